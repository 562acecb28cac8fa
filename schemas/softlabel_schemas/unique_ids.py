"""UniqueIds: finds ids that are repeated among any number of them, in bounded memory and in time that grows with their number.

    add: ids -> 8-byte hashes -> sorted runs in a temporary file        first_repeated: of all runs, one part at a time

Equal hashes are candidates only: among a billion ids two differing ones may share a hash, and that must not refuse a corpus, so
candidates are looked at again as text.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from softlabel_schemas.arrow import joined_bytes

_HASH_BYTES = 8
# 32 MB.
_IDS_PER_RUN = 1 << 22
# Up to this size, in memory.
_SPOOLED_BYTES = 1 << 20
# By the hash's highest bits: of a billion ids, a part has as many as a run.
_PART_BITS = 8
# A corpus that is one id, repeated: a part of the culprits is enough for a message.
_MAX_CANDIDATES = 1 << 16


class UniqueIds:
    """Close it, or use it as a context: the temporary file goes then, and in any case with the process."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(_SPOOLED_BYTES)  # noqa: SIM115 - closed in __exit__
        self._hash = _Hash()
        self._pending: list[npt.NDArray[np.uint64]] = []
        self._num_pending = 0
        # Of each run: where it begins in the file and, within it, where each part begins and the last one ends.
        self._runs: list[tuple[int, npt.NDArray[np.intp]]] = []

    def __enter__(self) -> UniqueIds:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, ids: pa.ChunkedArray) -> None:
        """A string column without nulls."""
        self._pending.append(self._hash(ids))
        self._num_pending += len(ids)
        if self._num_pending >= _IDS_PER_RUN:
            self._write_run()

    def first_repeated(self, columns: Iterable[pa.ChunkedArray]) -> tuple[str, int] | None:
        """The first id that occurs more than once, and how often; None where all ids differ.

        Args:
            columns: those given to ``add`` again, in order; asked for where hashes are equal.
        """
        self._write_run()
        candidates = self._candidates()
        if not len(candidates):
            return None
        counts: Counter[str] = Counter()
        for ids in columns:
            counts.update(ids.filter(pa.array(np.isin(self._hash(ids), candidates))).to_pylist())
        return next(((value, count) for value, count in counts.items() if count > 1), None)

    def _write_run(self) -> None:
        if not self._num_pending:
            return
        run = np.concatenate(self._pending)
        self._pending, self._num_pending = [], 0
        run.sort()
        firsts = np.arange(1 << _PART_BITS, dtype=np.uint64) << np.uint64(64 - _PART_BITS)
        self._runs.append((self._file.tell(), np.append(np.searchsorted(run, firsts), len(run))))
        self._file.write(run.data)

    def _candidates(self) -> npt.NDArray[np.uint64]:
        """Hashes that occur more than once."""
        repeated = np.zeros(0, dtype=np.uint64)
        if not self._runs:
            return repeated
        for part in range(1 << _PART_BITS):
            ordered = np.sort(np.concatenate(list(self._part_of_runs(part))))
            repeated = np.union1d(repeated, ordered[1:][ordered[1:] == ordered[:-1]])[:_MAX_CANDIDATES]
        return repeated

    def _part_of_runs(self, part: int) -> Iterator[npt.NDArray[np.uint64]]:
        for offset, starts in self._runs:
            self._file.seek(offset + int(starts[part]) * _HASH_BYTES)
            yield np.frombuffer(self._file.read(int(starts[part + 1] - starts[part]) * _HASH_BYTES), dtype=np.uint64)


class _Hash:
    """Multilinear hash (Carter and Wegman 1979) of each id: the sum, modulo 2^64, of its bytes times random factors.

    Two differing ids have equal hashes with a probability of at most 2^-56, whatever the ids: a byte differs by at most 256, so
    that no more than 8 bits of its factor are lost. Eight times as fast as a digest of each.
    """

    def __init__(self) -> None:
        self._rng = np.random.default_rng()
        self._factors = np.zeros(0, dtype=np.uint64)

    def __call__(self, ids: pa.ChunkedArray) -> npt.NDArray[np.uint64]:
        """uint64 [N]."""
        data, offsets = joined_bytes(ids)
        lengths = np.diff(offsets)
        missing = int(lengths.max(initial=0)) - len(self._factors)
        if missing > 0:
            more = self._rng.integers(0, 1 << 64, missing, dtype=np.uint64)
            self._factors = np.concatenate([self._factors, more])
        within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        # One more than the byte: a zero byte at the end counts too.
        values = np.frombuffer(data, dtype=np.uint8).astype(np.uint64) + np.uint64(1)
        # A sum from the beginning wraps around; its differences do not mind.
        totals = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(values * self._factors[within])])
        return np.asarray(totals[offsets[1:]] - totals[offsets[:-1]], dtype=np.uint64)
