"""Corpus manifests of any size, written a row group at a time; their audio does not exist."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from softlabel_schemas import ClassInventory
from softlabel_schemas.corpus_schema import ROWS_PER_GROUP, VERSION_1, CorpusMetadata

SECONDS = 10.0
NUM_LABELS = 1000


def write_large_manifest(
    path: Path, num_rows: int, inventory: ClassInventory | None, *, rows_per_group: int = ROWS_PER_GROUP
) -> Path:
    """Utterances of 10 s with a hard label every 10 ms: 4 kB each in memory, a tenth of that in the file. Without an inventory
    they have no hard labels."""
    metadata = CorpusMetadata(
        hard_label_frame_shift_ms=inventory and 10.0, inventory_digest=inventory and inventory.digest()
    )
    with pq.ParquetWriter(
        path, VERSION_1.with_metadata(metadata.to_bytes()), compression="zstd", write_page_checksum=True
    ) as writer:
        for start in range(0, num_rows, rows_per_group):
            indices = np.arange(start, min(start + rows_per_group, num_rows))
            writer.write_table(_rows(indices, inventory.num_classes if inventory else 0), row_group_size=rows_per_group)
    return path


def _rows(indices: np.ndarray, num_classes: int) -> pa.Table:
    count = len(indices)
    # Runs of 8 frames, about as in an alignment.
    rng = np.random.default_rng(indices[0])
    columns = {
        "utterance_id": pa.array([f"corpus-speaker-{index // 100:06d}-utterance-{index:08d}" for index in indices]),
        "audio": pa.array([f"audio/{index // 100:06d}/{index:08d}.flac" for index in indices]),
        "sha256": pa.array([rng.bytes(32).hex() for _ in indices]),
        "sample_rate": pa.array(np.full(count, 16_000, dtype=np.int32)),
        "num_samples": pa.array(np.full(count, round(SECONDS * 16_000), dtype=np.int64)),
        "split": pa.array(["train"] * count),
    }
    if num_classes:
        labels = np.repeat(rng.integers(0, num_classes, (count, NUM_LABELS // 8), dtype=np.int32), 8, axis=1)
        columns["hard_labels"] = pa.ListArray.from_arrays(
            pa.array(np.arange(count + 1, dtype=np.int32) * NUM_LABELS), pa.array(labels.reshape(-1))
        )
    return pa.table([columns.get(f.name, pa.nulls(count, f.type)).cast(f.type) for f in VERSION_1], schema=VERSION_1)
