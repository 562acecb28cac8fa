"""Selection on the CPU: the rows of a block of log-posteriors, one after the other; compiled.

The likeliest classes are found first and taken out of the row; what is left is summed for the tails, so that a small tail
is not lost as the difference of two large numbers.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from softlabel_schemas.compiled import compiled
from softlabel_schemas.selection import MIN_LOG_PROB, NO_LABEL
from teacher_service.float32 import exp_of_negative, largest_of

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

# Up to here a row's best entries are kept in order while it is read; above, all its classes are sorted.
_MAX_RUNNING = 128
# Classes that are compared with the threshold at once.
_STRIDE = 32
# Nats from the largest log-probability to the last that is kept: a first guess, and how many more are made.
FIRST_GAP = np.float32(6.0)
_MAX_GAPS = 10
TOP_K, MASS, THRESHOLD = 0, 1, 2

_MIN_LOG_PROB = np.float32(MIN_LOG_PROB)
_ZERO, _INFINITY = np.float32(0.0), np.float32(np.inf)


@compiled()
def select_rows(
    log_probs_RV: Float32,
    width: int,
    policy: int,
    limit: float,
    keep_hard_label: bool,
    temperatures_M: npt.NDArray[np.float64],
    labels_R: Int64,
    ids_RK: Int64,
    log_probs_RK: Float32,
    kept_RK: Bool,
    tail_RM: Float32,
    entropy_R: Float32,
) -> None:
    """Fill the last five; ``log_probs_RV`` is used up."""
    gap = FIRST_GAP
    for row in range(len(log_probs_RV)):
        log_probs_V, ids_K, log_probs_K, kept_K = log_probs_RV[row], ids_RK[row], log_probs_RK[row], kept_RK[row]
        gap = rank_row(log_probs_V, gap, ids_K[:width], log_probs_K[:width])
        num_kept = _prefix_length(log_probs_K[:width], policy, limit)
        kept_K[:num_kept] = True
        if keep_hard_label:
            label = max(labels_R[row], 0)
            ids_K[width], log_probs_K[width] = label, log_probs_V[label]
            kept_K[width] = labels_R[row] != NO_LABEL and not (ids_K[:num_kept] == label).any()
        top = log_probs_K[0]
        kept_entropy = 0.0
        for k in range(len(ids_K)):
            if kept_K[k]:
                # Out of the sums over what is left out.
                log_probs_V[ids_K[k]] = -_INFINITY
                kept_entropy -= math.exp(log_probs_K[k]) * float(clamped(log_probs_K[k]))
        tail, tail_entropy = tail_and_entropy(log_probs_V)
        entropy_R[row] = kept_entropy + tail_entropy
        for m in range(len(temperatures_M)):
            if temperatures_M[m] == 1.0:
                tail_RM[row, m] = min(tail, 1.0)
                continue
            scale = np.float32(1.0 / temperatures_M[m])
            outside, inside = _tempered_sum(log_probs_V, top, scale), 0.0
            for k in range(len(ids_K)):
                if kept_K[k]:
                    inside += float(exp_of_negative((log_probs_K[k] - top) * scale))
            tail_RM[row, m] = outside / (outside + inside)
        for k in range(len(ids_K)):
            log_probs_K[k] = clamped(log_probs_K[k])


@compiled()
def rank_row(log_probs_V: Float32, gap: np.float32, ids_K: Int64, log_probs_K: Float32) -> np.float32:
    """The likeliest classes in order, ties by rising id.

    Args:
        gap: between the largest and a floor below which nothing is looked at; the one found is returned, as a first guess
            for the next row. It saves time and changes nothing.
    """
    if len(ids_K) > _MAX_RUNNING:
        _rank_all(log_probs_V, ids_K, log_probs_K)
    else:
        gap = _rank_running(log_probs_V, gap if gap < _INFINITY else FIRST_GAP, ids_K, log_probs_K)
    return gap


@compiled()
def _rank_running(log_probs_V: Float32, gap: np.float32, ids_K: Int64, log_probs_K: Float32) -> np.float32:
    """Ids rise as they are read, so a later equal one goes behind."""
    width, num_classes = len(ids_K), len(log_probs_V)
    gap = _find_gap(log_probs_V, gap, width)
    threshold, num_found = largest_of(log_probs_V) - gap, 0
    if not threshold > -_INFINITY:
        # Classes that cannot be told from impossible ones are needed too.
        for v in range(width):
            _insert(log_probs_V[v], v, v, ids_K, log_probs_K)
        threshold, num_found = log_probs_K[width - 1], width
    for start in range(0 if num_found == 0 else width, num_classes, _STRIDE):
        stop = min(start + _STRIDE, num_classes)
        # Counted first, since the comparison is vectorised and nearly always finds none.
        if _count_above(log_probs_V[start:stop], threshold):
            for v in range(start, stop):
                if log_probs_V[v] > threshold:
                    _insert(log_probs_V[v], v, min(num_found, width - 1), ids_K, log_probs_K)
                    num_found += 1
                    if num_found >= width:
                        threshold = log_probs_K[width - 1]
    return gap


@compiled()
def _find_gap(log_probs_V: Float32, gap: np.float32, width: int) -> np.float32:
    """Above the largest less the gap there are at least ``width`` classes, and if it is soon found at most twice as many."""
    top = largest_of(log_probs_V)
    low, high = _ZERO, _INFINITY
    for _ in range(_MAX_GAPS):
        num_above = _count_above(log_probs_V, top - gap)
        if num_above < width:
            low = gap
        else:
            high = gap
            if num_above <= 2 * width:
                break
        gap = gap * np.float32(2.0) if high == _INFINITY else np.float32(0.5) * (low + high)
    return high


@compiled()
def _count_above(log_probs_V: Float32, threshold: np.float32) -> int:
    count = 0
    for v in range(len(log_probs_V)):
        count += log_probs_V[v] > threshold
    return count


@compiled()
def _insert(log_prob: np.float32, class_id: int, last: int, ids_K: Int64, log_probs_K: Float32) -> None:
    """Into the entries before ``last``, the one at ``last`` is overwritten."""
    k = last
    while k > 0 and log_probs_K[k - 1] < log_prob:
        log_probs_K[k], ids_K[k] = log_probs_K[k - 1], ids_K[k - 1]
        k -= 1
    log_probs_K[k], ids_K[k] = log_prob, class_id


@compiled()
def _rank_all(log_probs_V: Float32, ids_K: Int64, log_probs_K: Float32) -> None:
    order_V = np.argsort(-log_probs_V, kind="mergesort")
    for k in range(len(ids_K)):
        ids_K[k], log_probs_K[k] = order_V[k], log_probs_V[order_V[k]]


@compiled()
def _prefix_length(log_probs_K: Float32, policy: int, limit: float) -> int:
    """See ``softlabel_schemas.selection.prefix_lengths``; in float64 as there: in float32 the running sum reaches the mass an
    entry early or late in one frame of 70,000, and in one of eight where probabilities are equal."""
    if policy == TOP_K:
        return len(log_probs_K)
    total, k = 0.0, 0
    while k < len(log_probs_K):
        prob = math.exp(np.float64(log_probs_K[k]))
        total += prob
        is_kept = total - prob < limit if policy == MASS else prob >= limit
        if k and not is_kept:
            break
        k += 1
    return k


@compiled()
def clamped(log_prob: np.float32) -> np.float32:
    """Log-probabilities that are stored are finite; NaN stays NaN and is found later."""
    above = _MIN_LOG_PROB if log_prob < _MIN_LOG_PROB else log_prob
    return _ZERO if above > _ZERO else above


@compiled(fastmath={"reassoc"})
def tail_and_entropy(log_probs_V: Float32) -> tuple[float, float]:
    """Sums of p and of -p log p."""
    tail, entropy = 0.0, 0.0
    for start in range(0, len(log_probs_V), 1024):
        part, entropy_part, run = _ZERO, _ZERO, log_probs_V[start : start + 1024]
        for v in range(len(run)):
            prob = exp_of_negative(run[v])
            part += prob
            entropy_part -= prob * clamped(run[v])
        tail += float(part)
        entropy += float(entropy_part)
    return tail, entropy


@compiled(fastmath={"reassoc"})
def _tempered_sum(log_probs_V: Float32, top: np.float32, scale: np.float32) -> float:
    """Sum of exp((log-probability - top) / temperature)."""
    total = 0.0
    for start in range(0, len(log_probs_V), 1024):
        part, run = _ZERO, log_probs_V[start : start + 1024]
        for v in range(len(run)):
            part += exp_of_negative((run[v] - top) * scale)
        total += float(part)
    return total
