"""IndexReader: where the labels of utterances are, found in the utterance index of a published dataset.

An id whose bucket is in memory takes no request, any other takes one. Ids that are asked for together mostly lie together in
the corpus, and so in a few shards, but their keys are spread over all buckets. So a few are looked up in their buckets, and the
others in the commit records of the shards that were found: of 5,000 utterances in a row, in a dataset of 25,000 shards, 16
buckets and a few records are read instead of 5,000 buckets. What is left is looked for in the same way, with up to twice as
many: 100,000 ids that lie together in 1,000 shards take 6 rounds. Where that finds nothing, ids are random and each gets its
bucket.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from softlabel_schemas import layout
from softlabel_schemas.commit import read_published_commits
from softlabel_schemas.digest import sha256_hex
from softlabel_schemas.errors import IntegrityError
from softlabel_schemas.lru import LruCache
from softlabel_schemas.manifest import Manifest
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.transfers import undamaged
from softlabel_schemas.utterance_index import Place, Records, ShardIndex, find, key_of, leading_bits, read_bucket

# All buckets of 4,000 hours in utterances of 10 s.
_CACHED_BYTES = 64 << 20
# Of buckets and commit records: as many as a store is asked for concurrently.
_READ_AT_ONCE = 16
# So many buckets are fetched without looking for ids that lie together.
_FEW_BUCKETS = 64
# Of the first round; of each where few shards are left.
_PROBES = 16


class IndexReader:
    """Of a manifest that has an index; any number of threads may use it."""

    def __init__(self, store: ObjectStore, manifest: Manifest) -> None:
        self._store, self._manifest = store, manifest
        self._table = manifest.bucket_table()
        self._buckets: LruCache[int, Records] = LruCache(_CACHED_BYTES)
        self._shards: LruCache[int, ShardIndex] = LruCache(_CACHED_BYTES)

    def find(self, utterance_id: str) -> list[Place]:
        """Where an utterance of this id may be: mostly one place, none where there is no such utterance.

        Raises:
            IntegrityError: a bucket is missing, is not as it was written, or leads to what the dataset does not have.
        """
        key = key_of(utterance_id)
        bucket = self._bucket_of([key])[0]
        return next(self._find_in([(bucket, [(utterance_id, key)])]))[1]

    def find_many(self, utterance_ids: Iterable[str]) -> dict[str, list[Place]]:
        """As :meth:`find`, but that a place can be that of another utterance with the same key while its own is left out."""
        keys = {utterance_id: key_of(utterance_id) for utterance_id in utterance_ids}
        bucket_of = dict(zip(keys, self._bucket_of(list(keys.values())), strict=True))
        found: dict[str, list[Place]] = {}
        pending, together, num_probes = list(keys), True, _PROBES
        while pending:
            wanted = {bucket_of[each] for each in pending}
            few = sum(self._buckets.get(bucket) is None for bucket in wanted) <= _FEW_BUCKETS
            probes = pending if few or not together else pending[:: -(-len(pending) // num_probes)]
            grouped: defaultdict[int, list[tuple[str, int]]] = defaultdict(list)
            for each in probes:
                grouped[bucket_of[each]].append((each, keys[each]))
            found.update(self._find_in(sorted(grouped.items())))
            pending = [each for each in pending if each not in found]
            if pending:
                near = self._find_near(pending, keys, {place.shard for each in probes for place in found[each]})
                found.update(near)
                together = len(near) >= len(probes)
                pending = [each for each in pending if each not in found]
                # A round goes over all ids left: with as many probes in each, they would cost the square of the number of
                # shards. More than shards are likely left would find the same ones again.
                shards_left = len(pending) * len(probes) // (len(probes) + len(near))
                num_probes = max(_PROBES, min(2 * num_probes, shards_left))
        return found

    def place_of_row(self, shard: int, row: int) -> tuple[Place, int]:
        """The place of a shard's utterance ``row``, and its position there."""
        index = self._shard_indices([shard])[shard]
        block, first_row = index.block_of_row(row)
        return Place(shard, block), row - first_row

    def _bucket_of(self, keys: Sequence[int]) -> list[int]:
        return [int(bucket) for bucket in leading_bits(np.array(keys, np.uint64), len(self._table))]

    def _find_in(self, wanted: Sequence[tuple[int, Sequence[tuple[str, int]]]]) -> Iterator[tuple[str, list[Place]]]:
        """Ids and their places, for ids and keys by bucket; a few buckets are in memory at a time."""
        for start in range(0, len(wanted), _READ_AT_ONCE):
            some = wanted[start : start + _READ_AT_ONCE]
            buckets = self._read_buckets([bucket for bucket, _ in some])
            for bucket, ids in some:
                for utterance_id, key in ids:
                    places = find(buckets[bucket], key)
                    self._check(places, self._where(bucket))
                    yield utterance_id, places

    def _find_near(self, ids: Sequence[str], keys: dict[str, int], shards: set[int]) -> dict[str, list[Place]]:
        """Those of the ids whose keys are in these shards; a few commit records are in memory at a time."""
        keys_N = np.array([keys[each] for each in ids], np.uint64)
        order_N = np.argsort(keys_N)
        sorted_N = keys_N[order_N]
        found: dict[str, list[Place]] = {}
        wanted = sorted(shards)
        for start in range(0, len(wanted), _READ_AT_ONCE):
            for shard, index in self._shard_indices(wanted[start : start + _READ_AT_ONCE]).items():
                keys_M, rows_M = np.unique(index.keys_N.astype(np.uint64), return_index=True)
                starts_M, stops_M = (np.searchsorted(sorted_N, keys_M, side) for side in ("left", "right"))
                for position in np.flatnonzero(starts_M < stops_M).tolist():
                    place = Place(shard, index.block_of_row(int(rows_M[position]))[0])
                    for each in order_N[starts_M[position] : stops_M[position]].tolist():
                        found[ids[each]] = [place]
        return found

    def _read_buckets(self, wanted: Sequence[int]) -> dict[int, Records]:
        found = {bucket: entries for bucket in wanted if (entries := self._buckets.get(bucket)) is not None}
        missing = [bucket for bucket in wanted if bucket not in found]
        try:
            fetched = undamaged(self._store, lambda: self._fetch(missing))
        except FileNotFoundError as error:
            raise IntegrityError(f"a bucket of the utterance index is missing: {error}") from None
        for bucket, entries in zip(missing, fetched, strict=True):
            found[bucket] = entries
            self._buckets.put(bucket, entries, entries.nbytes)
        return found

    def _fetch(self, buckets: Sequence[int]) -> list[Records]:
        sizes = [self._table.num_bytes(bucket) for bucket in buckets]
        keys = [layout.index_bucket(bucket, self._table.sha256(bucket)) for bucket in buckets]
        found = []
        for bucket, data in zip(buckets, self._store.read_many(keys, max_bytes=sizes), strict=True):
            if sha256_hex(data) != self._table.sha256(bucket):
                raise IntegrityError(f"{self._where(bucket)}: was changed after writing")
            found.append(read_bucket(data, bucket, len(self._table)))
        return found

    def _shard_indices(self, shards: Sequence[int]) -> dict[int, ShardIndex]:
        found = {shard: index for shard in shards if (index := self._shards.get(shard)) is not None}
        missing = [shard for shard in shards if shard not in found]
        try:
            commits = read_published_commits(self._store, self._manifest, missing)
        except FileNotFoundError as error:
            raise IntegrityError(f"a commit record is missing: {error}") from None
        for commit in commits:
            shard, index = commit.shard.index, commit.shard_index()
            found[shard] = index
            self._shards.put(shard, index, index.blocks.nbytes + index.keys_N.nbytes)
        return found

    def _check(self, places: Sequence[Place], where: str) -> None:
        """Raises IntegrityError for a place that the dataset does not have."""
        for place in places:
            record = self._manifest.shards[place.shard] if place.shard < len(self._manifest.shards) else None
            if record is None or not record.num_utterances:
                raise IntegrityError(f"{where}: leads to shard {place.shard}, which holds no utterance")
            block = place.block
            if block is None:
                continue
            if len(record.files) != 1 or block.start + block.num_bytes > record.num_bytes:
                raise IntegrityError(
                    f"{where}: leads to {block.num_bytes} bytes at {block.start} outside shard {place.shard}"
                )
            if not 0 < block.num_rows <= record.num_utterances:
                raise IntegrityError(f"{where}: leads to {block.num_rows} utterances of shard {place.shard}")

    def _where(self, bucket: int) -> str:
        return self._store.describe(layout.index_bucket(bucket, self._table.sha256(bucket)))
