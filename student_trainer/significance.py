"""Whether two arms differ: a paired bootstrap over utterances, for frame, phone and word errors alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from softlabel_schemas.errors import InputError
from student_trainer.arms import Arm, Metric

NUM_RESAMPLES = 10_000
# Drawn at once: 4 M indices are 32 MB.
_INDICES_AT_ONCE = 4_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Of two arms' mean error rates over the same utterances, in points (percent of frames, phones or words).

    Attributes:
        points: soft less hard.
        low, high: 95% interval of it over test utterances.
        p_value: two-sided, that the difference is zero.
    """

    metric: Metric
    points: float
    low: float
    high: float
    p_value: float

    @property
    def unit(self) -> str:
        """``frame``, ``phone`` or ``word``."""
        return self.metric.removesuffix("_error_rate")


def difference(soft: Arm, hard: Arm, metric: Metric) -> Difference | None:
    """Of two arms in one metric; None where one of them has no counts of it. Raises InputError where the counts do not fit."""
    of_soft, of_hard = soft.errors_U(metric), hard.errors_U(metric)
    if of_soft is None or of_hard is None:
        return None
    if not np.array_equal(of_soft[1], of_hard[1]):
        raise InputError(
            f"{soft.name} and {hard.name} cannot be compared: their utterances have different numbers of "
            f"{metric.removesuffix('_error_rate')}s; evaluate both with the same transcripts"
        )
    points, low, high, p_value = paired_bootstrap(of_soft[0], of_hard[0], of_hard[1])
    return Difference(metric=metric, points=points, low=low, high=high, p_value=p_value)


def paired_bootstrap(
    errors_a_U: npt.NDArray[np.float64], errors_b_U: npt.NDArray[np.float64], units_U: npt.NDArray[np.float64]
) -> tuple[float, float, float, float]:
    """Difference of two error rates (a less b) over the same utterances, by resampling utterances.

    After Bisani and Ney, "Bootstrap estimates for confidence intervals in ASR performance evaluation" (2004). The seed is
    fixed: the same files give the same interval.

    Args:
        units_U: what the errors are counted among: frames, phones or words of each utterance.

    Returns:
        difference, lower and upper end of its 95% percentile interval (points), two-sided p (at least 2 / 10,001).
    """
    differences_U = errors_a_U - errors_b_U
    rng = np.random.default_rng(0)
    num_utterances = len(units_U)
    rows = max(_INDICES_AT_ONCE // num_utterances, 1)
    parts = []
    for start in range(0, NUM_RESAMPLES, rows):
        sample_RU = rng.integers(num_utterances, size=(min(rows, NUM_RESAMPLES - start), num_utterances))
        parts.append(differences_U[sample_RU].sum(axis=1) / np.maximum(units_U[sample_RU].sum(axis=1), 1))
    resampled_R = 100 * np.concatenate(parts)
    low, high = np.percentile(resampled_R, (2.5, 97.5))
    beyond = min((resampled_R <= 0).sum(), (resampled_R >= 0).sum())
    # Plus one: what was observed counts as a resample, and no finite number of them shows p = 0.
    p_value = min(1.0, 2 * (1 + int(beyond)) / (NUM_RESAMPLES + 1))
    return 100 * float(differences_U.sum() / max(units_U.sum(), 1)), float(low), float(high), p_value
