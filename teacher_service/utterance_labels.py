"""Behind the model: the teachers' outputs of a batch -> labelled utterances."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softlabel_schemas.byte_budget import keep_within_budget
from softlabel_schemas.corpus import Utterance
from softlabel_schemas.frame_selection import frame_weights
from softlabel_schemas.narrowing import drop_frames
from softlabel_schemas.sampling import frame_streams
from softlabel_schemas.selection import NO_LABEL, ByteBudget, SampledSelection
from softlabel_schemas.shard import LabelledUtterance, UtteranceStats
from softlabel_schemas.spec import DatasetSpec
from softlabel_schemas.targets import SoftTargets
from softlabel_schemas.utterance_reader import UtteranceError
from teacher_service.capture import capture
from teacher_service.ensemble import disagreements
from teacher_service.selection import Selected, to_soft_targets, top1_targets

# By the utterance's row in the shard.
Results = dict[int, LabelledUtterance | UtteranceError]


class TeachersFailedError(UtteranceError):
    """A model raised on the utterance by itself, or its posteriors are not finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """What the teachers gave for the utterances in ``indices``, B of them.

    Attributes:
        logits: of each teacher, [B, T, V] on its device, which is done with them; T may differ.
        lengths: of each teacher, int64 [B] on the CPU.
    """

    indices: list[int]
    logits: list[Tensor]
    lengths: list[Tensor]


def label_outputs(
    rows: Sequence[Utterance],
    outputs: Outputs,
    names: list[str],
    weights: list[float],
    spec: DatasetSpec,
    silence_V: npt.NDArray[np.bool_],
) -> Results:
    """Check the outputs against the corpus, and capture.

    Args:
        rows: of the whole shard.
        names, weights: of the teachers.
        silence_V: see ``softlabel_schemas.frame_selection.silence_classes``.
    """
    problems = disagreements(outputs.lengths, names)
    results: Results = {}
    labels: dict[int, np.ndarray] = {}
    num_frames = outputs.lengths[0].tolist()
    for position, (index, frames) in enumerate(zip(outputs.indices, num_frames, strict=True)):
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
    streams_NW = None
    if isinstance(spec.selection, SampledSelection):
        seed = spec.selection.seed
        streams_NW = np.concatenate([frame_streams(seed, rows[i].utterance_id, len(own)) for i, own in labels.items()])
    labels_N = np.concatenate(list(labels.values()))
    selected = _captured(outputs.logits, num_frames, weights, spec, labels_N, streams_NW)
    targets = to_soft_targets(selected, spec.num_classes, spec.temperatures)
    start = 0
    for index, labels_T in labels.items():
        stop = start + len(labels_T)
        results[index] = _utterance(rows[index], targets, selected, slice(start, stop), labels_T, spec, silence_V)
        start = stop
    return results


def _captured(
    logits: list[Tensor],
    num_frames: list[int],
    weights: list[float],
    spec: DatasetSpec,
    labels_N: np.ndarray,
    streams_NW: npt.NDArray[np.uint64] | None,
) -> Selected:
    """On a stream of its own where the device has streams: what is copied does not wait for the next batch's model."""
    device = logits[0].device
    # It need not wait for the logits, ``Teacher.logits`` has. Nor can they be freed under it: ``to_cpu`` waits for it.
    with torch.cuda.stream(_capture_stream(device)) if device.type == "cuda" else nullcontext():
        return capture(
            logits,
            num_frames,
            weights,
            spec.combination,
            spec.selection,
            spec.temperatures,
            torch.from_numpy(labels_N),
            streams_NW,
        ).to_cpu()


@lru_cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: memory is reused on its own stream alone, and new streams are 32 different ones in turn."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


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
    row: Utterance,
    targets: SoftTargets,
    selected: Selected,
    frames: slice,
    labels_T: np.ndarray,
    spec: DatasetSpec,
    silence_V: npt.NDArray[np.bool_],
) -> LabelledUtterance | UtteranceError:
    own = targets.frames(frames.start, frames.stop)
    entropy_T, top1_T = selected.entropy_N[frames].numpy(), selected.top1_N[frames].numpy()
    if not (np.isfinite(entropy_T).all() and np.isfinite(own.log_probs).all() and np.isfinite(own.tail_mass).all()):
        return TeachersFailedError(f"utterance {row.utterance_id}: the teachers' posteriors are not finite")
    if spec.selection.frames is not None:
        # By the posterior's top class, which a sample may not show.
        top1 = top1_targets(selected, spec.num_classes, frames)
        own = drop_frames(own, frame_weights(top1, labels_T, silence_V, spec.selection.frames) == 0)
    if isinstance(spec.selection, ByteBudget):
        own = keep_within_budget(own, spec.selection, spec.codec)
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
