"""Frame, phone and word error rate, cross-entropy and calibration error, summed utterance by utterance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from rapidfuzz.distance import Levenshtein

from softlabel_schemas.errors import InputError
from softlabel_schemas.inventory import ClassInventory

NUM_BINS = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class FramePosteriors:
    """What the metrics need of an utterance's posteriors, from a model or from stored targets.

    Attributes:
        top1_T: likeliest class, int [T].
        confidence_T: its probability, float [T].
        label_log_prob_T: log-probability of the hard label, nats, float [T]; NaN where it is not known.
        phone_log_probs_TC: log-probabilities of phones, float32 [T, C]; None where words are not decoded.
    """

    top1_T: npt.NDArray[np.integer]
    confidence_T: npt.NDArray[np.floating]
    label_log_prob_T: npt.NDArray[np.floating]
    phone_log_probs_TC: npt.NDArray[np.float32] | None = None


def check_finite(utterance_id: str, best_T: npt.NDArray[np.floating]) -> None:
    """Raises InputError where the likeliest class of a frame has a probability, or a logit, that is not finite."""
    if not np.isfinite(best_T).all():
        raise InputError(
            f"utterance {utterance_id}: the posteriors are not finite, as of a model whose training diverged; lower "
            "training.learning_rate"
        )


@dataclass(slots=True)
class Metrics:
    """Sums over utterances; ``summary`` gives the rates.

    Frames without a hard label count nowhere. Calibration error is the expected calibration error over 15 equal bins
    of the top-1 probability (Naeini et al., 2015; Guo et al., 2017).
    """

    inventory: ClassInventory
    utterances: list[dict[str, Any]] = field(default_factory=list)
    _bins: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros((3, NUM_BINS)))

    def add(
        self,
        utterance_id: str,
        labels_T: npt.NDArray[np.integer],
        posteriors: FramePosteriors,
        words: Mapping[str, Any] | None = None,
    ) -> None:
        """``words``: the record of ``WordErrors`` for this utterance; given for all of them or none.

        Raises:
            InputError: posteriors are not finite.
        """
        valid = labels_T >= 0
        labels, top1 = labels_T[valid], posteriors.top1_T[valid]
        confidence = posteriors.confidence_T[valid].astype(np.float64)
        check_finite(utterance_id, confidence)
        bins = np.minimum((confidence * NUM_BINS).astype(np.int64), NUM_BINS - 1)
        for row, values in enumerate((np.ones(len(labels)), top1 == labels, confidence)):
            self._bins[row] += np.bincount(bins, weights=values, minlength=NUM_BINS)
        cross_entropy_sum = -float(posteriors.label_log_prob_T[valid].astype(np.float64).sum())
        record: dict[str, Any] = {
            "utterance_id": utterance_id,
            "frames": len(labels),
            "frame_errors": int((top1 != labels).sum()),
            # JSON has no NaN.
            "cross_entropy_sum": None if math.isnan(cross_entropy_sum) else cross_entropy_sum,
        }
        if self.inventory.phones:
            reference, found = self.phone_sequence(labels), self.phone_sequence(top1)
            record |= {"phones": len(reference), "phone_errors": Levenshtein.distance(reference, found)}
        self.utterances.append({**record, **(words or {})})

    def phone_sequence(self, classes_T: npt.NDArray[np.integer]) -> list[int]:
        """Phones of a frame sequence: runs joined, silence and frames of no class (-1) left out."""
        phones, phone_of_class = self.inventory.phone_ids()
        sequence = np.where(classes_T >= 0, phone_of_class[classes_T], -1)
        if len(sequence) == 0:
            return []
        starts = np.concatenate([[True], sequence[1:] != sequence[:-1]])
        left_out = {-1, *(phones.index(phone) for phone in self.inventory.silence_phones)}
        return [int(phone) for phone in sequence[starts] if int(phone) not in left_out]

    def summary(self) -> dict[str, Any]:
        """Rates in percent, cross-entropy in nats per frame (None where a label's probability is not known)."""

        def total(key: str) -> float:
            return float(sum(record[key] for record in self.utterances))

        frames = max(total("frames"), 1.0)
        unknown = any(record["cross_entropy_sum"] is None for record in self.utterances)
        counts, correct, confidence = self._bins
        return {
            "num_utterances": len(self.utterances),
            "num_frames": int(total("frames")),
            "frame_error_rate": 100 * total("frame_errors") / frames,
            "phone_error_rate": 100 * total("phone_errors") / max(total("phones"), 1.0)
            if self.inventory.phones
            else None,
            "cross_entropy": None if unknown else total("cross_entropy_sum") / frames,
            "calibration_error": 100 * float(np.abs(correct - confidence).sum() / max(counts.sum(), 1.0)),
            **self._word_summary(),
        }

    def _word_summary(self) -> dict[str, Any]:
        """Rates in percent of the words of the transcripts; nothing where no words were decoded."""
        records = self.utterances
        if not records or "words" not in records[0]:
            return {}
        num_words = sum(record["words"] for record in records)
        return {
            "num_words": num_words,
            "word_error_rate": 100 * sum(record["word_errors"] for record in records) / max(num_words, 1),
            "out_of_vocabulary_rate": 100 * sum(record["oov_words"] for record in records) / max(num_words, 1),
            "num_unfinished_decodings": sum(not record["decoding_finished"] for record in records),
        }
