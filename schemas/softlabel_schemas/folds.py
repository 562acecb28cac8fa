"""Folds of speakers, for out-of-fold labelling: each speaker's soft labels come from teachers that never heard them.

A teacher's posteriors on its own training speech are over-confident and leak the hard labels. So K ensembles are trained, each
without the speakers of one fold, and one job labels every utterance by the ensemble that its speaker's fold was held out of
(stacked generalisation; Wolpert, 1992).
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from softlabel_schemas.arrow import joined_bytes
from softlabel_schemas.corpus import Corpus
from softlabel_schemas.errors import InputError
from softlabel_schemas.strict import StrictModel

NumFolds = Annotated[int, Field(ge=2, le=1000)]


class Fold(StrictModel):
    """Fold ``fold``, from 0, of ``num_folds``."""

    num_folds: NumFolds
    fold: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.fold >= self.num_folds:
            raise ValueError(f"fold {self.fold} of {self.num_folds} does not exist; they are counted from 0")
        return self

    def __str__(self) -> str:
        return f"fold {self.fold} of {self.num_folds}"


def fold_of(speaker: str, num_folds: int) -> int:
    """The speaker's fold: the first 8 bytes of sha256 of the name in UTF-8, big-endian, modulo ``num_folds``.

    A function of the name alone, so that every corpus that names its speakers alike is cut alike, whatever else is in it. Folds
    of few speakers differ in size.
    """
    return int.from_bytes(hashlib.sha256(speaker.encode()).digest()[:8], "big") % num_folds


def folds_of(speakers: pa.ChunkedArray, num_folds: int, *, where: str) -> npt.NDArray[np.int64]:
    """Fold of each utterance, int64 [N]. Raises InputError where one has no speaker."""
    names = speakers.to_pylist()
    missing = [row for row, name in enumerate(names) if not name]
    if missing:
        raise _no_speaker(len(missing), f"row {missing[0]}", where)
    fold_of_name = {name: fold_of(name, num_folds) for name in set(names)}
    return np.array([fold_of_name[name] for name in names], dtype=np.int64)


def without_fold(corpus: Corpus, held_out: Fold, *, where: str) -> Corpus:
    """The utterances of the speakers in the other folds. Raises InputError where none is left or one has no speaker."""
    fold_N = folds_of(corpus.table["speaker"], held_out.num_folds, where=where)
    if (fold_N == held_out.fold).all():
        raise InputError(
            f"{where}: all speakers of {len(corpus)} utterances are in {held_out}, which is held out; take more folds"
        )
    return corpus.where(fold_N != held_out.fold)


class SpeakerScan:
    """The speakers of a corpus of any size: their digest, and whether every utterance has one."""

    def __init__(self) -> None:
        self._lengths, self._names = hashlib.sha256(), hashlib.sha256()
        self._num_missing = 0
        self._first_missing = ""

    def add(self, table: pa.Table) -> None:
        """The next rows; their cut into tables does not matter."""
        speakers = table["speaker"].fill_null("")
        names, offsets = joined_bytes(speakers)
        self._lengths.update(np.diff(offsets).astype("<i4").tobytes())
        self._names.update(names)
        without = table["utterance_id"].filter(pc.equal(speakers, ""))
        if len(without) and not self._num_missing:
            self._first_missing = without[0].as_py()
        self._num_missing += len(without)

    def digest(self, *, where: str) -> str:
        """sha256 over (sha256 of the names' byte lengths, i4, and sha256 of the names joined): what decides each row's fold.

        Raises:
            InputError: an utterance has no speaker.
        """
        if self._num_missing:
            raise _no_speaker(self._num_missing, self._first_missing, where)
        return hashlib.sha256(self._lengths.digest() + self._names.digest()).hexdigest()


def _no_speaker(num_missing: int, first: str, where: str) -> InputError:
    return InputError(
        f"{where}: {num_missing} utterances have no speaker, the first is {first}; folds are of speakers: fill the column "
        "'speaker', or leave num_folds out"
    )
