"""The two containers by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from softlabel_schemas import parquet_shard, zarr_shard
from softlabel_schemas.shard import Block, ShardColumns
from softlabel_schemas.spec import ShardFormat


class Container(Protocol):
    """See :mod:`softlabel_schemas.shard`."""

    def encode(self, columns: ShardColumns, zstd_level: int) -> dict[str, bytes]:
        """Raises InputError where there is more than a shard can hold."""

    def decode(self, files: Mapping[str, bytes], streams: Sequence[str], *, where: str) -> ShardColumns: ...

    def blocks(self, files: Mapping[str, bytes]) -> list[Block]:
        """The parts that can be read alone, all rows in order; none where only the whole shard can be."""

    def num_files(self, files: Mapping[str, bytes], factor: float) -> int:
        """Of a shard that is ``factor`` times as large as that of ``files``."""

    def decode_block(self, data: bytes, num_rows: int, streams: Sequence[str], *, where: str) -> ShardColumns: ...


CONTAINERS: dict[ShardFormat, Container] = {"parquet": parquet_shard, "zarr": zarr_shard}
