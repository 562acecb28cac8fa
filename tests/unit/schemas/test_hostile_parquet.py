"""Parquet shards by an attacker who writes every byte, with valid digests: each is refused before it does harm.

Every test is a hole that was there once, or would be with a general reader in place of ours; ``tests/fuzz`` looks for more.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from softlabel_schemas import (
    IntegrityError,
    parquet_shard,
)
from softlabel_schemas.codec import Codec
from softlabel_schemas.shard import ShardColumns
from softlabel_schemas.thrift import read_struct
from tests.fuzz import parquet_forge
from tests.fuzz.mutate import varint
from tests.support.hostile import CODEC, columns_of, either_codec


@pytest.fixture
def columns() -> ShardColumns:
    return columns_of(CODEC)


def forged(columns: ShardColumns, change: Callable[[parquet_forge.File], None], *, fit_pages: bool = True) -> bytes:
    """``fit_pages``: after the change the sizes in page headers are corrected."""
    file = parquet_forge.take_apart(encode_parquet(columns))
    file = parquet_forge.take_apart(put_together(file, fit_pages=True))
    change(file)
    return put_together(file, fit_pages=fit_pages)


def put_together(file: parquet_forge.File, *, fit_pages: bool) -> bytes:
    return parquet_forge.put_together(Random(0), file, fit_pages=fit_pages, mutate_footer=False)


def encode_parquet(columns: ShardColumns) -> bytes:
    return parquet_shard.encode(columns, CODEC.zstd_level)["shard.parquet"]


def decode_parquet(data: bytes, codec: Codec = CODEC) -> ShardColumns:
    return parquet_shard.decode({"shard.parquet": data}, codec.streams, where="here")


def field(tree: parquet_forge.Tree, *path: int) -> Any:
    """A field by ids, of the first element of a list on the way; the field itself, to be changed."""
    for step, field_id in enumerate(path):
        found = next(entry for entry in tree if entry[0] == field_id)
        if step == len(path) - 1:
            return found
        tree = found[2][1][0] if isinstance(found[2], tuple) else found[2]
    raise AssertionError("an empty path")


def set_footer(*path: int, value: int) -> Callable[[parquet_forge.File], None]:
    def change(file: parquet_forge.File) -> None:
        field(file.footer, *path)[2] = value

    return change


def set_header(*path: int, value: int) -> Callable[[parquet_forge.File], None]:
    """In the first page of the last column, the tail masses."""

    def change(file: parquet_forge.File) -> None:
        field(file.chunks[0][-1][0].header, *path)[2] = value

    return change


def share_bytes(file: parquet_forge.File) -> None:
    """A hundred row groups of the same bytes."""
    groups = field(file.footer, 4)[2][1]
    groups *= 100
    field(file.footer, 3)[2] *= 100
    file.chunks += [[[] for _ in columns] for columns in file.chunks * 99]


def make_bomb(file: parquet_forge.File) -> None:
    page = file.chunks[0][-1][0]
    page.values = bytes(200 << 20)


def spoil_id(file: parquet_forge.File) -> None:
    file.chunks[0][0][0].values = file.chunks[0][0][0].values.replace("ü".encode(), b"\xff\xff")


def set_type_to_a_list(file: parquet_forge.File) -> None:
    field(file.footer, 2)[2][1][1][0][1:] = [9, (5, [1, 1])]


def set_levels(levels: bytes) -> Callable[[parquet_forge.File], None]:
    def change(file: parquet_forge.File) -> None:
        file.chunks[0][5][0].values = len(levels).to_bytes(4, "little") + levels + bytes(12)

    return change


HOSTILE_PARQUET: dict[str, tuple[Callable[[parquet_forge.File], None], str]] = {
    "a page that claims 2 GiB": (set_header(2, value=2**31 - 1), "claims to decompress to more than 67"),
    "a page of negative size": (set_header(2, value=-1), "is not within its column chunk"),
    "a page beyond its chunk": (set_header(3, value=10**6), "is not within its column chunk"),
    "a page of a billion rows": (set_header(5, 1, value=10**9), "more rows than the row group"),
    "a page of negative rows": (set_header(5, 1, value=-1), "a page has -1 rows"),
    "a dictionary page": (set_header(1, value=2), "a page of type 2 found"),
    "another encoding": (set_header(5, 2, value=5), "a page in encoding 5 found"),
    "a file of a trillion rows": (set_footer(3, value=10**12), "are not 1000000000000 rows"),
    "a row group of a trillion rows": (set_footer(4, 3, value=10**12), "are not 3 rows"),
    "another compression": (set_footer(4, 1, 3, 4, value=1), "compression 1 found"),
    "a bomb": (make_bomb, "claims to decompress to more than 67"),
    "an id that is no text": (spoil_id, "codec can't decode byte 0xff"),
    "levels without end": (set_levels(b"\x80" * 20), "definition levels are cut short"),
    "a run of no levels": (set_levels(b"\x00\x01" * 10), "definition levels are cut short"),
    "levels that are packed without end": (set_levels(varint(2**27 + 1) + b"\xff"), "definition levels are cut short"),
}


@pytest.mark.parametrize("name", HOSTILE_PARQUET)
@either_codec
def test_a_hostile_parquet_shard_is_refused(codec: Codec, name: str) -> None:
    change, message = HOSTILE_PARQUET[name]
    columns = columns_of(codec)
    decode_parquet(forged(columns, lambda file: None), codec)
    fit_pages = not name.startswith(("a page", "a dictionary", "another encoding"))
    with pytest.raises(IntegrityError, match=f"^here: shard.parquet cannot be read: .*{message}"):
        decode_parquet(forged(columns, change, fit_pages=fit_pages), codec)


def test_a_column_chunk_outside_the_file_is_refused(columns: ShardColumns) -> None:
    honest = encode_parquet(columns)
    file = parquet_forge.take_apart(honest)
    for value in (-1, 10**6, 2**62):
        # Over the chunk's own offset, which putting together would correct.
        field(file.footer, 4, 1, 3, 9)[2] = value
        encoded = parquet_forge.serialize(file.footer)
        size = int.from_bytes(honest[-8:-4], "little")
        data = honest[: -8 - size] + encoded + len(encoded).to_bytes(4, "little") + b"PAR1"
        with pytest.raises(IntegrityError, match=r"a column chunk of \d+ bytes at .* is not within the file"):
            decode_parquet(data)


def test_row_groups_that_share_their_bytes_are_refused(columns: ShardColumns) -> None:
    file = parquet_forge.take_apart(encode_parquet(columns))
    share_bytes(file)
    with pytest.raises(IntegrityError, match="column chunks overlap"):
        decode_parquet(put_together(file, fit_pages=True))


def test_a_column_whose_type_is_a_list_is_refused(columns: ShardColumns) -> None:
    with pytest.raises(IntegrityError, match=r"^here: columns are \['\?', 'num_frames INT32'"):
        decode_parquet(forged(columns, set_type_to_a_list))


def test_more_rows_than_a_shard_may_have_are_refused(columns: ShardColumns) -> None:
    def change(file: parquet_forge.File) -> None:
        field(file.footer, 4, 3)[2] = field(file.footer, 3)[2] = 1_000_001

    with pytest.raises(IntegrityError, match="1000001 rows are too many"):
        decode_parquet(forged(columns, change))


def test_an_encoding_in_which_few_bytes_are_many_rows_is_refused(columns: ShardColumns) -> None:
    """A dictionary of one value: 60 thousand rows a byte, for which Arrow allocates."""
    num_rows = 100_000
    schema = pq.read_schema(io.BytesIO(encode_parquet(columns)))
    table = pa.table(
        [pa.array([value] * num_rows, entry.type) for entry, value in zip(schema, CONSTANTS, strict=True)],
        schema=schema,
    )
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", use_dictionary=True)
    assert len(sink.getvalue()) < num_rows / 10
    with pytest.raises(IntegrityError, match=r"a page in encoding 8 found, expected 0 \(PLAIN\)"):
        decode_parquet(sink.getvalue())


CONSTANTS = ("", 0, 0, 0.0, 0.0, 0.0, b"", b"", b"", b"")


def test_an_arrow_schema_in_the_metadata_is_not_followed(columns: ShardColumns) -> None:
    """It could name extension types, whose code the reading process runs."""

    def change(file: parquet_forge.File) -> None:
        key_value = field(file.footer, 5)[2][1][0]
        assert key_value[0][2] == b"ARROW:schema"
        key_value[1][2] = b"!" * 1000

    found = decode_parquet(forged(columns, change))
    assert found.utterance_ids == columns.utterance_ids


def test_agreement_has_any_pattern_of_nulls(columns: ShardColumns) -> None:
    rng = np.random.default_rng(0)
    for num_rows, share in itertools.product((1, 7, 8, 9, 63, 64, 65, 200), (0.0, 0.1, 0.5, 0.95, 1.0)):
        agreement = rng.random(num_rows).astype(np.float32)
        agreement[rng.random(num_rows) < share] = np.nan
        zeros = np.zeros(num_rows, np.int32)
        made = ShardColumns(
            utterance_ids=tuple(f"utt-{n}" for n in range(num_rows)),
            num_frames=zeros,
            num_entries=zeros,
            kept_mass=zeros.astype(np.float32),
            entropy=zeros.astype(np.float32),
            agreement=agreement,
            streams={name: (memoryview(b""), np.zeros(num_rows + 1, np.int64)) for name in columns.streams},
        )
        found = decode_parquet(encode_parquet(made))
        np.testing.assert_array_equal(found.agreement, agreement, strict=True)
        assert found.utterance_ids == made.utterance_ids


def test_a_column_chunk_of_several_pages_is_read(columns: ShardColumns) -> None:
    def split(file: parquet_forge.File) -> None:
        first = file.chunks[0][3][0]
        second = parquet_forge.Page(parquet_forge.copied(first.header), first.values[8:])
        first.values = first.values[:8]
        field(first.header, 5, 1)[2], field(second.header, 5, 1)[2] = 2, 1
        file.chunks[0][3].append(second)

    data = forged(columns, split)
    np.testing.assert_array_equal(decode_parquet(data).kept_mass, columns.kept_mass, strict=True)
    assert pq.read_table(io.BytesIO(data))["kept_mass"].to_pylist() == columns.kept_mass.tolist()


HOSTILE_THRIFT = {
    "a list longer than the bytes": b"\x19\xfc" + varint(2**31) + b"\x00",
    "a binary longer than the bytes": b"\x18" + varint(2**40) + b"\x00",
    "a map longer than the bytes": b"\x1b" + varint(2**31) + b"\x55\x00",
    "a number without end": b"\x16" + b"\xff" * 1000,
    "a struct without end": b"\x1c" * 100_000,
    "lists without end": b"\x19" + b"\x19" * 100_000,
    "values without end": b"\x19\xf1" + varint(90_000) + b"\x01" * 90_000 + b"\x00",
    "a field given twice": b"\x15\x02" + b"\x05\x02\x02\x00",
    "an unknown type": b"\x1d\x00",
    "nothing": b"",
}


@pytest.mark.parametrize("name", HOSTILE_THRIFT)
def test_hostile_thrift_is_refused(name: str) -> None:
    data = HOSTILE_THRIFT[name]
    with pytest.raises(ValueError, match=r"Thrift"):
        read_struct(data, 0, len(data), max_values=10_000)
