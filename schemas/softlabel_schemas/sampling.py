"""Sampling: classes drawn from a frame's posterior, at capture and when a store of all classes is narrowed; compiled.

Draw d of frame t of an utterance is a function of (seed, utterance id, t, d) and of the frame's posterior, and of nothing else:
neither batches, shards nor threads change it. The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as
easy as 1, 2, 3", SC 2011): the key is of the seed and the utterance, the counter of the frame and the draw. Each draw is
looked up in the running sum of the probabilities, in float64 and in the order of the class ids; a sum in another
order, as a device makes it, would now and then give another class, so the draws are made on the CPU wherever the teachers run.

Shape suffixes: T frames, V classes, K entries, W = 3 words: key (2) and frame.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt

from softlabel_schemas.compiled import compiled
from softlabel_schemas.errors import InputError
from softlabel_schemas.selection import MIN_LOG_PROB, SampledSelection, max_entries_per_frame
from softlabel_schemas.targets import SoftTargets, offsets_of

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW, _32, _11, _0 = np.uint64(0xFFFFFFFF), np.uint64(32), np.uint64(11), np.uint64(0)
_MIN_LOG_PROB, _ZERO, _INFINITY = np.float32(MIN_LOG_PROB), np.float32(0.0), np.float32(np.inf)


def frame_streams(seed: int, utterance_id: str, num_frames: int) -> UInt64:
    """What the draws of each frame are a function of, besides its posterior: uint64 [T, W], of 32 bits each."""
    digest = hashlib.sha256(f"{seed}:{utterance_id}".encode()).digest()
    streams_TW = np.empty((num_frames, 3), dtype=np.uint64)
    streams_TW[:, :2] = np.frombuffer(digest, "<u4", 2)
    streams_TW[:, 2] = np.arange(num_frames)
    return streams_TW


def sampled(targets: SoftTargets, selection: SampledSelection, utterance_id: str) -> SoftTargets:
    """The sample that capture would have drawn from the posteriors that ``targets`` hold of all classes.

    Frames without entries stay so, with the tail mass that they have.

    Raises:
        InputError: a frame has entries, but not one for each class: what its tail stands for cannot be drawn.
    """
    some_T = (targets.counts_T > 0) & (targets.counts_T < targets.num_classes)
    if some_T.any():
        frame = int(some_T.argmax())
        raise InputError(
            f"utterance {utterance_id}: frame {frame} has {targets.counts_T[frame]} entries, a sample is drawn from all "
            f"{targets.num_classes} classes; use another selection, or label again with 'top_k' of all classes"
        )
    num_frames, width = targets.num_frames, max_entries_per_frame(selection, targets.num_classes)
    ids_TK = np.empty((num_frames, width), dtype=np.int64)
    log_probs_TK = np.empty((num_frames, width), dtype=np.float32)
    counts_T = np.zeros(num_frames, dtype=np.int64)
    _sample_frames(
        *(targets.offsets, targets.class_ids, targets.log_probs, targets.num_classes),
        *(min(selection.num_head, targets.num_classes), selection.draws),
        *(frame_streams(selection.seed, utterance_id, num_frames), ids_TK, log_probs_TK, counts_T),
    )
    kept_TK = np.arange(width) < counts_T[:, None]
    return SoftTargets(
        num_classes=targets.num_classes,
        temperatures=(1.0,),
        offsets=offsets_of(counts_T),
        class_ids=ids_TK[kept_TK].astype(np.int32),
        log_probs=log_probs_TK[kept_TK],
        tail_mass=np.where(counts_T[:, None] > 0, np.float32(0), targets.tail_mass[:, :1]),
    )


@compiled()
def _sample_frames(
    offsets: Int64,
    class_ids: npt.NDArray[np.int32],
    log_probs: Float32,
    num_classes: int,
    num_head: int,
    draws: int,
    streams_TW: UInt64,
    ids_TK: Int64,
    log_probs_TK: Float32,
    counts_T: Int64,
) -> None:
    """Fill the last three; frames without entries are left as they are."""
    row_V = np.empty(num_classes, dtype=np.float32)
    for frame in range(len(offsets) - 1):
        start, stop = offsets[frame], offsets[frame + 1]
        if start == stop:
            continue
        row_V[:] = -_INFINITY
        for entry in range(start, stop):
            row_V[class_ids[entry]] = log_probs[entry]
        for k in range(num_head):
            ids_TK[frame, k], log_probs_TK[frame, k] = class_ids[start + k], log_probs[start + k]
        counts_T[frame] = sample_frame(row_V, num_head, draws, streams_TW[frame], ids_TK[frame], log_probs_TK[frame])


@compiled()
def sample_frame(
    log_probs_V: Float32, num_head: int, draws: int, stream_W: UInt64, ids_K: Int64, log_probs_K: Float32
) -> int:
    """Draw from one frame's posterior, and rank what is drawn with the head; the number of entries.

    Args:
        log_probs_V: used up.
        ids_K, log_probs_K: the first ``num_head`` entries are the likeliest classes; the others are filled. Classes of -100 or
            less, which stored posteriors do not tell from impossible ones, are never drawn.
    """
    for k in range(num_head):
        log_probs_V[ids_K[k]] = -_INFINITY
        log_probs_K[k] = min(max(log_probs_K[k], _MIN_LOG_PROB), _ZERO)
    sums_V, total = np.empty(len(log_probs_V), dtype=np.float64), 0.0
    for v in range(len(log_probs_V)):
        if not log_probs_V[v] <= _MIN_LOG_PROB:
            total += math.exp(np.float64(min(log_probs_V[v], _ZERO)))
        sums_V[v] = total
    if not total > 0:
        return num_head
    drawn_D = np.empty(draws, dtype=np.int64)
    for first in range(0, draws, 2):
        a, b, c, d = philox(np.uint64(first >> 1), stream_W[2], _0, _0, stream_W[0], stream_W[1])
        drawn_D[first] = _look_up(sums_V, total, a, b)
        if first + 1 < draws:
            drawn_D[first + 1] = _look_up(sums_V, total, c, d)
    drawn_D.sort()
    # What the draws stand for together: all classes, or those outside the head.
    mass, num_entries, start = total if num_head else 1.0, num_head, 0
    for stop in range(1, draws + 1):
        if stop == draws or drawn_D[stop] != drawn_D[start]:
            log_prob = np.float32(math.log(mass * (stop - start) / draws))
            ids_K[num_entries], log_probs_K[num_entries] = drawn_D[start], min(max(log_prob, _MIN_LOG_PROB), _ZERO)
            num_entries, start = num_entries + 1, stop
    _rank(ids_K[:num_entries], log_probs_K[:num_entries])
    return num_entries


@compiled()
def _rank(ids_K: Int64, log_probs_K: Float32) -> None:
    """By falling probability, ties by rising id."""
    by_id_K = np.argsort(ids_K)
    ids_by_id_K, log_probs_by_id_K = ids_K[by_id_K], log_probs_K[by_id_K]
    ranked_K = np.argsort(-log_probs_by_id_K, kind="mergesort")
    for k in range(len(ranked_K)):
        ids_K[k], log_probs_K[k] = ids_by_id_K[ranked_K[k]], log_probs_by_id_K[ranked_K[k]]


@compiled()
def _look_up(sums_V: npt.NDArray[np.float64], total: float, high: np.uint64, low: np.uint64) -> int:
    """The first class whose running sum is above a uniform number's share of the total."""
    share = float(((high << _32) | low) >> _11) * 2.0**-53 * total
    # Rounded up to the total it would be beyond the last class.
    return int(np.searchsorted(sums_V, min(share, np.nextafter(total, 0.0)), side="right"))


@compiled()
def philox(
    c0: np.uint64, c1: np.uint64, c2: np.uint64, c3: np.uint64, k0: np.uint64, k1: np.uint64
) -> tuple[np.uint64, np.uint64, np.uint64, np.uint64]:
    """Four random words of 32 bits for a counter of four and a key of two."""
    for _ in range(10):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (product1 >> _32) ^ c1 ^ k0, product1 & _LOW, (product0 >> _32) ^ c3 ^ k1, product0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3
