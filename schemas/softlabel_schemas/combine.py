"""Combine stored targets of several teachers into those of their ensemble, without running a teacher.

Of the n_m classes that teacher m did not keep only their mass is known, the tail mass t_m. Each is taken to have t_m /
n_m, and the ensemble's posterior is that of the estimates q_m (q_m(i) = p_m(i) where i was kept):

    arithmetic   p^(i) = sum_m w_m q_m(i)                      log_linear   p^(i) = prod_m q_m(i)^w_m / Z

The classes that some teacher kept are ranked by p^, and the k likeliest are kept. Where every class was stored it
is exact, but for what the codecs rounded. A frame that an input stored without entries has none in the result either.

Error. Where m did not keep i, p_m(i) and its estimate are both in [0, t_m], so |q_m(i) - p_m(i)| <= t_m. q_m and p_m
put the same t_m on the same n_m classes, so their total variation distance TV is at most t_m (1 - 1 / n_m). Hence

- arithmetic: |p^(i) - p(i)| <= sum of w_m t_m over the teachers that did not keep i (0 if all did), and
  TV(p^, p) <= sum_m w_m t_m (1 - 1 / n_m);
- log_linear: before normalisation, with g = prod_m p_m^w_m and g^ = prod_m q_m^w_m, |g^(i) - g(i)| <= prod_m b_m^w_m with
  b_m = p_m(i) where m kept i and t_m where not. A class that all kept has only the error of Z. The classes that none
  kept add up to at most prod_m t_m^w_m, in truth (Hoelder's inequality) as in the estimate. ln p^(i) has no bound:
  p_m(i) may be tiny.

Codecs. The arithmetic posterior has the error of a lossy codec's values. The log-linear one raises its floor to w_m, too, as
temperature 1 / w_m does: with three teachers 1.7e-6 of "mtf-sqrt" counts 0.012. Of three simulated teachers of 638 classes
(independent logits of deviation 4), all stored, the result was 0.2 nats from the true one with "mtf-sqrt", 0.035 with
"packed-u8". So :mod:`softlabel_schemas.combined_dataset` refuses to combine where it refuses the temperature. What it does
not refuse are tails that "mtf-sqrt" decodes as 0, which are below 9.5e-6: the classes outside then have e^-100, as a veto.

Temperature tau. The tail that m stored at tau gives the sum over the n_m classes of p_m(i)^(1/tau). Their mean, to the
power of tau, is the one value v_m that each could have to give this sum; at tau = 1 it is t_m / n_m. The classes
outside all kept sets are given p^ made of v_m at tau. This is exact for one teacher and where every class was stored;
elsewhere it is an estimate. Three simulated teachers of 640 classes, alike but for noise of a third of the logits'
deviation, with top-20 stored: the tail at tau = 2, 0.65 on average, is off by 0.006 (arithmetic) or 0.05 (log_linear); with
t_m spread evenly at tau too, which overstates it (Jensen's inequality), by 0.11 or 0.15. Only temperatures that all inputs
stored are derived.

Shape suffixes: T frames, E entries of all frames together, M inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from softlabel_schemas.errors import InputError
from softlabel_schemas.selection import MIN_LOG_PROB, NO_LABEL
from softlabel_schemas.spec import Combination
from softlabel_schemas.targets import SoftTargets, offsets_of, segment_sum

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Combined:
    """Targets of the ensemble, and the entropy of the posterior they were taken from, nats, float64 [T]."""

    targets: SoftTargets
    entropy_T: Float64


class Estimate:
    """A teacher's posterior as far as its targets tell: kept classes, and one value for all others.

    Attributes:
        keys_E: those of the targets.
        log_probs_E: float64; normalised, which a lossy codec's are only within its bound.
    """

    def __init__(self, targets: SoftTargets) -> None:
        self._targets = targets
        self.keys_E = targets.keys_E()
        self._log_total_T = np.log(targets.kept_mass_T() + targets.tail_mass[:, 0])
        self.log_probs_E = targets.log_probs - np.repeat(self._log_total_T, targets.counts_T)

    def log_outside_T(self, temperature: float) -> Float64:
        """ln v of each class that was not kept, float64 [T]; see the module's docstring."""
        targets = self._targets
        num_outside_T = targets.num_classes - targets.counts_T
        # Where nothing is outside, or it has no mass, the logarithm is infinite and then floored.
        with np.errstate(divide="ignore", invalid="ignore"):
            log_num_T = np.log(np.maximum(num_outside_T, 1))
            even_T = np.log(targets.tail_mass[:, 0].astype(np.float64)) - log_num_T - self._log_total_T
            if temperature != 1.0:
                tail_T = targets.tail_mass[:, targets.temperatures.index(temperature)].astype(np.float64)
                kept_T = segment_sum(np.exp(self.log_probs_E / temperature), targets.offsets)
                powered_T = temperature * (np.log(tail_T) + np.log(kept_T) - np.log1p(-tail_T) - log_num_T)
                # Without a kept entry, or with a tail that was rounded to 1, the sum is not known.
                even_T = np.where((kept_T > 0) & (tail_T < 1), powered_T, even_T)
        return np.asarray(np.maximum(even_T, MIN_LOG_PROB))

    def log_prob_T(self, labels_T: npt.NDArray[np.integer]) -> Float64:
        """ln q of the hard label of each frame, float64 [T]; NaN where a frame has none."""
        found_T = np.where(labels_T == NO_LABEL, np.nan, self.log_outside_T(1.0))
        # A key of NO_LABEL, which is -1, would be that of the last class of the frame before.
        labelled = np.flatnonzero(labels_T != NO_LABEL)
        keys = labelled * self._targets.num_classes + labels_T[labelled]
        _, entries, positions = np.intersect1d(self.keys_E, keys, assume_unique=True, return_indices=True)
        found_T[labelled[positions]] = self.log_probs_E[entries]
        return found_T


def combine_targets(
    inputs: Sequence[SoftTargets],
    weights: Sequence[float],
    method: Combination,
    temperatures: tuple[float, ...],
    *,
    top_k: int,
) -> Combined:
    """The ensemble's targets.

    Args:
        inputs: of the same frames, one for each teacher (or ensemble).
        weights: positive, adding up to 1.
        temperatures: that all inputs have, 1 first.

    Raises:
        InputError: the inputs differ in frames or classes; names both.
    """
    first = inputs[0]
    for position, each in enumerate(inputs[1:], start=2):
        found, expected = (each.num_frames, each.num_classes), (first.num_frames, first.num_classes)
        if found != expected:
            raise InputError(f"input {position} has (frames, classes) {found}, the first has {expected}")
    estimates = [Estimate(targets) for targets in inputs]
    pooled = _Pooled.of(estimates, weights, method, first.num_frames, first.num_classes)
    # A frame that an input stored without entries was dropped there: the ensemble's posterior is not known.
    known_T = np.all([targets.counts_T > 0 for targets in inputs], axis=0)
    order = pooled.ranked(top_k)
    order = order[known_T[pooled.frames_E[order]]]
    is_kept_E = np.zeros(len(pooled.log_E), dtype=bool)
    is_kept_E[order] = True
    tails = []
    for temperature in temperatures:
        outside_T = _pool(np.stack([each.log_outside_T(temperature) for each in estimates]), weights, method)
        tails.append(pooled.tail_T(is_kept_E, outside_T, temperature))
    targets = SoftTargets(
        num_classes=first.num_classes,
        temperatures=temperatures,
        offsets=offsets_of(np.where(known_T, np.minimum(np.diff(pooled.offsets), top_k), 0)),
        class_ids=pooled.ids_E[order].astype(np.int32),
        log_probs=np.clip(pooled.log_E[order], MIN_LOG_PROB, 0.0).astype(np.float32),
        tail_mass=np.stack(tails, axis=1).astype(np.float32),
    )
    return Combined(targets=targets, entropy_T=pooled.entropy_T())


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Pooled:
    """The ensemble's posterior: the classes that some input kept, by frame and class, and one value for all others.

    Attributes:
        log_E, ids_E, frames_E: ln p^, class and frame of each entry; ``offsets`` int64 [T + 1].
        log_outside_T: ln p^ of each of the ``num_outside_T`` other classes.
        log_total_T: what was subtracted to normalise.
    """

    log_E: Float64
    ids_E: Int64
    frames_E: Int64
    offsets: Int64
    log_outside_T: Float64
    num_outside_T: Int64
    log_total_T: Float64

    @classmethod
    def of(
        cls,
        estimates: Sequence[Estimate],
        weights: Sequence[float],
        method: Combination,
        num_frames: int,
        num_classes: int,
    ) -> _Pooled:
        keys_E, positions = np.unique(np.concatenate([each.keys_E for each in estimates]), return_inverse=True)
        frames_E, ids_E = np.divmod(keys_E, num_classes)
        offsets = offsets_of(np.bincount(frames_E, minlength=num_frames))
        outside_MT = np.stack([each.log_outside_T(1.0) for each in estimates])
        known_ME = outside_MT[:, frames_E]
        ends = np.cumsum([len(each.keys_E) for each in estimates])
        for known_E, each, own in zip(known_ME, estimates, np.split(positions, ends[:-1]), strict=True):
            known_E[own] = each.log_probs_E
        log_E, log_outside_T = _pool(known_ME, weights, method), _pool(outside_MT, weights, method)
        num_outside_T = num_classes - np.diff(offsets)
        log_total_T = np.log(segment_sum(np.exp(log_E), offsets) + num_outside_T * np.exp(log_outside_T))
        return cls(
            log_E=log_E - log_total_T[frames_E],
            ids_E=ids_E,
            frames_E=frames_E,
            offsets=offsets,
            log_outside_T=log_outside_T - log_total_T,
            num_outside_T=num_outside_T,
            log_total_T=log_total_T,
        )

    def ranked(self, top_k: int) -> Int64:
        """Positions of each frame's ``top_k`` likeliest entries, ranked; ties, as they are stored, by rising class id."""
        order = np.lexsort((self.ids_E, -self.log_E.astype(np.float32), self.frames_E))
        ranks = np.arange(len(order)) - np.repeat(self.offsets[:-1], np.diff(self.offsets))
        return np.asarray(order[ranks < top_k])

    def tail_T(self, is_kept_E: npt.NDArray[np.bool_], log_outside_T: Float64, temperature: float) -> Float64:
        """Mass at ``temperature`` of what is not kept; ``log_outside_T`` is not normalised."""
        powered_E = np.exp(self.log_E / temperature)
        outside_T = self.num_outside_T * np.exp((log_outside_T - self.log_total_T) / temperature)
        dropped_T = segment_sum(np.where(is_kept_E, 0.0, powered_E), self.offsets) + outside_T
        return dropped_T / (dropped_T + segment_sum(np.where(is_kept_E, powered_E, 0.0), self.offsets))

    def entropy_T(self) -> Float64:
        outside_T = self.num_outside_T * self.log_outside_T * np.exp(self.log_outside_T)
        return -segment_sum(self.log_E * np.exp(self.log_E), self.offsets) - outside_T


def _pool(log_probs: Float64, weights: Sequence[float], method: Combination) -> Float64:
    """Over the first axis, [M, ...]; not normalised."""
    weights_M1 = np.array(weights)[:, None]
    if method == "log_linear":
        return np.asarray((weights_M1 * log_probs).sum(axis=0))
    return np.asarray(np.logaddexp.reduce(np.log(weights_M1) + log_probs, axis=0))
