"""The Parquet form of a corpus manifest, and the rules that a row keeps by itself. See FORMAT.md, "Corpus manifest"."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from softlabel_schemas.errors import InputError

VERSION_1 = pa.schema(
    [
        pa.field("utterance_id", pa.string(), nullable=False),
        pa.field("audio", pa.string()),
        pa.field("features", pa.string()),
        pa.field("sha256", pa.string()),
        pa.field("sample_rate", pa.int32(), nullable=False),
        pa.field("num_samples", pa.int64(), nullable=False),
        pa.field("text", pa.string()),
        pa.field("speaker", pa.string()),
        pa.field("split", pa.string(), nullable=False),
        pa.field("hard_labels", pa.list_(pa.field("element", pa.int32(), nullable=False))),
    ]
)
# Parts of files. A file in which no row has any of them is of version 1, without these columns.
PART_FIELDS = (
    pa.field("start_sample", pa.int64()),
    pa.field("audio_offset", pa.int64()),
    pa.field("audio_bytes", pa.int64()),
)
# Of version 2, and of every table in memory.
SCHEMA = pa.schema([*VERSION_1, *PART_FIELDS])
# A reader takes one row group at a time: this many rows of 10 s with labels every 10 ms are 16 MB.
ROWS_PER_GROUP = 4096
NO_ROWS = "a corpus needs at least one utterance"
_VERSION = b"softlabels.corpus_version"
_FRAME_SHIFT = b"softlabels.hard_label_frame_shift_ms"
_INVENTORY = b"softlabels.inventory_digest"


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusMetadata:
    """Of the file as a whole; None where it does not say."""

    hard_label_frame_shift_ms: float | None
    inventory_digest: str | None

    def to_bytes(self, version: bytes = b"1") -> dict[bytes, bytes]:
        """As the file's key-value metadata."""
        found = {_VERSION: version}
        if self.hard_label_frame_shift_ms is not None:
            found[_FRAME_SHIFT] = repr(self.hard_label_frame_shift_ms).encode()
        if self.inventory_digest is not None:
            found[_INVENTORY] = self.inventory_digest.encode()
        return found


def read_metadata(schema: pa.Schema, *, where: str) -> CorpusMetadata:
    """Raises InputError where a Parquet file is not a corpus manifest."""
    metadata = schema.metadata or {}
    expected = {b"1": VERSION_1, b"2": SCHEMA}.get(metadata.get(_VERSION, b""))
    if expected is None or schema.names != expected.names:
        names = (expected or VERSION_1).names
        raise InputError(
            f"{where} is not a corpus manifest: columns {schema.names}, expected {names}; "
            "write it with softlabel_schemas.write_corpus"
        )
    try:
        return CorpusMetadata(
            hard_label_frame_shift_ms=float(metadata[_FRAME_SHIFT]) if _FRAME_SHIFT in metadata else None,
            inventory_digest=metadata[_INVENTORY].decode() if _INVENTORY in metadata else None,
        )
    except ValueError as error:
        raise InputError(f"{where} is not a corpus manifest: {error}") from None


def stored_form(table: pa.Table, metadata: CorpusMetadata) -> pa.Table:
    """Rows with the columns of ``SCHEMA`` as a file holds them: of version 1 where that has room for all they say."""
    if any(table[field.name].null_count < len(table) for field in PART_FIELDS):
        return table.replace_schema_metadata(metadata.to_bytes(b"2"))
    return table.select(VERSION_1.names).replace_schema_metadata(metadata.to_bytes(b"1"))


def checked_types(table: pa.Table, metadata: CorpusMetadata, *, where: str) -> pa.Table:
    """Rows of a manifest, some of its columns or all, in the types of ``SCHEMA``; all columns of version 1 get those of
    version 2.

    Raises:
        InputError: a column has other types, text is not UTF-8, or hard labels lack their metadata or have nulls.
    """
    try:
        table = table.replace_schema_metadata(None).cast(pa.schema([SCHEMA.field(name) for name in table.schema.names]))
        # Above all that text is UTF-8, which Parquet promises and Arrow does not look at.
        table.validate(full=True)
    except ValueError as error:
        raise InputError(f"{where} is not a corpus manifest: {error}") from None
    if table.schema.names == VERSION_1.names:
        for field in PART_FIELDS:
            table = table.append_column(field, pa.nulls(len(table), field.type))
    if "hard_labels" in table.schema.names and table["hard_labels"].null_count < len(table):
        frame_shift_ms = metadata.hard_label_frame_shift_ms
        if metadata.inventory_digest is None or frame_shift_ms is None or not 0 < frame_shift_ms < math.inf:
            raise InputError(
                f"{where} has hard labels, so its metadata must name their inventory and a positive frame shift; "
                f"found {metadata.inventory_digest} and {frame_shift_ms} ms"
            )
        if pc.list_flatten(table["hard_labels"]).null_count:
            raise InputError(f"{where} has a null among the hard labels; a frame without one has -1")
    return table


def check_rows(table: pa.Table, *, where: str, first_row: int = 0) -> None:
    """Raises InputError for a row that breaks a rule by itself; ``first_row`` is the first one's number in the file."""
    ids = table["utterance_id"]
    problems = {
        "utterance_id is empty": pc.equal(ids, ""),
        "neither audio nor features is given": pc.and_(pc.is_null(table["audio"]), pc.is_null(table["features"])),
        "sample_rate is not positive": pc.less_equal(table["sample_rate"], 0),
        "num_samples is not positive": pc.less_equal(table["num_samples"], 0),
        "start_sample is negative": pc.less(table["start_sample"], 0),
        "audio_offset is negative": pc.less(table["audio_offset"], 0),
        "audio_bytes is not positive": pc.less_equal(table["audio_bytes"], 0),
        "audio_offset and audio_bytes are not both given": pc.xor(
            pc.is_null(table["audio_offset"]), pc.is_null(table["audio_bytes"])
        ),
        "a part of the audio is given, and no audio": pc.and_(
            pc.is_null(table["audio"]),
            pc.or_(pc.is_valid(table["start_sample"]), pc.is_valid(table["audio_bytes"])),
        ),
    }
    for problem, bad in problems.items():
        if pc.any(bad).as_py():
            row = pc.index(bad, True).as_py()
            raise InputError(f"{where}: row {first_row + row} (utterance_id '{ids[row]}'): {problem}")
