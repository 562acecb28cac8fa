"""Files whose digests are right but whose writer was wrong, and the checksums inside the containers."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from softlabel_schemas import IntegrityError
from softlabel_schemas.codec import build_codec
from softlabel_schemas.containers import CONTAINERS, Container
from softlabel_schemas.shard import ShardColumns, decode_columns, encode_columns
from softlabel_schemas.spec import DatasetSpec, ShardFormat
from tests.support.datasets import SPEC, random_utterance


def cut_elsewhere(columns: ShardColumns) -> ShardColumns:
    """A few class ids more for the first utterance, as many less for the second; their sum is right."""
    name = "class_ids" if "class_ids" in columns.streams else "positions"
    data, offsets = columns.streams[name]
    moved = offsets.copy()
    moved[1] += 2
    return replace(columns, streams=columns.streams | {name: (data, moved)})


def with_class_id(columns: ShardColumns, class_id: int) -> ShardColumns:
    """The first entry's: to "mtf-sqrt" it is a new class, of a single byte below 256."""
    name, size = ("class_ids", 2) if "class_ids" in columns.streams else ("new_ids", 1)
    data, offsets = columns.streams[name]
    changed = class_id.to_bytes(size, "little") + bytes(data[size:])
    return replace(columns, streams=columns.streams | {name: (memoryview(changed), offsets)})


ONE_MOVED, MANY_MOVED = np.array([1, -1, 0], dtype=np.int32), np.array([-99, 99, 0], dtype=np.int32)
FOREIGN: dict[str, tuple[Callable[[ShardColumns], ShardColumns], str]] = {
    "a repeated id": (lambda c: replace(c, utterance_ids=("a", "b", "a")), "an utterance id is repeated"),
    "entries": (
        lambda c: replace(c, num_entries=c.num_entries + ONE_MOVED),
        "num_entries does not match the stored counts",
    ),
    "frames": (
        lambda c: replace(c, num_frames=c.num_frames + ONE_MOVED),
        "stream 'counts' has 20 bytes for utterance 0 of the shard, expected 21",
    ),
    "negative frames": (lambda c: replace(c, num_frames=c.num_frames + MANY_MOVED), "num_frames is negative"),
    "another cut": (
        cut_elsewhere,
        r"stream '(class_ids|positions)' has \d+ bytes for utterance 0 of the shard, expected \d+",
    ),
    "no kept mass": (lambda c: replace(c, kept_mass=c.kept_mass * np.float32("nan")), "kept_mass is not finite"),
    "no entropy": (lambda c: replace(c, entropy=c.entropy * np.float32("inf")), "entropy is not finite"),
    "an invalid target": (
        lambda c: with_class_id(c, 50),
        r"class id 50 found, but there are 50 classes|frame \d+: a class id is not below the number of classes",
    ),
}


@pytest.fixture
def spec(codec: str) -> DatasetSpec:
    return SPEC.model_copy(update={"codec": codec})


@pytest.fixture
def columns(spec: DatasetSpec) -> ShardColumns:
    rng = np.random.default_rng(0)
    return encode_columns([random_utterance(rng, name, 20) for name in ("a", "b", "c")], build_codec(spec))


@pytest.fixture
def container(shard_format: ShardFormat) -> Container:
    return CONTAINERS[shard_format]


def encode(container: Container, columns: ShardColumns, spec: DatasetSpec) -> dict[str, bytes]:
    return container.encode(columns, build_codec(spec).zstd_level)


def decode(container: Container, files: dict[str, bytes], spec: DatasetSpec) -> None:
    codec = build_codec(spec)
    decode_columns(container.decode(files, codec.streams, where="here"), codec, where="here")


@pytest.mark.parametrize("name", FOREIGN)
def test_broken_invariants_are_refused(
    container: Container, spec: DatasetSpec, columns: ShardColumns, name: str
) -> None:
    change, message = FOREIGN[name]
    decode(container, encode(container, columns, spec), spec)
    with pytest.raises(IntegrityError, match=f"^here: ({message})"):
        decode(container, encode(container, change(columns), spec), spec)


def test_a_missing_file_is_refused(container: Container, spec: DatasetSpec, columns: ShardColumns) -> None:
    files = encode(container, columns, spec)
    for name in files:
        with pytest.raises(IntegrityError, match=r"^here: "):
            decode(container, {other: data for other, data in files.items() if other != name}, spec)


def test_an_unknown_file_is_refused(container: Container, spec: DatasetSpec, columns: ShardColumns) -> None:
    with pytest.raises(IntegrityError, match=r"^here: .*more"):
        decode(container, encode(container, columns, spec) | {"more/c/0": b""}, spec)


ARRAYS = ("utterance_id", "lengths", "num_frames", "num_entries", "kept_mass", "entropy", "agreement")


def test_a_zarr_array_of_another_shard_is_refused(spec: DatasetSpec, columns: ShardColumns) -> None:
    container = CONTAINERS["zarr"]
    rng = np.random.default_rng(1)
    others = [random_utterance(rng, name, 15) for name in ("longer id", "d")]
    other, files = (encode(container, each, spec) for each in (encode_columns(others, build_codec(spec)), columns))
    for array in (*ARRAYS, *build_codec(spec).streams):
        replaced = {name: data for name, data in other.items() if name.startswith(f"{array}/")}
        assert len(replaced) == 2
        with pytest.raises(IntegrityError, match=r"^here: "):
            decode(container, files | replaced, spec)


def test_a_zarr_array_of_another_type_is_refused(spec: DatasetSpec, columns: ShardColumns) -> None:
    files = encode(CONTAINERS["zarr"], columns, spec)
    files["tail_mass/zarr.json"] = files["tail_mass/zarr.json"].replace(b'"uint8"', b'"int8"')
    with pytest.raises(IntegrityError, match=r"^here: .*'tail_mass' is not a 1-D array of uint8"):
        decode(CONTAINERS["zarr"], files, spec)


def test_a_parquet_column_of_another_type_is_refused(spec: DatasetSpec, columns: ShardColumns) -> None:
    container = CONTAINERS["parquet"]
    table = pq.read_table(io.BytesIO(encode(container, columns, spec)["shard.parquet"]))
    sink = io.BytesIO()
    pq.write_table(table.set_column(1, "num_frames", table["num_frames"].cast("int64")), sink)
    with pytest.raises(IntegrityError, match=r"^here: columns are .*, expected those of FORMAT.md"):
        decode(container, {"shard.parquet": sink.getvalue()}, spec)


def test_the_container_has_checksums_of_its_own(container: Container, spec: DatasetSpec, columns: ShardColumns) -> None:
    """For readers in other languages that have no digest at hand: any flip in a stream's payload is noticed."""
    files = encode(container, columns, spec)
    # Class ids, or what stands for them.
    name, start, stop = stored_stream(files, build_codec(spec).streams[1])
    # The first half may be page or frame header, some bits of which mean nothing.
    for position in range((start + stop) // 2, stop):
        damaged = bytearray(files[name])
        damaged[position] ^= 1 << position % 8
        with pytest.raises(IntegrityError):
            decode(container, files | {name: bytes(damaged)}, spec)


def stored_stream(files: dict[str, bytes], stream: str) -> tuple[str, int, int]:
    """The file and the bytes of it that hold a stream."""
    if "shard.parquet" not in files:
        return f"{stream}/c/0", 0, len(files[f"{stream}/c/0"])
    metadata = pq.ParquetFile(io.BytesIO(files["shard.parquet"])).metadata
    column = metadata.row_group(0).column(metadata.schema.names.index(stream))
    return "shard.parquet", column.data_page_offset, column.data_page_offset + column.total_compressed_size
