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
from softlabel_schemas.plan import ShardRange
from softlabel_schemas.selection import NO_LABEL
from softlabel_schemas.shard import LabelledUtterance, UtteranceStats
from softlabel_schemas.spec import DatasetSpec, StorageSpec
from softlabel_schemas.targets import SoftTargets
from teacher_service.batching import batch_rows, pad
from teacher_service.ensemble import check_same_lengths, combine
from teacher_service.selection import Selected, select, to_soft_targets
from teacher_service.teacher import Teacher

Features = list[np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledShard:
    """Utterances in corpus order, and those that could not be labelled."""

    utterances: list[LabelledUtterance]
    skipped: list[SkippedUtterance]


def label_shard(
    corpus: Corpus,
    shard_range: ShardRange,
    teachers: list[Teacher],
    spec: DatasetSpec,
    storage: StorageSpec,
    *,
    on_seconds: Callable[[float], None] = lambda _: None,
) -> LabelledShard:
    """Label the rows of one shard; a function of its arguments alone.

    Args:
        on_seconds: told the seconds of speech of each batch when it is done.

    Raises:
        UtteranceError: an utterance cannot be labelled and ``storage.on_error`` is "fail".
        InputError: teachers and corpus do not fit together; both values are named.
    """
    first, reader = shard_range.first_row, UtteranceReader(corpus)
    rows = list(corpus.rows(first, first + shard_range.num_rows))
    labelled: dict[int, LabelledUtterance] = {}
    skipped: dict[int, SkippedUtterance] = {}

    def skip(index: int, error: UtteranceError) -> None:
        if storage.on_error == "fail":
            raise error
        skipped[index] = SkippedUtterance(utterance_id=rows[index].utterance_id, reason=str(error))

    for indices in batch_rows(np.array([row.seconds for row in rows]), storage.batch_seconds):
        features: dict[int, Features] = {}
        for index in indices:
            try:
                features[index] = reader.features(rows[index], [teacher.front_end for teacher in teachers])
            except UtteranceError as error:
                skip(index, error)
        if features:
            for index, result in label_batch(rows, features, teachers, spec).items():
                if isinstance(result, UtteranceError):
                    skip(index, result)
                else:
                    labelled[index] = result
        on_seconds(sum(rows[index].seconds for index in indices))
    return LabelledShard(
        utterances=[labelled[index] for index in sorted(labelled)],
        skipped=[skipped[index] for index in sorted(skipped)],
    )


def label_batch(
    rows: list[Utterance], features: dict[int, Features], teachers: list[Teacher], spec: DatasetSpec
) -> dict[int, LabelledUtterance | UtteranceError]:
    """Run the ensemble on one padded batch; an utterance with non-finite posteriors gives its error."""
    logits, lengths = [], []
    for position, teacher in enumerate(teachers):
        logits_BTV, lengths_B = teacher.logits(*pad([of_teachers[position] for of_teachers in features.values()]))
        logits.append(logits_BTV)
        lengths.append(lengths_B)
    check_same_lengths(lengths, [teacher.name for teacher in teachers])
    log_probs_BTV = combine(logits, [teacher.weight for teacher in teachers], spec.combination)
    num_frames = lengths[0].tolist()
    labels = [_hard_labels(rows[index], frames) for index, frames in zip(features, num_frames, strict=True)]
    device = log_probs_BTV.device
    mask_BT = torch.arange(log_probs_BTV.shape[1], device=device) < lengths[0].to(device)[:, None]
    labels_N = torch.from_numpy(np.concatenate(labels)).to(device)
    selected = select(log_probs_BTV[mask_BT], spec.selection, spec.temperatures, labels_N).to_cpu()
    targets = to_soft_targets(selected, spec.num_classes, spec.temperatures)
    results: dict[int, LabelledUtterance | UtteranceError] = {}
    start = 0
    for index, frames, labels_T in zip(features, num_frames, labels, strict=True):
        results[index] = _utterance(rows[index], targets, selected, slice(start, start + frames), labels_T)
        start += frames
    return results


def _hard_labels(row: Utterance, num_frames: int) -> np.ndarray:
    """int64 [T]. Raises InputError where the corpus has another number of labels than the teachers give frames."""
    if row.hard_labels is None:
        return np.full(num_frames, NO_LABEL, dtype=np.int64)
    if len(row.hard_labels) != num_frames:
        raise InputError(
            f"utterance {row.utterance_id}: the teachers give {num_frames} frames, the corpus has "
            f"{len(row.hard_labels)} hard labels; both need the same frame shift"
        )
    return row.hard_labels.astype(np.int64)


def _utterance(
    row: Utterance, targets: SoftTargets, selected: Selected, frames: slice, labels_T: np.ndarray
) -> LabelledUtterance | UtteranceError:
    if frames.start == frames.stop:
        return UtteranceError(f"utterance {row.utterance_id}: the teachers give no frames for its {row.seconds:g} s")
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
