"""The documents of a dataset: shard records, commit records and the manifest, strictly validated."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Annotated, Any, Self, get_args

from pydantic import AfterValidator, Field, model_validator

from softlabel_schemas import layout
from softlabel_schemas.digest import LabelHash, canonical_json, parse_canonical, seal, unseal
from softlabel_schemas.errors import InputError, IntegrityError
from softlabel_schemas.file_records import FileRecords, FilesApart, take_out_files
from softlabel_schemas.limits import MAX_COUNT, MAX_SHARD_BYTES, MAX_SHARDS, MAX_UTTERANCES_PER_SHARD
from softlabel_schemas.spec import Count, DatasetSpec, Sha256, StorageSpec
from softlabel_schemas.strict import ModelT, StrictModel, parse, shortened
from softlabel_schemas.utterance_index import BucketTable, ShardIndex

_NEWEST_VERSION = max(get_args(DatasetSpec.model_fields["format_version"].annotation))

# Nats times frames: no sum of an honest shard comes near, and those of a million shards stay finite.
Sum = Annotated[float, Field(ge=-64 * MAX_COUNT, le=64 * MAX_COUNT)]


class SkippedUtterance(StrictModel):
    """An utterance without labels, and why."""

    utterance_id: str
    reason: str


class FrameSums(StrictModel):
    """Sums over frames; divide by num_frames (agreement: by num_labelled_frames) for means.

    Attributes:
        entropy: nats.
        agreement: frames whose likeliest class is the hard label.
    """

    kept_mass: Sum
    entropy: Sum
    agreement: Sum
    num_labelled_frames: Count


class ShardRecord(StrictModel):
    """What a shard holds: rows ``first_row`` to ``first_row + num_rows - 1`` of the corpus, less the skipped."""

    index: Annotated[int, Field(ge=0, lt=MAX_SHARDS)]
    first_row: Count
    num_rows: Annotated[int, Field(gt=0, le=MAX_COUNT)]
    num_utterances: Annotated[int, Field(ge=0, le=MAX_UTTERANCES_PER_SHARD)]
    num_frames: Count
    num_entries: Count
    sums: FrameSums
    skipped: tuple[SkippedUtterance, ...]
    files: FileRecords

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_utterances + len(self.skipped) != self.num_rows:
            raise ValueError(
                f"{self.num_utterances} utterances and {len(self.skipped)} skipped are not {self.num_rows} rows"
            )
        if self.num_bytes > MAX_SHARD_BYTES:
            raise ValueError(
                f"the files have {self.num_bytes} bytes together, a shard at most {MAX_SHARD_BYTES}; cut smaller shards"
            )
        return self

    @property
    def folder(self) -> str:
        return layout.shard_folder(self.index, self.files.digest())

    @property
    def num_bytes(self) -> int:
        return self.files.num_bytes


def _check_label_hash(text: str) -> str:
    LabelHash.from_base64(text)
    return text


class CommitRecord(StrictModel):
    """Says that a shard is complete.

    Attributes:
        label_hash: the base64 state of the shard's LabelHash.
        index: the base64 form of the shard's ShardIndex; None in format version 1.
    """

    fingerprint: Sha256
    shard: ShardRecord
    label_hash: Annotated[str, Field(max_length=4096), AfterValidator(_check_label_hash)]
    index: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.index is not None:
            self.shard_index()
        return self

    def shard_index(self) -> ShardIndex:
        """Raises ValueError where it does not fit the shard."""
        return ShardIndex.from_base64(
            self.index or "",
            num_utterances=self.shard.num_utterances,
            file_bytes=[file.num_bytes for file in self.shard.files],
        )


class SpecDocument(StrictModel):
    """``spec.json``: what the run at this destination makes; written first."""

    spec: DatasetSpec
    storage: StorageSpec


class Manifest(StrictModel):
    """``manifest.json``: written last; a dataset without one is not published.

    Attributes:
        index: the base64 form of the utterance index's BucketTable; None in format version 1.
    """

    fingerprint: Sha256
    content_digest: Sha256
    spec: DatasetSpec
    storage: StorageSpec
    shards: tuple[ShardRecord, ...]
    index: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.fingerprint != self.spec.fingerprint():
            raise ValueError("the fingerprint is not that of the spec")
        if len(self.shards) != self.storage.num_shards:
            raise ValueError(f"{len(self.shards)} shards are listed, the storage spec says {self.storage.num_shards}")
        next_row = 0
        for index, shard in enumerate(self.shards):
            if (shard.index, shard.first_row) != (index, next_row):
                raise ValueError(
                    f"shard {index} should begin at row {next_row}, found {shard.index} at {shard.first_row}"
                )
            next_row += shard.num_rows
        if next_row != self.storage.num_rows:
            raise ValueError(f"shards cover {next_row} rows, the storage spec says {self.storage.num_rows}")
        if (self.index is None) != (self.spec.format_version == 1):
            raise ValueError("an utterance index belongs to format version 2, and version 2 has one")
        if self.index is not None:
            self.bucket_table()
        return self

    def bucket_table(self) -> BucketTable:
        """Raises ValueError where it does not fit the dataset."""
        return BucketTable.from_base64(
            self.index or "", num_rows=self.storage.num_rows, num_utterances=self.num_utterances
        )

    @property
    def num_utterances(self) -> int:
        return sum(shard.num_utterances for shard in self.shards)

    @property
    def num_frames(self) -> int:
        return sum(shard.num_frames for shard in self.shards)

    @property
    def num_entries(self) -> int:
        return sum(shard.num_entries for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def skipped(self) -> tuple[SkippedUtterance, ...]:
        return tuple(entry for shard in self.shards for entry in shard.skipped)


def to_bytes(document: StrictModel) -> bytes:
    return seal(_fields(document))


def _fields(document: StrictModel, context: FilesApart | None = None) -> dict[str, Any]:
    # What a version does not have is absent; nothing is stored as null.
    return document.model_dump(mode="json", exclude_none=True, context=context)


def from_bytes(model: type[ModelT], data: bytes, *, where: str) -> ModelT:
    """The document that the bytes are.

    Raises:
        IntegrityError: a byte is not as written, or the body breaks the schema.
        InputError: it is of a newer format version.
    """
    with _without_collection():
        body = unseal(data, where=where)
        rest, files = take_out_files(body) if issubclass(model, CommitRecord | Manifest) else (body, [])
        context = FilesApart(iter(files)) if files else None
        value = parse_canonical(rest, where=where)
        if issubclass(model, SpecDocument | Manifest):
            _refuse_newer(value, where)
        try:
            document = parse(model, value, where=where, context=context)
        except InputError as error:
            raise IntegrityError(str(error)) from None
        # The lists that were taken out have their one form. Each is a shard's if the rest has its own and no list is left over.
        has_one_form = canonical_json(_fields(document, context)) == rest
        if not has_one_form or (context is not None and next(context.lists, None) is not None):
            raise IntegrityError(f"{where}: values are not in their canonical form")
        return document


def _refuse_newer(body: Any, where: str) -> None:
    """Raises InputError for a format version above ours, before the tables: what is new in it is no damage."""
    spec = body.get("spec") if isinstance(body, dict) else None
    version = spec.get("format_version") if isinstance(spec, dict) else None
    if isinstance(version, int) and version > _NEWEST_VERSION:
        raise InputError(
            f"{where} is of format version {shortened(version)}, this package reads versions up to {_NEWEST_VERSION}; it was "
            "made by a newer one: upgrade essence-distill"
        )


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """A large manifest is many objects and no cycle: looking for cycles takes a tenth of the time to open it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
