"""Weights of an arithmetic ensemble, fitted on a dev split from stored targets.

They maximise the mean log-likelihood of the hard labels, (1/N) sum_n ln sum_m w_m q_m(label_n), by expectation-
maximisation of a mixture with fixed components (Dempster, Laird and Rubin, 1977): w_m becomes the mean responsibility
of teacher m. The objective is concave in w, so that the limit does not depend on the start. q_m is the stored
probability of the label, or the estimate where it was not kept (see ``combine.py``): targets stored with
``keep_hard_label`` give it exactly.

Weights of a log-linear ensemble are not fitted: its likelihood has a normaliser over all classes, and needs a general
optimiser.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from softlabel_schemas.combine import Estimate
from softlabel_schemas.combined_dataset import check_inputs
from softlabel_schemas.command_line import Advance
from softlabel_schemas.corpus import Corpus, check_hard_labels
from softlabel_schemas.dataset import SoftLabelDataset
from softlabel_schemas.errors import InputError
from softlabel_schemas.selection import NO_LABEL

# Nats per frame that a step of EM must gain; it gains little long before the weights stand still.
_MIN_GAIN = 1e-12
_MAX_STEPS = 100_000
_UTTERANCES_AT_ONCE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedWeights:
    """Log-likelihoods are of the hard label, nats per frame.

    Attributes:
        weights: one for each dataset, adding up to 1.
        num_skipped: utterances of the split that a dataset skipped.
        alone: log-likelihood of each dataset by itself; then of equal weights, and of those fitted.
    """

    weights: tuple[float, ...]
    num_frames: int
    num_skipped: int
    alone: tuple[float, ...]
    equal: float
    fitted: float


def fit_weights(inputs: Sequence[SoftLabelDataset], corpus: Corpus, *, where: str, advance: Advance) -> FittedWeights:
    """Fit on all frames of ``corpus`` that have a hard label.

    Args:
        corpus: of the dev split, which no teacher was trained on.
        where: names the corpus in errors.
        advance: told the number of utterances read.

    Raises:
        InputError: the datasets or the corpus do not fit together, or there is no hard label.
    """
    check_inputs(inputs, "arithmetic")
    check_hard_labels(corpus, inputs[0].inventory, where=where)
    shift, expected = corpus.hard_label_frame_shift_ms, inputs[0].manifest.spec.frame_shift_ms
    if shift is not None and shift != expected:
        raise InputError(
            f"{where} has hard labels every {shift:g} ms, {inputs[0].store.url} has frames of {expected:g} ms"
        )
    skipped = {entry.utterance_id for data in inputs for entry in data.manifest.skipped}
    pieces = []
    for start in range(0, len(corpus), _UTTERANCES_AT_ONCE):
        rows = list(corpus.rows(start, min(start + _UTTERANCES_AT_ONCE, len(corpus))))
        labels = {row.utterance_id: row.hard_labels for row in rows if row.utterance_id not in skipped}
        pieces.append(_label_log_probs(inputs, {each: found for each, found in labels.items() if found is not None}))
        advance(start + len(rows))
    log_probs_MN = np.concatenate(pieces, axis=1)
    if not log_probs_MN.shape[1]:
        raise InputError(f"{where}: no frame has both a hard label and soft targets; weights are fitted on hard labels")
    weights_M = mixture_weights(log_probs_MN)
    ids = set(corpus.table["utterance_id"].to_pylist())
    return FittedWeights(
        weights=tuple(weights_M.tolist()),
        num_frames=log_probs_MN.shape[1],
        num_skipped=len(ids & skipped),
        alone=tuple(log_probs_MN.mean(axis=1).tolist()),
        equal=_log_likelihood(log_probs_MN, np.full(len(inputs), 1 / len(inputs))),
        fitted=_log_likelihood(log_probs_MN, weights_M),
    )


def _label_log_probs(
    inputs: Sequence[SoftLabelDataset], labels: dict[str, npt.NDArray[np.int32]]
) -> npt.NDArray[np.float64]:
    """ln q of the hard label, float64 [M, N], of the frames that have one."""
    rows = []
    for data in inputs:
        pieces = [np.empty(0)]
        try:
            utterances = data.read_utterances(list(labels))
        except KeyError as error:
            raise InputError(f"{error.args[0]}; label the split that the weights are fitted on") from None
        for utterance in utterances:
            labels_T, num_frames = labels[utterance.utterance_id], utterance.targets.num_frames
            if len(labels_T) != num_frames:
                raise InputError(
                    f"utterance {utterance.utterance_id}: {data.store.url} has {num_frames} frames, the corpus "
                    f"{len(labels_T)} hard labels; give the corpus that was labelled"
                )
            pieces.append(Estimate(utterance.targets).log_prob_T(labels_T)[labels_T != NO_LABEL])
        rows.append(np.concatenate(pieces))
    return np.stack(rows)


def mixture_weights(log_probs_MN: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The weights float64 [M] that maximise the mean over N of ln sum_m w_m exp(log_probs_MN)."""
    # Relative to the best of each frame, which cancels in the responsibilities, so that none underflows in all.
    probs_MN = np.exp(log_probs_MN - log_probs_MN.max(axis=0))
    weights_M = np.full(len(probs_MN), 1 / len(probs_MN))
    before = -np.inf
    for _ in range(_MAX_STEPS):
        total_N = weights_M @ probs_MN
        now = float(np.log(total_N).mean())
        if now - before < _MIN_GAIN:
            break
        before = now
        weights_M = weights_M * (probs_MN / total_N).mean(axis=1)
    return weights_M


def _log_likelihood(log_probs_MN: npt.NDArray[np.float64], weights_M: npt.NDArray[np.float64]) -> float:
    best_N = log_probs_MN.max(axis=0)
    return float((best_N + np.log(weights_M @ np.exp(log_probs_MN - best_N))).mean())
