"""A process that runs cases under limits; started by ``python -m tests.fuzz``.

Its own death is a finding, so it notes the number of each case in a file before it begins it. When it ends it prints one JSON
line: outcomes by target, and failures.
"""

from __future__ import annotations

import argparse
import json
import mmap
import resource
import signal
import sys
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from tests.fuzz.targets import run_case, target_of, warm_up

# Beyond what the worker has after its warm-up: 64 MiB may be decompressed (limits.py), and decoding takes some fifteen times
# as much as it reads.
MEMORY_BYTES = 1536 << 20
CPU_SECONDS = 5.0
# Of the interpreter's audit events, what no reader of memory:// has a reason to do.
FORBIDDEN = (
    "open", "import", "exec", "compile", "os.", "shutil.", "subprocess.", "socket.", "ctypes.", "marshal.", "pickle.",
    "tempfile.", "glob.", "code.__new__", "urllib.", "webbrowser.",
)  # fmt: skip


class Watch:
    """Notes forbidden events while a case runs."""

    def __init__(self) -> None:
        self.active = False
        self.events: list[str] = []
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.active and event.startswith(FORBIDDEN):
            self.events.append(f"{event} {arguments!r:.200}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--first", type=int, required=True)
    parser.add_argument("--cases", type=int, required=True)
    parser.add_argument("--note", required=True, help="file that holds the number of the case under way")
    arguments = parser.parse_args()
    warnings.simplefilter("error")
    warm_up()
    with Path(arguments.note).open("r+b") as file, mmap.mmap(file.fileno(), 8) as note:
        print(json.dumps(run(arguments.seed, range(arguments.first, arguments.first + arguments.cases), note)))


def run(seed: int, numbers: range, note: mmap.mmap) -> dict[str, Any]:
    watch = Watch()
    limit = _memory_in_use() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Ends the process, even within C code: the parent reports the case and goes on behind it.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    outcomes: dict[str, Counter[str]] = {}
    failures: list[dict[str, Any]] = []
    for number in numbers:
        note[:] = number.to_bytes(8, "little")
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        watch.events.clear()
        watch.active = True
        try:
            outcome, problem = run_case(seed, number), ""
        except Exception as error:  # noqa: BLE001  # any of them is a finding
            outcome, problem = f"FAILED {type(error).__name__}", traceback.format_exc(limit=-4)
        watch.active = False
        if watch.events and not problem:
            outcome, problem = "FAILED event", watch.events[0]
        target = target_of(number)
        outcomes.setdefault(target, Counter())[outcome] += 1
        if problem:
            failures.append({"case": number, "target": target, "problem": problem[-2000:]})
    signal.setitimer(signal.ITIMER_PROF, 0)
    return {"outcomes": outcomes, "failures": failures}


def _memory_in_use() -> int:
    """Bytes of address space."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    main()
