"""The two containers by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from softlabel_schemas import parquet_shard, zarr_shard
from softlabel_schemas.shard import ShardColumns
from softlabel_schemas.spec import ShardFormat


class Container(Protocol):
    """See :mod:`softlabel_schemas.shard`."""

    def encode(self, columns: ShardColumns) -> dict[str, bytes]: ...

    def decode(self, files: Mapping[str, bytes], *, where: str) -> ShardColumns: ...


CONTAINERS: dict[ShardFormat, Container] = {"parquet": parquet_shard, "zarr": zarr_shard}
