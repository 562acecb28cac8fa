"""What a reader is ready to spend on stored bytes that a stranger may have written.

Every number is far above what a job writes and is checked before anything of that size is allocated. Writers meet the same
checks: documents and records are made by the models that read them, and a shard is read back before it is stored.
"""

from __future__ import annotations

# Of each count in a document. A million shards' counts add up to less than 2^63.
MAX_COUNT = 2**40
# Times any count it is finite.
MAX_FRAME_SHIFT_MS = 1e6
MAX_SHARDS = 1_000_000
MAX_UTTERANCES_PER_SHARD = 1_000_000
# Stored bytes of one shard: a hundred times a shard of two hours at 30 bytes a frame.
MAX_SHARD_BYTES = 2 << 30
# A stream of a Parquet shard has fewer bytes: Arrow's offsets have 32 bits.
PARQUET_STREAM_BYTES = 2 << 30
# The utterance index: 131,072 buckets of 4,096 entries hold 1.5 million hours in utterances of 10 s, and take 6 MiB of the
# manifest. Of more utterances buckets get larger, up to 10 MiB.
MAX_INDEX_BUCKETS = 1 << 17
MAX_BUCKET_ENTRIES = 1 << 18
# A value of a document takes some 100 bytes of memory, and as little as two of the document. An honest one has at most 3.7
# million: a 96 MiB manifest of Zarr shards, a value every 27 bytes.
MAX_DOCUMENT_VALUES = 4 << 20

# Real labels decompress to 1.5 to 4 times their stored size, but constant columns (silence, one class) to thousands of
# times theirs: 64 MiB holds 18 hours of the latter.
_DECODED_BASE = 64 << 20
_DECODED_FACTOR = 16
MAX_DECODED_BYTES = 4 << 30


def max_decoded_bytes(stored_bytes: int) -> int:
    """What the columns of a shard of ``stored_bytes`` may decompress to."""
    return min(_DECODED_BASE + _DECODED_FACTOR * stored_bytes, MAX_DECODED_BYTES)


class DecodingBudget:
    """What is left of a shard's decoded bytes."""

    def __init__(self, stored_bytes: int) -> None:
        self._limit = self._left = max_decoded_bytes(stored_bytes)

    def spend(self, num_bytes: int) -> None:
        """Before ``num_bytes`` are allocated. Raises ValueError where they are more than is left."""
        self._left -= num_bytes
        if self._left < 0:
            raise ValueError(f"it claims to decompress to more than {self._limit} bytes; shards are cut smaller")
