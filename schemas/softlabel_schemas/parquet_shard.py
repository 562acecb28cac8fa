"""Parquet container: one file, one utterance per row, streams as packed ``binary`` columns.

Measured: packed binary columns read at 13.7 M frames/s where ``list<uint16>`` gives 4.4; zstd-3, 64 rows a group.
Page checksums are written and verified, since plain Parquet returned silently wrong data for 137 of 200 bit flips.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from softlabel_schemas.codec import STREAMS
from softlabel_schemas.errors import IntegrityError
from softlabel_schemas.parquet_file import Column, ParquetColumns, SchemaError
from softlabel_schemas.shard import ShardColumns

FILE_NAME = "shard.parquet"
ROWS_PER_GROUP = 64

SCHEMA = pa.schema(
    [
        pa.field("utterance_id", pa.string(), nullable=False),
        pa.field("num_frames", pa.int32(), nullable=False),
        pa.field("num_entries", pa.int32(), nullable=False),
        pa.field("kept_mass", pa.float32(), nullable=False),
        pa.field("entropy", pa.float32(), nullable=False),
        pa.field("agreement", pa.float32(), nullable=True),
        *(pa.field(stream, pa.binary(), nullable=False) for stream in STREAMS),
    ]
)

_KINDS = {pa.string(): "STRING", pa.binary(): "BYTE_ARRAY", pa.int32(): "INT32", pa.float32(): "FLOAT"}
_COLUMNS = [Column(field.name, _KINDS[field.type], field.nullable) for field in SCHEMA]


def encode(columns: ShardColumns) -> dict[str, bytes]:
    agreement = pa.array(columns.agreement, mask=np.isnan(columns.agreement))
    arrays = [
        pa.array(columns.utterance_ids, pa.string()),
        pa.array(columns.num_frames),
        pa.array(columns.num_entries),
        pa.array(columns.kept_mass),
        pa.array(columns.entropy),
        agreement,
    ]
    for stream in STREAMS:
        data, offsets = columns.streams[stream]
        if offsets[-1] >= 2**31:
            raise ValueError(
                f"stream '{stream}' has {offsets[-1]} bytes, a shard holds less than 2 GiB; cut smaller shards"
            )
        buffers = [None, pa.py_buffer(offsets.astype(np.int32).tobytes()), pa.py_buffer(data)]
        arrays.append(pa.Array.from_buffers(pa.binary(), len(offsets) - 1, buffers))
    sink = io.BytesIO()
    pq.write_table(
        pa.Table.from_arrays(arrays, schema=SCHEMA),
        sink,
        row_group_size=ROWS_PER_GROUP,
        compression="zstd",
        compression_level=3,
        use_dictionary=False,
        # What the reader knows, whatever a later Arrow's default may be.
        data_page_version="1.0",
        write_statistics=["utterance_id", "num_frames", "num_entries", "kept_mass", "entropy", "agreement"],
        write_page_checksum=True,
    )
    return {FILE_NAME: sink.getvalue()}


def decode(files: Mapping[str, bytes], *, where: str) -> ShardColumns:
    """Raises IntegrityError where the files are not a shard of format version 1."""
    if set(files) != {FILE_NAME}:
        raise IntegrityError(f"{where}: expected the one file {FILE_NAME}, found {sorted(files)}")
    try:
        columns = ParquetColumns(files[FILE_NAME], _COLUMNS)
        ids, offsets = columns.strings("utterance_id")
        return ShardColumns(
            utterance_ids=tuple(str(ids[start:stop], "utf-8") for start, stop in itertools.pairwise(offsets.tolist())),
            num_frames=columns.numbers("num_frames"),
            num_entries=columns.numbers("num_entries"),
            kept_mass=columns.numbers("kept_mass"),
            entropy=columns.numbers("entropy"),
            agreement=columns.optional_floats("agreement"),
            streams={stream: columns.strings(stream) for stream in STREAMS},
        )
    except SchemaError as error:
        raise IntegrityError(f"{where}: {error}") from None
    except ValueError as error:
        raise IntegrityError(f"{where}: {FILE_NAME} cannot be read: {error}") from None
