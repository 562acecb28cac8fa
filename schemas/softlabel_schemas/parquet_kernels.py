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
    position = filled = 0
    for index in range(len(lengths)):
        if position + 4 > len(page):
            return False
        length = np.int64(0)
        for byte in range(4):
            length |= np.int64(page[position + byte]) << (8 * byte)
        position += 4
        if length > len(page) - position or length > len(values) - filled:
            return False
        values[filled : filled + length] = page[position : position + length]
        position += length
        filled += length
        lengths[index] = length
    return position == len(page)
