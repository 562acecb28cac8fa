"""Datasets by an attacker who writes every file, with valid seals and digests: each is refused before it does harm.

Every test is a hole that was there once, or would be with a general reader in place of ours; ``tests/fuzz`` looks for more.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from numcodecs.zstd import Zstd

from softlabel_schemas import (
    ClassInventory,
    InputError,
    IntegrityError,
    digest,
    open_dataset,
    parquet_shard,
    zarr_shard,
)
from softlabel_schemas.codec import Codec, build_codec
from softlabel_schemas.commit import read_commits, read_spec
from softlabel_schemas.digest import LabelHash, canonical_json, parse_canonical, parse_json, seal, sha256_hex, unseal
from softlabel_schemas.limits import MAX_COUNT, MAX_DOCUMENT_VALUES, MAX_SHARD_BYTES, max_decoded_bytes
from softlabel_schemas.manifest import CommitRecord, Manifest, from_bytes
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.shard import ShardColumns, decode_columns, encode_columns
from softlabel_schemas.strict import parse
from softlabel_schemas.thrift import read_struct
from softlabel_schemas.utterance_index import BucketTable
from softlabel_schemas.zstd import decompress
from tests.fuzz import parquet_forge, seeds
from tests.fuzz.mutate import varint
from tests.support.datasets import SPEC, random_utterance

ZSTD = Zstd(level=3, checksum=True)
CODEC = build_codec(SPEC)
either_codec = pytest.mark.parametrize(
    "codec", [CODEC, build_codec(SPEC.model_copy(update={"codec": "mtf-sqrt"}))], ids=["packed-u8", "mtf-sqrt"]
)


@pytest.fixture
def columns() -> ShardColumns:
    return columns_of(CODEC)


def columns_of(codec: Codec) -> ShardColumns:
    rng = np.random.default_rng(0)
    return encode_columns([random_utterance(rng, name, 20) for name in ("a", "ü", "c")], codec)


# --- documents --------------------------------------------------------------------------------------------------------


def set_field(path: str, value: Any) -> Callable[[Any], None]:
    *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))

    def change(body: Any) -> None:
        for part in parents:
            body = body[part]
        body[last] = value

    return change


def repeat_file(body: Any) -> None:
    body["shards"][0]["files"] *= 2


def set_version_1(body: Any) -> None:
    body["spec"]["format_version"] = 1
    body["fingerprint"] = sha256_hex(canonical_json(body["spec"]))


HOSTILE_MANIFESTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a count that int64 cannot hold": (set_field("shards.0.num_frames", 2**63), "less than or equal to 1099511627776"),
    "a count whose total int64 cannot hold": (set_field("shards.0.num_entries", MAX_COUNT + 1), "num_entries"),
    "more bytes than a shard may have": (
        set_field("shards.0.files.0.num_bytes", MAX_SHARD_BYTES + 1),
        "a shard at most",
    ),
    "a file given twice": (repeat_file, "the files are not sorted by name, each once"),
    "a sum that overflows": (set_field("shards.0.sums.entropy", 1e308), "sums.entropy"),
    "a frame shift without end": (set_field("spec.frame_shift_ms", 1e308), "spec.frame_shift_ms"),
    "rows without end": (set_field("storage.num_rows", 10**30), "storage.num_rows"),
    "an index of another size": (set_field("index", "AAAA"), "an index of 3 bytes, expected 1 buckets of 36"),
    "an index of other utterances": (
        set_field("index", BucketTable.of([(0, "0" * 64)]).to_base64()),
        "the buckets of the index do not hold 4 utterances",
    ),
    "an index that is no base64": (set_field("index", "!" * 48), "index|base64"),
    "no index": (lambda body: body.pop("index"), "an utterance index belongs to format version 2"),
    "an index that is null": (set_field("index", None), "an utterance index belongs to format version 2"),
    "an index in format version 1": (set_version_1, "an utterance index belongs to format version 2"),
}


@pytest.mark.parametrize("name", HOSTILE_MANIFESTS)
def test_a_hostile_manifest_is_refused(tmp_path: Path, name: str) -> None:
    change, message = HOSTILE_MANIFESTS[name]
    body = seeds.body(seeds.datasets()[0], "manifest.json")
    from_bytes(Manifest, seal(body), where="here")
    change(body)
    (tmp_path / "manifest.json").write_bytes(seal(body))
    with pytest.raises(IntegrityError, match=message):
        open_dataset(tmp_path)


@pytest.mark.parametrize("text", ["", "AAAA", "A" * 2731 + "!", "ä" * 2732, LabelHash().to_base64()[:-2] + "B="])
def test_a_commit_record_with_another_label_hash_is_refused(text: str) -> None:
    body = seeds.body(seeds.datasets()[0], "commits/000000.json")
    from_bytes(CommitRecord, seal(body), where="here")
    with pytest.raises(IntegrityError, match=r"^here is not valid:\n  label_hash: "):
        from_bytes(CommitRecord, seal(body | {"label_hash": text}), where="here")


@pytest.mark.parametrize("text", ["", "AAAA", "!" * 64, None])
def test_a_commit_record_with_another_index_is_refused(tmp_path: Path, text: str | None) -> None:
    for name, data in seeds.datasets()[0].items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    body = seeds.body(seeds.datasets()[0], "commits/000000.json")
    body["index"] = text
    if text is None:
        del body["index"]
    (tmp_path / "commits" / "000000.json").write_bytes(seal(body))
    store = ObjectStore(tmp_path)
    for read in (lambda: open_dataset(tmp_path)[0], lambda: read_commits(store, read_spec(store), [0])):
        with pytest.raises(IntegrityError, match=r"(?s)000000\.json.*(index|base64)"):
            read()


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 100_000,
        b'{"names":' * 100_000,
        b'{"names":["\\ud800"]}',
        b'{"names":["\\uDFFF"]}',
        b"[" + b"1" * 5000 + b"]",
        '{"names":["a"]}'.encode("utf-16-le"),
    ],
    ids=["deep", "deep objects", "half a surrogate pair", "the other half", "a long number", "UTF-16"],
)
def test_a_hostile_inventory_is_refused(data: bytes) -> None:
    with pytest.raises(InputError, match=r"^here is not a class inventory: "):
        ClassInventory.from_json(data, where="here")


def test_a_surrogate_pair_is_a_character() -> None:
    assert ClassInventory.from_json(b'{"names":["\\ud83d\\ude00"]}', where="here").names == ("\U0001f600",)


def test_a_repeated_name_is_found_in_linear_time() -> None:
    """Comparing each with each takes half an hour."""
    names = [str(n) for n in range(500_000)]
    with pytest.raises(InputError, match="'499999' is repeated"):
        parse(ClassInventory, {"names": [*names, "499999"]}, where="here")


def test_a_document_of_too_many_values_is_neither_parsed_nor_written(monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"[" + b"0," * MAX_DOCUMENT_VALUES + b"0]"
    with pytest.raises(ValueError, match="a JSON document of 4194305 values, expected at most 4194304"):
        parse_json(data)
    monkeypatch.setattr(digest, "MAX_DOCUMENT_VALUES", 99)
    with pytest.raises(ValueError, match="a JSON document of 100 values, expected at most 99"):
        seal([0] * 100)
    with pytest.raises(InputError, match="the class inventory cannot be stored: a JSON document of 105 values"):
        ClassInventory(names=tuple(map(str, range(100)))).to_json()


def test_messages_stay_short_and_printable() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    hostile = {"names": [deep] * 1000, "\x1b[2J": 1, "x" * 1_000_000: 1}
    with pytest.raises(InputError) as caught:
        parse(ClassInventory, hostile, where="here")
    message = str(caught.value)
    assert message.endswith("  and 982 problems more")
    assert len(message) < 5000
    assert message.replace("\n", "").isprintable()


@pytest.mark.parametrize(
    "body", [b"NaN", b"1e999", b'{"a":1,"a":2}', b'"\\ud800"', b"01", b"\xff", b" 1", b"[" * 100_000]
)
def test_a_seal_does_not_make_json_of_anything(body: bytes) -> None:
    data = b'{"body":' + body + b',"sha256":"' + sha256_hex(body).encode() + b'"}'
    with pytest.raises(IntegrityError, match=r"^here: (not a sealed JSON document|its JSON is not in canonical form)"):
        parse_canonical(unseal(data, where="here"), where="here")


# --- Parquet ----------------------------------------------------------------------------------------------------------


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


# --- Zarr -------------------------------------------------------------------------------------------------------------


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


# --- zstd and decoded labels ------------------------------------------------------------------------------------------


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
