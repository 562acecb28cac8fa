"""Capture on the CPU: teachers' logits -> the few classes that are kept, in one pass over blocks of rows that stay in cache.

    logits of each teacher --_add_teacher--> log-posterior of a block --_select_rows--> ids, log-probabilities, tails, entropy

Only a block's log-posterior is ever held. Rows are independent of one another, so the result does not depend on the blocks
nor on the threads that share them. Shape suffixes: N frames, R rows of a block, V classes, K entries, M temperatures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softlabel_schemas.selection import NO_LABEL, Mass, Threshold, TopK
from teacher_service.compiled import compiled, exp_of_negative, log1p_of_fraction
from teacher_service.selection import MIN_LOG_PROB, Selected

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

# 256 KiB of log-posterior: half of a core's second cache.
_BLOCK_ELEMENTS = 1 << 16
# Up to here a row's best entries are kept in order while it is read; above, all its classes are sorted.
_MAX_RUNNING = 128
# Classes that are compared with the threshold at once.
_STRIDE = 32
# Nats from the largest log-probability to the last that is kept: a first guess, and how many more are made.
_FIRST_GAP = np.float32(6.0)
_MAX_GAPS = 10
_ARITHMETIC, _LOG_LINEAR = 0, 1
_TOP_K, _MASS, _THRESHOLD = 0, 1, 2

_MIN_LOG_PROB = np.float32(MIN_LOG_PROB)
_ALL_BUT_SIGN = np.int32(2**31 - 1)
_ZERO, _INFINITY = np.float32(0.0), np.float32(np.inf)


def capture_cpu(
    logits: Sequence[Tensor],
    rows: Sequence[Int64],
    weights: Sequence[float],
    method: Literal["arithmetic", "log_linear"],
    selection: TopK | Mass | Threshold,
    temperatures: tuple[float, ...],
    labels_N: Int64,
) -> Selected:
    """Combine, temper and select.

    Args:
        logits: of each teacher, float [*, V], contiguous.
        rows: for each teacher, where in its logits the N frames are.
        weights: positive, adding up to 1.
        labels_N: hard labels; ``NO_LABEL`` where a frame has none.
    """
    arrays = [each.float().numpy() for each in logits]
    code = _LOG_LINEAR if method == "log_linear" and len(arrays) > 1 else _ARITHMETIC

    def fill(log_probs_RV: Float32, start: int) -> None:
        stop = start + len(log_probs_RV)
        for teacher, (logits_XV, rows_N, weight) in enumerate(zip(arrays, rows, weights, strict=True)):
            _add_teacher(logits_XV, rows_N[start:stop], weight, teacher == 0, code, log_probs_RV)
        if code == _LOG_LINEAR:
            _normalise(log_probs_RV)

    return _by_blocks(fill, arrays[0].shape[1], selection, temperatures, labels_N)


def select_cpu(
    log_probs_NV: Tensor, selection: TopK | Mass | Threshold, temperatures: tuple[float, ...], labels_N: Tensor
) -> Selected:
    """As :func:`teacher_service.selection.select`, of log-posteriors float32 [N, V] on the CPU."""
    array = log_probs_NV.numpy()

    def fill(log_probs_RV: Float32, start: int) -> None:
        log_probs_RV[:] = array[start : start + len(log_probs_RV)]

    return _by_blocks(fill, array.shape[1], selection, temperatures, labels_N.numpy())


def _by_blocks(
    fill: Callable[[Float32, int], None],
    num_classes: int,
    selection: TopK | Mass | Threshold,
    temperatures: tuple[float, ...],
    labels_N: Int64,
) -> Selected:
    """Select from N frames whose log-posterior ``fill`` writes, a block of rows from a first one on at a time."""
    num_frames, width = len(labels_N), min(selection.cap, num_classes)
    num_entries = width + int(selection.keep_hard_label)
    ids_NK = np.empty((num_frames, num_entries), dtype=np.int64)
    log_probs_NK = np.empty((num_frames, num_entries), dtype=np.float32)
    kept_NK = np.zeros((num_frames, num_entries), dtype=np.bool_)
    tail_NM = np.empty((num_frames, len(temperatures)), dtype=np.float32)
    entropy_N = np.empty(num_frames, dtype=np.float32)
    policy, limit = _rule(selection)
    num_rows = max(1, _BLOCK_ELEMENTS // num_classes)
    starts = range(0, num_frames, num_rows)

    def run(share: range) -> None:
        scratch_RV = np.empty((num_rows, num_classes), dtype=np.float32)
        for start in share:
            stop = min(start + num_rows, num_frames)
            log_probs_RV, rows = scratch_RV[: stop - start], slice(start, stop)
            fill(log_probs_RV, start)
            _select_rows(
                *(
                    log_probs_RV,
                    width,
                    policy,
                    limit,
                    selection.keep_hard_label,
                    np.asarray(temperatures),
                    labels_N[rows],
                ),
                *(ids_NK[rows], log_probs_NK[rows], kept_NK[rows], tail_NM[rows], entropy_N[rows]),
            )

    num_threads = min(torch.get_num_threads(), len(starts))
    if num_threads <= 1:
        run(starts)
    else:
        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(run, [starts[first::num_threads] for first in range(num_threads)]))
    return Selected(
        ids_NK=torch.from_numpy(ids_NK),
        log_probs_NK=torch.from_numpy(log_probs_NK),
        kept_NK=torch.from_numpy(kept_NK),
        tail_NM=torch.from_numpy(tail_NM),
        entropy_N=torch.from_numpy(entropy_N),
        top1_N=torch.from_numpy(ids_NK[:, 0].copy()),
    )


def _rule(selection: TopK | Mass | Threshold) -> tuple[int, float]:
    if isinstance(selection, TopK):
        return _TOP_K, 0.0
    return (_MASS, selection.mass) if isinstance(selection, Mass) else (_THRESHOLD, selection.min_prob)


# Combination


@compiled()
def _add_teacher(
    logits_XV: Float32, rows_R: Int64, weight: float, is_first: bool, method: int, log_probs_RV: Float32
) -> None:
    """Take one more teacher into the sum of weighted posteriors, or into the weighted sum of log-posteriors."""
    log_weight, factor = np.float32(math.log(weight)), np.float32(weight)
    for row in range(len(rows_R)):
        logits_V, sum_V = logits_XV[rows_R[row]], log_probs_RV[row]
        top = _largest(logits_V)
        log_norm = np.float32(math.log(_sum_of_exp(logits_V, top)))
        if method == _LOG_LINEAR:
            for v in range(len(sum_V)):
                weighted = ((logits_V[v] - top) - log_norm) * factor
                sum_V[v] = weighted if is_first else sum_V[v] + weighted
        elif is_first:
            for v in range(len(sum_V)):
                sum_V[v] = ((logits_V[v] - top) - log_norm) + log_weight
        else:
            for v in range(len(sum_V)):
                sum_V[v] = _log_add_exp(sum_V[v], ((logits_V[v] - top) - log_norm) + log_weight)


@compiled()
def _log_add_exp(a: np.float32, b: np.float32) -> np.float32:
    larger = a if a > b else b
    total = larger + log1p_of_fraction(exp_of_negative(-abs(a - b)))
    # -inf - -inf is no number, but it is -inf that they add up to.
    return -_INFINITY if a == -_INFINITY and b == -_INFINITY else total


@compiled()
def _normalise(log_probs_RV: Float32) -> None:
    for row in range(len(log_probs_RV)):
        log_probs_V = log_probs_RV[row]
        top = _largest(log_probs_V)
        log_norm = np.float32(math.log(_sum_of_exp(log_probs_V, top)))
        for v in range(len(log_probs_V)):
            log_probs_V[v] = (log_probs_V[v] - top) - log_norm


@compiled()
def _largest(values_V: Float32) -> np.float32:
    """Compared as integers of the same order, which is vectorised: 0.07 ns a value against 0.5. A NaN is above infinity."""
    bits_V = values_V.view(np.int32)
    largest = np.int32(-(2**31))
    for v in range(len(bits_V)):
        largest = max(largest, np.int32(bits_V[v] ^ (np.int32(bits_V[v] >> 31) & _ALL_BUT_SIGN)))
    return np.int32(largest ^ (np.int32(largest >> 31) & _ALL_BUT_SIGN)).view(np.float32)


@compiled(fastmath={"reassoc"})
def _sum_of_exp(values_V: Float32, top: np.float32) -> float:
    """Sum of exp(value - top): in float32 within runs of 1,024, whose sums are added in float64."""
    total = 0.0
    for start in range(0, len(values_V), 1024):
        part, run = _ZERO, values_V[start : start + 1024]
        for v in range(len(run)):
            part += exp_of_negative(run[v] - top)
        total += part
    return total


# Selection


@compiled()
def _select_rows(
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
    gap = _FIRST_GAP
    for row in range(len(log_probs_RV)):
        log_probs_V, ids_K, log_probs_K, kept_K = log_probs_RV[row], ids_RK[row], log_probs_RK[row], kept_RK[row]
        if width > _MAX_RUNNING:
            _rank_all(log_probs_V, ids_K[:width], log_probs_K[:width])
        else:
            gap = _rank_running(log_probs_V, gap if gap < _INFINITY else _FIRST_GAP, ids_K[:width], log_probs_K[:width])
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
                kept_entropy -= math.exp(log_probs_K[k]) * _clamped(log_probs_K[k])
        tail, tail_entropy = _tail_and_entropy(log_probs_V)
        entropy_R[row] = kept_entropy + tail_entropy
        for m in range(len(temperatures_M)):
            if temperatures_M[m] == 1.0:
                tail_RM[row, m] = min(tail, 1.0)
                continue
            scale = np.float32(1.0 / temperatures_M[m])
            outside, inside = _tempered_sum(log_probs_V, top, scale), 0.0
            for k in range(len(ids_K)):
                if kept_K[k]:
                    inside += exp_of_negative((log_probs_K[k] - top) * scale)
            tail_RM[row, m] = outside / (outside + inside)
        for k in range(len(ids_K)):
            log_probs_K[k] = _clamped(log_probs_K[k])


@compiled()
def _rank_running(log_probs_V: Float32, gap: np.float32, ids_K: Int64, log_probs_K: Float32) -> np.float32:
    """The likeliest classes in order, ties by rising id: ids rise as they are read, so a later equal one goes behind.

    Args:
        gap: between the largest and a floor below which nothing is looked at; the one found is returned, as a first guess
            for the next row. It saves time and changes nothing.
    """
    width, num_classes = len(ids_K), len(log_probs_V)
    gap = _find_gap(log_probs_V, gap, width)
    threshold, num_found = _largest(log_probs_V) - gap, 0
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
    top = _largest(log_probs_V)
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
    if policy == _TOP_K:
        return len(log_probs_K)
    total, k = 0.0, 0
    while k < len(log_probs_K):
        prob = math.exp(np.float64(log_probs_K[k]))
        total += prob
        is_kept = total - prob < limit if policy == _MASS else prob >= limit
        if k and not is_kept:
            break
        k += 1
    return k


@compiled()
def _clamped(log_prob: np.float32) -> np.float32:
    """Log-probabilities that are stored are finite; NaN stays NaN and is found later."""
    above = _MIN_LOG_PROB if log_prob < _MIN_LOG_PROB else log_prob
    return _ZERO if above > _ZERO else above


@compiled(fastmath={"reassoc"})
def _tail_and_entropy(log_probs_V: Float32) -> tuple[float, float]:
    """Sums of p and of -p log p."""
    tail, entropy = 0.0, 0.0
    for start in range(0, len(log_probs_V), 1024):
        part, entropy_part, run = _ZERO, _ZERO, log_probs_V[start : start + 1024]
        for v in range(len(run)):
            prob = exp_of_negative(run[v])
            part += prob
            entropy_part -= prob * _clamped(run[v])
        tail += part
        entropy += entropy_part
    return tail, entropy


@compiled(fastmath={"reassoc"})
def _tempered_sum(log_probs_V: Float32, top: np.float32, scale: np.float32) -> float:
    """Sum of exp((log-probability - top) / temperature)."""
    total = 0.0
    for start in range(0, len(log_probs_V), 1024):
        part, run = _ZERO, log_probs_V[start : start + 1024]
        for v in range(len(run)):
            part += exp_of_negative((run[v] - top) * scale)
        total += part
    return total
