"""The utterance index as bytes: what is put in is found, however it was sorted, and nothing else is accepted."""

from __future__ import annotations

import base64
import hashlib
import shutil
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from softlabel_schemas import InputError, IntegrityError, index_builder, utterance_index
from softlabel_schemas.index_builder import IndexBuilder, check_room
from softlabel_schemas.lru import LruCache
from softlabel_schemas.shard import Block
from softlabel_schemas.utterance_index import (
    ENTRY,
    BucketTable,
    Place,
    Records,
    ShardIndex,
    block_digest,
    find,
    key_of,
    leading_bits,
    num_buckets,
    read_bucket,
)

FILE = bytes(range(256)) * 4


def blocks_of(rows: list[int]) -> list[Block]:
    """Blocks of so many rows and seven bytes for each, with three bytes of something else before each."""
    found, start, first_row = [], 3, 0
    for num_rows in rows:
        found.append(Block(file="a", start=start, stop=start + 7 * num_rows, first_row=first_row, num_rows=num_rows))
        start, first_row = start + 7 * num_rows + 3, first_row + num_rows
    return found


def index_of(ids: list[str], rows: list[int]) -> ShardIndex:
    return ShardIndex.of(ids, blocks_of(rows), {"a": FILE})


def reread(index: ShardIndex) -> ShardIndex:
    return ShardIndex.from_base64(index.to_base64(), num_utterances=len(index.keys_N), file_bytes=[len(FILE)])


def test_a_key_is_the_beginning_of_a_digest() -> None:
    """The example of FORMAT.md."""
    assert f"{key_of('utt-1'):016x}" == hashlib.sha256(b"utt-1").hexdigest()[:16] == "af5ca2c4d9bc78b9"
    assert f"{key_of('utt-é'):016x}" == "bf888da225348d20"


def test_the_bytes_of_an_index() -> None:
    index = index_of(["utt-1", "utt-é"], [2])
    piece = FILE[3:17]
    record = (3).to_bytes(4, "little") + (14).to_bytes(4, "little") + (2).to_bytes(4, "little")
    record += hashlib.sha256(piece).digest()[:16]
    keys = key_of("utt-1").to_bytes(8, "big") + key_of("utt-é").to_bytes(8, "big")
    assert base64.b64decode(index.to_base64()) == record + keys
    entry = index.entries(5)[1].tobytes()
    assert entry == key_of("utt-é").to_bytes(8, "big") + (5).to_bytes(4, "little") + record


# Few ids, so that some are equal, as keys can be.
SHARDS = st.lists(st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=8), max_size=4), min_size=1, max_size=6)


@given(shards=SHARDS, per_bucket=st.sampled_from([1, 3, 4096]), partitions=st.sampled_from([1, 2, 128]))
def test_whatever_is_added_is_found(shards: list[list[list[int]]], per_bucket: int, partitions: int) -> None:
    names = [[f"utt-{n}" for block in blocks for n in block] for blocks in shards]
    num_rows = max(1, sum(map(len, names)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utterance_index, "_ENTRIES_PER_BUCKET", per_bucket)
        patch.setattr(index_builder, "_MAX_PARTITIONS", partitions)
        expected: dict[str, list[Place]] = {}
        with IndexBuilder(num_rows) as builder:
            for shard, (ids, blocks) in enumerate(zip(names, shards, strict=True)):
                index = reread(index_of(ids, [len(block) for block in blocks]))
                builder.add(shard, index)
                for row, utterance_id in enumerate(ids):
                    block, first_row = index.block_of_row(row)
                    assert block is not None
                    assert first_row <= row < first_row + block.num_rows
                    assert block.digest == block_digest(FILE[block.start : block.start + block.num_bytes])
                    expected.setdefault(utterance_id, []).append(Place(shard, block))
            buckets = list(builder.buckets())
        assert len(buckets) == num_buckets(num_rows)
    entries = [read_bucket(data, bucket, len(buckets)) for bucket, data in enumerate(buckets)]
    assert sum(map(len, entries)) == sum(map(len, names))
    for utterance_id, places in expected.items():
        bucket = int(leading_bits(np.array([key_of(utterance_id)], np.uint64), len(buckets))[0])
        assert find(entries[bucket], key_of(utterance_id)) == places
    assert find(entries[0], key_of("another")) == []
    table = BucketTable.of((len(data), hashlib.sha256(data).hexdigest()) for data in buckets)
    assert [table.sha256(n) for n in range(len(table))] == [hashlib.sha256(data).hexdigest() for data in buckets]
    assert [table.num_bytes(n) for n in range(len(table))] == list(map(len, buckets))


def test_a_shard_without_blocks_is_found_as_a_whole() -> None:
    index = index_of(["a", "b"], [])
    assert index.block_of_row(1) == (None, 0)
    assert find(np.sort(index.entries(9), order="key"), key_of("b")) == [Place(9, None)]


@pytest.mark.parametrize(
    ("num_rows", "count"),
    [(1, 1), (4096, 1), (4097, 2), (8192, 2), (8193, 4), (3_600_000, 1024), (2**29, 2**17), (2**40, 2**17)],
)
def test_the_number_of_buckets(num_rows: int, count: int) -> None:
    assert num_buckets(num_rows) == count


def set_block(**fields: int) -> Callable[[Records], None]:
    def change(blocks: Records) -> None:
        for name, value in fields.items():
            blocks[name][1] = value

    return change


HOSTILE_BLOCKS = {
    "outside the file": set_block(num_bytes=2000),
    "far outside the file": set_block(start=2**32 - 1, num_bytes=2**32 - 1),
    "overlapping": set_block(start=16),
    "in another order": set_block(start=0),
    "of no bytes": set_block(num_bytes=0),
    "of no rows": set_block(num_rows=0),
    "of other rows": set_block(num_rows=4),
    "of rows that wrap": set_block(num_rows=2**32 - 1),
}


@pytest.mark.parametrize("name", HOSTILE_BLOCKS)
def test_hostile_blocks_are_refused(name: str) -> None:
    honest = index_of(list("abcde"), [2, 3])
    reread(honest)
    blocks = honest.blocks.copy()
    HOSTILE_BLOCKS[name](blocks)
    with pytest.raises(ValueError, match="blocks of the index"):
        reread(ShardIndex(blocks, honest.keys_N))


def test_an_index_that_does_not_fit_its_shard_is_refused() -> None:
    text = index_of(list("abcde"), [2, 3]).to_base64()
    for num_utterances in (0, 4, 6, 2**30):
        with pytest.raises(ValueError, match="does not fit"):
            ShardIndex.from_base64(text, num_utterances=num_utterances, file_bytes=[len(FILE)])
    for file_bytes in ([], [len(FILE), 1], [10]):
        with pytest.raises(ValueError, match="not within the one file"):
            ShardIndex.from_base64(text, num_utterances=5, file_bytes=file_bytes)
    for damaged in (text[:-1], text[:-4], "!" + text[1:], text.rstrip("=") + "B"):
        with pytest.raises(ValueError):
            ShardIndex.from_base64(damaged, num_utterances=5, file_bytes=[len(FILE)])


def test_a_table_that_does_not_fit_its_dataset_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    table = BucketTable.of([(40 * 9, "0" * 64), (40 * 2, "1" * 64)])
    text = table.to_base64()
    BucketTable.from_base64(text, num_rows=5000, num_utterances=11)
    for num_rows in (10, 10_000):
        with pytest.raises(ValueError, match="an index of 72 bytes, expected"):
            BucketTable.from_base64(text, num_rows=num_rows, num_utterances=11)
    with pytest.raises(ValueError, match="do not hold 12 utterances"):
        BucketTable.from_base64(text, num_rows=5000, num_utterances=12)
    monkeypatch.setattr(utterance_index, "MAX_BUCKET_ENTRIES", 8)
    with pytest.raises(ValueError, match="do not hold 11 utterances"):
        BucketTable.from_base64(text, num_rows=5000, num_utterances=11)


def test_a_bucket_that_is_not_sorted_or_not_its_own_is_refused() -> None:
    entries = np.zeros(3, ENTRY)
    entries["key"] = [1, 2, 2**63]
    assert len(read_bucket(entries.tobytes(), 0, 1)) == 3
    for data, bucket, count in ((entries.tobytes(), 0, 2), (entries.tobytes(), 1, 2), (entries[::-1].tobytes(), 0, 1)):
        with pytest.raises(IntegrityError, match=f"bucket {bucket} of the index"):
            read_bucket(data, bucket, count)


def test_a_bucket_beyond_what_readers_take_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_builder, "MAX_BUCKET_ENTRIES", 3)
    with IndexBuilder(4) as builder:
        builder.add(0, index_of(list("abcd"), [4]))
        with pytest.raises(InputError, match="4 utterances share a bucket of the index; at most 3 may"):
            list(builder.buckets())


def test_a_disk_without_room_is_noticed_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3999))
    with pytest.raises(InputError, match=r"4000 bytes are needed in .*, 3999 are free; set TMPDIR"):
        check_room(100)


class TestLruCache:
    def test_the_least_recently_used_goes_first(self) -> None:
        cache: LruCache[str, int] = LruCache(10)
        for name in "abc":
            cache.put(name, ord(name), 3)
        assert cache.get("a") == ord("a")
        cache.put("d", 1, 4)
        assert [name for name, _ in cache.items()] == ["d", "a", "c"]
        cache.put("d", 2, 5)
        assert [name for name, _ in cache.items()] == ["d", "a"]
        assert cache.get("b") is None

    def test_the_latest_is_kept_whatever_its_size(self) -> None:
        cache: LruCache[str, int] = LruCache(10)
        cache.put("a", 1, 3)
        cache.put("b", 2, 1000)
        assert cache.items() == [("b", 2)]

    @given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 12)), max_size=40))
    def test_never_more_than_that(self, steps: list[tuple[int, int]]) -> None:
        cache: LruCache[int, int] = LruCache(20)
        sizes: dict[int, int] = {}
        for key, size in steps:
            cache.put(key, size, size)
            sizes[key] = size
            held = cache.items()
            assert sum(sizes[name] for name, _ in held) <= 20
            assert all(value == sizes[name] for name, value in held)
            assert held[0][0] == key
