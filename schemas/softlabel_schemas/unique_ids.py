"""UniqueIds: finds ids that are repeated among any number of them, in bounded memory.

An id is remembered by an 8-byte hash in a temporary file. Equal hashes are candidates only: among 10 million ids two differing
ones share a hash once in 370,000 corpora, and that must not refuse a corpus, so candidates are looked at again as text.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from softlabel_schemas.arrow import joined_bytes

_HASH_BYTES = 8
# Hashes are looked at a part at a time, those of about 4 M ids or 32 MB.
_IDS_PER_PART = 1 << 22
# A corpus that is one id, repeated: a part of the culprits is enough for a message.
_MAX_CANDIDATES = 1 << 16


class UniqueIds:
    """Close it, or use it as a context: the temporary file goes then, and in any case with the process."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        self._num_ids = 0

    def __enter__(self) -> UniqueIds:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, ids: pa.ChunkedArray) -> None:
        """A string column without nulls."""
        self._file.write(b"".join(_hashes(ids)))
        self._num_ids += len(ids)

    def first_repeated(self, columns: Iterable[pa.ChunkedArray]) -> tuple[str, int] | None:
        """The first id that occurs more than once, and how often; None where all ids differ.

        Args:
            columns: those given to ``add`` again, in order; asked for where hashes are equal.
        """
        candidates = {part.item().to_bytes(_HASH_BYTES, "little") for part in self._candidates()}
        if not candidates:
            return None
        counts: Counter[str] = Counter()
        for ids in columns:
            counts.update(
                value for value, hashed in zip(ids.to_pylist(), _hashes(ids), strict=True) if hashed in candidates
            )
        return next(((value, count) for value, count in counts.items() if count > 1), None)

    def _candidates(self) -> npt.NDArray[np.uint64]:
        """Hashes that occur more than once."""
        num_parts = np.uint64(-(-self._num_ids // _IDS_PER_PART))
        repeated = np.zeros(0, dtype="<u8")
        for part in range(int(num_parts)):
            self._file.seek(0)
            found = []
            while chunk := self._file.read(_IDS_PER_PART * _HASH_BYTES):
                hashes = np.frombuffer(chunk, dtype="<u8")
                found.append(hashes if num_parts == 1 else hashes[hashes % num_parts == part])
            ordered = np.sort(np.concatenate(found))
            repeated = np.union1d(repeated, ordered[1:][ordered[1:] == ordered[:-1]])[:_MAX_CANDIDATES]
        return repeated


def _hashes(ids: pa.ChunkedArray) -> list[bytes]:
    data, offsets = joined_bytes(ids)
    ends = offsets.tolist()
    return [_hash(data[start:end]) for start, end in pairwise(ends)]


def _hash(value: memoryview) -> bytes:
    return hashlib.blake2b(value, digest_size=_HASH_BYTES).digest()
