"""Seeded mutators of bytes and of JSON values."""

from __future__ import annotations

import copy
from collections.abc import Callable
from random import Random
from typing import Any

EXTREMES = (
    0,
    1,
    -1,
    2,
    127,
    128,
    255,
    256,
    65_535,
    65_536,
    2**24,
    *(2**n + d for n in (31, 32, 40, 53, 63, 64) for d in (-1, 0, 1)),
)
MORE_NUMBERS = (-(2**31), -(2**63), 10**30, 10**400, 1_000_000, 1_000_001, 0.0, -0.0, 0.5, 1e-320, 1e308, 1.5, 10.0)
# Names of fields, and what parsers of such files have tripped over.
WORDS = (
    b"body", b"sha256", b"shards", b"files", b"num_bytes", b"../../x", b"/etc/passwd", b"PAR1", b"PARE", b"zarr.json",
    b"codecs", b"sharding_indexed", b"numcodecs.pickle", b"ARROW:schema", b"arrow.py_extension_type", b"\x28\xb5\x2f\xfd",
    b"\\ud800", b"NaN", b"Infinity", b"1e999", b"\x00", b"\xff\xfe", b"{", b"[", b"\"", b",", b"__class__", b"\x1b[2J",
)  # fmt: skip


def varint(value: int) -> bytes:
    """Unsigned LEB128."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def little(rng: Random, value: int) -> bytes:
    size = rng.choice((1, 2, 4, 8))
    return (value % (1 << 8 * size)).to_bytes(size, "little")


def _cut(rng: Random, data: bytes) -> tuple[int, int]:
    """A stretch of the data, mostly short."""
    start = rng.randrange(len(data) + 1)
    length = rng.randrange(1, 9) if rng.random() < 0.7 else rng.randrange(len(data) + 1)
    return start, min(start + length, len(data))


def _flip(rng: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _overwrite(rng: Random, data: bytes, new: bytes) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + new + data[start + len(new) :]


def _insert(rng: Random, data: bytes, new: bytes) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + new + data[start:]


def _remove(rng: Random, data: bytes) -> bytes:
    start, stop = _cut(rng, data)
    return data[:start] + data[stop:]


def _duplicate(rng: Random, data: bytes) -> bytes:
    start, stop = _cut(rng, data)
    return data[:stop] + data[start:stop] * rng.choice((1, 1, 2, 50)) + data[stop:]


def _splice(rng: Random, data: bytes) -> bytes:
    start, stop = _cut(rng, data)
    return _overwrite(rng, data, data[start:stop])


_BYTE_MUTATORS: tuple[Callable[[Random, bytes], bytes], ...] = (
    _flip,
    _flip,
    lambda rng, data: _overwrite(rng, data, rng.choice((b"\x00", b"\xff", b"\x7f", b"\x80"))),
    lambda rng, data: _overwrite(rng, data, rng.randbytes(1)),
    lambda rng, data: _overwrite(rng, data, little(rng, rng.choice(EXTREMES))),
    lambda rng, data: _overwrite(rng, data, varint(rng.choice(EXTREMES) % 2**70)),
    lambda rng, data: _insert(rng, data, varint(rng.choice(EXTREMES) % 2**70)),
    lambda rng, data: _insert(rng, data, rng.choice(WORDS)),
    lambda rng, data: _insert(rng, data, rng.randbytes(rng.randrange(1, 20))),
    lambda rng, data: data[: rng.randrange(len(data))],
    _remove,
    _duplicate,
    _splice,
)


def mutate_bytes(rng: Random, data: bytes) -> bytes:
    """One to four changes."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        if not data:
            return rng.randbytes(rng.randrange(8))
        data = rng.choice(_BYTE_MUTATORS)(rng, data)
    return data


def mutate_values(rng: Random, data: bytes) -> bytes:
    """Like :func:`mutate_bytes`, mostly of the same length: what is behind the checks of lengths shall be reached."""
    if not data or rng.random() < 0.3:
        return mutate_bytes(rng, data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        new = rng.choice((_flip(rng, data), _overwrite(rng, data, rng.randbytes(1)), _splice(rng, data)))
        if rng.random() < 0.4:
            new = _overwrite(rng, data, little(rng, rng.choice(EXTREMES)))
        data = new[: len(data)]
    return data


def mutate_int(rng: Random, value: int) -> int:
    if rng.random() < 0.4:
        return value + rng.choice((-1, 1, -8, 8, 64))
    return rng.choice(EXTREMES)


def mutate_json(rng: Random, value: Any) -> Any:
    """One to three nodes are replaced, removed, repeated, renamed or moved, in ``value`` itself."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = _mutate_node(rng, value)
    return value


def _mutate_node(rng: Random, root: Any) -> Any:
    places = _places(root)
    if not places or rng.random() < 0.01:
        return _other_value(rng, root)
    parent, key = rng.choice(places)
    action = rng.randrange(8)
    if action <= 3:
        parent[key] = _other_value(rng, parent[key])
    elif action == 4:
        del parent[key]
    elif action == 5 and isinstance(parent, list):
        parent[key:key] = [copy.deepcopy(parent[key])] * rng.choice((1, 1, 2, 100))
    elif action == 6:
        other_parent, other_key = rng.choice(places)
        parent[key] = copy.deepcopy(other_parent[other_key])
    elif isinstance(parent, dict):
        parent[rng.choice(WORDS).decode(errors="replace")] = parent[key] if action == 5 else parent.pop(key)
    else:
        rng.shuffle(parent)
    return root


def _places(value: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    pending = [value]
    while pending:
        node = pending.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            found.append((node, key))
            pending.append(node[key])
    return found


def _other_value(rng: Random, value: Any) -> Any:
    if rng.random() < 0.6:
        if isinstance(value, bool):
            return not value
        if isinstance(value, int | float):
            return rng.choice((*EXTREMES, *MORE_NUMBERS, value + 1, value - 1, _as_other(value)))
        if isinstance(value, str):
            return rng.choice(_OTHER_TEXTS)(rng, value)
    return rng.choice(_OTHER_VALUES)(rng)


def _as_other(value: int | float) -> int | float:
    """The same number as a float or an integer."""
    if abs(value) > 1e300:
        return 0
    return float(value) if isinstance(value, int) else int(value)


_OTHER_TEXTS: tuple[Callable[[Random, str], str], ...] = (
    lambda rng, text: "",
    lambda rng, text: text * rng.choice((2, 1000)),
    lambda rng, text: text[:-1],
    lambda rng, text: text.upper(),
    lambda rng, text: text + "\n",
    lambda rng, text: rng.choice(("../", "/", "..", "a/../b", "a//b", "./a", "a\\b", "C:x", "zarr.json/x")) + text,
    lambda rng, text: text + rng.choice(("\ud800", "\x00", "\x1b[2J", "\u202e", "\U0001f600", "é")),
    lambda rng, text: rng.choice(WORDS).decode(errors="replace"),
    lambda rng, text: "".join(rng.sample(text, len(text))),
    lambda rng, text: rng.choice("0123456789abcdef") + text[1:],
)
_OTHER_VALUES: tuple[Callable[[Random], Any], ...] = (
    lambda rng: rng.choice((None, True, False, "", [], {}, [[]], {"": None})),
    lambda rng: rng.choice((*EXTREMES, *MORE_NUMBERS)),
    lambda rng: str(rng.choice(EXTREMES)),
    lambda rng: float(rng.choice(EXTREMES)),
    lambda rng: rng.choice(("nan", "inf", "x" * 5000, "\ud800", "0" * 64, "parquet", "zarr", "packed-f32", "mass")),
    lambda rng: nested(rng.choice((3, 50, 120))),
    lambda rng: [0] * rng.choice((1, 100, 3000)),
    lambda rng: {str(n): n for n in range(rng.choice((1, 100)))},
)  # fmt: skip


def nested(depth: int) -> Any:
    value: Any = 0
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value
