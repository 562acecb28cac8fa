"""The file cache: never wrong data, never an error, never above its size; also with many processes on one folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import multiprocessing
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from softlabel_schemas import InputError, open_dataset, verify
from softlabel_schemas.cache import FileCache
from softlabel_schemas.local_files import TEMPORARY
from softlabel_schemas.object_store import ObjectStore
from tests.support.datasets import SHARD_FORMATS, write_dataset

KILOBYTE = 1000


def content(index: int, num_bytes: int = KILOBYTE) -> tuple[str, bytes]:
    data = random.Random(index).randbytes(num_bytes)
    return hashlib.sha256(data).hexdigest(), data


def files(cache: FileCache) -> dict[str, Path]:
    return {path.name: path for path in cache.folder.glob("??/*")}


def used(cache: FileCache) -> int:
    """Bytes of all files at one moment: while the lock is held none is added."""
    total = 0
    cache.folder.mkdir(exist_ok=True)
    with cache._locked():
        for path in cache.folder.glob("??/*"):
            # A damaged one may be dropped meanwhile.
            with contextlib.suppress(FileNotFoundError):
                total += path.stat().st_size if TEMPORARY not in path.name else 0
    return total


class TestKeeping:
    def test_what_was_put_is_found(self, tmp_path: Path) -> None:
        cache = FileCache(tmp_path / "new" / "cache", 10 * KILOBYTE)
        digest, data = content(0)
        assert cache.get(digest, len(data)) is None
        cache.put(digest, data)
        cache.put(digest, data)
        assert cache.get(digest, len(data)) == data
        assert FileCache(cache.folder, 1).get(digest, len(data)) == data
        assert list(files(cache)) == [digest]

    @pytest.mark.parametrize("damage", ["flipped", "shorter", "longer", "empty"])
    def test_a_damaged_file_is_dropped(self, tmp_path: Path, damage: str) -> None:
        cache = FileCache(tmp_path, 10 * KILOBYTE)
        digest, data = content(0)
        cache.put(digest, data)
        flipped = bytes([data[0] ^ 1]) + data[1:]
        damaged = {"flipped": flipped, "shorter": data[:-1], "longer": data + b"0", "empty": b""}[damage]
        files(cache)[digest].write_bytes(damaged)
        assert cache.get(digest, len(data)) is None
        assert files(cache) == {}
        cache.put(digest, data)
        assert cache.get(digest, len(data)) == data

    def test_a_file_larger_than_the_cache_is_not_kept(self, tmp_path: Path) -> None:
        cache = FileCache(tmp_path, KILOBYTE)
        small, large = content(0), content(1, KILOBYTE + 1)
        cache.put(*small)
        cache.put(*large)
        assert list(files(cache)) == [small[0]]
        assert cache.get(large[0], len(large[1])) is None

    @pytest.mark.parametrize("max_bytes", [0, -1])
    def test_no_room_at_all(self, tmp_path: Path, max_bytes: int) -> None:
        with pytest.raises(InputError, match="a cache needs a positive number of bytes"):
            FileCache(tmp_path, max_bytes)

    def test_a_url(self) -> None:
        with pytest.raises(InputError, match="must be a local folder, found s3://bucket/cache"):
            FileCache("s3://bucket/cache", 1)


class TestEviction:
    def test_the_least_recently_used_go(self, tmp_path: Path) -> None:
        cache = FileCache(tmp_path, 8 * KILOBYTE)
        contents = [content(index) for index in range(9)]
        for age, (digest, data) in enumerate(contents[:8]):
            cache.put(digest, data)
            os.utime(files(cache)[digest], (0, 1000 + age))
        assert len(files(cache)) == 8
        # The two oldest are used again.
        for digest, data in contents[:2]:
            assert cache.get(digest, len(data)) == data
        cache.put(*contents[8])
        # Room for the new one, and for one more.
        assert set(files(cache)) == {digest for digest, _ in (*contents[:2], *contents[4:])}

    def test_its_size_is_never_above_the_limit(self, tmp_path: Path) -> None:
        cache, rng = FileCache(tmp_path, 10 * KILOBYTE), random.Random(0)
        for index in range(300):
            digest, data = content(index, rng.randrange(1, 4 * KILOBYTE))
            cache.put(digest, data)
            assert used(cache) <= cache.max_bytes
            assert cache.get(digest, len(data)) == data

    @pytest.mark.parametrize("count", [b"", b"damaged", b"-5", b"9" * 30])
    def test_a_lost_count_is_found_again(self, tmp_path: Path, count: bytes) -> None:
        cache = FileCache(tmp_path, 10 * KILOBYTE)
        for index in range(5):
            cache.put(*content(index))
        (tmp_path / "lock").write_bytes(count)
        for index in range(5, 20):
            cache.put(*content(index))
            assert used(cache) <= cache.max_bytes
        assert len(files(cache)) > 5

    def test_leftovers_of_killed_processes_go_and_foreign_files_stay(self, tmp_path: Path) -> None:
        cache = FileCache(tmp_path, 3 * KILOBYTE)
        digest, _ = content(0)
        cache.put(*content(0))
        folder = files(cache)[digest].parent
        old, young = (folder / f"{digest}{TEMPORARY}{letter * 32}" for letter in "ab")
        foreign = folder / "notes.txt"
        for path in (old, young, foreign):
            path.write_bytes(b"half")
        os.utime(old, (0, 0))
        for index in range(1, 8):
            cache.put(*content(index))
        assert not old.exists()
        assert young.exists()
        assert foreign.exists()


class TestDegrading:
    """Each error is the operating system's own; root may write anywhere, so no permission is taken away."""

    def test_a_folder_that_cannot_be_made(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        (tmp_path / "file").write_bytes(b"")
        cache = FileCache(tmp_path / "file" / "cache", 10 * KILOBYTE)
        for index in range(3):
            digest, data = content(index)
            cache.put(digest, data)
            assert cache.get(digest, len(data)) is None
        (warning,) = caplog.records
        assert warning.levelno == logging.WARNING
        assert warning.getMessage().startswith(f"nothing more is added to the cache {tmp_path}/file/cache: ")

    def test_a_full_disk(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache = FileCache(tmp_path, 10 * KILOBYTE)
        cache.put(*content(0))
        write_bytes = Path.write_bytes

        def fill_up(self: Path, data: bytes) -> None:
            write_bytes(self, data[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(Path, "write_bytes", fill_up)
        cache.put(*content(1))
        cache.put(*content(2))
        assert len(caplog.records) == 1
        assert "No space left on device" in caplog.text
        digest, data = content(0)
        assert cache.get(digest, len(data)) == data
        assert list(files(cache)) == [digest]


@pytest.mark.parametrize("shard_format", SHARD_FORMATS)
class TestDataset:
    def test_files_are_fetched_once(
        self, tmp_path: Path, new_url: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, shard_format: str
    ) -> None:
        written = write_dataset(new_url("memory"), shard_format=shard_format)
        fetched: list[str] = []
        read_many = ObjectStore.read_many

        def counting(self: ObjectStore, keys: list[str], **limits: Any) -> list[bytes]:
            fetched.extend(keys)
            return read_many(self, keys, **limits)

        monkeypatch.setattr(ObjectStore, "read_many", counting)
        plain = list(open_dataset(written.url))
        cache = FileCache(tmp_path, 1 << 20)
        for _ in range(2):
            fetched.clear()
            found = list(open_dataset(written.url, cache=cache))
            assert [str(utterance) for utterance in found] == [str(utterance) for utterance in plain]
        assert fetched == []
        # Of a file that no two shards share, as some metadata of Zarr are.
        record = written.manifest.shards[1]
        file = max(record.files, key=lambda file: (file.name.endswith(("parquet", "log_probs/c/0")), file.name))
        victim = files(cache)[file.sha256]
        victim.write_bytes(victim.read_bytes()[::-1])
        assert [problem for _, problem in verify(open_dataset(written.url, cache=cache)) if problem] == []
        assert [key for key in fetched if key.startswith("shards/")] == [f"{record.folder}/{file.name}"]

    def test_a_cache_too_small_for_anything(
        self, tmp_path: Path, new_url: Callable[[str], str], shard_format: str
    ) -> None:
        written = write_dataset(new_url("memory"), shard_format=shard_format)
        dataset = open_dataset(written.url, cache=FileCache(tmp_path, 1))
        assert [utterance.utterance_id for utterance in dataset] == [u.utterance_id for u in written.utterances]
        assert list(tmp_path.iterdir()) == []


# Many processes

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["softlabel_schemas.cache"])
NUM_CONTENTS = 40


def hammer(folder: Path, max_bytes: int, seed: int, seconds: float) -> None:
    """Read and write, and damage what is there now and then; any wrong byte or error ends the process with code 1."""
    cache, rng = FileCache(folder, max_bytes), random.Random(seed)
    contents = [content(index, 500 + 37 * index) for index in range(NUM_CONTENTS)]
    hits, end = 0, time.monotonic() + seconds
    while time.monotonic() < end or hits == 0:
        digest, data = rng.choice(contents)
        found = cache.get(digest, len(data))
        assert found is None or found == data
        hits += found is not None
        if found is None:
            cache.put(digest, data)
        if rng.random() < 0.01 and (path := cache._path(digest)).exists():
            # Evicted since.
            with contextlib.suppress(FileNotFoundError), path.open("r+b") as file:
                file.write(b"damage")
        assert cache._writable


def test_processes_that_hammer_one_small_cache_and_are_killed(tmp_path: Path) -> None:
    max_bytes, rng = 12 * KILOBYTE, random.Random(762)
    cache = FileCache(tmp_path, max_bytes)
    workers = [PROCESSES.Process(target=hammer, args=(tmp_path, max_bytes, seed, 3.0)) for seed in range(6)]
    for worker in workers:
        worker.start()
    victims, checks = workers[:2], 0
    while any(worker.is_alive() for worker in workers):
        assert used(cache) <= max_bytes
        checks += 1
        if victims and checks > 50 and rng.random() < 0.01:
            victims.pop().kill()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers[2:]] == [0] * 4
    # Those that were killed hold no lock and have not lost count.
    for index in range(NUM_CONTENTS, 2 * NUM_CONTENTS):
        digest, data = content(index)
        cache.put(digest, data)
        assert cache.get(digest, len(data)) == data
        assert used(cache) <= max_bytes
