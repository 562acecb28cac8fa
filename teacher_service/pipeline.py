"""One shard, from corpus rows to labelled utterances: the whole flow, without Ray and without storage.

    rows -> batches -> features -> teachers -> ensemble -> selection -> SoftTargets

Shape suffixes: B utterances, T frames, V classes, N valid frames of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from softlabel_schemas.corpus import Corpus, Utterance
from softlabel_schemas.errors import InputError
from softlabel_schemas.front_end import UtteranceError, UtteranceReader
from softlabel_schemas.manifest import SkippedUtterance
from softlabel_schemas.selection import NO_LABEL
from softlabel_schemas.shard import LabelledUtterance, UtteranceStats
from softlabel_schemas.spec import DatasetSpec, StorageSpec
from softlabel_schemas.targets import SoftTargets
from teacher_service.batching import batch_rows, pad
from teacher_service.capture import capture
from teacher_service.ensemble import disagreements
from teacher_service.selection import Selected, to_soft_targets
from teacher_service.teacher import Teacher

Features = list[np.ndarray]
# By the utterance's row in the shard.
Results = dict[int, LabelledUtterance | UtteranceError]


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledShard:
    """Utterances in corpus order, and those that could not be labelled."""

    utterances: list[LabelledUtterance]
    skipped: list[SkippedUtterance]


def label_shard(
    rows: Corpus,
    teachers: list[Teacher],
    spec: DatasetSpec,
    storage: StorageSpec,
    *,
    on_seconds: Callable[[float], None] = lambda _: None,
) -> LabelledShard:
    """Label the rows of one shard; a function of its arguments alone.

    What is wrong with one utterance, in the corpus or in what the teachers give for it, leaves out that one. Storage and
    devices that fail are not an utterance's fault: their errors are passed on, and the shard can be tried again.

    Args:
        rows: all rows of the shard and no others.
        on_seconds: told the seconds of speech of each batch when it is done.

    Raises:
        UtteranceError: an utterance cannot be labelled and ``storage.on_error`` is "fail"; names it.
    """
    reader, utterances = UtteranceReader(rows), list(rows)
    labelled: dict[int, LabelledUtterance] = {}
    skipped: dict[int, SkippedUtterance] = {}

    def keep(index: int, result: LabelledUtterance | UtteranceError) -> None:
        if isinstance(result, LabelledUtterance):
            labelled[index] = result
        elif storage.on_error == "fail":
            raise result
        else:
            skipped[index] = SkippedUtterance(utterance_id=utterances[index].utterance_id, reason=str(result))

    for indices in batch_rows(rows.seconds(), storage.batch_seconds):
        features: dict[int, Features] = {}
        for index in indices:
            try:
                features[index] = reader.features(utterances[index], [teacher.front_end for teacher in teachers])
            except UtteranceError as error:
                keep(index, error)
        for index, result in _label_batch(utterances, features, teachers, spec).items():
            keep(index, result)
        on_seconds(sum(utterances[index].seconds for index in indices))
    return LabelledShard(
        utterances=[labelled[index] for index in sorted(labelled)],
        skipped=[skipped[index] for index in sorted(skipped)],
    )


def _label_batch(
    rows: list[Utterance], features: dict[int, Features], teachers: list[Teacher], spec: DatasetSpec
) -> Results:
    """Run the ensemble on one padded batch. Where a teacher's output does not fit the batch, each utterance has one of its own,
    to find those that it is the fault of."""
    if not features:
        return {}
    try:
        return _run(rows, features, teachers, spec)
    except InputError as error:
        if len(features) == 1:
            (index,) = features
            return {index: UtteranceError(f"utterance {rows[index].utterance_id}: {error}")}
    results: Results = {}
    for index, own in features.items():
        results |= _label_batch(rows, {index: own}, teachers, spec)
    return results


def _run(rows: list[Utterance], features: dict[int, Features], teachers: list[Teacher], spec: DatasetSpec) -> Results:
    """Raises InputError where a teacher's output is not as a bundle promises."""
    logits, lengths = [], []
    for position, teacher in enumerate(teachers):
        logits_BTV, lengths_B = teacher.logits(*pad([of_teachers[position] for of_teachers in features.values()]))
        logits.append(logits_BTV)
        lengths.append(lengths_B.cpu())
    problems = disagreements(lengths, [teacher.name for teacher in teachers])
    results: Results = {}
    labels: dict[int, np.ndarray] = {}
    num_frames = lengths[0].tolist()
    for position, (index, frames) in enumerate(zip(features, num_frames, strict=True)):
        problem = problems.get(position)
        try:
            if problem is not None:
                raise UtteranceError(f"utterance {rows[index].utterance_id}: {problem}")
            labels[index] = _hard_labels(rows[index], frames, spec.num_classes)
        except UtteranceError as error:
            results[index] = error
            num_frames[position] = 0
    if not labels:
        return results
    weights, labels_N = (
        [teacher.weight for teacher in teachers],
        torch.from_numpy(np.concatenate(list(labels.values()))),
    )
    selected = capture(
        logits, num_frames, weights, spec.combination, spec.selection, spec.temperatures, labels_N
    ).to_cpu()
    targets = to_soft_targets(selected, spec.num_classes, spec.temperatures)
    start = 0
    for index, labels_T in labels.items():
        stop = start + len(labels_T)
        results[index] = _utterance(rows[index], targets, selected, slice(start, stop), labels_T)
        start = stop
    return results


def _hard_labels(row: Utterance, num_frames: int, num_classes: int) -> np.ndarray:
    """int64 [T]. Raises UtteranceError where they do not fit the teachers' frames and classes, or there is no frame."""
    if num_frames == 0:
        raise UtteranceError(f"utterance {row.utterance_id}: the teachers give no frames for its {row.seconds:g} s")
    if row.hard_labels is None:
        return np.full(num_frames, NO_LABEL, dtype=np.int64)
    if len(row.hard_labels) != num_frames:
        raise UtteranceError(
            f"utterance {row.utterance_id}: the teachers give {num_frames} frames, the corpus has "
            f"{len(row.hard_labels)} hard labels; both need the same frame shift"
        )
    low, high = int(row.hard_labels.min()), int(row.hard_labels.max())
    if low < NO_LABEL or high >= num_classes:
        raise UtteranceError(
            f"utterance {row.utterance_id}: hard labels run from {low} to {high}, "
            f"expected {NO_LABEL} (none) to {num_classes - 1}"
        )
    return row.hard_labels.astype(np.int64)


def _utterance(
    row: Utterance, targets: SoftTargets, selected: Selected, frames: slice, labels_T: np.ndarray
) -> LabelledUtterance | UtteranceError:
    own = targets.frames(frames.start, frames.stop)
    entropy_T, top1_T = selected.entropy_N[frames].numpy(), selected.top1_N[frames].numpy()
    if not (np.isfinite(entropy_T).all() and np.isfinite(own.log_probs).all() and np.isfinite(own.tail_mass).all()):
        return UtteranceError(f"utterance {row.utterance_id}: the teachers' posteriors are not finite")
    valid = labels_T != NO_LABEL
    return LabelledUtterance(
        utterance_id=row.utterance_id,
        targets=own,
        stats=UtteranceStats(
            kept_mass=float(own.kept_mass_T().mean()),
            entropy=float(entropy_T.mean(dtype=np.float64)),
            agreement=float((top1_T == labels_T)[valid].mean()) if valid.any() else float("nan"),
        ),
    )
