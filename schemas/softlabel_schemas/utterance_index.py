"""Utterance index: from an utterance id to the bytes of its labels (FORMAT.md, "Utterance index").

::

    commit record:  blocks of the shard, and a key for each utterance       ShardIndex   one for each shard
    index/NNNNNN-*: entries of all utterances whose keys begin alike        bucket       sorted by key
    manifest:       number of entries and sha256 of each bucket             BucketTable

A key is eight bytes of a hash and not the id: those of 360 million utterances take 3.8 GB in commit records, ids of 40
characters would take 14. Two ids share one with a probability of 0.4% among so many, so a reader compares the id that it finds.
A bucket has at most about 4,096 entries, 160 kB: less than a block, so that the first of the two requests of a cold access is
not the slower one.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from softlabel_schemas.errors import IntegrityError
from softlabel_schemas.limits import MAX_BUCKET_ENTRIES, MAX_INDEX_BUCKETS
from softlabel_schemas.shard import Block

_ENTRIES_PER_BUCKET = 4096
_KEY_BYTES, _DIGEST_BYTES = 8, 16

# Keys compare as byte strings do. "V": numpy strips zeros off "S".
_KEY = np.dtype(">u8")
_BLOCK = np.dtype([("start", "<u4"), ("num_bytes", "<u4"), ("num_rows", "<u4"), ("digest", f"V{_DIGEST_BYTES}")])
_BUCKET = np.dtype([("num_entries", "<u4"), ("sha256", "V32")])
ENTRY = np.dtype([("key", _KEY), ("shard", "<u4"), *((name, _BLOCK[name]) for name in _BLOCK.names or ())])

Keys = npt.NDArray[np.uint64]
# Structured arrays; numpy has no type for their fields.
Records = npt.NDArray[Any]


class BlockPlace(NamedTuple):
    """Bytes ``start`` to ``start + num_bytes - 1`` of the shard's only file, which hold ``num_rows`` utterances."""

    start: int
    num_bytes: int
    num_rows: int
    digest: bytes


class Place(NamedTuple):
    """Where the labels of an utterance are: a block of a shard, or somewhere in the shard (``block`` None)."""

    shard: int
    block: BlockPlace | None


def key_of(utterance_id: str) -> int:
    """The first eight bytes of the id's sha256, most significant first."""
    return int.from_bytes(hashlib.sha256(utterance_id.encode()).digest()[:_KEY_BYTES], "big")


def block_digest(data: bytes | memoryview) -> bytes:
    """The first 16 bytes of sha256: enough against chance and forgery, at half of what the index needs for digests."""
    return hashlib.sha256(data).digest()[:_DIGEST_BYTES]


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """What a commit record says of a shard's utterances.

    Attributes:
        blocks: of B blocks start, num_bytes, num_rows, digest; none where a shard can only be read as a whole.
        keys_N: big-endian uint64, in the order of the utterances.
    """

    blocks: Records
    keys_N: Keys

    @classmethod
    def of(cls, utterance_ids: Sequence[str], blocks: Sequence[Block], files: Mapping[str, bytes]) -> ShardIndex:
        """Of a shard just encoded."""
        found = np.empty(len(blocks), _BLOCK)
        for position, block in enumerate(blocks):
            data = memoryview(files[block.file])[block.start : block.stop]
            found[position] = (block.start, len(data), block.num_rows, block_digest(data))
        return cls(found, np.array([key_of(utterance_id) for utterance_id in utterance_ids], _KEY))

    def to_base64(self) -> str:
        return base64.b64encode(self.blocks.tobytes() + self.keys_N.tobytes()).decode("ascii")

    @classmethod
    def from_base64(cls, text: str, *, num_utterances: int, file_bytes: Sequence[int]) -> ShardIndex:
        """The index of a shard of so many utterances, whose files have these sizes.

        Raises:
            ValueError: it is not what :meth:`to_base64` gives, or its blocks are not those of such a shard.
        """
        data = _unpacked(text)
        num_blocks, rest = divmod(len(data) - _KEY_BYTES * num_utterances, _BLOCK.itemsize)
        if not 0 <= num_blocks <= num_utterances or rest:
            raise ValueError(f"an index of {len(data)} bytes does not fit {num_utterances} utterances")
        blocks = np.frombuffer(data, _BLOCK, num_blocks)
        keys_N = np.frombuffer(data, _KEY, num_utterances, offset=blocks.nbytes)
        if num_blocks:
            starts_B, rows_B = blocks["start"].astype(np.int64), blocks["num_rows"].astype(np.int64)
            stops_B = starts_B + blocks["num_bytes"]
            if len(file_bytes) != 1 or stops_B[-1] > file_bytes[0] or (starts_B[1:] < stops_B[:-1]).any():
                raise ValueError("the blocks of the index overlap or are not within the one file of a shard")
            if not blocks["num_bytes"].all() or not rows_B.all() or rows_B.sum() != num_utterances:
                raise ValueError(f"the blocks of the index do not hold {num_utterances} utterances")
        return cls(blocks, keys_N)

    def entries(self, shard: int) -> Records:
        """The entries of its utterances, in order, ENTRY [N]."""
        found = np.zeros(len(self.keys_N), ENTRY)
        found["key"], found["shard"] = self.keys_N, shard
        if len(self.blocks):
            for name in _BLOCK.names or ():
                found[name] = np.repeat(self.blocks[name], self.blocks["num_rows"])
        return found

    def block_places(self) -> list[BlockPlace]:
        return [_block_place(record) for record in self.blocks]

    def block_of_row(self, row: int) -> tuple[BlockPlace | None, int]:
        """The block of the shard's utterance ``row``, and the utterances before that block."""
        if not len(self.blocks):
            return None, 0
        stops_B = np.cumsum(self.blocks["num_rows"], dtype=np.int64)
        position = int(np.searchsorted(stops_B, row, side="right"))
        block = _block_place(self.blocks[position])
        return block, int(stops_B[position]) - block.num_rows


class BucketTable:
    """The manifest's table of buckets: ``num_entries`` and ``sha256`` of each."""

    def __init__(self, records: Records) -> None:
        self.records = records

    @classmethod
    def of(cls, buckets: Iterable[tuple[int, str]]) -> BucketTable:
        """Of the number of bytes and the sha256 of each bucket."""
        found = [(num_bytes // ENTRY.itemsize, bytes.fromhex(sha256)) for num_bytes, sha256 in buckets]
        return cls(np.array(found, _BUCKET))

    def to_base64(self) -> str:
        """48 characters a bucket, against 130 for a file record, and no objects in memory."""
        return base64.b64encode(self.records.tobytes()).decode("ascii")

    @classmethod
    def from_base64(cls, text: str, *, num_rows: int, num_utterances: int) -> BucketTable:
        """Raises ValueError unless it can be the table of a dataset of so many corpus rows and utterances."""
        data, expected = _unpacked(text), num_buckets(num_rows)
        if len(data) != expected * _BUCKET.itemsize:
            raise ValueError(f"an index of {len(data)} bytes, expected {expected} buckets of {_BUCKET.itemsize}")
        records = np.frombuffer(data, _BUCKET)
        counts = records["num_entries"]
        if counts.max() > MAX_BUCKET_ENTRIES or counts.sum(dtype=np.int64) != num_utterances:
            raise ValueError(f"the buckets of the index do not hold {num_utterances} utterances")
        return cls(records)

    def __len__(self) -> int:
        return len(self.records)

    def sha256(self, bucket: int) -> str:
        return bytes(self.records["sha256"][bucket].tobytes()).hex()

    def num_bytes(self, bucket: int) -> int:
        return int(self.records["num_entries"][bucket]) * ENTRY.itemsize


def num_buckets(num_rows: int) -> int:
    """A power of two, so that a bucket is the leading bits of a key. Of corpus rows, which are known beforehand, and not of
    utterances: a writer sorts into buckets while it reads."""
    return min(1 << max(0, (num_rows - 1) // _ENTRIES_PER_BUCKET).bit_length(), MAX_INDEX_BUCKETS)


def leading_bits(keys: Keys, count: int) -> npt.NDArray[np.int64]:
    """``keys`` cut into ``count`` (a power of two) equal ranges: the number of the range of each."""
    bits = count.bit_length() - 1
    native = keys.astype(np.uint64)
    return (native >> np.uint64(64 - bits)).astype(np.int64) if bits else np.zeros(len(native), np.int64)


def read_bucket(data: bytes, bucket: int, count: int) -> Records:
    """The entries of a bucket whose bytes have the expected digest, ENTRY [N].

    Raises:
        IntegrityError: they are not sorted by key, or lie in another of the ``count`` buckets.
    """
    entries = np.frombuffer(data, ENTRY)
    keys = entries["key"].astype(np.uint64)
    if (keys[1:] < keys[:-1]).any() or (leading_bits(keys, count) != bucket).any():
        raise IntegrityError(f"bucket {bucket} of the index: its keys are not sorted or not its own")
    return entries


def find(entries: Records, key: int) -> list[Place]:
    """Where the utterances of ``key`` are: none where there is no such utterance, more than one in a few datasets."""
    keys_N = entries["key"]
    start, stop = (int(np.searchsorted(keys_N, np.uint64(key), side)) for side in ("left", "right"))
    return [
        Place(int(entry["shard"]), _block_place(entry) if entry["num_bytes"] else None) for entry in entries[start:stop]
    ]


def _block_place(record: Any) -> BlockPlace:
    start, num_bytes, num_rows = (int(record[name]) for name in ("start", "num_bytes", "num_rows"))
    return BlockPlace(start, num_bytes, num_rows, record["digest"].tobytes())


def _unpacked(text: str) -> bytes:
    data = base64.b64decode(text, validate=True)
    if base64.b64encode(data).decode("ascii") != text:
        raise ValueError("an index is not in canonical base64")
    return data
