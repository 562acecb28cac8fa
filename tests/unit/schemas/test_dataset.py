"""Reading a dataset: ahead and in order, in bounded memory, over transfers that go wrong, and in other processes."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from softlabel_schemas import IntegrityError, open_dataset, verify
from softlabel_schemas.cache import FileCache
from softlabel_schemas.commit import begin
from softlabel_schemas.dataset import SoftLabelDataset
from softlabel_schemas.object_store import ConditionalWriteError, ObjectStore
from softlabel_schemas.shard import ShardColumns
from tests.support.datasets import INVENTORY, SHARD_FORMATS, Written, random_rows, write_dataset
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.indices import requests
from tests.support.targets import assert_same_targets

NUM_SHARDS = 8
ROWS = random_rows(seed=2, num_rows=24)


@pytest.fixture(scope="module", params=SHARD_FORMATS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    url = str(tmp_path_factory.mktemp("dataset") / "labels")
    return write_dataset(url, shard_format=request.param, rows=ROWS, num_shards=NUM_SHARDS)


@pytest.fixture
def remote(written: Written, new_url: Callable[[str], str]) -> Written:
    url = new_url("memory")
    return write_dataset(url, shard_format=written.document.storage.shard_format, rows=ROWS, num_shards=NUM_SHARDS)


class Reads:
    """Counts the shards whose reading has begun."""

    def __init__(self, dataset: SoftLabelDataset, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[int] = []
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()
        self._read = dataset.shards.read_columns
        monkeypatch.setattr(dataset.shards, "read_columns", self)

    def __call__(self, index: int) -> tuple[dict[str, bytes], ShardColumns]:
        with self._lock:
            self.begun.append(index)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return self._read(index)
        finally:
            with self._lock:
                self.at_once -= 1


def reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


class TestReadingAhead:
    @pytest.mark.parametrize("num_parallel", [1, 2, 4, 20])
    def test_in_the_order_asked_for(self, written: Written, num_parallel: int) -> None:
        dataset = open_dataset(written.url)
        order = [5, 0, 5, 7, 2]
        found = [shard.utterance_ids for shard in dataset.iter_shards(order, num_parallel=num_parallel)]
        assert found == [dataset.read_shard(index).utterance_ids for index in order]
        assert reader_threads() == []

    @pytest.mark.parametrize("num_parallel", [1, 3])
    def test_only_so_far(self, written: Written, monkeypatch: pytest.MonkeyPatch, num_parallel: int) -> None:
        dataset = open_dataset(written.url)
        reads = Reads(dataset, monkeypatch)
        for done, _ in enumerate(dataset.iter_shards(num_parallel=num_parallel), start=1):
            assert len(reads.begun) <= done + num_parallel
        assert reads.begun == list(range(NUM_SHARDS))
        assert reads.most_at_once <= num_parallel

    def test_closing_it_ends_the_threads(self, written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
        dataset = open_dataset(written.url)
        reads = Reads(dataset, monkeypatch)
        shards = dataset.iter_shards(num_parallel=2)
        next(shards)
        assert len(reader_threads()) == 2
        shards.close()
        assert reader_threads() == []
        assert len(reads.begun) <= 3

    def test_an_error_comes_where_its_shard_would(self, remote: Written) -> None:
        store = ObjectStore(remote.url)
        record = remote.manifest.shards[3]
        store.delete([f"{record.folder}/{record.files[-1].name}"])
        shards = open_dataset(remote.url).iter_shards()
        assert [len(next(shards)) for _ in range(3)] == [s.num_utterances for s in remote.manifest.shards[:3]]
        with pytest.raises(IntegrityError, match=r"\(shard 3\): a file is missing"):
            next(shards)
        assert reader_threads() == []

    def test_of_no_shards(self, written: Written) -> None:
        assert list(open_dataset(written.url).iter_shards([])) == []

    def test_a_shard_that_is_not_there(self, written: Written) -> None:
        with pytest.raises(IndexError, match="shard 8 asked for, the dataset has 8"):
            list(open_dataset(written.url).iter_shards([0, 8]))


class TestUtterances:
    def test_in_the_order_of_their_ids(self, written: Written) -> None:
        expected = [written.utterances[index] for index in np.random.default_rng(0).permutation(20)]
        found = open_dataset(written.url).read_utterances([utterance.utterance_id for utterance in expected])
        assert [utterance.utterance_id for utterance in found] == [utterance.utterance_id for utterance in expected]
        by_id = {utterance.utterance_id: utterance for utterance in open_dataset(written.url)}
        for utterance in found:
            assert_same_targets(utterance.targets, by_id[utterance.utterance_id].targets)
            # Not a view, which would keep the whole shard in memory.
            assert utterance.targets.class_ids.base is None

    def test_each_shard_is_read_once(self, written: Written) -> None:
        dataset = open_dataset(written.url)
        ids = [utterance.utterance_id for utterance in dataset]
        with requests() as log:
            dataset.read_utterances([ids[-1], ids[0], ids[-2], ids[1], ids[0]])
        assert {key.split("/")[1][:6] for key in log if key.startswith("shards")} == {"000000", "000007"}
        assert max(Counter(log).values()) == 1

    def test_of_no_ids(self, written: Written) -> None:
        assert open_dataset(written.url).read_utterances([]) == []

    def test_one_that_was_skipped(self, written: Written) -> None:
        with pytest.raises(KeyError, match="utt-silent: it was skipped: its audio is empty"):
            open_dataset(written.url).read_utterances(["utt-ü0", "utt-silent"])


class TestVerify:
    def test_goes_on_after_a_bad_shard(self, remote: Written) -> None:
        store = ObjectStore(remote.url)
        for index in (1, 2, 6):
            record = remote.manifest.shards[index]
            store.put(f"{record.folder}/{record.files[0].name}", b"damaged")
        outcome = list(verify(open_dataset(remote.url)))
        assert [index for index, _ in outcome] == list(range(NUM_SHARDS))
        assert [index for index, problem in outcome if problem] == [1, 2, 6]

    def test_holds_few_shards(self, written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
        dataset = open_dataset(written.url)
        reads = Reads(dataset, monkeypatch)
        for done, (_, problem) in enumerate(verify(dataset), start=1):
            assert not problem
            assert len(reads.begun) <= done + 4

    def test_spec_and_inventory_are_both_reported(self, remote: Written) -> None:
        store = ObjectStore(remote.url)
        store.put("spec.json", b"{}")
        store.put("inventory.json", b"{}")
        problems = [problem for index, problem in verify(open_dataset(remote.url)) if index is None]
        assert len(problems) == 2
        assert "spec.json" in problems[0]
        assert "inventory.json" in problems[1]


def damage_transfers(monkeypatch: pytest.MonkeyPatch, damage: Callable[[str, int], bool]) -> list[str]:
    """Flip a bit of what the store returns where ``damage`` (key, how often it was read before) says so."""
    log: list[str] = []
    read = ObjectStore.read

    def damaged(self: ObjectStore, key: str, **limits: Any) -> bytes:
        data = read(self, key, **limits)
        before = log.count(key)
        log.append(key)
        return bytes([data[0] ^ 1]) + data[1:] if damage(key, before) else data

    monkeypatch.setattr(ObjectStore, "read", damaged)
    return log


class TestTransfers:
    def test_each_damaged_once_does_no_harm(self, remote: Written, monkeypatch: pytest.MonkeyPatch) -> None:
        log = damage_transfers(monkeypatch, lambda _, before: before == 0)
        dataset = open_dataset(remote.url)
        assert [problem for _, problem in verify(dataset) if problem] == []
        assert {log.count(key) for key in ("manifest.json", "spec.json", "inventory.json", "commits/000000.json")} == {
            2
        }

    def test_damage_that_stays_is_an_error(self, remote: Written, monkeypatch: pytest.MonkeyPatch) -> None:
        victim = f"{remote.manifest.shards[2].folder}/{remote.manifest.shards[2].files[0].name}"
        log = damage_transfers(monkeypatch, lambda key, _: key == victim)
        dataset = open_dataset(remote.url)
        with pytest.raises(IntegrityError, match=r"\(shard 2\): .* was changed after writing: expected \d+ bytes"):
            dataset.read_shard(2)
        assert log.count(victim) == 2

    def test_a_local_disk_is_read_once(self, written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
        log = damage_transfers(monkeypatch, lambda key, _: key.startswith("shards/"))
        with pytest.raises(IntegrityError, match="was changed after writing"):
            open_dataset(written.url).read_shard(0)
        assert {log.count(key) for key in log} == {1}

    def test_a_file_larger_than_declared_is_not_read(self, remote: Written) -> None:
        store, record = ObjectStore(remote.url), remote.manifest.shards[1]
        key = f"{record.folder}/{record.files[0].name}"
        store.put(key, store.read(key) + bytes(1 << 20))
        with pytest.raises(IntegrityError, match=rf"\(shard 1\): .*{record.files[0].num_bytes} bytes"):
            open_dataset(remote.url).read_shard(1)

    def test_over_a_flaky_server(
        self, written: Written, new_url: Callable[[str], str], s3: Any, tmp_path: Path
    ) -> None:
        url = new_url("s3")
        there = write_dataset(url, shard_format=written.document.storage.shard_format, rows=ROWS, num_shards=NUM_SHARDS)
        with FaultProxy(s3.endpoint, share=0.2, seed=3) as proxy:
            options = {"client_kwargs": {"endpoint_url": proxy.endpoint}}
            dataset = open_dataset(url, options, cache=FileCache(tmp_path, 1 << 20))
            assert [problem for _, problem in verify(dataset) if problem] == []
            assert dataset.manifest == there.manifest
            assert [str(utterance) for utterance in dataset] == [str(u) for u in open_dataset(written.url)]
            counts = proxy.counts()
        assert counts.get(Fault.TRUNCATED_BODY, 0) > 0
        assert sum(counts.values()) > 4


# Other processes. A plain fork would take over locks that threads of the parent hold: Python itself advises against it.


def count_utterances(url: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    sys.exit(sum(1 for _ in open_dataset(url)))


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
@pytest.mark.parametrize("store", ["local", "s3"])
def test_reading_in_processes_that_start_while_this_one_reads(
    new_url: Callable[[str], str], start_method: str, store: str
) -> None:
    url = new_url(store)
    written = write_dataset(url, shard_format="parquet", rows=ROWS, num_shards=NUM_SHARDS)
    context = multiprocessing.get_context(start_method)
    shards = open_dataset(url).iter_shards()
    next(shards)
    # A fork server that another test started has the environment of that time.
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    processes = [context.Process(target=count_utterances, args=(url, environment)) for _ in range(2)]
    for process in processes:
        process.start()
    assert sum(1 for _ in shards) == NUM_SHARDS - 1
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [len(written.utterances)] * 2


FORKING = """
import os, sys
from softlabel_schemas import open_dataset
dataset = open_dataset(sys.argv[1])
dataset.read_shard(0)
pid = os.fork()
# The child has the parent's connections and none of its threads.
number = sum(1 for _ in dataset)
if pid == 0:
    os._exit(number)
_, status = os.waitpid(pid, 0)
print(number, os.waitstatus_to_exitcode(status))
"""


def test_who_joins_replaces_nothing(remote: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    """With another ``on_error``, at a server that ignores the condition, where that is found out by creating again."""
    of_memory = MemoryFileSystem.pipe_file

    def replacing(self: MemoryFileSystem, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> Any:
        return of_memory(self, path, value, mode="overwrite", **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", replacing)
    store, storage = ObjectStore(remote.url), remote.document.storage
    before = store.read("spec.json")
    other = remote.document.model_copy(update={"storage": storage.model_copy(update={"on_error": "fail"})})
    with pytest.raises(ConditionalWriteError, match=r"it replaced spec\.json"):
        begin(store, other, INVENTORY)
    assert store.read("spec.json") == before


def test_a_dataset_that_is_carried_across_a_fork(new_url: Callable[[str], str]) -> None:
    """As into the workers of a torch DataLoader."""
    url = new_url("s3")
    number = len(write_dataset(url, shard_format="parquet", rows=ROWS, num_shards=NUM_SHARDS).utterances)
    done = subprocess.run([sys.executable, "-c", FORKING, url], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == [str(number), str(number)], done.stderr
