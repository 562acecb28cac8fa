"""Garbage collection: attempts that died or lost are told from what anyone may need, beside running writers too."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from softlabel_schemas import InputError, IntegrityError, LabelledUtterance, open_dataset, verify
from softlabel_schemas import gc as gc_module
from softlabel_schemas.cli import main
from softlabel_schemas.commit import begin, publish, read_manifest
from softlabel_schemas.gc import Finding, delete_garbage, find_garbage
from softlabel_schemas.layout import MANIFEST, commit_record, index_bucket, shard_folder_of
from softlabel_schemas.local_files import TEMPORARY
from softlabel_schemas.object_store import ObjectStore
from tests.support.datasets import (
    INVENTORY,
    SHARD_FORMATS,
    Row,
    Written,
    commit_rows,
    cut_evenly,
    make_document,
    random_rows,
    write_dataset,
)
from tests.support.trees import tree

NUM_SHARDS = 3
ROWS = random_rows()
# What labelling on another machine can give: the same names, other bytes.
OTHER_ROWS = random_rows(seed=1)
LEFTOVER = f"{TEMPORARY}{'0' * 32}"


@pytest.fixture(params=SHARD_FORMATS)
def shard_format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["local", "memory", "s3"])
def store(request: pytest.FixtureRequest, new_url: Callable[[str], str]) -> ObjectStore:
    return ObjectStore(new_url(request.param))


@pytest.fixture
def local(tmp_path: Path, shard_format: str) -> Written:
    return write_dataset(str(tmp_path / "labels"), shard_format=shard_format)


class _KilledError(Exception):
    pass


class DyingStore(ObjectStore):
    """Of a writer that dies before its commit record, or after some of the files."""

    num_files: int | None = None

    def put_many(self, objects: dict[str, bytes]) -> None:
        super().put_many(dict(sorted(objects.items())[: self.num_files]))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        raise _KilledError


def die_writing(url: str, shard_format: str, index: int, rows: Sequence[Row], num_files: int | None = None) -> None:
    dying = DyingStore(url)
    dying.num_files = num_files
    document = make_document(len(rows), shard_format=shard_format, codec="packed-u8", num_shards=NUM_SHARDS)
    with pytest.raises((_KilledError, FileNotFoundError)):
        commit_rows(dying, document, cut_evenly(len(rows), NUM_SHARDS)[index], rows)


def lose(written: Written, index: int) -> None:
    """Write a shard that is committed already, with other labels."""
    commit_rows(ObjectStore(written.url), written.document, cut_evenly(len(ROWS), NUM_SHARDS)[index], OTHER_ROWS)


def folders(store: ObjectStore) -> set[str]:
    return {place[1] for place in map(shard_folder_of, store.list("shards")) if place is not None}


def indices(findings: Sequence[Finding]) -> list[int]:
    found = [shard_folder_of(finding.keys[0]) for finding in findings]
    return [place[0] for place in found if place is not None]


def softlabels(*args: str) -> Result:
    return CliRunner().invoke(main, args)


def assert_whole(written: Written) -> None:
    assert [problem for _, problem in verify(open_dataset(written.url)) if problem] == []
    assert open_dataset(written.url).manifest == written.manifest


class TestShards:
    def test_of_writers_that_lost_or_died_after_the_commit(self, store: ObjectStore, shard_format: str) -> None:
        written = write_dataset(store.url, shard_format=shard_format)
        before = store.list("")
        lose(written, 0)
        die_writing(store.url, shard_format, 2, OTHER_ROWS, num_files=1)
        orphans = store.list("").keys() - before.keys()
        found = find_garbage(store)
        assert indices(found.garbage) == [0, 2]
        assert found.kept == ()
        assert {key for finding in found.garbage for key in finding.keys} == orphans
        assert found.num_bytes == sum(store.size(key) for key in orphans)
        record = written.manifest.shards[0]
        assert found.garbage[0].reason == f"shard 0 was committed as {record.folder}"
        delete_garbage(store, found.garbage)
        assert store.list("") == before
        assert_whole(written)
        assert find_garbage(store).garbage == ()

    def test_before_the_manifest(self, store: ObjectStore, shard_format: str) -> None:
        """Shard 0 is committed and has a loser; shards 1 and 2 are not: nothing of theirs is touched."""
        document = make_document(len(ROWS), shard_format=shard_format, codec="packed-u8", num_shards=NUM_SHARDS)
        begin(store, document, INVENTORY)
        ranges = cut_evenly(len(ROWS), NUM_SHARDS)
        commit_rows(store, document, ranges[0], ROWS)
        for rows in (ROWS, OTHER_ROWS):
            die_writing(store.url, shard_format, 1, rows)
        die_writing(store.url, shard_format, 2, ROWS, num_files=1)
        die_writing(store.url, shard_format, 0, OTHER_ROWS)
        kept = folders(store)
        found = find_garbage(store)
        assert indices(found.garbage) == [0]
        assert indices(found.kept) == [1, 1, 2]
        assert "a job that runs, or is resumed, makes use of it" in found.kept[0].reason
        delete_garbage(store, found.garbage)
        assert folders(store) == kept - {found.garbage[0].path}
        for shard_range in ranges[1:]:
            commit_rows(store, document, shard_range, ROWS)
        publish(store, document)
        # The other attempt at shard 1 is garbage now.
        found = find_garbage(store)
        assert (indices(found.garbage), found.kept) == ([1], ())
        delete_garbage(store, found.garbage)
        assert folders(store) == {record.folder for record in read_manifest(store).shards}

    def test_what_the_manifest_names_is_kept_whatever_a_record_says(self, local: Written) -> None:
        """Someone has replaced a commit record by that of another attempt."""
        store = ObjectStore(local.url)
        other = write_dataset(f"{local.url}-other", shard_format=local.document.storage.shard_format, rows=OTHER_ROWS)
        lose(local, 1)
        (Path(local.url) / commit_record(1)).write_bytes((Path(other.url) / commit_record(1)).read_bytes())
        before = tree(Path(local.url))
        assert find_garbage(store).garbage == ()
        die_writing(local.url, local.document.storage.shard_format, 1, random_rows(seed=2))
        delete_garbage(store, find_garbage(store).garbage)
        assert tree(Path(local.url)) == before

    def test_what_is_not_ours_is_not_touched(self, local: Written) -> None:
        lose(local, 0)
        root = Path(local.url)
        loser = root / find_garbage(ObjectStore(local.url)).garbage[0].path
        foreign = [
            root / "notes.txt",
            root / "shards/readme.md",
            root / f"shards/000001-{'0' * 31}/shard.parquet",
            root / f"shards/0000001-{'0' * 32}/shard.parquet",
            root / f"shards/000009-{'0' * 32}/shard.parquet",
            root / "commits/000009.json",
            loser / "notes.txt",
            loser / "my shard.parquet",
            root / local.manifest.shards[1].folder / "zarr.json.bak",
            root / f"notes.txt{LEFTOVER}",
            root / f"spec.json{TEMPORARY}0",
            root / f"a/spec.json{LEFTOVER}",
        ]
        for path in foreign:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"mine")
            os.utime(path, (0, 0))
        store = ObjectStore(local.url)
        delete_garbage(store, find_garbage(store).garbage)
        assert [path for path in foreign if not path.exists()] == []
        assert {path.name for path in loser.iterdir()} == {"notes.txt", "my shard.parquet"}
        assert_whole(local)

    def test_the_last_folder_of_a_shard_is_not_touched(self, local: Written) -> None:
        """What is left where the folder that the record names is gone."""
        lose(local, 1)
        root = Path(local.url)
        shutil.rmtree(root / local.manifest.shards[1].folder)
        assert find_garbage(ObjectStore(local.url)).garbage == ()

    @pytest.mark.parametrize("damage", ["record", "size", "manifest"])
    def test_damage_stops_it_before_anything_is_deleted(self, local: Written, damage: str) -> None:
        lose(local, 0)
        lose(local, 1)
        root = Path(local.url)
        record = local.manifest.shards[1]
        path = {"record": root / commit_record(1), "manifest": root / MANIFEST}.get(
            damage, root / record.folder / record.files[0].name
        )
        path.write_bytes(path.read_bytes()[:-1])
        before = tree(root)
        with pytest.raises(IntegrityError, match=r"manifest\.json" if damage == "manifest" else "000001"):
            find_garbage(ObjectStore(local.url))
        result = softlabels("gc", local.url, "--delete")
        assert (result.exit_code, result.stdout) == (1, "")
        assert tree(root) == before

    def test_where_no_run_was_begun(self, tmp_path: Path) -> None:
        (tmp_path / f"spec.json{LEFTOVER}").write_bytes(b"")
        with pytest.raises(InputError, match=r"holds no soft-label run: spec\.json does not exist"):
            find_garbage(ObjectStore(tmp_path))
        assert softlabels("gc", str(tmp_path), "--delete").exit_code == 2
        assert (tmp_path / f"spec.json{LEFTOVER}").exists()


class TestBuckets:
    def test_those_that_the_manifest_does_not_name(self, store: ObjectStore, shard_format: str) -> None:
        written = write_dataset(store.url, shard_format=shard_format)
        before = store.list("")
        others = [index_bucket(0, "0" * 64), index_bucket(7, "1" * 64)]
        foreign = ["index/readme.md", f"index/000000-{'0' * 31}", f"index/00000-{'0' * 32}"]
        for key in (*others, *foreign):
            store.put(key, b"stale")
        found = find_garbage(store)
        assert [(finding.path, finding.num_bytes) for finding in found.garbage] == [(key, 5) for key in others]
        assert found.garbage[0].reason == "the manifest names other buckets of the utterance index"
        delete_garbage(store, found.garbage)
        assert store.list("").keys() == before.keys() | set(foreign)
        assert_whole(written)

    def test_without_a_manifest_they_are_kept(self, store: ObjectStore, shard_format: str) -> None:
        """A publisher was killed, or is at work."""
        written = write_dataset(store.url, shard_format=shard_format)
        before = store.list("")
        store.delete([MANIFEST])
        found = find_garbage(store)
        assert found.garbage == ()
        assert [finding.path for finding in found.kept] == [key for key in before if key.startswith("index/")]
        assert "a job that publishes, or is resumed, makes use of it" in found.kept[0].reason
        publish(store, written.document)
        assert find_garbage(store) == gc_module.Findings(garbage=(), kept=())
        assert_whole(written)

    def test_format_version_1_has_none(self, tmp_path: Path, shard_format: str) -> None:
        shutil.copytree(Path(__file__).parents[2] / "golden" / "v1" / shard_format, tmp_path, dirs_exist_ok=True)
        store = ObjectStore(tmp_path)
        store.put(index_bucket(0, "0" * 64), b"mine")
        assert find_garbage(store) == gc_module.Findings(garbage=(), kept=())


class TestTemporaries:
    def test_old_ones_go_and_young_ones_stay(self, local: Written) -> None:
        record = local.manifest.shards[0]
        names = [
            f"manifest.json{LEFTOVER}",
            f"commits/000001.json{LEFTOVER}",
            f"{record.folder}/{record.files[0].name}{LEFTOVER}",
            f"{index_bucket(0, '0' * 64)}{LEFTOVER}",
        ]
        before = tree(Path(local.url))
        hour_ago = time.time() - 3600
        for name in names:
            for suffix, seconds in (("1", hour_ago - 60), ("2", hour_ago + 600)):
                path = Path(local.url) / (name[:-1] + suffix)
                path.write_bytes(b"half")
                os.utime(path, (seconds, seconds))
        store = ObjectStore(local.url)
        found = find_garbage(store)
        assert sorted(finding.path for finding in found.garbage) == sorted(name[:-1] + "1" for name in names)
        assert sorted(finding.path for finding in found.kept) == sorted(name[:-1] + "2" for name in names)
        assert found.num_bytes == 4 * len(names)
        delete_garbage(store, found.garbage)
        left = {str(path.relative_to(local.url)) for path in Path(local.url).rglob(f"*{TEMPORARY}*")}
        assert left == {name[:-1] + "2" for name in names}
        assert tree(Path(local.url)) == before

    def test_on_an_object_store_they_are_somebodys_objects(self, new_url: Callable[[str], str]) -> None:
        store = ObjectStore(new_url("memory"))
        write_dataset(store.url, shard_format="parquet")
        store.put(f"spec.json{LEFTOVER}", b"mine")
        store._fs.store[store.path(f"spec.json{LEFTOVER}")].modified -= timedelta(days=2)
        assert find_garbage(store) == gc_module.Findings(garbage=(), kept=())


class TestUploads:
    def test_unfinished_ones(self, new_url: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
        store = ObjectStore(new_url("s3"))
        written = write_dataset(store.url, shard_format="parquet")
        ours = f"{written.manifest.shards[0].folder}/shard.parquet"
        bucket, _, root = store.path("").partition("/")
        for key in (ours, "notes.txt"):
            store._fs.call_s3("create_multipart_upload", Bucket=bucket, Key=f"{root.rstrip('/')}/{key}")
        assert find_garbage(store).garbage == ()
        monkeypatch.setattr(gc_module, "UPLOAD_AGE", timedelta(days=-1))
        found = find_garbage(store).garbage
        assert [finding.path for finding in found] == [ours]
        delete_garbage(store, found)
        # Gone already.
        delete_garbage(store, found)
        assert [key for key, _ in store.stale_uploads("", timedelta(days=-1))] == ["notes.txt"]
        assert_whole(written)


class TestCommand:
    def test_a_dry_run_deletes_nothing(self, local: Written) -> None:
        lose(local, 0)
        before = tree(Path(local.url))
        result = softlabels("gc", local.url)
        assert (result.exit_code, result.stderr) == (0, "")
        assert tree(Path(local.url)) == before
        line, total = result.stdout.splitlines()
        (finding,) = find_garbage(ObjectStore(local.url)).garbage
        files = "1 file" if len(finding.keys) == 1 else f"{len(finding.keys)} files"
        size = f"{finding.num_bytes:,} bytes"
        record = local.manifest.shards[0].folder
        assert line == f"garbage: {finding.path}, {files}, {size}: shard 0 was committed as {record}"
        assert total == f"{local.url}: 1 pieces of garbage with {size}; delete them with --delete"

    def test_delete(self, local: Written) -> None:
        before = tree(Path(local.url))
        lose(local, 0)
        result = softlabels("gc", local.url, "--delete")
        assert (result.exit_code, result.stderr) == (0, "")
        assert result.stdout.startswith("deleted: shards/000000-")
        assert tree(Path(local.url)) == before
        result = softlabels("gc", local.url, "--delete")
        assert result.stdout == f"{local.url}: 0 pieces of garbage with 0 bytes\n"

    def test_json(self, tmp_path: Path, shard_format: str) -> None:
        store = ObjectStore(tmp_path)
        document = make_document(len(ROWS), shard_format=shard_format, codec="packed-u8", num_shards=NUM_SHARDS)
        begin(store, document, INVENTORY)
        commit_rows(store, document, cut_evenly(len(ROWS), NUM_SHARDS)[0], ROWS)
        die_writing(store.url, shard_format, 0, OTHER_ROWS)
        die_writing(store.url, shard_format, 1, ROWS)
        result = softlabels("gc", store.url, "--json")
        found, facts = find_garbage(store), json.loads(result.stdout)
        assert (facts["url"], facts["deleted"], facts["num_bytes"]) == (store.url, False, found.num_bytes)
        for name, expected in (("garbage", found.garbage), ("kept", found.kept)):
            (entry,), (finding,) = facts[name], expected
            assert entry["path"] == finding.path
            assert (entry["num_files"], entry["num_bytes"]) == (len(finding.keys), finding.num_bytes)
            assert entry["reason"] == finding.reason
        assert json.loads(softlabels("gc", store.url, "--json", "--delete").stdout)["deleted"]
        assert find_garbage(store).garbage == ()


# Beside running writers. Statistics are no labels: writers that differ in them alone store other bytes with one content digest.

RACE_SHARDS = 8


def with_statistics(rows: Sequence[Row], entropy: float) -> list[Row]:
    return [
        replace(row, stats=replace(row.stats, entropy=entropy)) if isinstance(row, LabelledUtterance) else row
        for row in rows
    ]


def write_racing(url: str, shard_format: str, rows: Sequence[Row], seed: int) -> None:
    """Every shard in some order, committed by others or not; what fails is tried again, as a job does."""
    store, rng = ObjectStore(url), random.Random(seed)
    document = make_document(len(rows), shard_format=shard_format, codec="packed-u8", num_shards=RACE_SHARDS)
    own = with_statistics(rows, float(seed))
    steps: list[Callable[[], object]] = [
        lambda shard_range=shard_range: commit_rows(store, document, shard_range, own)
        for shard_range in cut_evenly(len(rows), RACE_SHARDS)
    ]
    rng.shuffle(steps)
    for step in [lambda: begin(store, document, INVENTORY), *steps, lambda: publish(store, document)]:
        for _ in range(1000):
            try:
                step()
                break
            except FileNotFoundError:
                # What it was writing was deleted under its hands.
                continue
        else:
            raise AssertionError("it never succeeds")


def collect_once(url: str) -> int:
    store = ObjectStore(url)
    try:
        found = find_garbage(store)
    except InputError:
        return 0
    delete_garbage(store, found.garbage)
    return len(found.garbage)


PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["softlabel_schemas", "tests.support.datasets"])


def test_beside_writers_that_race_and_are_killed(
    tmp_path: Path, shard_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if it takes the temporary files of live writers, who then have to try again."""
    monkeypatch.setattr(gc_module, "TEMPORARY_AGE", timedelta(0))
    rows = random_rows(seed=3, num_rows=24)
    expected = write_dataset(str(tmp_path / "alone"), shard_format=shard_format, num_shards=RACE_SHARDS, rows=rows)
    rng, url, collected = random.Random(762), str(tmp_path / "raced"), 0
    writers = [PROCESSES.Process(target=write_racing, args=(url, shard_format, rows, seed)) for seed in range(4)]
    for writer in writers:
        writer.start()
    victims = writers[:2]
    while any(writer.is_alive() for writer in writers):
        collected += collect_once(url)
        if victims and rng.random() < 0.2:
            victims.pop().kill()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers[2:]] == [0, 0]
    collected += collect_once(url)
    assert collected > 0
    assert_raced(url, expected)


def test_beside_writers_that_race_on_s3(new_url: Callable[[str], str], shard_format: str) -> None:
    rows = random_rows(seed=3, num_rows=24)
    expected = write_dataset(new_url("memory"), shard_format=shard_format, num_shards=RACE_SHARDS, rows=rows)
    url, collected = new_url("s3"), 0
    with ThreadPoolExecutor(max_workers=3) as pool:
        writers = [pool.submit(write_racing, url, shard_format, rows, seed) for seed in range(3)]
        while not all(writer.done() for writer in writers):
            collected += collect_once(url)
    for writer in writers:
        writer.result()
    collected += collect_once(url)
    assert collected > 0
    assert_raced(url, expected)


def assert_raced(url: str, expected: Written) -> None:
    """All is there, labels as without a race; and nothing else after a last collection."""
    dataset, store = open_dataset(url), ObjectStore(url)
    assert [problem for _, problem in verify(dataset) if problem] == []
    assert dataset.manifest.content_digest == expected.manifest.content_digest
    collect_once(url)
    assert folders(store) == {record.folder for record in dataset.manifest.shards}
    assert [problem for _, problem in verify(dataset) if problem] == []
