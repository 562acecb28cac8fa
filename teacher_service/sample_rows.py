"""Sampling on the CPU: as :mod:`teacher_service.select_rows`, for policies that draw."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from softlabel_schemas.compiled import compiled
from softlabel_schemas.sampling import sample_frame
from teacher_service.select_rows import FIRST_GAP, clamped, rank_row, tail_and_entropy

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]


@compiled()
def sample_rows(
    log_probs_RV: Float32,
    num_head: int,
    draws: int,
    streams_RW: npt.NDArray[np.uint64],
    ids_RK: Int64,
    log_probs_RK: Float32,
    kept_RK: npt.NDArray[np.bool_],
    entropy_R: Float32,
    top1_R: Int64,
    top1_log_prob_R: Float32,
) -> None:
    """Fill the last six; ``log_probs_RV`` is used up."""
    # The likeliest class is found in any case.
    width, gap = max(num_head, 1), FIRST_GAP
    for row in range(len(log_probs_RV)):
        log_probs_V, ids_K, log_probs_K = log_probs_RV[row], ids_RK[row], log_probs_RK[row]
        gap = rank_row(log_probs_V, gap, ids_K[:width], log_probs_K[:width])
        top1_R[row], top1_log_prob_R[row] = ids_K[0], clamped(log_probs_K[0])
        _, entropy_R[row] = tail_and_entropy(log_probs_V)
        num_kept = sample_frame(log_probs_V, num_head, draws, streams_RW[row], ids_K, log_probs_K)
        kept_RK[row, :num_kept] = True
