"""Random access: the right utterance, in as few requests as promised, from honest and from hostile indices."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softlabel_schemas import IntegrityError, index_reader, layout, open_dataset, parquet_shard, utterance_index, verify
from softlabel_schemas.cache import FileCache
from softlabel_schemas.dataset import SoftLabelDataset
from softlabel_schemas.index_reader import IndexReader
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.shard_reader import ShardReader
from softlabel_schemas.utterance_index import Records, key_of
from tests.support.datasets import SHARD_FORMATS, Written, random_rows, write_dataset
from tests.support.indices import change_document, forge_index, ids_by_block, kinds, requests, shard_index
from tests.support.targets import assert_same_targets

NUM_SHARDS = 2
# Shards of several blocks, each less than half of its shard.
ROWS = random_rows(seed=4, num_rows=400)
V1 = Path(__file__).parents[2] / "golden" / "v1"
STORES = ("local", "memory", "s3")


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet_shard, "FRAMES_PER_GROUP", 600)
        yield


@pytest.fixture(scope="module", params=STORES)
def written(request: pytest.FixtureRequest, new_url: Callable[[str], str]) -> Written:
    return write_dataset(new_url(request.param), shard_format="parquet", rows=ROWS, num_shards=NUM_SHARDS)


@pytest.fixture
def own(new_url: Callable[[str], str]) -> Written:
    """A dataset that the test may damage."""
    return write_dataset(new_url("memory"), shard_format="parquet", rows=ROWS, num_shards=NUM_SHARDS)


@pytest.fixture
def many_buckets(monkeypatch: pytest.MonkeyPatch, new_url: Callable[[str], str]) -> Written:
    """As in a large dataset: each utterance has a bucket of its own, more or less."""
    monkeypatch.setattr(utterance_index, "_ENTRIES_PER_BUCKET", 2)
    monkeypatch.setattr(index_reader, "_FEW_BUCKETS", 8)
    monkeypatch.setattr(index_reader, "_PROBES", 4)
    return write_dataset(new_url("memory"), shard_format="parquet", rows=ROWS, num_shards=8)


def ids_of(written: Written) -> list[str]:
    return [utterance.utterance_id for utterance in written.utterances]


def assert_right(dataset: SoftLabelDataset, found: list[Any], expected: list[str]) -> None:
    assert [utterance.utterance_id for utterance in found] == expected
    by_id = {utterance.utterance_id: utterance for utterance in dataset}
    for utterance in found:
        assert_same_targets(utterance.targets, by_id[utterance.utterance_id].targets)
        assert str(utterance.stats) == str(by_id[utterance.utterance_id].stats)


class TestRequests:
    def test_two_when_cold_and_one_when_warm(self, written: Written) -> None:
        blocks = list(ids_by_block(open_dataset(written.url)).values())
        assert len(blocks) > 2 * NUM_SHARDS
        dataset = open_dataset(written.url)
        with requests() as log:
            assert dataset[blocks[0][0]].utterance_id == blocks[0][0]
        assert kinds(log) == ["index", "shards"]
        for ids in blocks[1:]:
            with requests() as log:
                assert dataset[ids[-1]].utterance_id == ids[-1]
            assert kinds(log) == ["shards"]
            with requests() as log:
                # Its neighbour came with it.
                assert dataset[ids[0]].utterance_id == ids[0]
            assert log == []

    def test_whether_an_id_is_there(self, written: Written) -> None:
        dataset, ids = open_dataset(written.url), ids_of(written)
        with requests() as log:
            assert [each in dataset for each in (ids[0], ids[-1])] == [True, True]
            # Skipped, unknown, and no ids at all.
            assert not any(each in dataset for each in ("utt-silent", "nobody", 0, None, b"utt-0"))
        assert "shards" not in kinds(log)
        shard = dataset.read_shard(0)
        assert [each in shard for each in (ids[0], ids[-1], 0, shard[0])] == [True, False, False, False]

    def test_by_position(self, written: Written) -> None:
        dataset, ids = open_dataset(written.url), ids_of(written)
        with requests() as log:
            assert dataset[150].utterance_id == ids[150]
        assert kinds(log) == ["commits", "shards"]
        with requests() as log:
            assert dataset[0].utterance_id == ids[0]
        assert kinds(log) == ["shards"]
        for position in (0, 1, 63, 64, 198, 199, 200, 398):
            assert_right(open_dataset(written.url), [dataset[position]], [ids[position]])

    def test_each_block_once(self, written: Written) -> None:
        blocks = ids_by_block(open_dataset(written.url))
        wanted = [min((b for b in blocks if b[0] == n), key=lambda b: b[1].num_bytes) for n in range(NUM_SHARDS)]
        dataset = open_dataset(written.url)
        ids = [each for ids in zip(*(blocks[block][:5] for block in wanted), strict=True) for each in ids]
        with requests() as log:
            found = dataset.read_utterances([*ids, ids[0]])
        assert kinds(log) == ["index", "shards", "shards"]
        assert_right(open_dataset(written.url), found, [*ids, ids[0]])
        # Not a view, which would keep the whole block in memory.
        assert all(utterance.targets.class_ids.base is None for utterance in found)

    def test_a_shard_at_once_where_most_of_it_is_needed(self, written: Written) -> None:
        dataset, ids = open_dataset(written.url), ids_of(written)
        with requests() as log:
            found = dataset.read_utterances(ids)
        assert kinds(log) == ["index", *["shards"] * NUM_SHARDS]
        assert_right(open_dataset(written.url), found, ids)

    def test_blocks_are_fetched_at_once(self, many_buckets: Written, monkeypatch: pytest.MonkeyPatch) -> None:
        barrier = threading.Barrier(4, timeout=60)
        read = ShardReader.read_block

        def wait(self: ShardReader, *args: Any) -> Any:
            barrier.wait()
            return read(self, *args)

        monkeypatch.setattr(ShardReader, "read_block", wait)
        dataset = open_dataset(many_buckets.url)
        monkeypatch.setattr("softlabel_schemas.dataset._MOST", 1.0)
        ids = [dataset.read_shard(shard).utterance_ids[0] for shard in range(4)]
        assert [utterance.utterance_id for utterance in dataset.read_utterances(ids)] == ids

    def test_neighbours_are_found_without_their_buckets(self, many_buckets: Written) -> None:
        ids = ids_of(many_buckets)
        dataset = open_dataset(many_buckets.url)
        wanted = ids[60:110] + ids[250:290]
        with requests() as log:
            found = dataset.read_utterances(wanted)
        assert kinds(log).count("index") < 20
        assert kinds(log).count("commits") <= 4
        assert_right(open_dataset(many_buckets.url), found, wanted)

    @pytest.mark.parametrize("shuffled", [False, True])
    def test_rounds_do_not_grow_with_the_shards(
        self, new_url: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, shuffled: bool
    ) -> None:
        """Each goes over all ids left. With a probe in each they would be as many as shards."""
        monkeypatch.setattr(utterance_index, "_ENTRIES_PER_BUCKET", 2)
        for name, value in {"_FEW_BUCKETS": 1, "_PROBES": 1, "_CACHED_BYTES": 1}.items():
            monkeypatch.setattr(index_reader, name, value)
        there = write_dataset(new_url("memory"), shard_format="parquet", rows=ROWS[-198:], num_shards=66)
        ids, rounds = ids_of(there), 0
        if shuffled:
            ids = [ids[n] for n in np.random.default_rng(0).permutation(len(ids))]
        find_near = IndexReader._find_near

        def counted(self: IndexReader, *args: Any) -> Any:
            nonlocal rounds
            rounds += 1
            return find_near(self, *args)

        monkeypatch.setattr(IndexReader, "_find_near", counted)
        dataset = open_dataset(there.url)
        with requests() as log:
            found = dataset.shards_of(ids)
        assert found == {each: n for n, shard in enumerate(dataset.iter_shards()) for each in shard.utterance_ids}
        # Doubling from 1 to more than 66, and some that find the last ones.
        assert 2 <= rounds <= 12
        assert kinds(log).count("commits") == 66
        assert kinds(log).count("index") <= (100 if shuffled else 66)

    def test_ids_that_lie_nowhere_near_each_other(self, many_buckets: Written) -> None:
        ids = ids_of(many_buckets)
        wanted = [ids[n] for n in np.random.default_rng(0).permutation(len(ids))[:150]]
        dataset = open_dataset(many_buckets.url)
        with requests() as log:
            found = dataset.read_utterances(wanted)
        # In the same buckets there may be several of them, and each is read once.
        assert kinds(log).count("index") == len(set(log) & {key for key in log if key.startswith("index")}) <= 150
        assert_right(open_dataset(many_buckets.url), found, wanted)

    @pytest.mark.parametrize("shard_format", SHARD_FORMATS)
    def test_every_one_of_a_format(self, new_url: Callable[[str], str], shard_format: str) -> None:
        there = write_dataset(new_url("memory"), shard_format=shard_format, rows=ROWS[-60:], num_shards=4)
        dataset = open_dataset(there.url)
        ids = ids_of(there)
        assert_right(open_dataset(there.url), [dataset[each] for each in ids], ids)
        assert_right(open_dataset(there.url), [dataset[number] for number in range(len(dataset))], ids)

    def test_a_zarr_shard_is_read_as_a_whole(self, new_url: Callable[[str], str]) -> None:
        """And no other."""
        there = write_dataset(new_url("memory"), shard_format="zarr", rows=ROWS[-60:], num_shards=4)
        dataset = open_dataset(there.url)
        with requests() as log:
            assert dataset["utt-none"].targets.num_frames == 0
        assert {key.split("/")[1] for key in log if key.startswith("shards")} == {
            there.manifest.shards[3].folder.partition("/")[2]
        }
        assert kinds(log).count("index") == 1


class TestMissing:
    @pytest.mark.parametrize("ask", [lambda d, i: d[i], lambda d, i: d.read_utterances(["utt-ü0", i])])
    def test_says_why(self, written: Written, ask: Callable[[SoftLabelDataset, str], Any]) -> None:
        dataset = open_dataset(written.url)
        with pytest.raises(KeyError, match="utt-silent: it was skipped: its audio is empty"):
            ask(dataset, "utt-silent")
        with pytest.raises(KeyError, match=r"nobody: no such utterance \(.*\)"):
            ask(dataset, "nobody")

    def test_takes_one_request(self, written: Written) -> None:
        dataset = open_dataset(written.url)
        with requests() as log, pytest.raises(KeyError):
            dataset["nobody"]
        assert kinds(log) == ["index"]

    @pytest.mark.parametrize("position", [-1, 399, 10**12])
    def test_by_position(self, written: Written, position: int) -> None:
        with pytest.raises(IndexError, match="the dataset has 399"):
            open_dataset(written.url)[position]


@pytest.mark.parametrize("num_keys", [1, 7])
def test_keys_that_collide(monkeypatch: pytest.MonkeyPatch, new_url: Callable[[str], str], num_keys: int) -> None:
    def colliding(utterance_id: str) -> int:
        return key_of(utterance_id) % num_keys << 61

    for module in (utterance_index, index_reader):
        monkeypatch.setattr(module, "key_of", colliding)
    # Neighbours are looked for too.
    monkeypatch.setattr(utterance_index, "_ENTRIES_PER_BUCKET", 16)
    monkeypatch.setattr(index_reader, "_FEW_BUCKETS", 1)
    there = write_dataset(new_url("memory"), shard_format="parquet", rows=ROWS[-150:], num_shards=3)
    dataset, ids = open_dataset(there.url), ids_of(there)
    assert_right(open_dataset(there.url), dataset.read_utterances(ids), ids)
    assert_right(open_dataset(there.url), [dataset[each] for each in ids[::20]], ids[::20])
    with pytest.raises(KeyError, match="no such utterance"):
        dataset["nobody"]
    with pytest.raises(KeyError, match="no such utterance"):
        dataset.read_utterances(["nobody"])
    assert [problem for _, problem in verify(dataset) if problem] == []


@pytest.mark.parametrize("shard_format", SHARD_FORMATS)
def test_format_version_1_is_read_without_an_index(shard_format: str) -> None:
    dataset = open_dataset(V1 / shard_format)
    ids = ["zweite-ü", "first", "third"]
    assert_right(open_dataset(V1 / shard_format), dataset.read_utterances(ids), ids)
    assert_right(open_dataset(V1 / shard_format), [dataset[each] for each in ids], ids)
    assert dataset[1].utterance_id == "zweite-ü"
    with pytest.raises(KeyError, match="silent: it was skipped: 0 samples"):
        dataset["silent"]
    with pytest.raises(KeyError, match="no such utterance"):
        dataset.read_utterances(["first", "nobody"])


class TestCache:
    def test_blocks_are_kept(self, own: Written, tmp_path: Path) -> None:
        blocks = ids_by_block(open_dataset(own.url))
        ids = min(blocks.values(), key=len)
        cache = FileCache(tmp_path, 1 << 20)
        first = open_dataset(own.url, cache=cache).read_utterances(ids)
        dataset = open_dataset(own.url, cache=cache)
        with requests() as log:
            again = dataset.read_utterances(ids)
        assert kinds(log) == ["index"]
        assert [str(utterance) for utterance in again] == [str(utterance) for utterance in first]

    def test_a_damaged_one_is_fetched_again(self, own: Written, tmp_path: Path) -> None:
        (_, block), ids = next(iter(ids_by_block(open_dataset(own.url)).items()))
        cache = FileCache(tmp_path, 1 << 20)
        open_dataset(own.url, cache=cache)[ids[0]]
        path = tmp_path / block.digest.hex()[:2] / block.digest.hex()
        path.write_bytes(b"x" + path.read_bytes()[1:])
        dataset = open_dataset(own.url, cache=cache)
        with requests() as log:
            assert dataset[ids[0]].utterance_id == ids[0]
        assert kinds(log) == ["index", "shards"]
        assert path.stat().st_size == block.num_bytes


class TestTransfers:
    @pytest.mark.parametrize("folder", ["index", "shards"])
    @pytest.mark.parametrize("stays", [False, True])
    def test_a_damaged_one(self, own: Written, monkeypatch: pytest.MonkeyPatch, folder: str, stays: bool) -> None:
        read, seen = ObjectStore._request_range, set()

        def damaged(self: ObjectStore, key: str, start: int, stop: int) -> bytes:
            data = read(self, key, start, stop)
            if not key.startswith(folder) or (key in seen and not stays):
                return data
            seen.add(key)
            return bytes([data[0] ^ 1]) + data[1:]

        monkeypatch.setattr(ObjectStore, "_request_range", damaged)
        dataset = open_dataset(own.url)
        if not stays:
            assert dataset["utt-ü0"].utterance_id == "utt-ü0"
            return
        for ask in (lambda: dataset["utt-ü0"], lambda: dataset.read_utterances(["utt-ü0"])):
            with pytest.raises(IntegrityError, match=rf"{folder}/000000-.*was changed after writing"):
                ask()

    @pytest.mark.parametrize("folder", ["index", "shards"])
    def test_a_missing_object(self, own: Written, folder: str) -> None:
        store = ObjectStore(own.url)
        store.delete([key for key in store.list(folder) if key.startswith(f"{folder}/000000-")])
        with pytest.raises(IntegrityError, match=rf"is missing.*{folder}/000000-"):
            open_dataset(own.url)["utt-ü0"]


def set_entry(**fields: int) -> Callable[[Records], Records]:
    """In the entry of utt-ü0."""

    def change(entries: Records) -> Records:
        for name, value in fields.items():
            entries[name][entries["key"] == key_of("utt-ü0")] = value
        return entries

    return change


def set_digest(digest: bytes) -> Callable[[Records], Records]:
    def change(entries: Records) -> Records:
        entries["digest"][entries["key"] == key_of("utt-ü0")] = digest
        return entries

    return change


HOSTILE_ENTRIES: dict[str, tuple[Callable[[Records], Records], str]] = {
    "of no shard": (set_entry(shard=NUM_SHARDS), "leads to shard 2, which holds no utterance"),
    "of a shard far away": (set_entry(shard=2**32 - 1), "which holds no utterance"),
    "outside its file": (set_entry(start=2**32 - 1), "at 4294967295 outside shard 0"),
    "larger than its file": (set_entry(num_bytes=2**32 - 1), "4294967295 bytes at .* outside shard 0"),
    "of no rows": (set_entry(num_rows=0), "leads to 0 utterances of shard 0"),
    "of rows without end": (set_entry(num_rows=2**32 - 1), "leads to 4294967295 utterances of shard 0"),
    "of other rows": (set_entry(num_rows=5), "shard 0"),
    "of other bytes": (set_entry(start=5), "do not have the digest in the index"),
    "of another digest": (set_digest(bytes(16)), "do not have the digest in the index"),
    "not sorted": (lambda entries: entries[::-1], "its keys are not sorted"),
}


@pytest.mark.parametrize("name", HOSTILE_ENTRIES)
def test_a_hostile_entry_is_refused(own: Written, name: str) -> None:
    change, message = HOSTILE_ENTRIES[name]
    forge_index(ObjectStore(own.url), open_dataset(own.url), change)
    dataset = open_dataset(own.url)
    for ask in (lambda: dataset["utt-ü0"], lambda: dataset.read_utterances(["utt-ü0"])):
        with pytest.raises(IntegrityError, match=message):
            ask()
    problems = [problem for index, problem in verify(dataset) if problem]
    assert problems == ["bucket 0 of the utterance index does not hold the utterances of the shards"]


def test_an_entry_of_another_utterance_does_not_mislead(own: Written) -> None:
    """Its block is read, and it is not there."""
    dataset = open_dataset(own.url)
    last = next(reversed(ids_by_block(dataset)))[1]
    place = set_entry(shard=1, start=last.start, num_bytes=last.num_bytes, num_rows=last.num_rows)
    forge_index(ObjectStore(own.url), dataset, lambda entries: place(set_digest(last.digest)(entries)))
    with pytest.raises(KeyError, match="no such utterance"):
        open_dataset(own.url)["utt-ü0"]


class TestVerify:
    def problems(self, written: Written) -> list[tuple[int | None, str]]:
        return [(index, problem) for index, problem in verify(open_dataset(written.url)) if problem]

    def test_a_bucket_that_is_missing_or_damaged(self, own: Written) -> None:
        store = ObjectStore(own.url)
        (key,) = store.list("index")
        data = store.read(key)
        for damaged in (data[:-1], data + b"\x00", data[:100] + bytes([data[100] ^ 1]) + data[101:]):
            store.put(key, damaged)
            ((index, problem),) = self.problems(own)
            assert index is None
            assert key in problem
        store.delete([key])
        ((index, problem),) = self.problems(own)
        assert problem.startswith("a bucket of the utterance index is missing")

    def test_an_utterance_that_is_left_out_or_added(self, own: Written) -> None:
        store, dataset = ObjectStore(own.url), open_dataset(own.url)

        def swap(entries: Records) -> Records:
            entries[3] = entries[2]
            return entries

        forge_index(store, dataset, swap)
        ((index, problem),) = self.problems(own)
        assert index is None
        assert problem == "bucket 0 of the utterance index does not hold the utterances of the shards"

    def test_more_utterances_than_a_bucket_may_have(self, own: Written, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("softlabel_schemas.index_builder.MAX_BUCKET_ENTRIES", 398)
        ((index, problem),) = self.problems(own)
        assert (index, problem) == (None, "399 utterances share a bucket of the index; at most 398 may")

    @pytest.mark.parametrize("where", ["key", "digest", "length"])
    def test_a_commit_record_with_another_index(self, own: Written, where: str) -> None:
        store, dataset = ObjectStore(own.url), open_dataset(own.url)
        commit = shard_index(dataset, 1)
        blocks, keys = commit.blocks.copy(), commit.keys_N.copy()
        if where == "key":
            keys[0] += 1
        elif where == "digest":
            blocks["digest"][1] = bytes(16)
        else:
            blocks["num_rows"][0] -= 1
            blocks["num_rows"][1] += 1
        text = utterance_index.ShardIndex(blocks, keys).to_base64()
        change_document(store, layout.commit_record(1), lambda body: body.update(index=text))
        ((index, problem),) = self.problems(own)
        assert index == 1
        assert "(shard 1)" in problem
