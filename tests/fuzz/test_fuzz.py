"""A short run of the fuzzer, and that it would notice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from softlabel_schemas import zarr_shard
from tests.fuzz import targets
from tests.fuzz.__main__ import index_checks, run_block

CASES = 4000


def test_a_short_run_finds_nothing() -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--cases", str(CASES), "--seed", "2019"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    result = json.loads(done.stdout)
    assert result["failures"] == []
    assert done.returncode == 0
    assert result["cases_by_target"] == {name: CASES * share // 100 for name, share in sorted(targets.SHARES.items())}
    # Of each target some cases are refused and some get through to the checks behind.
    for target, outcomes in result["outcomes"].items():
        assert outcomes["accepted"] > 0, target
        assert len(outcomes) > 1, target


def test_a_case_is_a_function_of_seed_and_number() -> None:
    first, again = ([targets.run_case(3, number) for number in range(200)] for _ in range(2))
    assert first == again
    assert first != [targets.run_case(4, number) for number in range(200)]


def test_an_error_that_is_not_clean_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(files: object, streams: object, *, where: str) -> None:
        raise KeyError(where)

    monkeypatch.setattr(zarr_shard, "decode", careless)
    number = next(number for number in range(100) if targets.target_of(number) == "zarr")
    with pytest.raises(KeyError):
        targets.run_case(1, number)


# A worker whose cases do what no reader may.
SABOTEUR = """
import os, signal
from tests.fuzz import worker

def run_case(seed, number):
    if number == 11:
        os.kill(os.getpid(), signal.SIGSEGV)
    if number == 12:
        open("/dev/null").close()
    if number == 13:
        bytearray(8 << 30)
    if number == 14:
        import this_module_does_not_exist
    while number == 15:
        pass
    if number == 16:
        eval("1")
    return "accepted"

worker.run_case, worker.warm_up, worker.CPU_SECONDS = run_case, lambda: None, 0.5
worker.main()
"""


def test_the_worker_notices_what_no_reader_may_do() -> None:
    result = run_block(1, range(10, 20), ("-c", SABOTEUR))
    problems = {failure["case"]: failure["problem"] for failure in result["failures"]}
    expected = {
        11: "the worker died of SIGSEGV",
        12: "open ('/dev/null'",
        13: "MemoryError",
        14: "ModuleNotFoundError",
        15: "the worker died of SIGPROF",
        16: "compile",
    }
    assert problems.keys() == expected.keys()
    for number, problem in expected.items():
        assert problem in problems[number]
    assert sum(counts["accepted"] for counts in result["outcomes"].values()) == 4


# A worker whose cases look beyond an array, in compiled code.
BEYOND = """
import numpy as np
from softlabel_schemas.compiled import compiled
from tests.fuzz import worker

@compiled()
def look(values, index):
    return values[index]

worker.warm_up = lambda: look(np.zeros(3, np.uint8), np.int64(0))
worker.run_case = lambda seed, number: str(look(np.zeros(3, np.uint8), np.int64(number)))
worker.main()
"""


def test_the_worker_notices_an_index_out_of_bounds(tmp_path: Path) -> None:
    environment = os.environ | index_checks(str(tmp_path))
    result = run_block(1, range(2, 5), ("-c", BEYOND), environment)
    assert [failure["case"] for failure in result["failures"]] == [3, 4]
    assert all("IndexError: index is out of bounds" in failure["problem"] for failure in result["failures"])


def test_a_worker_that_does_not_start_is_no_finding() -> None:
    with pytest.raises(
        RuntimeError, match=r"before its first case the worker died of exit 1: (?s:.*)ZeroDivisionError"
    ):
        run_block(1, range(10), ("-c", "1 / 0"))
