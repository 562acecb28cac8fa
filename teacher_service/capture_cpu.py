"""Capture on the CPU: teachers' logits -> the few classes that are kept, in one pass over blocks of rows that stay in cache.

    logits of each teacher --_add_teacher--> log-posterior of a block --select_rows--> ids, log-probabilities, tails, entropy

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

from softlabel_schemas.compiled import compiled
from softlabel_schemas.selection import Mass, PrefixSelection, SampledSelection, TopK
from teacher_service.float32 import exp_of_negative, largest_of, log1p_of_fraction
from teacher_service.sample_rows import sample_rows
from teacher_service.select_rows import MASS, THRESHOLD, TOP_K, select_rows
from teacher_service.selection import Selected

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]

# 256 KiB of log-posterior: half of a core's second cache.
_BLOCK_ELEMENTS = 1 << 16
_ARITHMETIC, _LOG_LINEAR = 0, 1
_ZERO, _INFINITY = np.float32(0.0), np.float32(np.inf)


def capture_cpu(
    logits: Sequence[Tensor],
    rows: Sequence[Int64],
    weights: Sequence[float],
    method: Literal["arithmetic", "log_linear"],
    selection: PrefixSelection | SampledSelection,
    temperatures: tuple[float, ...],
    labels_N: Int64,
    streams_NW: UInt64 | None = None,
) -> Selected:
    """Combine, temper and select.

    Args:
        logits: of each teacher, float [*, V], contiguous.
        rows: for each teacher, where in its logits the N frames are.
        weights: positive, adding up to 1.
        labels_N: hard labels; -1 where a frame has none.
        streams_NW: for a sample, see ``softlabel_schemas.sampling.frame_streams``.
    """
    arrays = [each.float().numpy() for each in logits]
    code = _LOG_LINEAR if method == "log_linear" and len(arrays) > 1 else _ARITHMETIC

    def fill(log_probs_RV: Float32, start: int) -> None:
        stop = start + len(log_probs_RV)
        for teacher, (logits_XV, rows_N, weight) in enumerate(zip(arrays, rows, weights, strict=True)):
            _add_teacher(logits_XV, rows_N[start:stop], weight, teacher == 0, code, log_probs_RV)
        if code == _LOG_LINEAR:
            _normalise(log_probs_RV)

    return _by_blocks(fill, arrays[0].shape[1], selection, temperatures, labels_N, streams_NW)


def select_cpu(
    log_probs_NV: Tensor,
    selection: PrefixSelection | SampledSelection,
    temperatures: tuple[float, ...],
    labels_N: Tensor,
    streams_NW: UInt64 | None = None,
) -> Selected:
    """As :func:`teacher_service.selection.select`, of log-posteriors float32 [N, V] on the CPU; samples too."""
    array = log_probs_NV.numpy()

    def fill(log_probs_RV: Float32, start: int) -> None:
        log_probs_RV[:] = array[start : start + len(log_probs_RV)]

    return _by_blocks(fill, array.shape[1], selection, temperatures, labels_N.numpy(), streams_NW)


def _by_blocks(
    fill: Callable[[Float32, int], None],
    num_classes: int,
    selection: PrefixSelection | SampledSelection,
    temperatures: tuple[float, ...],
    labels_N: Int64,
    streams_NW: UInt64 | None,
) -> Selected:
    """Select from N frames whose log-posterior ``fill`` writes, a block of rows from a first one on at a time."""
    num_frames = len(labels_N)
    num_entries = min(selection.cap, num_classes) + int(selection.keep_hard_label)
    ids_NK = np.empty((num_frames, num_entries), dtype=np.int64)
    log_probs_NK = np.empty((num_frames, num_entries), dtype=np.float32)
    kept_NK = np.zeros((num_frames, num_entries), dtype=np.bool_)
    tail_NM = np.zeros((num_frames, len(temperatures)), dtype=np.float32)
    entropy_N = np.empty(num_frames, dtype=np.float32)
    top1_N, top1_log_prob_N = np.empty(num_frames, dtype=np.int64), np.empty(num_frames, dtype=np.float32)
    num_rows = max(1, _BLOCK_ELEMENTS // num_classes)
    starts = range(0, num_frames, num_rows)

    def run(share: range) -> None:
        scratch_RV = np.empty((num_rows, num_classes), dtype=np.float32)
        for start in share:
            stop = min(start + num_rows, num_frames)
            log_probs_RV, rows = scratch_RV[: stop - start], slice(start, stop)
            fill(log_probs_RV, start)
            entries = ids_NK[rows], log_probs_NK[rows], kept_NK[rows]
            if isinstance(selection, SampledSelection):
                assert streams_NW is not None
                sample_rows(
                    *(log_probs_RV, min(selection.num_head, num_classes), selection.draws, streams_NW[rows]),
                    *(*entries, entropy_N[rows], top1_N[rows], top1_log_prob_N[rows]),
                )
                continue
            select_rows(
                *(log_probs_RV, min(selection.cap, num_classes), *_rule(selection), selection.keep_hard_label),
                *(np.asarray(temperatures), labels_N[rows], *entries, tail_NM[rows], entropy_N[rows]),
            )
            top1_N[rows], top1_log_prob_N[rows] = ids_NK[rows, 0], log_probs_NK[rows, 0]

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
        top1_N=torch.from_numpy(top1_N),
        top1_log_prob_N=torch.from_numpy(top1_log_prob_N),
    )


def _rule(selection: PrefixSelection) -> tuple[int, float]:
    if isinstance(selection, TopK):
        return TOP_K, 0.0
    return (MASS, selection.mass) if isinstance(selection, Mass) else (THRESHOLD, selection.min_prob)


# Combination


@compiled()
def _add_teacher(
    logits_XV: Float32, rows_R: Int64, weight: float, is_first: bool, method: int, log_probs_RV: Float32
) -> None:
    """Take one more teacher into the sum of weighted posteriors, or into the weighted sum of log-posteriors."""
    log_weight, factor = np.float32(math.log(weight)), np.float32(weight)
    for row in range(len(rows_R)):
        logits_V, sum_V = logits_XV[rows_R[row]], log_probs_RV[row]
        top = largest_of(logits_V)
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
        top = largest_of(log_probs_V)
        log_norm = np.float32(math.log(_sum_of_exp(log_probs_V, top)))
        for v in range(len(log_probs_V)):
            log_probs_V[v] = (log_probs_V[v] - top) - log_norm


@compiled(fastmath={"reassoc"})
def _sum_of_exp(values_V: Float32, top: np.float32) -> float:
    """Sum of exp(value - top): in float32 within runs of 1,024, whose sums are added in float64."""
    total = 0.0
    for start in range(0, len(values_V), 1024):
        part, run = _ZERO, values_V[start : start + 1024]
        for v in range(len(run)):
            part += exp_of_negative(run[v] - top)
        total += float(part)
    return total
