"""Zarr shards by an attacker who writes every byte, with valid digests, and what both containers decompress: each is refused.

Every test is a hole that was there once, or would be with a general reader in place of ours; ``tests/fuzz`` looks for more.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import zarr
from numcodecs.zstd import Zstd

from softlabel_schemas import (
    IntegrityError,
    zarr_shard,
)
from softlabel_schemas.codec import Codec
from softlabel_schemas.limits import MAX_SHARD_BYTES, max_decoded_bytes
from softlabel_schemas.shard import ShardColumns, decode_columns
from softlabel_schemas.zstd import decompress
from tests.support.hostile import CODEC, columns_of, either_codec

ZSTD = Zstd(level=3, checksum=True)


@pytest.fixture
def columns() -> ShardColumns:
    return columns_of(CODEC)


def metadata_with(**members: Any) -> Callable[[dict[str, bytes]], None]:
    def change(files: dict[str, bytes]) -> None:
        metadata = json.loads(files["tail_mass/zarr.json"]) | members
        files["tail_mass/zarr.json"] = json.dumps(metadata).encode()

    return change


def grid(chunk: int) -> dict[str, Any]:
    return {"name": "regular", "configuration": {"chunk_shape": [chunk]}}


def frame_with_size(size: int) -> Callable[[dict[str, bytes]], None]:
    """The header of a single segment with eight bytes of content size, and a checksum."""

    def change(files: dict[str, bytes]) -> None:
        files["tail_mass/c/0"] = b"\x28\xb5\x2f\xfd\xe4" + size.to_bytes(8, "little") + b"\x01\x00\x00" + bytes(4)

    return change


def zarr_bomb(files: dict[str, bytes]) -> None:
    """80 chunks of a MiB of zeros, each of which is stored in fifty bytes."""
    size = 80 << 20
    metadata_with(shape=[size], chunk_grid=grid(1 << 20))(files)
    files.update({f"tail_mass/c/{index}": ZSTD.encode(bytes(1 << 20)) for index in range(80)})


def wrap_lengths(files: dict[str, bytes]) -> None:
    """Lengths that add up to what is there in 64 bits."""
    lengths = np.frombuffer(ZSTD.decode(files["lengths/c/0"]), "<i8").copy()
    total = int(lengths[:3].sum())
    lengths[:3] = [2**63 - 1, 2**63 - 1, total + 2]
    files["lengths/c/0"] = ZSTD.encode(lengths.tobytes())


def without_checksum(files: dict[str, bytes]) -> None:
    files["tail_mass/c/0"] = Zstd(level=3).encode(ZSTD.decode(files["tail_mass/c/0"]))


def longer_metadata(files: dict[str, bytes]) -> None:
    files["tail_mass/zarr.json"] += b" " * (64 << 10)


def other_file(files: dict[str, bytes]) -> None:
    files["tail_mass/c/1"] = files["tail_mass/c/0"]


PICKLE = {"name": "numcodecs.pickle", "configuration": {}}
HOSTILE_ZARR: dict[str, tuple[Callable[[dict[str, bytes]], None], str]] = {
    "another codec": (metadata_with(codecs=[PICKLE]), "metadata have 'codecs'"),
    "one codec more": (metadata_with(codecs=[PICKLE, {"name": "bytes"}]), "metadata have 'codecs'"),
    "a storage transformer": (metadata_with(storage_transformers=[PICKLE]), "'storage_transformers'"),
    "attributes": (metadata_with(attributes={"a": 1}), "'attributes'"),
    "an unknown member": (metadata_with(x=1), "'x' 1, which shards do not"),
    "a shape without memory for it": (metadata_with(shape=[2**62], chunk_grid=grid(1 << 20)), "missing or too many"),
    "a shape of 2^100": (metadata_with(shape=[2**100], chunk_grid=grid(1 << 20)), "missing or too many"),
    "a negative shape": (metadata_with(shape=[-1]), "is not a 1-D array"),
    "a shape that is true": (metadata_with(shape=[True]), "is not a 1-D array"),
    "two dimensions": (metadata_with(shape=[1, 100]), "is not a 1-D array"),
    "another chunk": (metadata_with(chunk_grid=grid(2**40)), "metadata have 'chunk_grid'"),
    "another fill value": (metadata_with(fill_value=1), "metadata have 'fill_value' 1"),
    "a frame that claims a TiB": (frame_with_size(2**40), "a zstd frame declares 1099511627776 bytes"),
    "a frame without a checksum": (without_checksum, "chunk tail_mass/c/0: a zstd frame has no checksum"),
    "a bomb": (zarr_bomb, "claims to decompress to more than 67"),
    "lengths that wrap": (wrap_lengths, "lie outside"),
    "metadata without end": (longer_metadata, "too many for metadata"),
    "a chunk too many": (other_file, "a file is missing or too many"),
}


@pytest.mark.parametrize("name", HOSTILE_ZARR)
@either_codec
def test_a_hostile_zarr_shard_is_refused(codec: Codec, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    change, message = HOSTILE_ZARR[name]
    files = zarr_shard.encode(columns_of(codec), codec.zstd_level)
    zarr_shard.decode(files, codec.streams, where="here")
    change(files)
    # No codec is looked up, whatever the metadata name: nothing of Zarr is asked.
    monkeypatch.setattr(zarr, "open_group", None)
    monkeypatch.setattr(zarr.registry, "get_codec_class", None)
    with pytest.raises(IntegrityError, match=rf"^here: not a readable Zarr shard: .*{message}"):
        zarr_shard.decode(files, codec.streams, where="here")


def test_single_bytes_may_have_a_byte_order(columns: ShardColumns) -> None:
    files = zarr_shard.encode(columns, CODEC.zstd_level)
    zstd = {"name": "zstd", "configuration": {"level": 3, "checksum": True}}
    for codec in ({"name": "bytes"}, {"name": "bytes", "configuration": {"endian": "little"}}):
        metadata_with(codecs=[codec, zstd])(files)
        assert zarr_shard.decode(files, CODEC.streams, where="here").utterance_ids == columns.utterance_ids


def test_a_frame_of_the_right_size_is_decompressed() -> None:
    for size in (0, 1, 255, 256, 65_791, 65_792, 500_000):
        data = np.random.default_rng(size).bytes(size // 2) + bytes(size - size // 2)
        assert decompress(ZSTD.encode(data) if size else pa.compress(data, "zstd", asbytes=True), size) == data


def test_what_is_not_one_frame_is_refused() -> None:
    frame = ZSTD.encode(b"labels" * 100)
    for hostile in (b"", frame[:3], frame[:-1], frame + b"\x00", frame + frame, b"\x00" + frame[1:]):
        with pytest.raises(ValueError, match="zstd"):
            decompress(hostile, 600)
    with pytest.raises(ValueError, match="declares 600 bytes, expected 599"):
        decompress(frame, 599)


def test_an_infinite_agreement_is_refused(columns: ShardColumns) -> None:
    hostile = replace(columns, agreement=np.full(3, np.inf, np.float32))
    with pytest.raises(IntegrityError, match="here: agreement is infinite"):
        decode_columns(hostile, CODEC, where="here")


def test_what_a_shard_may_decompress_to_is_bounded_by_its_size() -> None:
    assert max_decoded_bytes(0) == 64 << 20
    assert max_decoded_bytes(10 << 20) == (64 + 160) << 20
    assert max_decoded_bytes(MAX_SHARD_BYTES) == 4 << 30
