"""Compiled loops of the codec "mtf-sqrt": entries <-> byte streams, one frame after the other (FORMAT.md, section 7).

They read streams that a stranger may have written. Numba checks no index, so each one that depends on the data is checked
here before it is used; the fuzzer runs them with Numba's own checks on (``NUMBA_BOUNDSCHECK=1``).

Names: N utterances, T frames, E entries. ``ends`` of a stream are offsets [N + 1] of the utterances' bytes in it.
"""

from __future__ import annotations

import math

import numpy as np

from softlabel_schemas.compiled import compiled

# Codes of square roots of probabilities: steps of 1 / LEVELS.
LEVELS = 192
# As many of the last frame's classes can be referred to; more would make a hostile frame cost its square.
MAX_LIST = 64
# Values of a nibble of "positions": a position below, one above, or the high part of a new class id.
FAR_POSITION = 12
NEW_CLASS = 13
LAST_HIGH = 2
# Ranks whose steps have a byte each; further ones have a nibble, in which this value means a byte of "overflow" more.
HEAD_STEPS = 3
LONG_STEP = 15
# Larger inventories have no table of a stamp for each class: duplicates are then looked for by sorting.
MAX_STAMPS = 1 << 20

_FIRST_TEN = np.uint64(sum(slot << (6 * slot) for slot in range(10)))

# What a kernel found, beside the frame.
GOOD, BAD_TARGETS, CUT_SHORT, LEFT_OVER, BAD_POSITION, BAD_CLASS, REPEATED, RISING, BAD_TAIL, BAD_MASS = range(10)


@compiled()
def encode_frames(
    frame_offsets,
    entry_offsets,
    class_ids,
    log_probs,
    tail_mass,
    tail_codes,
    predicted,
    stamps,
    num_classes,
    high_bytes,
    mass_tolerance,
    positions,
    new_ids,
    first_codes,
    head_steps,
    tail_steps,
    overflow,
    tails,
    ends,
):
    """Fill the streams and ``ends`` [7, N + 1]; returns (GOOD or BAD_TARGETS, frame).

    Args:
        tail_codes: u1 [T, K]; predicted: u1 [LEVELS^2 + 1], the tail code for each squared code left over.
        stamps: i8 [V] of -1, or of no length where V is above MAX_STAMPS.
        high_bytes: bytes of "overflow" for the high part of a new class id.
    """
    # The classes of the last frame that were not met again yet, from ``head`` on; ``slot_of`` finds them.
    recent = np.empty(MAX_LIST, np.int64)
    keys, slots = np.empty(256, np.int64), np.empty(256, np.int64)
    num_temperatures = tail_codes.shape[1]
    n_pos = n_new = n_first = n_head = n_tail = n_over = n_tails = 0
    for u in range(len(frame_offsets) - 1):
        first_frame, stop_frame = frame_offsets[u], frame_offsets[u + 1]
        num_recent = 0
        pos_nibbles = tail_nibbles = 0
        for t in range(first_frame, stop_frame):
            start, stop = entry_offsets[t], entry_offsets[t + 1]
            keys[:] = -1
            for j in range(num_recent):
                h = (recent[j] * 0x9E3779B1 >> 13) & 255
                while keys[h] >= 0:
                    h = (h + 1) & 255
                keys[h], slots[h] = recent[j], j
            taken = np.uint64(0)
            for e in range(start, stop):
                class_id = np.int64(class_ids[e])
                if not 0 <= class_id < num_classes:
                    return BAD_TARGETS, t
                if len(stamps):
                    if stamps[class_id] == t:
                        return BAD_TARGETS, t
                    stamps[class_id] = t
                # Where it stood in the last frame: the slot less those before it that are taken.
                h = (class_id * 0x9E3779B1 >> 13) & 255
                while keys[h] >= 0 and keys[h] != class_id:
                    h = (h + 1) & 255
                if keys[h] == class_id:
                    slot = np.uint64(slots[h])
                    position = np.int64(slot) - _num_ones(taken & ((np.uint64(1) << slot) - np.uint64(1)))
                    taken |= np.uint64(1) << slot
                    nibble = min(position, FAR_POSITION)
                    if nibble == FAR_POSITION:
                        overflow[n_over] = position - FAR_POSITION
                        n_over += 1
                else:
                    high = class_id >> 8
                    nibble = NEW_CLASS + min(high, LAST_HIGH)
                    new_ids[n_new] = class_id & 255
                    n_new += 1
                    if high >= LAST_HIGH:
                        for shift in range(high_bytes):
                            overflow[n_over] = (high - LAST_HIGH) >> (8 * shift) & 255
                            n_over += 1
                if pos_nibbles & 1:
                    positions[n_pos - 1] |= nibble << 4
                else:
                    positions[n_pos] = nibble
                    n_pos += 1
                pos_nibbles += 1
            squares, mass, last_code, last_log_prob = 0, 0.0, LEVELS, np.float32(0)
            for e in range(start, stop):
                log_prob = log_probs[e]
                if not -np.inf < log_prob <= last_log_prob:
                    return BAD_TARGETS, t
                last_log_prob = log_prob
                root = math.exp(0.5 * log_prob)
                mass += root * root
                code = np.int64(np.rint(root * LEVELS))
                squares += code * code
                step = last_code - code
                last_code = code
                rank = e - start
                if rank == 0:
                    first_codes[n_first] = step
                    n_first += 1
                elif rank <= HEAD_STEPS:
                    head_steps[n_head] = step
                    n_head += 1
                else:
                    if step >= LONG_STEP:
                        overflow[n_over] = step - LONG_STEP
                        n_over += 1
                        step = LONG_STEP
                    if tail_nibbles & 1:
                        tail_steps[n_tail - 1] |= step << 4
                    else:
                        tail_steps[n_tail] = step
                        n_tail += 1
                    tail_nibbles += 1
            if not abs(mass + tail_mass[t, 0] - 1.0) <= mass_tolerance:
                return BAD_TARGETS, t
            for k in range(num_temperatures):
                if k == 0:
                    expected = np.int64(predicted[max(LEVELS * LEVELS - squares, 0)])
                else:
                    expected = np.int64(tail_codes[t - 1, k]) if t > first_frame else 0
                at = n_tails + k * (stop_frame - first_frame) + t - first_frame
                tails[at] = (np.int64(tail_codes[t, k]) - expected) & 255
            num_recent = min(stop - start, MAX_LIST)
            for j in range(num_recent):
                recent[j] = class_ids[start + j]
        n_tails += num_temperatures * (stop_frame - first_frame)
        ends[0, u + 1], ends[1, u + 1], ends[2, u + 1], ends[3, u + 1] = n_pos, n_new, n_first, n_head
        ends[4, u + 1], ends[5, u + 1], ends[6, u + 1] = n_tail, n_over, n_tails
    return GOOD, 0


@compiled()
def decode_frames(
    frame_offsets,
    entry_offsets,
    positions,
    new_ids,
    first_codes,
    head_steps,
    tail_steps,
    overflow,
    tails,
    ends,
    log_prob_of,
    tail_of,
    predicted,
    stamps,
    num_classes,
    high_bytes,
    mass_tolerance,
    class_ids,
    log_probs,
    tail_mass,
):
    """Fill class_ids [E], log_probs [E] and tail_mass [T, K]; returns (GOOD or what is wrong, frame).

    The lengths of "positions" and "tail_mass" were checked against the frames and entries. "new_ids" goes on for as many bytes
    as a frame has entries.

    Args:
        log_prob_of: f4 [LEVELS + 1]; tail_of: f4 [256]; the others as :func:`encode_frames`.
    """
    num_temperatures = tail_mass.shape[1]
    last_tails = np.zeros(num_temperatures, np.int64)
    has_stamps = len(stamps) > 0
    # The nibbles of "positions", one for each entry.
    nibbles = np.empty(len(class_ids), np.uint8)
    # Slots of the last frame's classes in their order, without those that FAR_POSITION or one near it took out.
    order = np.arange(2 * MAX_LIST).astype(np.uint64)
    is_rare = np.int64(1 << 10 | 1 << 11 | 1 << FAR_POSITION)
    if high_bytes:
        is_rare |= np.int64(1 << (NEW_CLASS + LAST_HIGH))
    for u in range(len(frame_offsets) - 1):
        first_frame, stop_frame = frame_offsets[u], frame_offsets[u + 1]
        num_frames = stop_frame - first_frame
        i_new, i_first, i_head = np.uint64(ends[1, u]), np.uint64(ends[2, u]), np.uint64(ends[3, u])
        i_tail, i_over, i_tails = np.uint64(0), np.uint64(ends[5, u]), ends[6, u]
        end_new, end_first, end_head = np.uint64(ends[1, u + 1]), ends[2, u + 1], ends[3, u + 1]
        end_tail, end_over = 2 * (ends[4, u + 1] - ends[4, u]), np.uint64(ends[5, u + 1])
        _unpack(positions[ends[0, u] : ends[0, u + 1]], nibbles[entry_offsets[first_frame] : entry_offsets[stop_frame]])
        tail_nibbles = np.empty(end_tail, np.uint8)
        _unpack(tail_steps[ends[4, u] : ends[4, u + 1]], tail_nibbles)
        last_tails[:] = 0
        num_recent, recent = 0, np.uint64(0)
        for t in range(first_frame, stop_frame):
            start, stop = entry_offsets[t], entry_offsets[t + 1]
            # Class ids. The last frame's classes that were not met again are those of the ten slots in ``window``, six bits
            # each, then those of ``order`` from ``coming`` on: ``left`` in all. A processor cannot guess whether an entry is
            # new, so that is no branch but a mask. What is rare is outside the inner loop: it would take its registers.
            # Indices are unsigned where it counts: Numba lets others be negative, which takes time.
            window, coming, left, is_moved = _FIRST_TEN, np.uint64(10), num_recent, False
            e, last = np.uint64(start), np.uint64(stop)
            while True:
                while e < last:
                    nibble = np.int64(nibbles[e])
                    if is_rare >> nibble & 1:
                        break
                    is_new = -np.int64(nibble >= NEW_CLASS)
                    if nibble | is_new >= left:
                        return BAD_POSITION, t
                    shift = np.uint64(6 * (nibble & ~is_new))
                    from_here = window >> shift
                    # Slot 0 for a new class: of no meaning, and it can be read.
                    known = np.int64(class_ids[recent + (from_here & np.uint64(63 & ~is_new))])
                    new = (nibble - NEW_CLASS) << 8 | np.int64(new_ids[i_new])
                    class_id = new & is_new | known & ~is_new
                    if class_id >= num_classes:
                        return BAD_CLASS, t
                    if has_stamps:
                        if stamps[np.uint64(class_id)] == t:
                            return REPEATED, t
                        stamps[np.uint64(class_id)] = t
                    below = window & ((np.uint64(1) << shift) - np.uint64(1))
                    without = below | from_here >> np.uint64(6) << shift | order[coming] << np.uint64(54)
                    window = window & np.uint64(is_new) | without & ~np.uint64(is_new)
                    coming += np.uint64(1 + is_new)
                    left -= 1 + is_new
                    i_new -= np.uint64(is_new)
                    class_ids[e] = class_id
                    e += np.uint64(1)
                if e == last:
                    break
                nibble = np.int64(nibbles[e])
                if nibble <= FAR_POSITION:
                    position = nibble
                    if nibble == FAR_POSITION:
                        if i_over >= end_over:
                            return CUT_SHORT, t
                        position += overflow[i_over]
                        i_over += np.uint64(1)
                    if position >= left:
                        return BAD_POSITION, t
                    after_window = np.int64(coming) - 10
                    class_id = np.int64(class_ids[recent + order[after_window + position]])
                    for index in range(after_window + position, after_window + left - 1):
                        order[index] = order[index + 1]
                    is_moved = True
                    left -= 1
                else:
                    if i_over + np.uint64(high_bytes) > end_over:
                        return CUT_SHORT, t
                    class_id = LAST_HIGH << 8 | np.int64(new_ids[i_new])
                    i_new += np.uint64(1)
                    for byte in range(high_bytes):
                        class_id += np.int64(overflow[i_over]) << (8 * byte + 8)
                        i_over += np.uint64(1)
                    if class_id >= num_classes:
                        return BAD_CLASS, t
                if has_stamps:
                    if stamps[np.uint64(class_id)] == t:
                        return REPEATED, t
                    stamps[np.uint64(class_id)] = t
                class_ids[e] = class_id
                e += np.uint64(1)
            if is_moved:
                for index in range(num_recent):
                    order[index] = index
            if i_new > end_new:
                return CUT_SHORT, t
            num_recent, recent = min(stop - start, MAX_LIST), np.uint64(start)
            # Probabilities.
            squares, num_zeros, code = np.int64(0), np.int64(0), np.int64(LEVELS)
            head = min(start + 1 + HEAD_STEPS, stop)
            num_first, num_head = min(stop - start, 1), head - min(start + 1, stop)
            if np.int64(i_first) + num_first > end_first or np.int64(i_head) + num_head > end_head:
                return CUT_SHORT, t
            if np.int64(i_tail) + stop - head > end_tail:
                return CUT_SHORT, t
            for e in range(np.uint64(start), np.uint64(head)):
                if e > np.uint64(start):
                    code -= head_steps[i_head]
                    i_head += np.uint64(1)
                else:
                    code -= first_codes[i_first]
                    i_first += np.uint64(1)
                if code < 0:
                    return RISING, t
                log_probs[e] = log_prob_of[np.uint64(code)]
                squares += code * code
                num_zeros += code == 0
            for e in range(np.uint64(head), np.uint64(stop)):
                step = np.int64(tail_nibbles[i_tail])
                i_tail += np.uint64(1)
                if step == LONG_STEP:
                    if i_over >= end_over:
                        return CUT_SHORT, t
                    step += overflow[i_over]
                    i_over += np.uint64(1)
                code -= step
                if code < 0:
                    return RISING, t
                log_probs[e] = log_prob_of[np.uint64(code)]
                squares += code * code
                num_zeros += code == 0
            for k in range(num_temperatures):
                expected = last_tails[k] if k > 0 else np.int64(predicted[max(LEVELS * LEVELS - squares, 0)])
                tail_code = (expected + tails[i_tails + k * num_frames + t - first_frame]) & 255
                if tail_code == 255 and stop > start:
                    return BAD_TAIL, t
                last_tails[k] = tail_code
                tail_mass[t, k] = tail_of[tail_code]
            # What rounds to code 0 counts as code 1/4.
            mass = (squares + num_zeros / 16) / (LEVELS * LEVELS)
            if not abs(mass + tail_mass[t, 0] - 1.0) <= mass_tolerance:
                return BAD_MASS, t
        if np.int64(i_tail + (i_tail & np.uint64(1))) != end_tail or i_new != end_new or np.int64(i_first) != end_first:
            return LEFT_OVER, first_frame
        if np.int64(i_head) != end_head or i_over != end_over:
            return LEFT_OVER, first_frame
    return GOOD, 0


@compiled()
def _unpack(pairs, nibbles):
    """The low nibble of each byte first."""
    for i in range(len(nibbles) >> 1):
        nibbles[2 * i], nibbles[2 * i + 1] = pairs[i] & 15, pairs[i] >> 4
    if len(nibbles) & 1:
        nibbles[len(nibbles) - 1] = pairs[len(pairs) - 1] & 15


@compiled()
def _num_ones(bits):
    """Ones in a 64-bit word."""
    bits = bits - ((bits >> np.uint64(1)) & np.uint64(0x5555555555555555))
    bits = (bits & np.uint64(0x3333333333333333)) + ((bits >> np.uint64(2)) & np.uint64(0x3333333333333333))
    bits = (bits + (bits >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((bits * np.uint64(0x0101010101010101)) >> np.uint64(56))
