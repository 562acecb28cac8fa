"""SIGKILL at random moments of the commit protocol itself: begin, shard files, commit records, publish.

Writers are forked from a server, so that a kill costs milliseconds and lands inside a write more often than not.
"""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from softlabel_schemas.commit import begin, committed_shards, publish
from softlabel_schemas.dataset import open_dataset
from softlabel_schemas.errors import InputError
from softlabel_schemas.layout import MANIFEST
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.verification import verify
from tests.support.datasets import INVENTORY, SHARD_FORMATS, Row, commit_rows, cut_evenly, make_document, random_rows
from tests.support.trees import tree

NUM_KILLS = 25
NUM_SHARDS = 12


def write_what_is_missing(folder: Path, shard_format: str, rows: tuple[Row, ...]) -> None:
    store = ObjectStore(folder)
    document = make_document(len(rows), shard_format=shard_format, codec="packed-u8", num_shards=NUM_SHARDS)
    begin(store, document, INVENTORY)
    done = committed_shards(store)
    for shard_range in cut_evenly(len(rows), NUM_SHARDS):
        if shard_range.index not in done:
            commit_rows(store, document, shard_range, rows)
    publish(store, document)


# A fork server, not os.fork(): it has imported everything and started no thread or event loop that a child would lack.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["softlabel_schemas", "tests.support.datasets"])


def start_writer(folder: Path, shard_format: str, rows: tuple[Row, ...]) -> BaseProcess:
    process = PROCESSES.Process(target=write_what_is_missing, args=(folder, shard_format, rows))
    process.start()
    return process


def write_in_peace(folder: Path, shard_format: str, rows: tuple[Row, ...]) -> float:
    started = time.monotonic()
    writer = start_writer(folder, shard_format, rows)
    writer.join()
    assert writer.exitcode == 0
    return time.monotonic() - started


@pytest.mark.parametrize("shard_format", SHARD_FORMATS)
def test_killed_writers_leave_a_destination_that_resumes_to_the_same_bytes(tmp_path: Path, shard_format: str) -> None:
    rows = random_rows(seed=5, num_rows=60)
    reference = tmp_path / "reference"
    full_seconds = min(
        write_in_peace(reference, shard_format, rows), write_in_peace(tmp_path / "again", shard_format, rows)
    )
    rng = random.Random(762)
    kills, round_number = 0, 0
    folder = tmp_path / "killed-0"
    while kills < NUM_KILLS:
        writer = start_writer(folder, shard_format, rows)
        writer.join(rng.uniform(0, full_seconds))
        writer.kill()
        writer.join()
        if writer.exitcode == -signal.SIGKILL:
            kills += 1
            if not (folder / MANIFEST).exists():
                with pytest.raises(InputError, match=r"manifest\.json does not exist"):
                    open_dataset(folder)
        if (folder / MANIFEST).exists():
            assert tree(folder) == tree(reference)
            round_number += 1
            folder = tmp_path / f"killed-{round_number}"
    write_in_peace(folder, shard_format, rows)
    assert tree(folder) == tree(reference)
    assert [problem for _, problem in verify(open_dataset(folder)) if problem] == []


@pytest.mark.parametrize("shard_format", SHARD_FORMATS)
def test_writers_racing_publish_once(tmp_path: Path, shard_format: str) -> None:
    rows = random_rows(seed=6, num_rows=40)
    write_in_peace(tmp_path / "alone", shard_format, rows)
    writers = [start_writer(tmp_path / "raced", shard_format, rows) for _ in range(3)]
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert tree(tmp_path / "raced") == tree(tmp_path / "alone")
