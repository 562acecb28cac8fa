"""The operations of a store, and what happens when writers meet."""

from __future__ import annotations

import errno
import importlib
import os
import pickle  # noqa: TID251  What Ray does to exceptions; nothing is stored.
import pkgutil
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem

import softlabel_schemas
import student_trainer
import teacher_service
from softlabel_schemas import InputError, IntegrityError, open_dataset, verify
from softlabel_schemas.commit import begin, committed_shards
from softlabel_schemas.local_files import TEMPORARY
from softlabel_schemas.object_store import ConditionalWriteError, ObjectStore, StoredObject, refuse_credentials
from softlabel_schemas.parquet_file import SchemaError
from tests.support.datasets import (
    INVENTORY,
    Written,
    commit_rows,
    cut_evenly,
    make_document,
    random_rows,
    write_dataset,
)

# No two clocks of a test and its server are further apart; object stores round times to seconds.
CLOCK_TOLERANCE = timedelta(minutes=10)


def fill(store: ObjectStore, num_objects: int) -> dict[str, bytes]:
    """Objects whose sizes differ, written one by one."""
    objects = {f"k/{index:02d}": bytes([index]) * index for index in range(num_objects)}
    for key, data in objects.items():
        store.put(key, data)
    return objects


def test_put_if_absent_creates_once(store: ObjectStore) -> None:
    assert store.put_if_absent("commits/0", b"first")
    assert not store.put_if_absent("commits/0", b"second")
    assert store.read("commits/0") == b"first"


def test_put_replaces(store: ObjectStore) -> None:
    store.put("a/b", b"first")
    store.put("a/b", b"second")
    assert store.read("a/b") == b"second"
    assert list(store.list("")) == ["a/b"]


def test_put_many_puts_each(store: ObjectStore) -> None:
    store.put("k/00", b"replaced")
    objects = {f"k/{index:02d}": bytes([index]) * index for index in range(40)}
    store.put_many(objects)
    assert store.list("").keys() == objects.keys()
    assert store.read_many(list(objects)) == list(objects.values())


def test_what_is_missing(store: ObjectStore) -> None:
    assert not store.exists("a")
    assert store.list("a") == {}
    message = f"{store.url}/a does not exist"
    for ask in (
        lambda: store.read("a"),
        lambda: store.read("a", max_bytes=10),
        lambda: store.read_range("a", 0, 10),
        lambda: store.size("a"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            ask()
    store.put("b", b"")
    with pytest.raises(FileNotFoundError, match=message):
        store.read_many(["b", "a"])


def test_a_folder_is_not_an_object(store: ObjectStore) -> None:
    store.put("a/b", b"data")
    for ask in (store.read, store.size):
        with pytest.raises(FileNotFoundError, match=f"{store.url}/a does not exist"):
            ask("a")


def test_read_many_keeps_the_order(store: ObjectStore) -> None:
    objects = fill(store, 40)
    keys = list(objects)[::-1]
    assert store.read_many(keys) == [objects[key] for key in keys]


@pytest.mark.parametrize("max_bytes", [0, 1, 99, 100, 101, 1 << 40])
def test_read_up_to_a_limit(store: ObjectStore, max_bytes: int) -> None:
    data = bytes(range(100))
    store.put("a", data)
    if max_bytes >= 100:
        assert store.read("a", max_bytes=max_bytes) == data
        return
    with pytest.raises(IntegrityError, match=rf"{store.url}/a has .*\b{max_bytes}\b"):
        store.read("a", max_bytes=max_bytes)


def test_an_empty_object(store: ObjectStore) -> None:
    store.put("a", b"")
    assert store.read("a") == b""
    assert store.read("a", max_bytes=0) == b""
    assert store.read("a", max_bytes=10) == b""
    assert store.read_range("a", 0, 10) == b""
    assert store.size("a") == 0


def test_read_many_has_one_limit_per_key(store: ObjectStore) -> None:
    objects = fill(store, 20)
    exact = [len(data) for data in objects.values()]
    assert store.read_many(list(objects), max_bytes=exact) == list(objects.values())
    exact[7] -= 1
    with pytest.raises(IntegrityError, match=f"{store.url}/k/07"):
        store.read_many(list(objects), max_bytes=exact)


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 100), (0, 1), (99, 100), (20, 60), (50, 50), (50, 1000), (100, 101), (200, 300)]
)
def test_read_range(store: ObjectStore, start: int, stop: int) -> None:
    data = bytes(range(100))
    store.put("a", data)
    assert store.read_range("a", start, stop) == data[start:stop]


def test_size_is_that_of_now(store: ObjectStore) -> None:
    for num_bytes in (0, 1, 1 << 20, 5):
        store.put("a", bytes(num_bytes))
        assert store.size("a") == num_bytes


def test_list_tells_size_and_time(store: ObjectStore) -> None:
    before = datetime.now(UTC)
    objects = fill(store, 12)
    store.put("other", b"")
    found = store.list("k")
    assert list(found) == sorted(objects)
    for key, entry in found.items():
        assert isinstance(entry, StoredObject)
        assert entry.num_bytes == len(objects[key])
        assert abs(entry.modified - before) < CLOCK_TOLERANCE


def test_list_is_of_now(store: ObjectStore) -> None:
    """fsspec keeps listings; another writer's objects must be seen all the same."""
    other = ObjectStore(store.url)
    store.put("k/0", b"")
    assert list(store.list("k")) == ["k/0"]
    other.put("k/1", b"")
    assert list(store.list("k")) == ["k/0", "k/1"]
    other.delete(["k/0"])
    assert list(store.list("k")) == ["k/1"]
    assert not store.exists("k/0")


def test_children_are_what_lies_directly_there(store: ObjectStore) -> None:
    assert store.children("") == store.children("a") == ([], [])
    for key in ("b", "a/x/1", "a/x/2", "a/y/z/3", "a/4", "ab/5"):
        store.put(key, b"data")
    assert store.children("") == (["a", "ab"], ["b"])
    assert store.children("a") == (["x", "y"], ["4"])
    assert store.children("a/x") == ([], ["1", "2"])
    assert store.children("a/4")[0] == store.children("c")[0] == []


def test_list_more_than_one_page(store: ObjectStore) -> None:
    """S3 lists 1,000 objects at a time."""
    if store.is_local:
        pytest.skip("a local listing has no pages")
    keys = [f"k/{index:04d}" for index in range(1005)]
    store.put_many(dict.fromkeys(keys, b""))
    assert list(store.list("k")) == keys


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, commits that cannot be read would look as if no shard had been made."""
    store = ObjectStore(tmp_path / "labels")
    store.put_many({"commits/0": b"", "shards/0": b""})
    of_disk = LocalFileSystem.ls
    errors: dict[str, OSError] = {}

    def refusing(self: LocalFileSystem, path: str, *args: Any, **kwargs: Any) -> Any:
        """As a disk does, also to root, for whom permissions do not count."""
        for name, error in errors.items():
            if path.rstrip("/") == store.path(name):
                raise error
        return of_disk(self, path, *args, **kwargs)

    monkeypatch.setattr(LocalFileSystem, "ls", refusing)
    errors["commits"] = PermissionError(errno.EACCES, os.strerror(errno.EACCES), store.path("commits"))
    for prefix in ("", "commits"):
        with pytest.raises(PermissionError, match=re.escape(store.path("commits"))):
            store.list(prefix)
    assert list(store.list("shards")) == ["shards/0"]
    # One that another process has removed meanwhile is no error.
    errors["commits"] = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), store.path("commits"))
    assert list(store.list("")) == ["shards/0"]


def test_delete_passes_over_what_is_missing(store: ObjectStore) -> None:
    objects = fill(store, 20)
    store.put("k-other", b"stays")
    store.delete([*objects, "k/missing", "nowhere/missing"])
    assert list(store.list("")) == ["k-other"]
    store.delete([])
    assert store.put_if_absent("k/00", b"again")


def test_delete_removes_empty_folders(tmp_path: Path) -> None:
    store = ObjectStore(tmp_path / "labels")
    store.put_many({"shards/a/x/0": b"", "shards/a/y/0": b"", "shards/b/0": b""})
    store.delete(["shards/a/x/0", "shards/a/y/0"])
    assert sorted(path.name for path in (tmp_path / "labels" / "shards").iterdir()) == ["b"]
    store.delete(["shards/b/0"])
    assert list((tmp_path / "labels").iterdir()) == []


def test_leftovers_of_killed_writers_are_not_data(store: ObjectStore) -> None:
    leftover = f"commits/000000.json{TEMPORARY}1234"
    store.put(leftover, b"half")
    store.put("commits/000001.json", b"{}")
    assert list(store.list("")) == ["commits/000001.json"]
    assert committed_shards(store) == {1}
    assert list(store.list("", temporaries=True)) == [leftover, "commits/000001.json"]


def test_too_much_for_a_conditional_write(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softlabel_schemas.object_store.MAX_DOCUMENT_BYTES", 10)
    assert store.put_if_absent("b", bytes(10))
    with pytest.raises(
        InputError, match="11 bytes are too many for a conditional write, expected at most 10; fewer shards"
    ):
        store.put_if_absent("a", bytes(11))
    assert not store.exists("a")


@pytest.mark.parametrize(
    "url",
    [
        *("nowhere://labels", "reference://labels", "zip://labels", "generic://labels", "data:labels"),
        *("reference://::file:///refs", "simplecache::s3://bucket/labels", "a::b"),
    ],
)
def test_what_is_not_plain_storage(url: str) -> None:
    """Some protocols of fsspec act on what they read."""
    with pytest.raises(InputError, match=f"cannot use the URL {url}: expected a path, or one protocol of file, "):
        ObjectStore(url)


def test_exactly_one_writer_creates(store: ObjectStore) -> None:
    num_writers, num_races = 8, 50
    with ThreadPoolExecutor(max_workers=num_writers) as pool:
        for race in range(num_races):
            contents = [f"{race} by {writer}".encode() for writer in range(num_writers)]
            created = list(pool.map(lambda data, key=f"r/{race}": store.put_if_absent(key, data), contents))
            assert created.count(True) == 1
            assert store.read(f"r/{race}") == contents[created.index(True)]
    assert len(store.list("", temporaries=True)) == num_races


def test_last_writer_wins_looks_and_writes(new_url: Callable[[str], str]) -> None:
    """For servers without conditional writes: one writer after another still creates once."""
    store = ObjectStore(new_url("s3"), last_writer_wins=True)
    assert store.put_if_absent("a", b"first")
    assert not store.put_if_absent("a", b"second")
    assert store.read("a") == b"first"


def test_two_jobs_publish_one_dataset(store: ObjectStore, shard_format: str) -> None:
    def job(_: int) -> Written:
        return write_dataset(store.url, shard_format=shard_format)

    with ThreadPoolExecutor(max_workers=2) as pool:
        first, second = pool.map(job, range(2))
    assert first.manifest == second.manifest
    assert all(problem == "" for _, problem in verify(open_dataset(store.url)))
    assert store.list("", temporaries=True).keys() == store.list("").keys()


class RefusedError(Exception):
    def __init__(self, response: dict[str, object]) -> None:
        self.response = response


@pytest.mark.parametrize(
    "response", [{"ResponseMetadata": {"HTTPStatusCode": 412}}, {"Error": {"Code": "PreconditionFailed"}}]
)
def test_a_412_behind_an_os_error_means_that_the_object_exists(
    new_url: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, response: dict[str, object]
) -> None:
    """Ceph's answer to a conditional PUT, as some versions of s3fs pass it on."""
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


@pytest.mark.parametrize("last_writer_wins", [False, True])
def test_a_disk_without_hard_links_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last_writer_wins: bool
) -> None:
    """As FAT, some network file systems and mounted buckets answer."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    message = rf"{tmp_path}: .*Operation not permitted.* a file system with hard links; .* the bucket's own URL"
    for url in (str(tmp_path), f"file://{tmp_path}"):
        with pytest.raises(ConditionalWriteError, match=message) as caught:
            ObjectStore(url, last_writer_wins=last_writer_wins).put_if_absent("a", b"")
        # It would do nothing here.
        assert "accept_last_writer_wins" not in str(caught.value)
    assert "set accept_last_writer_wins = true" in str(ConditionalWriteError.because("s3://bucket", "no"))


@pytest.mark.parametrize("num_bytes", [0, 9, 10, 11, 20, 35])
def test_reads_in_pieces(store: ObjectStore, monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr("softlabel_schemas.object_store._PIECE_BYTES", 10)
    data = bytes(range(num_bytes))
    store.put("a", data)
    assert store.read("a") == data
    assert store.read("a", max_bytes=num_bytes) == data
    assert store.read("a", max_bytes=100) == data
    for start in (0, 5, 10):
        for stop in (5, 15, 20, 30, 35, 100):
            assert store.read_range("a", start, stop) == data[start:stop]
    if num_bytes:
        with pytest.raises(IntegrityError, match=f"{store.url}/a has"):
            store.read("a", max_bytes=num_bytes - 1)


@pytest.mark.parametrize(
    "url",
    [
        "s3://name:planted@bucket/labels",
        "https://planted@host/labels",
        "HTTP://planted@host/labels",
        "https://host/labels?X-Amz-Signature=planted",
        *(
            "https://host/labels?api_key=planted",
            "https://host/labels?a=b&Key=planted",
            "https://host/labels?auth=planted",
        ),
        "simplecache::s3://name:planted@bucket/labels",
    ],
)
def test_credentials_in_a_url_are_refused(url: str) -> None:
    for use in (refuse_credentials, ObjectStore):
        with pytest.raises(InputError, match="URL holds a credential") as caught:
            use(url)
        assert "planted" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/a@b:c",
        "abfs://container@account/labels",
        "https://host/a@b",
        "labels@home",
        "https://host/a?monkey=b",
    ],
)
def test_addresses_that_look_like_credentials(url: str) -> None:
    refuse_credentials(url)


def test_every_exception_comes_back_from_another_process() -> None:
    """Ray sends them by pickle."""
    classes = set()
    for package in (softlabel_schemas, teacher_service, student_trainer):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            # Triton's kernels are imported where there is Triton.
            if found.name.endswith(("__main__", "_triton")):
                continue
            for each in vars(importlib.import_module(found.name)).values():
                if isinstance(each, type) and issubclass(each, Exception) and each.__module__ == found.name:
                    classes.add(each)
    # Caught within the schemas.
    classes.discard(SchemaError)
    assert {InputError, IntegrityError, ConditionalWriteError} < classes
    for error in (*(each("what happened") for each in classes), ConditionalWriteError.because("s3://bucket", "no")):
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), copy.args, str(copy)) == (type(error), error.args, str(error))


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    """It is not mistaken for the object, which would then seem to exist."""
    (tmp_path / "labels").write_text("")
    for key in ("spec.json", "commits/000000.json"):
        with pytest.raises(NotADirectoryError, match="labels"):
            ObjectStore(tmp_path / "labels").put_if_absent(key, b"")


@pytest.mark.parametrize("folders_exist", [False, True], ids=["new", "made by a killed writer"])
def test_what_a_commit_record_names_survives_a_power_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_format: str, folders_exist: bool
) -> None:
    """When the record gets its name, every entry above and within the destination has been flushed, folders included."""
    root = tmp_path / "new" / "labels"
    if folders_exist:
        (root / "shards").mkdir(parents=True)
        (root / "commits").mkdir()
    rows = random_rows()
    num_shards = 3
    document = make_document(len(rows), shard_format=shard_format, codec="packed-f32", num_shards=num_shards)
    opened: dict[int, Path] = {}
    flushed: set[Path] = set()
    lost: list[Path] = []
    num_records = 0
    real_open, real_fsync, real_link = os.open, os.fsync, os.link

    def open_recorded(path: str | Path, *args: int, **kwargs: int) -> int:
        descriptor = real_open(path, *args, **kwargs)
        opened[descriptor] = Path(path)
        return descriptor

    def fsync_recorded(descriptor: int) -> None:
        real_fsync(descriptor)
        folder = opened.get(descriptor)
        if folder is not None and folder.is_dir():
            flushed.update(folder.iterdir())

    def link_recorded(source: Path, target: Path) -> None:
        nonlocal num_records
        if target.parent.name == "commits":
            num_records += 1
            entries = root.rglob("*") if folders_exist else tmp_path.rglob("*")
            lost.extend(path for path in entries if TEMPORARY not in path.name and path not in flushed)
        real_link(source, target)

    monkeypatch.setattr("os.open", open_recorded)
    monkeypatch.setattr("os.fsync", fsync_recorded)
    monkeypatch.setattr("os.link", link_recorded)
    store = ObjectStore(root)
    begin(store, document, INVENTORY)
    for shard_range in cut_evenly(len(rows), num_shards):
        commit_rows(store, document, shard_range, rows)
    assert (num_records, lost) == (num_shards, [])


def test_unfinished_uploads_of_this_destination(new_url: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of its neighbour, whose name begins the same; and more than one page of them."""
    store = ObjectStore(new_url("s3"))
    bucket, _, root = store.path("").partition("/")
    monkeypatch.setattr("softlabel_schemas.object_store._UPLOADS_PER_PAGE", 2)
    ours = [f"shards/{index}" for index in range(5)]
    started = [
        (key, store._fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)["UploadId"])
        for key in (*(f"{root}/{key}" for key in ours), f"{root}-v2/shards/0")
    ]
    found = store.stale_uploads("", timedelta(days=-1))
    assert sorted(key for key, _ in found) == ours
    assert {upload for _, upload in found} == {upload for _, upload in started[:-1]}
    assert store.stale_uploads("", timedelta(days=1)) == []
    for key, upload in started:
        store._fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload)
