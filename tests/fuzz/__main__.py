"""Runs cases in worker processes and prints one JSON line; exits with 1 on any failure."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# Cases per worker: a process start is 3 s, and the first one compiles for 10 s; a worker that died is repeated up to its last
# case.
BLOCK = 20_000
# Without an end of the block; beside the worker's own limit of CPU time per case.
STALLED_SECONDS = 1800
_NOT_BEGUN = b"\xff" * 8


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first case, to go on with a run")
    parser.add_argument("--jobs", type=int, default=1, help="worker processes")
    parser.add_argument("--case", type=int, help="run this case alone, here, without limits, and let its error be seen")
    arguments = parser.parse_args()
    if arguments.case is not None:
        with tempfile.TemporaryDirectory() as numba_cache:
            os.environ.update(index_checks(numba_cache))
            from tests.fuzz.targets import run_case, target_of

            print(target_of(arguments.case), run_case(arguments.seed, arguments.case))
        return
    result = fuzz(seed=arguments.seed, first=arguments.first, cases=arguments.cases, jobs=arguments.jobs)
    print(json.dumps(result))
    sys.exit(1 if result["failures"] else 0)


def fuzz(*, seed: int, first: int, cases: int, jobs: int) -> dict[str, Any]:
    """Run cases ``first`` to ``first + cases - 1``."""
    started = time.monotonic()
    size = min(BLOCK, -(-cases // jobs))
    blocks = [range(start, min(start + size, first + cases)) for start in range(first, first + cases, size)]
    outcomes: dict[str, Counter[str]] = {}
    failures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as numba_cache, ThreadPoolExecutor(max_workers=jobs) as pool:
        environment = os.environ | index_checks(numba_cache)
        results = pool.map(lambda block: run_block(seed, block, environment=environment), blocks)
        for done, result in enumerate(results, start=1):
            for target, counts in result["outcomes"].items():
                outcomes.setdefault(target, Counter()).update(counts)
            failures += result["failures"]
            print(f"{done} of {len(blocks)} blocks, {len(failures)} failures", file=sys.stderr, flush=True)
    return {
        "seed": seed,
        "first": first,
        "cases": cases,
        "seconds": round(time.monotonic() - started),
        "cases_by_target": {target: counts.total() for target, counts in sorted(outcomes.items())},
        "outcomes": {target: dict(sorted(counts.items())) for target, counts in sorted(outcomes.items())},
        "failures": failures,
    }


def index_checks(numba_cache: str) -> dict[str, str]:
    """Environment in which compiled loops check every index.

    Numba does not tell code with checks from code without when it looks into its cache, so this one is a folder of its own.
    """
    return {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": numba_cache}


def run_block(
    seed: int,
    numbers: range,
    worker: Sequence[str] = ("-m", "tests.fuzz.worker"),
    environment: Mapping[str, str] = os.environ,
) -> dict[str, Any]:
    """The cases in a worker; behind a case that kills it, in another one. ``worker``: what Python is started with."""
    outcomes: dict[str, Counter[str]] = {}
    failures: list[dict[str, Any]] = []
    pending = [numbers]
    while pending:
        block = pending.pop()
        result, died_at, reason = _run_worker(seed, block, worker, environment)
        if result is None:
            # Its counts are lost: the cases before are run again, to be counted.
            failures.append({"case": died_at, "target": "worker", "problem": reason})
            outcomes.setdefault("worker", Counter())["FAILED"] += 1
            rest = [range(block.start, died_at), range(died_at + 1, block.stop)]
            pending += [part for part in reversed(rest) if part]
            continue
        for target, counts in result["outcomes"].items():
            outcomes.setdefault(target, Counter()).update(counts)
        failures += result["failures"]
    return {"outcomes": outcomes, "failures": failures}


def _run_worker(
    seed: int, block: range, worker: Sequence[str], environment: Mapping[str, str]
) -> tuple[dict[str, Any] | None, int, str]:
    with tempfile.NamedTemporaryFile() as note:
        note.write(_NOT_BEGUN)
        note.flush()
        arguments = {"--seed": seed, "--first": block.start, "--cases": len(block), "--note": note.name}
        command = [sys.executable, *worker]
        command += [str(part) for item in arguments.items() for part in item]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=STALLED_SECONDS, check=False, env=environment
            )
        except subprocess.TimeoutExpired:
            reason = f"no end after {STALLED_SECONDS} s"
        else:
            if done.returncode == 0:
                result: dict[str, Any] = json.loads(done.stdout)
                return result, block.stop, ""
            signal_name = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit {done.returncode}"
            reason = f"the worker died of {signal_name}: {done.stderr[-1500:]}"
        number = Path(note.name).read_bytes()
        if number == _NOT_BEGUN:
            raise RuntimeError(f"before its first case {reason}")
        return None, int.from_bytes(number, "little"), reason


if __name__ == "__main__":
    main()
