"""Whether two arms differ, and what share of a gain an arm keeps: a paired bootstrap over utterances, for all errors alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from softlabel_schemas.errors import InputError
from student_trainer.arms import Arm
from student_trainer.metric_names import Metric, unit_name

NUM_RESAMPLES = 10_000
# Of fewer utterances an interval is too narrow by a tenth and more: for normal differences by z / t and sqrt((n - 1) / n).
MIN_UTTERANCES = 20
Float64 = npt.NDArray[np.float64]
_INTERVAL = (2.5, 97.5)
# Drawn at once: 4 M indices are 32 MB.
_INDICES_AT_ONCE = 4_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Of two arms' mean error rates over the same utterances, in points (percent of frames, tokens, phones or words).

    Attributes:
        points: soft less hard.
        low, high: 95% interval of it over test utterances; too narrow of few of them (``MIN_UTTERANCES``).
        p_value: two-sided, that the difference is zero.
    """

    metric: Metric
    points: float
    low: float
    high: float
    p_value: float

    @property
    def unit(self) -> str:
        return unit_name(self.metric)


def difference(soft: Arm, hard: Arm, metric: Metric) -> Difference | None:
    """Of two arms in one metric; None where one of them has no counts of it. Raises InputError where the counts do not fit."""
    of_soft, of_hard = soft.errors_U(metric), hard.errors_U(metric)
    if of_soft is None or of_hard is None:
        return None
    if not np.array_equal(of_soft[1], of_hard[1]):
        raise InputError(
            f"{soft.name} and {hard.name} cannot be compared: their utterances have different numbers of "
            f"{unit_name(metric)}s; evaluate both with the same transcripts"
        )
    points, low, high, p_value = paired_bootstrap(of_soft[0], of_hard[0], of_hard[1])
    return Difference(metric=metric, points=points, low=low, high=high, p_value=p_value)


@dataclass(frozen=True, slots=True, kw_only=True)
class GainKept:
    """Percent of the reference's gain over the baseline that an arm has too: 0 as the baseline, 100 as the reference.

    Attributes:
        kept: None where the reference gains nothing, or loses.
        interval: 95%, over test utterances. None where that of the reference's gain holds zero or is below it: the share can be
            anything then.
    """

    kept: float | None
    interval: tuple[float, float] | None


def gain_kept(arm: Arm, baseline: Arm, reference: Arm) -> GainKept:
    """(baseline - arm) / (baseline - reference) of the mean errors, of frames or of tokens, in the same resamples."""
    (of_arm_U, units_U), (of_baseline_U, _), (of_reference_U, _) = map(_leading_errors_U, (arm, baseline, reference))
    gains = of_baseline_U - of_arm_U, of_baseline_U - of_reference_U
    own, whole = (float(gain_U.sum()) for gain_U in gains)
    own_R, whole_R = _resampled(gains, units_U)
    interval = None
    if np.percentile(whole_R, _INTERVAL[0]) > 0:
        # Of so clear a gain hardly a resample is exactly zero; one that is has no share.
        is_some_R = whole_R != 0
        ends = np.percentile(100 * own_R[is_some_R] / whole_R[is_some_R], _INTERVAL)
        interval = float(ends[0]), float(ends[1])
    return GainKept(kept=100 * own / whole if whole > 0 else None, interval=interval)


def _leading_errors_U(arm: Arm) -> tuple[Float64, Float64]:
    found = arm.errors_U(arm.leading)
    assert found is not None  # every evaluation counts them
    return found


def paired_bootstrap(errors_a_U: Float64, errors_b_U: Float64, units_U: Float64) -> tuple[float, float, float, float]:
    """Difference of two error rates (a less b) over the same utterances, by resampling utterances.

    After Bisani and Ney, "Bootstrap estimates for confidence intervals in ASR performance evaluation" (2004). The seed is
    fixed: the same files give the same interval.

    Args:
        units_U: what the errors are counted among: frames, tokens, phones or words of each utterance.

    Returns:
        difference, lower and upper end of its 95% percentile interval (points), two-sided p (at least 2 / 10,001, and 2^(1 - n)
        where n utterances differ: the least that their signs can show).
    """
    differences_U = errors_a_U - errors_b_U
    (resampled_R,) = _resampled([differences_U], units_U)
    low, high = np.percentile(resampled_R, _INTERVAL)
    beyond = min((resampled_R <= 0).sum(), (resampled_R >= 0).sum())
    # Plus one: what was observed counts as a resample, and no finite number of them shows p = 0.
    p_value = 2 * (1 + int(beyond)) / (NUM_RESAMPLES + 1)
    # Where a handful of utterances agree all resamples do; but n signs agree by chance once in 2^(n - 1).
    least = 2.0 ** (1 - int(np.count_nonzero(differences_U)))
    p_value = min(1.0, max(p_value, least))
    return 100 * float(differences_U.sum() / max(units_U.sum(), 1)), float(low), float(high), p_value


def _resampled(errors: Sequence[Float64], units_U: Float64) -> Float64:
    """Rates, percent, of each of K counts in the same resamples of utterances, [K, R]."""
    rng = np.random.default_rng(0)
    num_utterances = len(units_U)
    rows = max(_INDICES_AT_ONCE // num_utterances, 1)
    parts = []
    for start in range(0, NUM_RESAMPLES, rows):
        sample_RU = rng.integers(num_utterances, size=(min(rows, NUM_RESAMPLES - start), num_utterances))
        units_R = np.maximum(units_U[sample_RU].sum(axis=1), 1)
        parts.append(np.stack([errors_U[sample_RU].sum(axis=1) / units_R for errors_U in errors]))
    return np.asarray(100 * np.concatenate(parts, axis=1))
