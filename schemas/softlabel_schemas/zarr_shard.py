"""Zarr v3 container: one self-contained group per shard, 1-D arrays, zstd with checksums.

Zarr's chunks are not aligned with utterances, so per-utterance lengths lie in ``offsets`` beside the joined streams.
Chunk checksums are on (``ZstdCodec(checksum=True)``): without them 182 of 200 bit flips were read silently. The group
is built in memory and then written file by file, each file's digest standing in the commit record; one shard
has one writer, always. Zarr writes the group and any Zarr library reads it; ours reads it without one, since a shard may come
from a stranger (see ``_read_arrays``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BytesCodec, ZstdCodec
from zarr.storage import MemoryStore

from softlabel_schemas import zstd
from softlabel_schemas.digest import parse_json
from softlabel_schemas.errors import IntegrityError
from softlabel_schemas.limits import DecodingBudget
from softlabel_schemas.shard import Block, ShardColumns
from softlabel_schemas.strict import shortened

_STATS = ("kept_mass", "entropy", "agreement")
_COUNTS = ("num_frames", "num_entries")
_METADATA = "zarr.json"
_MAX_METADATA_BYTES = 64 << 10
# Members of the metadata that may be there if they are empty.
_SILENT = ("attributes", "storage_transformers", "dimension_names", "consolidated_metadata")
# Of zstd, as codecs ask for.
_LEVELS = (1, 3)
# Bytes (or elements) in one chunk: large enough for zstd to find repeats, small enough for partial reads.
_CHUNK = 1 << 20


def encode(columns: ShardColumns, zstd_level: int) -> dict[str, bytes]:
    files: dict[str, Any] = {}
    # Users can configure how zarr writes its metadata; the bytes of a shard must not depend on that.
    with zarr.config.set({"json_indent": 2}):
        _write_group(files, columns, ZstdCodec(level=zstd_level, checksum=True))
    return {name: buffer.to_bytes() for name, buffer in sorted(files.items())}


def _write_group(files: dict[str, Any], columns: ShardColumns, compressor: ZstdCodec) -> None:
    group = zarr.create_group(MemoryStore(files), zarr_format=3)
    ids = [utterance_id.encode() for utterance_id in columns.utterance_ids]
    _write(group, "utterance_id", np.frombuffer(b"".join(ids), dtype=np.uint8), compressor)
    for name in _COUNTS:
        _write(group, name, getattr(columns, name).astype("<i4"), compressor)
    for name in _STATS:
        _write(group, name, getattr(columns, name).astype("<f4"), compressor)
    lengths = [np.array([len(encoded) for encoded in ids], dtype="<i8")]
    for stream, (data, offsets) in columns.streams.items():
        _write(group, stream, np.frombuffer(data, dtype=np.uint8), compressor)
        lengths.append(np.diff(offsets))
    _write(group, "lengths", np.stack(lengths).astype("<i8").reshape(-1), compressor)


def _write(group: zarr.Group, name: str, values: npt.NDArray[Any], compressor: ZstdCodec) -> None:
    group.create_array(
        name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=(max(1, min(len(values), _CHUNK)),),
        serializer=BytesCodec(endian="little"),
        compressors=compressor,
        fill_value=0,
        # A chunk of zeros is written like any other: a missing chunk then always means damage.
        config={"write_empty_chunks": True},
    )[:] = values


def decode(files: Mapping[str, bytes], streams: Sequence[str], *, where: str) -> ShardColumns:
    """Raises IntegrityError where the files are not a shard with these streams."""
    # The rows of ``lengths``, in order.
    joined = ("utterance_id", *streams)
    dtypes: dict[str, np.dtype[Any]] = {
        **dict.fromkeys(joined, np.dtype("u1")),
        **dict.fromkeys(_COUNTS, np.dtype("<i4")),
        **dict.fromkeys(_STATS, np.dtype("<f4")),
        "lengths": np.dtype("<i8"),
    }
    unknown = sorted({name.partition("/")[0] for name in files} - {*dtypes, _METADATA})
    if unknown:
        raise IntegrityError(f"{where}: unexpected files {unknown}, expected the arrays {sorted(dtypes)}")
    try:
        arrays = _read_arrays(files, dtypes)
        num_utterances = len(arrays["num_frames"])
        for name in (*_COUNTS, *_STATS):
            if len(arrays[name]) != num_utterances:
                raise ValueError(f"array '{name}' has {len(arrays[name])} elements, expected {num_utterances}")
        lengths = arrays["lengths"]
        if len(lengths) != len(joined) * num_utterances:
            raise ValueError(f"array 'lengths' has {len(lengths)} elements, expected {len(joined)} x {num_utterances}")
        lengths = lengths.reshape(len(joined), num_utterances)
        offsets = np.zeros((len(joined), num_utterances + 1), dtype=np.int64)
        np.cumsum(lengths, axis=1, out=offsets[:, 1:])
        for name, row, end in zip(joined, lengths, offsets[:, -1], strict=True):
            size = len(arrays[name])
            # A sum may wrap: none of its terms may be larger than it.
            if size != end or ((row < 0) | (row > size)).any():
                raise ValueError(f"array '{name}' has {size} bytes, its lengths add up to {end} or lie outside")
        ids = arrays["utterance_id"].tobytes()
        bounds = itertools.pairwise(offsets[0].tolist())
        utterance_ids = tuple(ids[start:stop].decode() for start, stop in bounds)
    except ValueError as error:
        raise IntegrityError(f"{where}: not a readable Zarr shard: {error}") from None
    return ShardColumns(
        utterance_ids=utterance_ids,
        num_frames=arrays["num_frames"],
        num_entries=arrays["num_entries"],
        kept_mass=arrays["kept_mass"],
        entropy=arrays["entropy"],
        agreement=arrays["agreement"],
        streams={stream: (arrays[stream].data, offsets[row]) for row, stream in enumerate(streams, start=1)},
    )


def blocks(files: Mapping[str, bytes]) -> list[Block]:
    """None: each stream is an object of its own, so an utterance alone would take as many requests as all of them."""
    return []


def num_files(files: Mapping[str, bytes], factor: float) -> int:
    sizes: list[int] = [_metadata_of(files, name)["shape"][0] for name in files if name.endswith(f"/{_METADATA}")]
    return 1 + sum(1 + math.ceil(size * factor / _CHUNK) for size in sizes)


def decode_block(data: bytes, num_rows: int, streams: Sequence[str], *, where: str) -> ShardColumns:
    """Raises IntegrityError: there are no blocks."""
    raise IntegrityError(f"{where}: a Zarr shard has no blocks")


def _read_arrays(files: Mapping[str, bytes], dtypes: Mapping[str, np.dtype[Any]]) -> dict[str, npt.NDArray[Any]]:
    """All arrays of the group. Nothing is decompressed before all metadata was found to be what :func:`encode` writes.

    Zarr itself is not asked: it would look up whatever codec the metadata name, and allocate whatever shape they claim.
    """
    sizes = _check_metadata(files, dtypes)
    budget = DecodingBudget(sum(map(len, files.values())))
    return {name: _read(files, name, dtypes[name], size, budget) for name, size in sizes.items()}


def _check_metadata(files: Mapping[str, bytes], dtypes: Mapping[str, np.dtype[Any]]) -> dict[str, int]:
    """The number of elements of each array. Raises ValueError where the files are not those of such arrays."""
    _check_json(_metadata_of(files, _METADATA), {"zarr_format": 3, "node_type": "group"}, "the group")
    sizes: dict[str, int] = {}
    num_chunks: dict[str, int] = {}
    for name, dtype in dtypes.items():
        metadata = _metadata_of(files, f"{name}/{_METADATA}")
        if metadata.get("data_type") != dtype.name:
            raise ValueError(f"'{name}' is not a 1-D array of {dtype.name}")
        shape = metadata.get("shape")
        if not isinstance(shape, list) or len(shape) != 1 or type(shape[0]) is not int or shape[0] < 0:
            raise ValueError(f"'{name}' is not a 1-D array of {dtype.name}")
        sizes[name] = shape[0]
        num_chunks[name] = -(-shape[0] // _chunk_of(shape[0]))
        expected_metadata = _array_metadata(dtype, shape[0])
        if metadata.get("codecs") in _codecs(dtype):
            expected_metadata["codecs"] = metadata["codecs"]
        _check_json(metadata, expected_metadata, f"'{name}'")
    # As numbers first: a hostile shape has more chunks than there is memory for their names.
    expected = 1 + len(sizes) + sum(num_chunks.values())
    if expected != len(files):
        raise ValueError(f"a file is missing or too many: {len(files)} found, expected {expected}")
    missing = [f"{name}/c/{k}" for name, n in num_chunks.items() for k in range(n) if f"{name}/c/{k}" not in files]
    if missing:
        raise ValueError(f"chunk {missing[0]} is missing")
    return sizes


def _read(
    files: Mapping[str, bytes], name: str, dtype: np.dtype[Any], size: int, budget: DecodingBudget
) -> npt.NDArray[Any]:
    chunk = _chunk_of(size)
    parts = [np.empty(0, dtype)]
    for index, start in enumerate(range(0, size, chunk)):
        budget.spend(chunk * dtype.itemsize)
        try:
            data = zstd.decompress(files[f"{name}/c/{index}"], chunk * dtype.itemsize, checksum=True)
        except ValueError as error:
            raise ValueError(f"chunk {name}/c/{index}: {error}") from None
        # The last chunk is filled up.
        parts.append(np.frombuffer(data, dtype)[: size - start])
    return np.concatenate(parts)


def _metadata_of(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    data = files.get(name)
    if data is None or len(data) > _MAX_METADATA_BYTES:
        raise ValueError(
            f"{name} is missing" if data is None else f"{name} has {len(data)} bytes, too many for metadata"
        )
    metadata = parse_json(data)
    if not isinstance(metadata, dict):
        raise ValueError(f"{name} is not a JSON object")
    return metadata


def _array_metadata(dtype: np.dtype[Any], size: int) -> dict[str, Any]:
    """Section 9 of FORMAT.md."""
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [size],
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [_chunk_of(size)]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": _codecs(dtype)[0],
    }


def _codecs(dtype: np.dtype[Any]) -> list[list[dict[str, Any]]]:
    """Those that an array may have; what is written comes first."""
    orders = [{"name": "bytes", "configuration": {"endian": "little"}}]
    if dtype.itemsize == 1:
        # Single bytes have no order: it may be left out.
        orders.append({"name": "bytes"})
    return [
        [order, {"name": "zstd", "configuration": {"level": level, "checksum": True}}]
        for level in _LEVELS
        for order in orders
    ]


def _check_json(found: dict[str, Any], expected: dict[str, Any], where: str) -> None:
    """Members that say nothing may be there or not."""
    for key in found.keys() | expected.keys():
        value = found.get(key)
        if key in expected and value != expected[key]:
            raise ValueError(f"{where}: metadata have '{key}' {shortened(value)}, expected {expected[key]}")
        if key not in expected and (key not in _SILENT or value):
            raise ValueError(f"{where}: metadata have {shortened(key)} {shortened(value)}, which shards do not")


def _chunk_of(size: int) -> int:
    """Elements in each chunk of an array."""
    return max(1, min(size, _CHUNK))
