"""Zstandard frames of known size (RFC 8878): decompressed only where the frame's header agrees."""

from __future__ import annotations

import pyarrow as pa

_MAGIC = b"\x28\xb5\x2f\xfd"
_RLE_BLOCK, _RESERVED_BLOCK = 1, 3
_ZSTD = pa.Codec("zstd")


def decompress(frame: bytes | memoryview, size: int, *, checksum: bool = False) -> bytes:
    """The ``size`` bytes of one whole frame; nothing is allocated before the frame's own structure was checked.

    Args:
        checksum: the frame must have one; where it has one it is verified in any case.

    Raises:
        ValueError: not one zstd frame of this size.
    """
    try:
        _check_frame(frame, size, checksum)
        data: bytes = _ZSTD.decompress(frame, size, asbytes=True)
    except IndexError:
        raise ValueError("a zstd frame is cut short") from None
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"a zstd frame is damaged: {error}") from None
    return data


def _check_frame(frame: bytes | memoryview, size: int, checksum: bool) -> None:
    """Section 3.1.1: header, blocks, checksum; raises IndexError where the frame ends early."""
    if bytes(frame[:4]) != _MAGIC:
        raise ValueError("no zstd frame")
    descriptor = frame[4]
    size_flag, single_segment, has_checksum = descriptor >> 6, descriptor >> 5 & 1, descriptor >> 2 & 1
    if descriptor & 0b1011:
        raise ValueError("a zstd frame needs a dictionary or a later version")
    if checksum and not has_checksum:
        raise ValueError("a zstd frame has no checksum")
    position = 5 + (1 - single_segment)
    size_bytes = (single_segment, 2, 4, 8)[size_flag]
    declared = int.from_bytes(frame[position : position + size_bytes], "little") + (256 if size_bytes == 2 else 0)
    if size_bytes and declared != size:
        raise ValueError(f"a zstd frame declares {declared} bytes, expected {size}")
    position += size_bytes
    last = 0
    while not last:
        header = frame[position] | frame[position + 1] << 8 | frame[position + 2] << 16
        last, kind, block_size = header & 1, header >> 1 & 3, header >> 3
        if kind == _RESERVED_BLOCK:
            raise ValueError("a zstd frame has a block of an unknown kind")
        position += 3 + (1 if kind == _RLE_BLOCK else block_size)
    if position + 4 * has_checksum != len(frame):
        raise ValueError(f"a zstd frame ends after {position + 4 * has_checksum} of {len(frame)} bytes")
