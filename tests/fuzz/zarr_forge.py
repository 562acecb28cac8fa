"""A Zarr shard with its metadata, chunks or zstd frames changed, and the rest consistent."""

from __future__ import annotations

import json
from functools import cache
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
from numcodecs.zstd import Zstd

from tests.fuzz import seeds
from tests.fuzz.mutate import EXTREMES, mutate_bytes, mutate_json, mutate_values

_ZSTD = Zstd(level=3, checksum=True)


def forge(rng: Random, number: int) -> dict[str, bytes]:
    """The files of the Zarr shard of seed ``number``, changed in one place or several."""
    files = dict(seeds.shards()[number].zarr)
    for _ in range(rng.choice((1, 1, 2, 3))):
        if rng.random() < 0.4:
            _change_values(rng, files, number)
        elif rng.random() < 0.15:
            _claim_shape(rng, files, number)
        else:
            rng.choice(_ACTIONS)(rng, files)
    return files


def _pick(rng: Random, files: dict[str, bytes], metadata: bool) -> str | None:
    names = sorted(name for name in files if name.endswith("zarr.json") is metadata)
    return rng.choice(names) if names else None


def _change_metadata(rng: Random, files: dict[str, bytes]) -> None:
    name = _pick(rng, files, metadata=True)
    if name is None:
        return
    try:
        files[name] = json.dumps(mutate_json(rng, json.loads(files[name]))).encode()
    except (ValueError, RecursionError):
        # Changed beyond JSON before.
        files[name] = mutate_bytes(rng, files[name])


def _change_file(rng: Random, files: dict[str, bytes]) -> None:
    name = rng.choice(sorted(files)) if files else "zarr.json"
    files[name] = mutate_bytes(rng, files.get(name, b"{}"))


def _change_values(rng: Random, files: dict[str, bytes], number: int) -> None:
    """The elements of an array; sometimes their number too, with metadata that say so."""
    honest = seeds.shards()[number].zarr
    name = _pick(rng, honest, metadata=False)
    if name is None:
        return
    array = name.split("/")[0]
    metadata = json.loads(honest[f"{array}/zarr.json"])
    dtype = np.dtype(metadata["data_type"]).newbyteorder("<")
    values = np.frombuffer(_values_of(number, name), dtype).copy()
    if rng.random() < 0.7 and dtype.kind in "iu":
        bits = np.dtype(f"u{dtype.itemsize}")
        values.view(bits)[rng.randrange(len(values))] = rng.choice(EXTREMES) % 2 ** (8 * dtype.itemsize)
        data = values.tobytes()
    else:
        data = mutate_values(rng, values.tobytes())
        data = data[: len(data) // dtype.itemsize * dtype.itemsize] or bytes(dtype.itemsize)
    metadata["shape"] = metadata["chunk_grid"]["configuration"]["chunk_shape"] = [len(data) // dtype.itemsize]
    files[f"{array}/zarr.json"] = json.dumps(metadata).encode()
    files[name] = _ZSTD.encode(data)


@cache
def _values_of(number: int, name: str) -> bytes:
    return bytes(_ZSTD.decode(seeds.shards()[number].zarr[name]))


def _forge_frame(rng: Random, files: dict[str, bytes]) -> None:
    """A zstd frame whose header claims another size: a single segment with eight bytes of it."""
    name = _pick(rng, files, metadata=False)
    if name is None:
        return
    claimed = (rng.choice(EXTREMES) % 2**64).to_bytes(8, "little")
    window = rng.randrange(256)
    head = bytes([0b1110_0100]) + claimed if rng.random() < 0.5 else bytes([0b1100_0100, window]) + claimed
    blocks = files[name][6:] if rng.random() < 0.5 else b"\x03\x00\x10\x00" * rng.randrange(1, 50)
    files[name] = b"\x28\xb5\x2f\xfd" + head + blocks


def _recompress(rng: Random, files: dict[str, bytes]) -> None:
    """Other frames of other data: without a checksum, several, of the wrong size."""
    name = _pick(rng, files, metadata=False)
    if name is None:
        return
    data = bytes(rng.choice((0, 1, 8, 40, 100_000, 1 << 20)))
    frame = _ZSTD.encode(data) if rng.random() < 0.5 else pa.compress(data, codec="zstd", asbytes=True)
    files[name] = frame * rng.choice((1, 1, 2))


def _claim_shape(rng: Random, files: dict[str, bytes], number: int) -> None:
    """A size that fits its chunk grid, with or without the chunks."""
    honest = seeds.shards()[number].zarr
    name = rng.choice(sorted(name for name in honest if name.endswith("/zarr.json")))
    size = rng.choice((*EXTREMES, 2**20, 2**20 + 1, 10 * 2**20))
    metadata: dict[str, Any] = json.loads(honest[name])
    metadata["shape"] = [size]
    metadata["chunk_grid"]["configuration"]["chunk_shape"] = [max(1, min(size, 1 << 20))]
    files[name] = json.dumps(metadata).encode()
    if 0 < size <= 10 * 2**20 and rng.random() < 0.7:
        array = name.split("/")[0]
        item = np.dtype(metadata["data_type"]).itemsize
        for index in range(-(-size // (1 << 20))):
            files[f"{array}/c/{index}"] = _zeros(min(size, 1 << 20) * item)


@cache
def _zeros(size: int) -> bytes:
    frame: bytes = _ZSTD.encode(bytes(size))
    return bytes(frame)


def _rename(rng: Random, files: dict[str, bytes]) -> None:
    if not files:
        return
    name = rng.choice(sorted(files))
    data = files[name] if rng.random() < 0.3 else files.pop(name)
    if rng.random() < 0.7:
        files[rng.choice((*sorted(files), "../x", "a/zarr.json", f"{name}/c/1", f"{name}0"))] = data


_ACTIONS = (_change_metadata, _change_metadata, _change_file, _forge_frame, _recompress, _rename)
