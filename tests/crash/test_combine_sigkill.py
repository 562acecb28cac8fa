"""SIGKILL at random moments of ``softlabels combine``: never a dataset that is half made, and the same one in the end."""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from softlabel_schemas.cli import main
from softlabel_schemas.dataset import open_dataset
from softlabel_schemas.errors import InputError
from softlabel_schemas.layout import MANIFEST
from softlabel_schemas.verification import verify
from tests.support.members import NUM_ROWS, member_rows, write_member
from tests.support.trees import tree

NUM_KILLS = 12
# As in test_commit_sigkill.py: a kill costs milliseconds then.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["softlabel_schemas.cli", "tests.support.members"])


def combine(urls: Sequence[str], output: Path) -> None:
    main(["combine", *urls, "--weights", "1,3", "--top-k", "6", "--output", str(output)])


def start(urls: Sequence[str], output: Path) -> BaseProcess:
    process = PROCESSES.Process(target=combine, args=(urls, output))
    process.start()
    return process


def combine_in_peace(urls: Sequence[str], output: Path) -> float:
    started = time.monotonic()
    process = start(urls, output)
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - started


def test_killed_and_run_again_it_makes_the_same_dataset(tmp_path: Path) -> None:
    # A shard for each utterance; both inputs skipped one.
    urls = [
        write_member(tmp_path / "tdnn", member_rows(1, skipped=[2]), num_shards=NUM_ROWS),
        write_member(tmp_path / "blstm", member_rows(2, skipped=[7]), name="blstm", num_shards=2),
    ]
    reference = tmp_path / "reference"
    full_seconds = min(combine_in_peace(urls, reference), combine_in_peace(urls, tmp_path / "again"))
    digest = open_dataset(reference).manifest.content_digest
    rng = random.Random(762)
    kills = datasets = 0
    output = tmp_path / "killed-0"
    while kills < NUM_KILLS or not (output / MANIFEST).exists():
        process = start(urls, output)
        if kills < NUM_KILLS:
            process.join(rng.uniform(0, full_seconds))
            process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        kills += process.exitcode == -signal.SIGKILL
        if not (output / MANIFEST).exists():
            with pytest.raises(InputError, match=r"manifest\.json does not exist"):
                open_dataset(output)
            continue
        made = open_dataset(output)
        assert made.manifest.content_digest == digest
        assert tree(output) == tree(reference)
        assert [problem for _, problem in verify(made) if problem] == []
        datasets += 1
        if kills < NUM_KILLS:
            output = tmp_path / f"killed-{datasets}"
    assert datasets > 0
