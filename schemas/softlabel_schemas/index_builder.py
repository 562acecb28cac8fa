"""IndexBuilder: sorts the entries of any number of utterances into buckets, in bounded memory.

An external radix partition: entries go to temporary files by the leading bits of their keys, then one file after the other is
read, sorted and cut into buckets. The entries of 1.5 million hours (537 million utterances) take 21 GB of temporary disk, in
files of 168 MB.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from typing import IO

import numpy as np

from softlabel_schemas import layout
from softlabel_schemas.digest import sha256_hex
from softlabel_schemas.errors import InputError
from softlabel_schemas.limits import MAX_BUCKET_ENTRIES
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.utterance_index import ENTRY, BucketTable, ShardIndex, leading_bits, num_buckets

# Open files; a process may have 1,024, or 256 on some systems.
_MAX_PARTITIONS = 128
# In memory while smaller, so that a small dataset needs no disk.
_SPOOLED_BYTES = 1 << 16
_BUCKETS_AT_ONCE = 64


def check_room(num_rows: int) -> None:
    """Raises InputError where the disk of temporary files has no room for the entries of so many utterances."""
    folder, needed = tempfile.gettempdir(), num_rows * ENTRY.itemsize
    if (free := shutil.disk_usage(folder).free) < needed:
        raise InputError(
            f"the utterance index is sorted on disk: {needed} bytes are needed in {folder}, {free} are free; "
            "set TMPDIR to a folder with more room"
        )


class IndexBuilder:
    """Close it, or use it as a context: its temporary files go then, and in any case with the process.

    Args:
        num_rows: corpus rows of the dataset, no fewer than its utterances.
    """

    def __init__(self, num_rows: int) -> None:
        self.num_buckets = num_buckets(num_rows)
        self._partitions: list[IO[bytes]] = [
            tempfile.SpooledTemporaryFile(_SPOOLED_BYTES)  # noqa: SIM115 - closed in __exit__
            for _ in range(min(self.num_buckets, _MAX_PARTITIONS))
        ]

    def __enter__(self) -> IndexBuilder:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._partitions:
            file.close()

    def add(self, shard: int, index: ShardIndex) -> None:
        """Shards in order: entries of equal keys stay in the order in which they came."""
        entries = index.entries(shard)
        partition_N = leading_bits(entries["key"], len(self._partitions))
        entries = entries[np.argsort(partition_N, kind="stable")]
        stops = np.cumsum(np.bincount(partition_N, minlength=len(self._partitions)))
        for file, part in zip(self._partitions, np.split(entries, stops[:-1]), strict=True):
            file.write(part.tobytes())

    def buckets(self) -> Iterator[bytes]:
        """The bytes of each bucket, in order. Raises InputError where one has more entries than readers take."""
        per_partition = self.num_buckets // len(self._partitions)
        for file in self._partitions:
            file.seek(0)
            entries = np.frombuffer(file.read(), ENTRY)
            bucket_N = leading_bits(entries["key"], self.num_buckets)
            order = np.argsort(entries["key"].astype(np.uint64), kind="stable")
            counts = np.bincount(bucket_N % per_partition, minlength=per_partition)
            if counts.max() > MAX_BUCKET_ENTRIES:
                raise InputError(
                    f"{counts.max()} utterances share a bucket of the index; at most {MAX_BUCKET_ENTRIES} may"
                )
            for part in np.split(order, np.cumsum(counts)[:-1]):
                yield entries[part].tobytes()


def put_buckets(store: ObjectStore, builder: IndexBuilder) -> BucketTable:
    """Store every bucket that is not there yet, under the name that its content gives."""
    stored = store.list(layout.INDEX)
    table: list[tuple[int, str]] = []
    waiting: dict[str, bytes] = {}
    for bucket, data in enumerate(builder.buckets()):
        table.append((len(data), sha256_hex(data)))
        key = layout.index_bucket(bucket, table[-1][1])
        # A name is given to whole objects only, and says what they hold.
        if key not in stored or stored[key].num_bytes != len(data):
            waiting[key] = data
        if len(waiting) == _BUCKETS_AT_ONCE or (waiting and bucket == builder.num_buckets - 1):
            store.put_many(waiting)
            waiting = {}
    store.sync(layout.INDEX)
    store.sync("")
    return BucketTable.of(table)
