"""Capture on CUDA: one Triton kernel over all teachers' logits, which reads each logit once.

A program takes one frame: the row of each teacher is loaded into registers, combined there, and never read again. Its best
``width`` classes are found by bisection over the float's bits (a count a step), gathered, and ranked by comparing each with
each. What a policy keeps of them is decided afterwards, on [N, K]: the kernel gives the sums of what is outside the best, and
what the policy drops is added to them, so that no tail is a difference.

Checked by Triton's interpreter against float64, and compiled for an H100; its speed has not been measured, since it
has never been run on a GPU. Up to 4,096 classes nothing is spilled from registers; at 9,000, 0.2 kB a thread is.

Errors, against float64: log-probabilities 3e-6, relative below -1; tails and entropy 2e-6 and relative 2e-5. Where several
teachers are averaged arithmetically, probabilities below 1.2e-38 count as 0.
"""

# mypy: disable-error-code="import-not-found, no-untyped-call, no-untyped-def, untyped-decorator, misc"
# Kernels are Triton's language rather than Python's; triton is there where torch for CUDA is.

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from softlabel_schemas.selection import MIN_LOG_PROB, NO_LABEL, PrefixSelection
from teacher_service.selection import Selected, prefix

# Classes that are ranked: with fewer than this above it, a floor is good enough.
_NUM_CANDIDATES = 128
_LEAST = tl.constexpr(MIN_LOG_PROB)


def capture_triton(
    logits: Sequence[Tensor],
    num_frames: Sequence[int],
    weights: Sequence[float],
    method: Literal["arithmetic", "log_linear"],
    selection: PrefixSelection,
    temperatures: tuple[float, ...],
    labels_N: Tensor,
) -> Selected:
    """As :func:`teacher_service.capture.capture`, for what ``capture.fits``: at most 16,384 classes, so that two counts
    of them fit into one integer."""
    device, num_classes = logits[0].device, logits[0].shape[2]
    logits = [each if each.stride(2) == 1 else each.contiguous() for each in logits]
    labels_N = labels_N.to(device) if selection.keep_hard_label else torch.full_like(labels_N, NO_LABEL, device=device)
    total, width = len(labels_N), min(selection.cap, num_classes)
    ids_NK = torch.empty((total, width), dtype=torch.int64, device=device)
    log_probs_NK = torch.empty((total, width), device=device)
    label_log_probs_N, entropy_N = torch.empty(total, device=device), torch.empty(total, device=device)
    outside_NM = torch.empty((total, len(temperatures)), device=device)
    _capture_row[(total,)](
        tuple(logits),
        tuple(_offsets(each, num_frames) for each in logits),
        tuple(weights),
        tuple(1.0 / temperature for temperature in temperatures),
        *(labels_N, torch.empty((total, 2, _NUM_CANDIDATES), dtype=torch.int32, device=device)),
        *(ids_NK, log_probs_NK, label_log_probs_N, entropy_N, outside_NM),
        NUM_CLASSES=num_classes,
        # Rows that begin at multiples of 16 bytes are loaded 16 bytes at a time.
        ALIGN=math.gcd(8, *(stride for each in logits for stride in each.stride()[:2])),
        WIDTH=width,
        LOG_LINEAR=method == "log_linear" and len(logits) > 1,
        BLOCK=triton.next_power_of_2(num_classes),
        CANDIDATES=_NUM_CANDIDATES,
        num_warps=4 if num_classes <= 2048 else 8 if num_classes <= 4096 else 16,
    )
    return _cut(ids_NK, log_probs_NK, label_log_probs_N, entropy_N, outside_NM, selection, temperatures, labels_N)


def _offsets(logits_BTV: Tensor, num_frames: Sequence[int]) -> Tensor:
    """Where the frames begin, int64 [N]; in elements."""
    counts_B = torch.tensor(num_frames)
    rows_N = torch.repeat_interleave(torch.arange(len(num_frames)), counts_B)
    first_B = counts_B.cumsum(0) - counts_B
    frames_N = torch.arange(len(rows_N)) - first_B[rows_N]
    return (rows_N * logits_BTV.stride(0) + frames_N * logits_BTV.stride(1)).to(logits_BTV.device)


def _cut(
    ids_NK: Tensor,
    log_probs_NK: Tensor,
    label_log_probs_N: Tensor,
    entropy_N: Tensor,
    outside_NM: Tensor,
    selection: PrefixSelection,
    temperatures: tuple[float, ...],
    labels_N: Tensor,
) -> Selected:
    """What the policy keeps of the best; ``outside_NM`` are sums of exp((log-probability - the largest) / temperature)."""
    kept_NK = prefix(log_probs_NK.double().exp(), selection)
    top_N = log_probs_NK[:, 0]
    if selection.keep_hard_label:
        has_label_N = labels_N != NO_LABEL
        is_label_NK = ids_NK == labels_N[:, None]
        # A label among the best that the policy drops is kept as the entry behind them, as elsewhere.
        added_N = has_label_N & ~(kept_NK & is_label_NK).any(dim=1)
        dropped_NK = ~kept_NK & ~is_label_NK
        ids_NK = torch.cat([ids_NK, labels_N.clamp(min=0)[:, None]], dim=1)
        log_probs_NK = torch.cat([log_probs_NK, label_log_probs_N[:, None]], dim=1)
        kept_NK = torch.cat([kept_NK, added_N[:, None]], dim=1)
        dropped_NK = torch.cat([dropped_NK, torch.zeros_like(added_N)[:, None]], dim=1)
    else:
        dropped_NK = ~kept_NK
    tails = []
    for column, temperature in enumerate(temperatures):
        powers_NK = ((log_probs_NK - top_N[:, None]) / temperature).exp()
        left_out_N = outside_NM[:, column] + (powers_NK * dropped_NK).sum(dim=1)
        whole_N = left_out_N + (powers_NK * kept_NK).sum(dim=1)
        tails.append((left_out_N / whole_N).clamp(0.0, 1.0))
    return Selected(
        ids_NK=ids_NK,
        log_probs_NK=log_probs_NK.clamp(MIN_LOG_PROB, 0.0),
        kept_NK=kept_NK,
        tail_NM=torch.stack(tails, dim=1),
        entropy_N=entropy_N,
        top1_N=ids_NK[:, 0],
        top1_log_prob_N=log_probs_NK[:, 0].clamp(MIN_LOG_PROB, 0.0),
    )


@triton.jit
def _capture_row(
    logits,
    offsets,
    weights,
    inverse_temperatures,
    labels_N,
    scratch_N2C,
    ids_NK,
    log_probs_NK,
    label_log_probs_N,
    entropy_N,
    outside_NM,
    NUM_CLASSES: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDTH: tl.constexpr,
    LOG_LINEAR: tl.constexpr,
    BLOCK: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    classes_V = tl.arange(0, BLOCK)
    is_class_V = classes_V < NUM_CLASSES
    log_probs_V = _log_posterior(logits, offsets, weights, row, classes_V, is_class_V, ALIGN, LOG_LINEAR)
    # From here on the row is held once, as integers. Lanes beyond the classes are below every class, also one of probability 0.
    keys_V = tl.where(is_class_V, _ordered(log_probs_V), -(2**31))
    low, high = _floor(keys_V, WIDTH, CANDIDATES)
    surely_V, perhaps_V = keys_V >= high, (keys_V >= low) & (keys_V < high)
    # Two running counts in one. Where there are more than can be ranked, they are equal: the first by id are those that count.
    counts_V = tl.cumsum(surely_V.to(tl.int32) + (perhaps_V.to(tl.int32) << 16))
    num_surely = tl.sum(surely_V.to(tl.int32))
    places_V = tl.where(surely_V, counts_V & 0xFFFF, num_surely + (counts_V >> 16)) - 1
    chosen_V = (surely_V | perhaps_V) & (places_V < CANDIDATES)
    num_chosen = tl.sum(chosen_V.to(tl.int32))
    scratch = scratch_N2C + row * 2 * CANDIDATES
    tl.store(scratch + places_V, keys_V, mask=chosen_V)
    tl.store(scratch + CANDIDATES + places_V, classes_V, mask=chosen_V)
    tl.debug_barrier()

    slots_C = tl.arange(0, CANDIDATES)
    is_filled_C = slots_C < num_chosen
    keys_C = tl.load(scratch + slots_C, mask=is_filled_C, other=-(2**31))
    ids_C = tl.load(scratch + CANDIDATES + slots_C, mask=is_filled_C, other=2**31 - 1)
    is_before_CC = (keys_C[None, :] > keys_C[:, None]) | (
        (keys_C[None, :] == keys_C[:, None]) & (ids_C[None, :] < ids_C[:, None])
    )
    ranks_C = tl.sum((is_before_CC & is_filled_C[None, :]).to(tl.int32), axis=1)
    is_best_C = is_filled_C & (ranks_C < WIDTH)
    tl.store(ids_NK + row * WIDTH + ranks_C, ids_C.to(tl.int64), mask=is_best_C)
    tl.store(log_probs_NK + row * WIDTH + ranks_C, _float_of(keys_C), mask=is_best_C)

    is_last_C = is_filled_C & (ranks_C == WIDTH - 1)
    last_key, last_id = tl.sum(tl.where(is_last_C, keys_C, 0)), tl.sum(tl.where(is_last_C, ids_C, 0))
    is_best_V = (keys_V > last_key) | ((keys_V == last_key) & (classes_V <= last_id))
    log_probs_V = _float_of(keys_V)
    is_label_V = classes_V == tl.load(labels_N + row)
    tl.store(label_log_probs_N + row, tl.max(tl.where(is_label_V, log_probs_V, float("-inf"))))
    is_outside_V = is_class_V & ~is_best_V & ~is_label_V
    top = _float_of(tl.max(keys_V))
    terms_V = tl.exp(log_probs_V) * tl.maximum(log_probs_V, _LEAST)
    tl.store(entropy_N + row, -tl.sum(tl.where(is_class_V, terms_V, 0.0)))
    for column in tl.static_range(len(inverse_temperatures)):
        powers_V = tl.exp((log_probs_V - top) * inverse_temperatures[column])
        outside = tl.sum(tl.where(is_outside_V, powers_V, 0.0))
        tl.store(outside_NM + row * len(inverse_temperatures) + column, outside)


@triton.jit
def _log_posterior(logits, offsets, weights, row, classes_V, is_class_V, ALIGN: tl.constexpr, LOG_LINEAR: tl.constexpr):
    """Of one frame, float32; every logit is loaded here, once."""
    sum_V = tl.zeros_like(classes_V).to(tl.float32)
    for m in tl.static_range(len(logits)):
        begin = tl.multiple_of(tl.load(offsets[m] + row), ALIGN)
        logits_V = tl.load(logits[m] + begin + classes_V, mask=is_class_V, other=float("-inf")).to(tl.float32)
        shifted_V = logits_V - tl.max(logits_V)
        if len(logits) == 1:
            sum_V = shifted_V - tl.log(tl.sum(tl.exp(shifted_V)))
        elif LOG_LINEAR:
            sum_V += (shifted_V - tl.log(tl.sum(tl.exp(shifted_V)))) * weights[m]
        else:
            exp_V = tl.exp(shifted_V)
            sum_V += exp_V * (weights[m] / tl.sum(exp_V))
    if LOG_LINEAR:
        sum_V = sum_V - tl.max(sum_V)
        sum_V = sum_V - tl.log(tl.sum(tl.exp(sum_V)))
    elif len(logits) > 1:
        sum_V = tl.log(sum_V)
    return sum_V


@triton.jit
def _floor(keys_V, WIDTH: tl.constexpr, CANDIDATES: tl.constexpr):
    """Keys ``low`` < ``high``: ``WIDTH`` or more are at least ``low``, fewer are at least ``high``. Either at most
    ``CANDIDATES`` are at least ``low``, or ``high`` is ``low`` + 1."""
    low = tl.full((), -(2**31) + 1, tl.int64)
    high = tl.max(keys_V).to(tl.int64) + 1
    count = tl.full((), CANDIDATES + 1, tl.int32)
    while (count > CANDIDATES) & (high - low > 1):
        middle = (low + high) >> 1
        above = tl.sum((keys_V >= middle.to(tl.int32)).to(tl.int32))
        low, count = tl.where(above >= WIDTH, middle, low), tl.where(above >= WIDTH, above, count)
        high = tl.where(above >= WIDTH, high, middle)
    return low, high


@triton.jit
def _ordered(x):
    """int32 of the same order as the floats; a NaN is above infinity."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _float_of(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
