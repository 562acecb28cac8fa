"""The four operations of a store, and what happens when two writers meet."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from softlabel_schemas import InputError, open_dataset, verify
from softlabel_schemas.commit import committed_shards
from softlabel_schemas.object_store import TEMPORARY, ObjectStore
from tests.support.datasets import Written, write_dataset


def test_put_if_absent_creates_once(store: ObjectStore) -> None:
    assert store.put_if_absent("commits/0", b"first")
    assert not store.put_if_absent("commits/0", b"second")
    assert store.read("commits/0") == b"first"


def test_put_replaces(store: ObjectStore) -> None:
    store.put("a/b", b"first")
    store.put("a/b", b"second")
    assert store.read("a/b") == b"second"
    assert list(store.list("")) == ["a/b"]


def test_what_is_missing(store: ObjectStore) -> None:
    assert not store.exists("a")
    assert store.list("a") == {}
    with pytest.raises(FileNotFoundError, match=f"{store.url}/a does not exist"):
        store.read("a")
    store.put("b", b"")
    with pytest.raises(FileNotFoundError):
        store.read_many(["b", "a"])


def test_read_many_keeps_the_order(store: ObjectStore) -> None:
    keys = [f"k/{index}" for index in range(40)]
    for key in keys:
        store.put(key, key.encode())
    assert store.read_many(keys[::-1]) == [key.encode() for key in keys[::-1]]


def test_leftovers_of_killed_writers_are_not_data(store: ObjectStore) -> None:
    store.put(f"commits/000000.json{TEMPORARY}1234", b"half")
    store.put("commits/000001.json", b"{}")
    assert list(store.list("")) == ["commits/000001.json"]
    assert committed_shards(store) == {1}


def test_too_much_for_a_conditional_write(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softlabel_schemas.object_store._MAX_CONDITIONAL_BYTES", 10)
    assert store.put_if_absent("b", bytes(10))
    with pytest.raises(ValueError, match="too many for a conditional write"):
        store.put_if_absent("a", bytes(11))
    assert not store.exists("a")


def test_an_unknown_protocol() -> None:
    with pytest.raises(InputError, match="cannot use the URL nowhere://labels"):
        ObjectStore("nowhere://labels")


def test_exactly_one_writer_creates(tmp_path: Path) -> None:
    store = ObjectStore(tmp_path)
    for attempt in range(50):
        contents = [f"{attempt} by {writer}".encode() for writer in range(4)]
        with ThreadPoolExecutor(max_workers=4) as pool:
            created = list(pool.map(lambda data, key=f"r/{attempt}": store.put_if_absent(key, data), contents))
        assert created.count(True) == 1
        assert store.read(f"r/{attempt}") == contents[created.index(True)]
    assert len(list(tmp_path.rglob("*"))) == 51


def test_two_jobs_publish_one_dataset(tmp_path: Path, shard_format: str) -> None:
    def job(_: int) -> Written:
        return write_dataset(str(tmp_path), shard_format=shard_format)

    with ThreadPoolExecutor(max_workers=2) as pool:
        first, second = pool.map(job, range(2))
    assert first.manifest == second.manifest
    assert all(problem == "" for _, problem in verify(open_dataset(tmp_path)))
    assert not [path for path in tmp_path.rglob("*") if TEMPORARY in path.name]


class RefusedError(Exception):
    def __init__(self, response: dict[str, object]) -> None:
        self.response = response


@pytest.mark.parametrize(
    "response", [{"ResponseMetadata": {"HTTPStatusCode": 412}}, {"Error": {"Code": "PreconditionFailed"}}]
)
def test_a_412_behind_an_os_error_means_that_the_object_exists(
    new_url: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, response: dict[str, object]
) -> None:
    """Ceph's answer to a conditional PUT, as s3fs passes it on."""
    store = ObjectStore(new_url("memory"))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(22, "Invalid argument") from RefusedError(response)

    monkeypatch.setattr(store._fs, "pipe_file", refuse)
    assert not store.put_if_absent("a", b"")


def test_another_os_error_is_raised(new_url: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    store = ObjectStore(new_url("memory"))

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store._fs, "pipe_file", fail)
    with pytest.raises(OSError, match="No space left"):
        store.put_if_absent("a", b"")
