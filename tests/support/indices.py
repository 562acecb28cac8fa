"""What a test wants to know of random access: the requests it takes, the blocks of a dataset; and forged indices."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from softlabel_schemas import layout
from softlabel_schemas.commit import read_commits
from softlabel_schemas.dataset import SoftLabelDataset
from softlabel_schemas.digest import seal, sha256_hex
from softlabel_schemas.manifest import SpecDocument
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.utterance_index import BlockPlace, BucketTable, Records, ShardIndex, read_bucket


@contextmanager
def requests() -> Iterator[list[str]]:
    """The keys of the objects that are read meanwhile, one for each request."""
    log: list[str] = []
    request = ObjectStore._request_range

    def logged(self: ObjectStore, key: str, start: int, stop: int) -> bytes:
        log.append(key)
        return request(self, key, start, stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ObjectStore, "_request_range", logged)
        yield log


def kinds(log: list[str]) -> list[str]:
    """The folders of the objects, sorted."""
    return sorted(key.partition("/")[0] for key in log)


def shard_index(dataset: SoftLabelDataset, shard: int) -> ShardIndex:
    document = SpecDocument(spec=dataset.manifest.spec, storage=dataset.manifest.storage)
    return read_commits(dataset.store, document, [shard])[0].shard_index()


def ids_by_block(dataset: SoftLabelDataset) -> dict[tuple[int, BlockPlace], list[str]]:
    found = {}
    for shard in range(dataset.num_shards):
        ids = dataset.read_shard(shard).utterance_ids
        first_row = 0
        for block in shard_index(dataset, shard).block_places():
            found[shard, block] = list(ids[first_row : first_row + block.num_rows])
            first_row += block.num_rows
    return found


def change_document(store: ObjectStore, key: str, change: Callable[[Any], None]) -> None:
    """Seal it again."""
    body = json.loads(store.read(key))["body"]
    change(body)
    store.put(key, seal(body))


def forge_index(store: ObjectStore, dataset: SoftLabelDataset, change: Callable[[Records], Records]) -> None:
    """Replace the first bucket by what ``change`` makes of its entries, under its right name in a manifest that says so."""
    table = dataset.manifest.bucket_table()
    entries = read_bucket(store.read(layout.index_bucket(0, table.sha256(0))), 0, len(table))
    data = change(np.array(entries)).tobytes()
    store.put(layout.index_bucket(0, sha256_hex(data)), data)
    others = [(table.num_bytes(bucket), table.sha256(bucket)) for bucket in range(1, len(table))]
    text = BucketTable.of([(len(data), sha256_hex(data)), *others]).to_base64()
    change_document(store, layout.MANIFEST, lambda body: body.update(index=text))
