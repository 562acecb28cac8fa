"""The corpus manifest: one Parquet row per utterance, with optional frame-level hard labels.

Columns and file metadata are specified in FORMAT.md, "Corpus manifest". Locations may be relative to the manifest.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from softlabel_schemas.corpus_schema import (
    NO_ROWS,
    ROWS_PER_GROUP,
    SCHEMA,
    CorpusMetadata,
    check_rows,
    checked_types,
    read_metadata,
    stored_form,
)
from softlabel_schemas.errors import InputError
from softlabel_schemas.inventory import ClassInventory
from softlabel_schemas.object_store import ObjectStore, refuse_credentials

_FETCHES_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Utterance:
    """One row of a corpus.

    Attributes:
        audio: location of an audio file, or None where ``features`` is given.
        features: location of a ``.npy`` file, float32 [frames, dimensions].
        sha256: of the audio file's bytes, or of the feature file's where there is no audio; checked when it is read.
        hard_labels: class id of each frame, int32 [frames], -1 for a frame without one; None without hard labels.
        start_sample: the utterance is ``num_samples`` of a longer recording, from this one on; None: it is the whole file.
        audio_offset, audio_bytes: the audio file is this range of the bytes at ``audio``, as in a tar archive; None: all.
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
    start_sample: int | None = None
    audio_offset: int | None = None
    audio_bytes: int | None = None

    @property
    def seconds(self) -> float:
        return self.num_samples / self.sample_rate


class Corpus:
    """A corpus manifest in memory; :func:`load_corpus` makes one.

    Attributes:
        table: rows with the columns of ``corpus_schema.SCHEMA``.
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
        check_splits(splits, set(pc.unique(self.table["split"]).to_pylist()))
        return self.with_table(rows_of_splits(self.table, splits))

    def where(self, chosen_N: npt.NDArray[np.bool_]) -> Corpus:
        """The rows where ``chosen_N`` [N] is true, in order."""
        return self.with_table(self.table.filter(pa.array(chosen_N)))

    def with_table(self, table: pa.Table) -> Corpus:
        """Other rows of the same manifest."""
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

    @property
    def num_at_once(self) -> int:
        """How many files are to be read at a time: several from a URL, where each takes tens of milliseconds to come in which
        its reader has nothing to do. Parts of recordings come one after the other from few files."""
        location = next((row.audio or row.features for row in self.rows(0, 1)), None)
        is_remote = location is not None and "://" in self.location(location)
        return _FETCHES_AT_ONCE if is_remote and not has_start_samples(self.table) else 1

    @cached_property
    def digest(self) -> str:
        """sha256 over what decides the labels: ids, audio (start, length, rate, sha256) and hard labels; not locations, texts,
        speakers or splits. Column by column, so that it does not depend on the file's row groups."""
        has_segments = has_start_samples(self.table)
        digest = digest_head(
            self.inventory_digest, self.hard_label_frame_shift_ms, len(self), has_segments=has_segments
        )
        for name, encode in DIGEST_PARTS:
            if has_segments or name != SEGMENT_PART:
                digest.update(encode(self.table[name]))
        return digest.hexdigest()

    def resolve(self, location: str) -> tuple[str, str]:
        """Folder URL and name of an audio or feature file. Raises InputError where the location holds a credential."""
        if "://" not in location and not location.startswith("/"):
            location = f"{self.base_url}/{location}"
        return split_url(location)

    def location(self, location: str) -> str:
        """Of an audio or feature file, from wherever it is used: a URL, or an absolute path. Raises as :meth:`resolve`."""
        folder, name = self.resolve(location)
        return f"{folder.removesuffix('/')}/{name}" if "://" in folder else str(Path(folder, name).absolute())


def check_splits(wanted: Sequence[str], known: set[str]) -> None:
    """Raises InputError for a split that no row has."""
    unknown = sorted(set(wanted) - known)
    if unknown:
        raise InputError(f"the corpus has no split {', '.join(unknown)}; it has {', '.join(sorted(known))}")


def rows_of_splits(table: pa.Table, splits: Sequence[str]) -> pa.Table:
    return table.filter(pc.is_in(table["split"], pa.array(splits, pa.string())))


def split_url(url: str) -> tuple[str, str]:
    """Folder URL and name of a file. Directly under a scheme or the root, the folder is that: ``memory://``, ``/``.

    Raises:
        InputError: the URL holds a credential; does not show it.
    """
    # That of a signed URL is in the name, which an ObjectStore of the folder does not see.
    refuse_credentials(url)
    folder, slash, name = url.rpartition("/")
    if folder.endswith(":/") or not folder:
        folder += slash
    return folder or ".", name


def digest_head(
    inventory_digest: str | None, frame_shift_ms: float | None, num_rows: int, *, has_segments: bool
) -> hashlib._Hash:
    """The corpus digest before its columns."""
    segments = "|segments" if has_segments else ""
    return hashlib.sha256(f"{inventory_digest}|{frame_shift_ms}|{num_rows}{segments}".encode())


def has_start_samples(table: pa.Table) -> bool:
    """Whether any of the rows is a part of a recording."""
    return int(table["start_sample"].null_count) < len(table)


def text_lengths(column: pa.ChunkedArray) -> bytes:
    """Bytes of each value, ``<i4``; 0 for null."""
    return np.diff(joined_bytes(column.fill_null(""))[1]).astype("<i4").tobytes()


def text_bytes(column: pa.ChunkedArray) -> memoryview:
    """The values joined."""
    return joined_bytes(column.fill_null(""))[0]


def _values(dtype: str) -> Callable[[pa.ChunkedArray], memoryview]:
    return lambda column: column.to_numpy().astype(dtype, copy=False).data


# Of corpora without segments this part is left out of the digest, which was there before it.
SEGMENT_PART = "start_sample"
# What the corpus digest is over, in order: the bytes of a column, or of a run of its rows.
DIGEST_PARTS: tuple[tuple[str, Callable[[pa.ChunkedArray], bytes | memoryview]], ...] = (
    ("utterance_id", text_lengths),
    ("utterance_id", text_bytes),
    ("sha256", text_lengths),
    ("sha256", text_bytes),
    ("sample_rate", _values("<i4")),
    ("num_samples", _values("<i8")),
    (SEGMENT_PART, lambda column: _values("<i8")(pc.fill_null(column, -1))),
    ("hard_labels", lambda column: _values("<i4")(pc.fill_null(pc.list_value_length(column), -1))),
    ("hard_labels", lambda column: _values("<i4")(pc.list_flatten(column))),
)


def check_hard_labels(corpus: Corpus, inventory: ClassInventory, *, where: str) -> None:
    """Raises InputError where hard labels are of another inventory or outside it; names both values."""
    check_label_inventory(corpus.inventory_digest, inventory, where=where)
    check_label_range(label_range(corpus.table), inventory, where=where)


def check_label_inventory(inventory_digest: str | None, inventory: ClassInventory, *, where: str) -> None:
    """Raises InputError where hard labels are of another inventory; names both."""
    if inventory_digest is not None and inventory_digest != inventory.digest():
        raise InputError(
            f"{where}: hard labels are ids of inventory {inventory_digest[:12]}, "
            f"but the inventory given is {inventory.digest()[:12]} with {inventory.num_classes} classes"
        )


def label_range(table: pa.Table) -> tuple[int, int] | None:
    """Lowest and highest hard label; None where there is none."""
    found = pc.min_max(pc.list_flatten(table["hard_labels"])).as_py()
    return None if found["min"] is None else (found["min"], found["max"])


def check_label_range(found: tuple[int, int] | None, inventory: ClassInventory, *, where: str) -> None:
    """Raises InputError where hard labels, from the lowest to the highest ``found``, are outside the inventory."""
    if found is not None and (found[0] < -1 or found[1] >= inventory.num_classes):
        raise InputError(
            f"{where}: hard labels run from {found[0]} to {found[1]}, expected -1 (none) to {inventory.num_classes - 1}"
        )


def load_corpus(url: str | Path, storage_options: Mapping[str, Any] | None = None) -> Corpus:
    """Read and check a corpus manifest.

    Raises:
        InputError: the file is missing or not a corpus manifest, or a row breaks a rule; names the row.
    """
    folder, name = split_url(str(url))
    try:
        data = ObjectStore(folder, storage_options).read(name)
    except FileNotFoundError:
        raise InputError(f"corpus manifest {url} does not exist") from None
    try:
        table = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True).read(use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{url} is not a readable Parquet file: {error}") from None
    metadata = read_metadata(table.schema, where=str(url))
    table = checked_types(table, metadata, where=str(url))
    _check(table, str(url))
    return Corpus(
        table,
        hard_label_frame_shift_ms=metadata.hard_label_frame_shift_ms,
        inventory_digest=metadata.inventory_digest,
        base_url=folder,
    )


def write_corpus(
    path: str | Path,
    utterances: Iterable[Utterance],
    *,
    inventory: ClassInventory | None = None,
    hard_label_frame_shift_ms: float | None = None,
) -> None:
    """Write a corpus manifest, over one that is there; ``inventory`` and the frame shift are needed where utterances have
    hard labels.

    Raises:
        InputError: a row breaks a rule of the format, or has a location with a credential, which all readers of the manifest
            would see; names it.
    """
    rows = [{name: getattr(utterance, name) for name in SCHEMA.names} for utterance in utterances]
    for row in rows:
        for location in (row["audio"], row["features"]):
            try:
                refuse_credentials(location or "")
            except InputError as error:
                raise InputError(f"utterance {row['utterance_id']}: {error}") from None
    metadata = CorpusMetadata(hard_label_frame_shift_ms=None, inventory_digest=None)
    if any(row["hard_labels"] is not None for row in rows):
        if inventory is None or hard_label_frame_shift_ms is None:
            raise InputError("utterances have hard labels: give the inventory and hard_label_frame_shift_ms too")
        metadata = CorpusMetadata(
            hard_label_frame_shift_ms=float(hard_label_frame_shift_ms), inventory_digest=inventory.digest()
        )
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    _check(table, str(path))
    sink = io.BytesIO()
    pq.write_table(
        stored_form(table, metadata),
        sink,
        row_group_size=ROWS_PER_GROUP,
        compression="zstd",
        write_page_checksum=True,
    )
    folder, name = split_url(str(path))
    ObjectStore(folder).put(name, sink.getvalue())


def _check(table: pa.Table, where: str) -> None:
    if table.num_rows == 0:
        raise InputError(f"{where}: {NO_ROWS}")
    counts = pc.value_counts(table["utterance_id"])
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        raise InputError(f"{where}: utterance_id '{repeated[0]['values']}' occurs {repeated[0]['counts']} times")
    check_rows(table, where=where)
