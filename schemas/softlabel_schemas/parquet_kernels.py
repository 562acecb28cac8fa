"""Compiled loop of the Parquet reader."""

from __future__ import annotations

import numpy as np

from softlabel_schemas.compiled import compiled


@compiled()
def split_byte_arrays(page, values, lengths):
    """Values behind their lengths (four bytes each) -> values joined. False where they are not exactly the page.

    Args:
        page: u1 [n]; values: u1 [n - 4 x count], filled; lengths: i8 [count], filled.
    """
    # Indices are unsigned, and a value is copied by a loop: a tenth of the time that Numba's slices take.
    four, num_bytes, room = np.uint64(4), np.uint64(len(page)), np.uint64(len(values))
    position, filled = np.uint64(0), np.uint64(0)
    for index in range(len(lengths)):
        if num_bytes - position < four:
            return False
        length = np.uint64(0)
        for byte in range(four):
            length |= np.uint64(page[position + byte]) << (np.uint64(8) * byte)
        position += four
        if length > num_bytes - position or length > room - filled:
            return False
        for k in range(length):
            values[filled + k] = page[position + k]
        position += length
        filled += length
        lengths[index] = length
    return position == num_bytes
