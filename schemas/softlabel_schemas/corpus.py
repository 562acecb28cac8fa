"""The corpus manifest: one Parquet row per utterance, with optional frame-level hard labels.

Columns and file metadata are specified in FORMAT.md, "Corpus manifest". Locations may be relative to the manifest.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from softlabel_schemas.arrow import joined_bytes
from softlabel_schemas.errors import InputError
from softlabel_schemas.inventory import ClassInventory
from softlabel_schemas.object_store import ObjectStore

SCHEMA = pa.schema(
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
_VERSION = b"softlabels.corpus_version"
_FRAME_SHIFT = b"softlabels.hard_label_frame_shift_ms"
_INVENTORY = b"softlabels.inventory_digest"


@dataclass(frozen=True, kw_only=True, slots=True)
class Utterance:
    """One row of a corpus.

    Attributes:
        audio: location of an audio file, or None where ``features`` is given.
        features: location of a ``.npy`` file, float32 [frames, dimensions].
        sha256: of the audio file's bytes, or of the feature file's where there is no audio; checked when it is read.
        hard_labels: class id of each frame, int32 [frames], -1 for a frame without one; None without hard labels.
    """

    utterance_id: str
    sample_rate: int
    num_samples: int
    split: str
    audio: str | None = None
    features: str | None = None
    sha256: str | None = None
    text: str | None = None
    speaker: str | None = None
    hard_labels: npt.NDArray[np.int32] | None = None

    @property
    def seconds(self) -> float:
        return self.num_samples / self.sample_rate


class Corpus:
    """A corpus manifest in memory; :func:`load_corpus` makes one.

    Attributes:
        table: rows with the columns of ``SCHEMA``.
        hard_label_frame_shift_ms: None where no row has hard labels.
        inventory_digest: of the inventory that the hard labels are ids of.
        base_url: what relative locations are relative to.
    """

    def __init__(
        self, table: pa.Table, *, hard_label_frame_shift_ms: float | None, inventory_digest: str | None, base_url: str
    ) -> None:
        self.table = table
        self.hard_label_frame_shift_ms = hard_label_frame_shift_ms
        self.inventory_digest = inventory_digest
        self.base_url = base_url

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, row: int) -> Utterance:
        return next(self.rows(row, row + 1))

    def __iter__(self) -> Iterator[Utterance]:
        return self.rows(0, len(self))

    def rows(self, start: int, stop: int) -> Iterator[Utterance]:
        columns = self.table.slice(start, stop - start).drop_columns(["hard_labels"]).to_pylist()
        labels = self.table["hard_labels"].slice(start, stop - start)
        for fields, label_list in zip(columns, labels, strict=True):
            values = label_list.values
            yield Utterance(**fields, hard_labels=None if values is None else values.to_numpy())

    def select_splits(self, splits: Sequence[str]) -> Corpus:
        """The rows of these splits, in order. Raises InputError for a split that no row has."""
        known = set(pc.unique(self.table["split"]).to_pylist())
        unknown = sorted(set(splits) - known)
        if unknown:
            raise InputError(f"the corpus has no split {', '.join(unknown)}; it has {', '.join(sorted(known))}")
        return self._replaced(self.table.filter(pc.is_in(self.table["split"], pa.array(splits, pa.string()))))

    def _replaced(self, table: pa.Table) -> Corpus:
        return Corpus(
            table,
            hard_label_frame_shift_ms=self.hard_label_frame_shift_ms,
            inventory_digest=self.inventory_digest,
            base_url=self.base_url,
        )

    def seconds(self) -> npt.NDArray[np.float64]:
        """Duration of each utterance, float64 [N]."""
        samples = self.table["num_samples"].to_numpy().astype(np.float64)
        return np.asarray(samples / self.table["sample_rate"].to_numpy(), dtype=np.float64)

    @cached_property
    def digest(self) -> str:
        """sha256 over what decides the labels: ids, audio (length, rate, sha256) and hard labels; not locations, texts,
        speakers or splits. Column by column, so that it does not depend on the file's row groups."""
        digest = hashlib.sha256(f"{self.inventory_digest}|{self.hard_label_frame_shift_ms}|{len(self)}".encode())
        for name in ("utterance_id", "sha256"):
            column = self.table[name]
            data, offsets = joined_bytes(column.fill_null(""))
            digest.update(np.diff(offsets).astype("<i4").tobytes())
            digest.update(data)
        digest.update(self.table["sample_rate"].to_numpy().astype("<i4").tobytes())
        digest.update(self.table["num_samples"].to_numpy().astype("<i8").tobytes())
        lengths = pc.fill_null(pc.list_value_length(self.table["hard_labels"]), -1)
        digest.update(lengths.to_numpy().astype("<i4").tobytes())
        digest.update(pc.list_flatten(self.table["hard_labels"]).to_numpy().astype("<i4").tobytes())
        return digest.hexdigest()

    def resolve(self, location: str) -> tuple[str, str]:
        """Folder URL and name of an audio or feature file."""
        if "://" not in location and not location.startswith("/"):
            location = f"{self.base_url}/{location}"
        folder, _, name = location.rpartition("/")
        return folder, name


def check_hard_labels(corpus: Corpus, inventory: ClassInventory, *, where: str) -> None:
    """Raises InputError where hard labels are of another inventory or outside it; names both values."""
    if corpus.inventory_digest is not None and corpus.inventory_digest != inventory.digest():
        raise InputError(
            f"{where}: hard labels are ids of inventory {corpus.inventory_digest[:12]}, "
            f"but the inventory given is {inventory.digest()[:12]} with {inventory.num_classes} classes"
        )
    labels = pc.list_flatten(corpus.table["hard_labels"]).to_numpy()
    if len(labels) and (labels.max() >= inventory.num_classes or labels.min() < -1):
        raise InputError(
            f"{where}: hard labels run from {labels.min()} to {labels.max()}, "
            f"expected -1 (none) to {inventory.num_classes - 1}"
        )


def load_corpus(url: str | Path, storage_options: Mapping[str, Any] | None = None) -> Corpus:
    """Read and check a corpus manifest.

    Raises:
        InputError: the file is missing or not a corpus manifest, or a row breaks a rule; names the row.
    """
    folder, _, name = str(url).rpartition("/")
    folder = folder or "."
    try:
        data = ObjectStore(folder, storage_options).read(name)
    except FileNotFoundError:
        raise InputError(f"corpus manifest {url} does not exist") from None
    try:
        table = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True).read(use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{url} is not a readable Parquet file: {error}") from None
    metadata = table.schema.metadata or {}
    if metadata.get(_VERSION) != b"1" or table.schema.names != SCHEMA.names:
        raise InputError(
            f"{url} is not a corpus manifest of version 1: columns {table.schema.names}, expected {SCHEMA.names}; "
            "write it with softlabel_schemas.write_corpus"
        )
    try:
        table = table.replace_schema_metadata(None).cast(SCHEMA)
        frame_shift_ms = float(metadata[_FRAME_SHIFT]) if _FRAME_SHIFT in metadata else None
        inventory_digest = metadata[_INVENTORY].decode() if _INVENTORY in metadata else None
    except ValueError as error:
        raise InputError(f"{url} is not a corpus manifest of version 1: {error}") from None
    if table["hard_labels"].null_count < len(table):
        if inventory_digest is None or frame_shift_ms is None or not 0 < frame_shift_ms < math.inf:
            raise InputError(
                f"{url} has hard labels, so its metadata must name their inventory and a positive frame shift; "
                f"found {inventory_digest} and {frame_shift_ms} ms"
            )
        if pc.list_flatten(table["hard_labels"]).null_count:
            raise InputError(f"{url} has a null among the hard labels; a frame without one has -1")
    corpus = Corpus(
        table,
        hard_label_frame_shift_ms=frame_shift_ms,
        inventory_digest=inventory_digest,
        base_url=folder,
    )
    _check(corpus.table, str(url))
    return corpus


def write_corpus(
    path: str | Path,
    utterances: Iterable[Utterance],
    *,
    inventory: ClassInventory | None = None,
    hard_label_frame_shift_ms: float | None = None,
) -> None:
    """Write a corpus manifest; ``inventory`` and the frame shift are needed where utterances have hard labels.

    Raises:
        InputError: a row breaks a rule of the format; names it.
    """
    rows = [{name: getattr(utterance, name) for name in SCHEMA.names} for utterance in utterances]
    metadata = {_VERSION: b"1"}
    if any(row["hard_labels"] is not None for row in rows):
        if inventory is None or hard_label_frame_shift_ms is None:
            raise InputError("utterances have hard labels: give the inventory and hard_label_frame_shift_ms too")
        metadata |= {
            _FRAME_SHIFT: repr(float(hard_label_frame_shift_ms)).encode(),
            _INVENTORY: inventory.digest().encode(),
        }
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    _check(table, str(path))
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd", write_page_checksum=True)
    folder, _, name = str(path).rpartition("/")
    ObjectStore(folder or ".").put(name, sink.getvalue())


def _check(table: pa.Table, where: str) -> None:
    if table.num_rows == 0:
        raise InputError(f"{where}: a corpus needs at least one utterance")
    ids = table["utterance_id"]
    counts = pc.value_counts(ids)
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        raise InputError(f"{where}: utterance_id '{repeated[0]['values']}' occurs {repeated[0]['counts']} times")
    both_null = pc.and_(pc.is_null(table["audio"]), pc.is_null(table["features"]))
    problems = {
        "utterance_id is empty": pc.equal(ids, ""),
        "neither audio nor features is given": both_null,
        "sample_rate is not positive": pc.less_equal(table["sample_rate"], 0),
        "num_samples is not positive": pc.less_equal(table["num_samples"], 0),
    }
    for problem, bad in problems.items():
        if pc.any(bad).as_py():
            row = pc.index(bad, True).as_py()
            raise InputError(f"{where}: row {row} (utterance_id '{ids[row]}'): {problem}")
