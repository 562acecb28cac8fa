"""Thrift's compact protocol, as far as Parquet's metadata needs it: structs as dicts by field id.

Sizes are checked against the bytes that are there before anything is made of them; the number of values is limited. A compiled
loop takes the bytes apart: done in Python, metadata was a tenth of the time to read a shard.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from softlabel_schemas import thrift_kernels as kernels

Struct = dict[int, Any]

_TOKENS = 1 << 14


def read_struct(data: bytes | memoryview, start: int, stop: int, *, max_values: int) -> tuple[Struct, int]:
    """The struct that begins at ``start``, and where it ends, ``stop`` at most.

    Integers are ``int``, binaries and doubles ``bytes``, lists and sets ``list``, maps ``list`` of key and value in turn.

    Raises:
        ValueError: not a struct within these bytes, or of more than ``max_values`` values.
    """
    piece = np.frombuffer(memoryview(data)[start:stop], np.uint8)
    # Each value takes a byte at least, and a struct or list a token more for its end.
    tokens = np.empty((2 * min(max_values, len(piece)), 3), np.int64)
    status, num_bytes, num_tokens = kernels.tokenize(piece, max_values, tokens)
    if status != kernels.GOOD:
        raise ValueError(f"Thrift metadata {kernels.PROBLEMS[status]}")
    end, integer, of_bytes, of_struct = kernels.END, kernels.INTEGER, kernels.BYTES, kernels.STRUCT
    outermost: Struct = {}
    container: Any = outermost
    around: list[Any] = []
    # Lists of Python's take ten times the room: some tokens at a time.
    pieces = (tokens[first : min(first + _TOKENS, num_tokens)].tolist() for first in range(0, num_tokens, _TOKENS))
    for kind, field_id, value in itertools.chain.from_iterable(pieces):
        if kind == end:
            container = around.pop()
            continue
        if kind == integer:
            item = value
        elif kind == of_bytes:
            at = value >> 32
            item = piece[at : at + (value & 0xFFFFFFFF)].tobytes()
        elif kind == kernels.BOOLEAN:
            item = value == 1
        else:
            item = {} if kind == of_struct else []
        if type(container) is list:
            container.append(item)
        elif field_id in container:
            raise ValueError(f"Thrift field {field_id} is repeated")
        else:
            container[field_id] = item
        if type(item) is list or type(item) is dict:
            around.append(container)
            container = item
    return outermost, start + num_bytes
