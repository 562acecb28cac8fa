"""Arrow's variable-length columns as one run of bytes and offsets, without a Python object per value."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa


def joined_bytes(column: pa.ChunkedArray) -> tuple[memoryview, npt.NDArray[np.int64]]:
    """A ``string`` or ``binary`` column without nulls: its values joined, and int64 [N + 1] offsets into them."""
    if len(column) == 0:
        return memoryview(b""), np.zeros(1, dtype=np.int64)
    array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    _, offset_buffer, data = array.buffers()
    offsets = np.frombuffer(offset_buffer, dtype=np.int32)[array.offset : array.offset + len(array) + 1]
    data = memoryview(data) if data is not None else memoryview(b"")
    return data[offsets[0] : offsets[-1]], (offsets - offsets[0]).astype(np.int64)
