"""One shard, from corpus rows to labelled utterances: the whole flow, without Ray and without storage.

    rows -> batches -> features --> teachers --> ensemble -> selection -> SoftTargets
            '-- threads ahead --'            '---------- a thread behind --------'

Ahead are two batches of features, or one for each torch thread; behind is one of logits: with the one that the teachers make,
logits of two batches are held. Each stage takes the batches in order, so that threads change nothing in the result.

Shape suffixes: B utterances, T frames, V classes, N valid frames of the batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from softlabel_schemas.corpus import Corpus, Utterance
from softlabel_schemas.errors import InputError
from softlabel_schemas.folds import folds_of
from softlabel_schemas.frame_selection import silence_classes
from softlabel_schemas.front_end import AnyFrontEnd
from softlabel_schemas.manifest import SkippedUtterance
from softlabel_schemas.recordings import rows_by_recording
from softlabel_schemas.shard import LabelledUtterance
from softlabel_schemas.spec import DatasetSpec, StorageSpec
from softlabel_schemas.utterance_reader import MissingFileError, UtteranceError, UtteranceReader
from teacher_service.batching import batch_rows, batch_rows_by_fold, pad
from teacher_service.overlap import Behind, ahead
from teacher_service.teacher import Teacher, is_device_fault, lacks_memory
from teacher_service.utterance_labels import Outputs, Results, TeachersFailedError, label_outputs

_BATCHES_AHEAD = 2
_REASON_CHARACTERS = 200
_NO_LOCK = nullcontext()


class LacksMemoryError(TeachersFailedError):
    """There was not enough memory for the utterance by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledShard:
    """Utterances in corpus order, and those that could not be labelled.

    Attributes:
        num_missing: of ``skipped``, those whose file is not there.
        unproven: the folds (None: without folds) of which the teachers failed on some utterance, and none was labelled; with
            the duration of the shortest that memory was not enough for, infinite where there is none.
    """

    utterances: list[LabelledUtterance]
    skipped: list[SkippedUtterance]
    num_missing: int
    unproven: dict[int | None, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchDone:
    """A batch that is labelled.

    Attributes:
        seconds, padded_seconds: of speech, without and with what it was padded with.
        teacher_seconds: that passed while the teachers ran on it.
    """

    seconds: float
    padded_seconds: float
    num_frames: int
    teacher_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """Features that were read, by the utterance's row in the shard.

    Attributes:
        indices: of all rows of the batch, those that could not be read too.
        features: for each teacher, float32 [T, D].
        padded: for each teacher, features_BTD and lengths_B of the rows in ``features``.
        errors: of the other rows.
        teachers: that label it.
    """

    indices: list[int]
    teachers: list[Teacher]
    features: dict[int, list[np.ndarray]] = field(default_factory=dict)
    padded: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    errors: Results = field(default_factory=dict)


def label_shard(
    rows: Corpus,
    teachers: list[Teacher],
    spec: DatasetSpec,
    storage: StorageSpec,
    *,
    on_batch: Callable[[BatchDone], None] = lambda _: None,
    models: AbstractContextManager[object] = _NO_LOCK,
    check: Callable[[LabelledShard], None] = lambda _: None,
) -> LabelledShard:
    """Label the rows of one shard; a function of its arguments alone.

    What is wrong with one utterance, in the corpus or in what the teachers give for it, leaves out that one; so does one that
    the teachers fail on by itself too. A batch that does not fit into memory is labelled an utterance at a time. Storage and
    devices that fail are not an utterance's fault: their errors are passed on, and the shard can be tried again. No thread
    outlives the call.

    Args:
        rows: all rows of the shard and no others.
        on_batch: told of each batch when it is done.
        models: entered while the teachers run; a lock, where they have other shards to label.
        check: given the shard, may raise that what was left out is the machine's fault.

    Raises:
        UtteranceError: an utterance cannot be labelled and ``storage.on_error`` is "fail"; names it. Where a file is not there,
            or the teachers fail, only after ``check``: another machine may do better.
        RuntimeError: memory did not suffice for an utterance, and did for one that is as long.
    """
    reader, utterances, fold_N = UtteranceReader(rows), list(rows), folds(rows, spec.num_folds)
    frames = spec.selection.frames
    silence_V = np.zeros(0, dtype=bool) if frames is None else silence_classes(teachers[0].inventory, frames)
    labelled: dict[int, LabelledUtterance] = {}
    skipped: dict[int, UtteranceError] = {}

    def keep(results: Results) -> None:
        for index, result in results.items():
            if isinstance(result, LabelledUtterance):
                labelled[index] = result
            elif storage.on_error == "fail" and not isinstance(result, MissingFileError | TeachersFailedError):
                raise result
            else:
                skipped[index] = result

    def keep_batch(done: tuple[_Batch, Results, float] | None) -> None:
        if done is not None:
            batch, results, teacher_seconds = done
            keep(batch.errors)
            keep(results)
            on_batch(_done(utterances, batch, results, teacher_seconds))

    def finish(
        batch: _Batch, outputs: list[Outputs], errors: Results, teacher_seconds: float
    ) -> tuple[_Batch, Results, float]:
        names, weights = [each.name for each in batch.teachers], [each.weight for each in batch.teachers]
        for each in outputs:
            errors |= label_outputs(utterances, each, names, weights, spec, silence_V)
        return batch, errors, teacher_seconds

    num_threads = max(torch.get_num_threads(), rows.num_at_once)
    reading = ahead(
        lambda batch: _read(reader, utterances, *batch),
        batches_of(rows, teachers, spec.num_folds, storage.batch_seconds),
        depth=max(_BATCHES_AHEAD, num_threads),
        num_threads=num_threads,
    )
    with reading as batches, Behind[tuple[_Batch, Results, float]]() as behind:
        with models:
            for batch in batches:
                keep_batch(behind.push(finish, batch, *_run_batch(utterances, batch)))
        keep_batch(behind.last())
    shard = LabelledShard(
        utterances=[labelled[index] for index in sorted(labelled)],
        skipped=[
            SkippedUtterance(utterance_id=utterances[index].utterance_id, reason=str(error))
            for index, error in sorted(skipped.items())
        ],
        num_missing=sum(isinstance(error, MissingFileError) for error in skipped.values()),
        unproven=_unproven(utterances, fold_N, labelled.keys(), skipped),
    )
    check(shard)
    if storage.on_error == "fail" and skipped:
        raise skipped[min(skipped)]
    return shard


def _unproven(
    rows: Sequence[Utterance],
    fold_N: Sequence[int | None],
    labelled: Collection[int],
    skipped: Mapping[int, UtteranceError],
) -> dict[int | None, float]:
    """See :class:`LabelledShard`. Raises RuntimeError where memory was not enough for an utterance, and was for a longer one of
    its fold: something else takes it at times."""
    longest: dict[int | None, float] = {}
    for index in labelled:
        longest[fold_N[index]] = max(rows[index].seconds, longest.get(fold_N[index], 0.0))
    found: dict[int | None, float] = {}
    for index, error in skipped.items():
        fold, seconds = fold_N[index], rows[index].seconds if isinstance(error, LacksMemoryError) else math.inf
        if seconds <= longest.get(fold, 0.0):
            raise RuntimeError(f"{error}, but was for one of {longest[fold]:g} s: something else takes it at times")
        if isinstance(error, TeachersFailedError) and fold not in longest:
            found[fold] = min(seconds, found.get(fold, math.inf))
    return found


def folds(rows: Corpus, num_folds: int | None) -> list[int | None]:
    """Of each row; None without folds."""
    if num_folds is None:
        return [None] * len(rows)
    return list(folds_of(rows.table["speaker"], num_folds, where=rows.base_url).tolist())


def batches_of(
    rows: Corpus, teachers: list[Teacher], num_folds: int | None, batch_seconds: float
) -> list[tuple[list[int], list[Teacher]]]:
    """Rows of each batch, and the teachers that label it."""
    seconds_N, groups = rows.seconds(), rows_by_recording(rows, batch_seconds)
    if num_folds is None:
        return [
            (group[batch].tolist(), teachers)
            for group in groups
            for batch in batch_rows(seconds_N[group], batch_seconds)
        ]
    fold_N = folds_of(rows.table["speaker"], num_folds, where=rows.base_url)
    return [
        (group[batch].tolist(), [teacher for teacher in teachers if teacher.fold == fold_N[group[batch[0]]]])
        for group in groups
        for batch in batch_rows_by_fold(seconds_N[group], fold_N[group], batch_seconds)
    ]


def _read(reader: UtteranceReader, rows: Sequence[Utterance], indices: list[int], teachers: list[Teacher]) -> _Batch:
    batch, front_ends = _Batch(indices=indices, teachers=teachers), list[AnyFrontEnd]()
    for teacher in teachers:
        # Features that several teachers take are computed once.
        if teacher.front_end not in front_ends:
            front_ends.append(teacher.front_end)
    positions = [front_ends.index(teacher.front_end) for teacher in teachers]
    found = {}
    # Parts of a recording one after the other.
    for index in sorted(indices, key=lambda index: (rows[index].audio or "", index)):
        try:
            features = reader.features(rows[index], front_ends)
            found[index] = [features[position] for position in positions]
        except UtteranceError as error:
            batch.errors[index] = error
    batch.features.update((index, found[index]) for index in indices if index in found)
    if batch.features:
        batch.padded.extend(pad(of_teacher) for of_teacher in zip(*batch.features.values(), strict=True))
    return batch


def _done(rows: Sequence[Utterance], batch: _Batch, results: Results, teacher_seconds: float) -> BatchDone:
    seconds = [rows[index].seconds for index in batch.indices]
    labelled = [result for result in results.values() if isinstance(result, LabelledUtterance)]
    return BatchDone(
        seconds=sum(seconds),
        padded_seconds=max(seconds) * len(seconds),
        num_frames=sum(utterance.targets.num_frames for utterance in labelled),
        teacher_seconds=teacher_seconds,
    )


def _run_batch(rows: Sequence[Utterance], batch: _Batch) -> tuple[list[Outputs], Results, float]:
    """Run the teachers on one padded batch; the seconds it took come last. On a GPU too: ``Teacher.logits`` waits for it."""
    began = time.monotonic()
    outputs, errors = _outputs(rows, batch)
    return outputs, errors, time.monotonic() - began


def _outputs(rows: Sequence[Utterance], batch: _Batch) -> tuple[list[Outputs], Results]:
    """Where a batch fails, each utterance is one of its own, to find those that it is the fault of."""
    if not batch.features:
        return [], {}
    try:
        return [_run(list(batch.features), batch.padded, batch.teachers)], {}
    except Exception as error:
        if not _may_be_an_utterances_fault(error):
            raise
        # Its traceback holds what fills the memory.
        failure = error.with_traceback(None)
    if lacks_memory(failure) and torch.cuda.is_available():
        torch.cuda.empty_cache()
    outputs, errors = _one_by_one(rows, batch)
    if not errors and not isinstance(failure, InputError) and not lacks_memory(failure):
        # By chance, or of the batch alone. The shard is tried again: its labels are those of a run without it, to the bit.
        raise failure
    return outputs, errors


def _one_by_one(rows: Sequence[Utterance], batch: _Batch) -> tuple[list[Outputs], Results]:
    outputs: list[Outputs] = []
    errors: Results = {}
    for index, own in batch.features.items():
        try:
            outputs.append(_run([index], [pad([features_TD]) for features_TD in own], batch.teachers))
        except Exception as error:
            if not _may_be_an_utterances_fault(error):
                raise
            errors[index] = _of_utterance(rows[index], error)
    return outputs, errors


def _of_utterance(row: Utterance, error: Exception) -> UtteranceError:
    utterance = f"utterance {row.utterance_id}"
    if isinstance(error, InputError):
        return UtteranceError(f"{utterance}: {error}")
    if lacks_memory(error):
        # What torch says of it is of the machine: sizes and processes.
        return LacksMemoryError(f"{utterance}: memory was not enough for its {row.seconds:g} s alone")
    return TeachersFailedError(f"{utterance}: the teachers fail on it: {_in_one_line(error)}")


def _may_be_an_utterances_fault(error: Exception) -> bool:
    return not isinstance(error, OSError) and not is_device_fault(error)


def _in_one_line(error: Exception) -> str:
    """As it is recorded for each utterance: models give pages, with paths of the machine."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first[:_REASON_CHARACTERS]}"


def _run(indices: list[int], padded: list[tuple[Tensor, Tensor]], teachers: list[Teacher]) -> Outputs:
    """Raises InputError where a teacher's output is not as a bundle promises."""
    outputs = Outputs(indices=indices, logits=[], lengths=[])
    for teacher, (features_BTD, lengths_B) in zip(teachers, padded, strict=True):
        logits_BTV, out_lengths_B = teacher.logits(features_BTD, lengths_B)
        outputs.logits.append(logits_BTV)
        outputs.lengths.append(out_lengths_B.cpu())
    return outputs
