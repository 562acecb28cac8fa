"""DatasetSpec: everything that decides a dataset's labels, and the fingerprint over it.

``DatasetSpec`` is fingerprinted. ``StorageSpec`` is not: the container, the cut into shards and the batches change
neither the labels nor the content digest. Both must match for a run to resume, since shards are made from both (but for
``on_error``, which a run that is joined keeps).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from softlabel_schemas.digest import canonical_json, sha256_hex
from softlabel_schemas.errors import InputError
from softlabel_schemas.folds import NumFolds
from softlabel_schemas.limits import MAX_COUNT, MAX_FRAME_SHIFT_MS, MAX_SHARDS
from softlabel_schemas.selection import Selection, check_sampled_temperatures
from softlabel_schemas.strict import StrictModel, shortened

Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ShardFormat = Literal["parquet", "zarr"]
Combination = Literal["arithmetic", "log_linear"]
CodecName = Literal["mtf-sqrt", "packed-u8", "packed-f32"]


class TeacherSpec(StrictModel):
    """One member of the ensemble.

    Attributes:
        digest: of its bundle (weights, front end, frame shift).
        weight: normalised over the ensemble; with folds, over that of its fold.
        fold: whose speakers it was trained without, and labelled; None where all teachers labelled everything.
    """

    name: str
    digest: Sha256
    weight: Annotated[float, Field(gt=0, le=1)]
    fold: Annotated[int, Field(ge=0)] | None = None


class InputSpec(StrictModel):
    """A dataset that others were combined with; ``weight`` is normalised over the inputs."""

    content_digest: Sha256
    weight: Annotated[float, Field(gt=0, le=1)]


class SubsetSpec(StrictModel):
    """The dataset that some utterances were taken from, with their labels as they are.

    Attributes:
        choice: which ones, for people: "10 hours", "shards 0-3".
        choice_digest: sha256 over the canonical JSON of [folder, ids or null] of each shard that some were taken from: null
            where all of its rows were, else the sorted ids.
    """

    content_digest: Sha256
    choice: Annotated[str, Field(pattern=r"^[ -~]{1,200}$")]
    choice_digest: Sha256


class DatasetSpec(StrictModel):
    """What the labels are a function of.

    Attributes:
        format_version: written is 2; 1 had neither the codec "mtf-sqrt" nor an utterance index.
        corpus_digest: of the labelled utterances (see ``Corpus.digest``); of a subset, those of the dataset it was taken from.
        inventory_digest: of the class inventory all teachers share.
        combination: "arithmetic" averages posteriors, "log_linear" averages log-posteriors and renormalises.
        temperatures: tail masses are stored for these; 1.0 first.
        precision: floating point type the teachers ran in.
        num_folds: an utterance was labelled by the teachers of its speaker's fold (see ``folds.fold_of``); None without folds.
        speakers_digest: of the labelled utterances' speakers, which decide the folds; None without folds.
        combined_from: the stored datasets that the labels were combined from, without a teacher; None where teachers ran.
        subset_of: the dataset that the labels were taken from; None where all of them were made here.
    """

    format_version: Literal[1, 2] = 2
    corpus_digest: Sha256
    inventory_digest: Sha256
    num_classes: Annotated[int, Field(gt=0, lt=2**31)]
    frame_shift_ms: Annotated[float, Field(gt=0, le=MAX_FRAME_SHIFT_MS)]
    teachers: Annotated[tuple[TeacherSpec, ...], Field(min_length=1)]
    combination: Combination
    temperatures: tuple[float, ...]
    selection: Selection
    codec: CodecName
    precision: Literal["float32", "bfloat16"]
    num_folds: NumFolds | None = None
    speakers_digest: Sha256 | None = None
    combined_from: Annotated[tuple[InputSpec, ...], Field(min_length=1)] | None = None
    subset_of: SubsetSpec | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_temperatures(self.temperatures)
        check_sampled_temperatures(self.selection, self.temperatures)
        if self.format_version == 1 and self.codec == "mtf-sqrt":
            raise ValueError("format version 1 has no codec 'mtf-sqrt'")
        if (self.num_folds is None) != (self.speakers_digest is None):
            raise ValueError("num_folds and speakers_digest belong together")
        check_folds([teacher.fold for teacher in self.teachers], self.num_folds)
        totals: defaultdict[int | None, float] = defaultdict(float)
        for teacher in self.teachers:
            totals[teacher.fold] += teacher.weight
        for fold, total in totals.items():
            if abs(total - 1) > 1e-6:
                of_fold = "" if fold is None else f" of fold {fold}"
                raise ValueError(f"the weights of the teachers{of_fold} add up to {total:g}, expected 1")
        if self.combined_from is not None:
            total = sum(each.weight for each in self.combined_from)
            if abs(total - 1) > 1e-6:
                raise ValueError(f"the weights of combined_from add up to {total:g}, expected 1")
        return self

    def fields(self) -> dict[str, Any]:
        """As JSON; what a dataset does not have is absent, nothing is null."""
        return self.model_dump(mode="json", exclude_none=True)

    def fingerprint(self) -> str:
        """sha256 over the canonical JSON of the spec."""
        return sha256_hex(canonical_json(self.fields()))


class StorageSpec(StrictModel):
    """How the labels are cut and stored: container, number of shards, and what decides the batches.

    Attributes:
        num_rows: corpus rows covered, skipped ones included.
        shard_seconds: speech a shard is filled up to.
        batch_seconds: padded speech in one batch; it is here because padding moves the last bits of float results.
        on_error: whether an utterance that cannot be labelled ends the job or is recorded and skipped.
    """

    shard_format: ShardFormat
    num_shards: Annotated[int, Field(gt=0, le=MAX_SHARDS)]
    num_rows: Annotated[int, Field(gt=0, le=MAX_COUNT)]
    shard_seconds: Annotated[float, Field(gt=0)]
    batch_seconds: Annotated[float, Field(gt=0)]
    on_error: Literal["fail", "skip"]


def check_folds(folds: Sequence[int | None], num_folds: int | None) -> None:
    """Raises ValueError unless each fold has a teacher and each teacher a fold, or there are neither.

    Args:
        folds: of the teachers.
    """
    if num_folds is None:
        if any(fold is not None for fold in folds):
            raise ValueError("a teacher has a fold, but there are no folds: give num_folds too")
        return
    if any(fold is None for fold in folds):
        raise ValueError(
            f"num_folds is {num_folds}: every teacher needs a fold, or none has one and num_folds is left out"
        )
    found = {fold for fold in folds if fold is not None}
    if max(found) >= num_folds:
        raise ValueError(f"a teacher has fold {max(found)}, expected 0 to {num_folds - 1}")
    missing = next((fold for fold in range(num_folds) if fold not in found), None)
    if missing is not None:
        raise ValueError(f"fold {missing} of {num_folds} has no teacher; every fold needs one")


def check_temperatures(temperatures: tuple[float, ...]) -> None:
    """Raises ValueError unless temperatures start with 1.0, are distinct and positive."""
    if not temperatures or temperatures[0] != 1.0:
        raise ValueError(f"temperatures must start with 1.0, found {shortened(list(temperatures))}")
    if len(set(temperatures)) != len(temperatures) or min(temperatures) <= 0:
        raise ValueError(f"temperatures must be distinct and positive, found {shortened(list(temperatures))}")


def check_same_spec(stored: StrictModel, wanted: StrictModel, *, where: str) -> None:
    """Raises InputError naming each field in which the two differ, with both values."""
    stored_fields, wanted_fields = stored.model_dump(mode="json"), wanted.model_dump(mode="json")
    differing = [key for key in stored_fields if stored_fields[key] != wanted_fields[key]]
    if differing:
        lines = "\n".join(f"  {key}: there {stored_fields[key]!r}, here {wanted_fields[key]!r}" for key in differing)
        raise InputError(f"{where} was started with other settings; use them or another destination:\n{lines}")
