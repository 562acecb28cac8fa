"""Open and read a published dataset.

>>> dataset = open_dataset("s3://bucket/labels")               # doctest: +SKIP
>>> dataset["utterance-17"].targets.top1_T()                   # doctest: +SKIP
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from softlabel_schemas import layout
from softlabel_schemas.cache import FileCache
from softlabel_schemas.commit import read_manifest
from softlabel_schemas.errors import InputError, IntegrityError
from softlabel_schemas.index_reader import IndexReader
from softlabel_schemas.inventory import ClassInventory
from softlabel_schemas.lru import LruCache
from softlabel_schemas.manifest import Manifest
from softlabel_schemas.names import located
from softlabel_schemas.object_store import MAX_DOCUMENT_BYTES, ObjectStore
from softlabel_schemas.read_ahead import read_ahead
from softlabel_schemas.shard import LabelledUtterance, Shard
from softlabel_schemas.shard_reader import ShardReader
from softlabel_schemas.strict import printable
from softlabel_schemas.targets import concatenate, offsets_of
from softlabel_schemas.transfers import undamaged
from softlabel_schemas.utterance_index import Place

# Decoded blocks kept for access by utterance: neighbours are usually asked for next.
_CACHED_BYTES = 64 << 20
# Enough to hide the latency of an object store behind the decoding.
_READ_AHEAD = 4
# Blocks are small: their latency is hidden behind that of the others.
_BLOCKS_AT_ONCE = 16
# Of a shard's bytes: if more are needed, one request for all of them is less than one for each block.
_MOST = 0.5


class SoftLabelDataset:
    """A published dataset; opened with one read, shards are read when asked for. Made by :func:`open_dataset`."""

    def __init__(self, store: ObjectStore, manifest: Manifest, cache: FileCache | None = None) -> None:
        self.store = store
        self.manifest = manifest
        self.shards = ShardReader(store, manifest, cache)
        self._utterance_offsets = offsets_of([shard.num_utterances for shard in manifest.shards])
        self._index = None if manifest.index is None else IndexReader(store, manifest)
        self._decoded_places: LruCache[Place, tuple[Shard, dict[str, int]]] = LruCache(_CACHED_BYTES)

    def __len__(self) -> int:
        """Number of labelled utterances."""
        return int(self._utterance_offsets[-1])

    @property
    def num_shards(self) -> int:
        return len(self.manifest.shards)

    @cached_property
    def inventory(self) -> ClassInventory:
        return undamaged(self.store, self._read_inventory)

    def _read_inventory(self) -> ClassInventory:
        where = self.store.describe(layout.INVENTORY)
        try:
            data = self.store.read(layout.INVENTORY, max_bytes=MAX_DOCUMENT_BYTES)
            inventory = ClassInventory.from_json(data, where=where)
        except (FileNotFoundError, InputError) as error:
            raise IntegrityError(str(error)) from None
        if inventory.digest() != self.manifest.spec.inventory_digest or inventory.to_json() != data:
            raise IntegrityError(f"{where}: not the class inventory that the manifest names")
        return inventory

    def read_shard(self, index: int) -> Shard:
        """Read, check and decode a whole shard.

        Raises:
            IndexError: there is no such shard.
            IntegrityError: a file is missing, is not as it was written, or breaks an invariant.
        """
        return self.shards.read_shard(index)

    def iter_shards(self, indices: Iterable[int] | None = None, *, num_parallel: int = _READ_AHEAD) -> Iterator[Shard]:
        """Decoded shards in the order of ``indices`` (default: all), read ahead by threads.

        At most ``num_parallel`` shards are in memory beside the one that was yielded last, as files or decoded. What is
        wrong with a shard is raised where it would have come. Closing the iterator ends the threads.

        Raises:
            IndexError, IntegrityError, OSError: as :meth:`read_shard`.
        """
        wanted = range(self.num_shards) if indices is None else indices
        for coming in read_ahead(self.read_shard, wanted, num_parallel=num_parallel):
            yield coming.result()

    def __iter__(self) -> Iterator[LabelledUtterance]:
        for shard in self.iter_shards():
            yield from shard

    def __contains__(self, utterance_id: object) -> bool:
        """Whether the dataset has labels of the utterance of this id: as :meth:`shards_of`, without reading labels. What is no
        id is not in it.

        Raises:
            IntegrityError, OSError: the index cannot be read.
        """
        return isinstance(utterance_id, str) and self.shards_of([utterance_id])[utterance_id] is not None

    def __getitem__(self, key: int | str) -> LabelledUtterance:
        """One utterance by index (0 .. len - 1) or id, from its block; neighbours are in memory then.

        Raises:
            IndexError: there is no such index.
            KeyError: there is no such id; says why where it was skipped.
            IntegrityError, OSError: as :meth:`read_shard`.
        """
        if isinstance(key, str):
            return self._by_id(key)
        if not 0 <= key < len(self):
            raise IndexError(f"utterance {key} asked for, the dataset has {len(self)}")
        shard = int(np.searchsorted(self._utterance_offsets, key, side="right")) - 1
        row = key - int(self._utterance_offsets[shard])
        if self._index is None:
            return self._decoded(Place(shard, None))[0][row]
        place, row = self._index.place_of_row(shard, row)
        return self._decoded(place)[0][row]

    def read_utterances(self, utterance_ids: Sequence[str]) -> list[LabelledUtterance]:
        """Utterances in the order of their ids. Each block that holds some is read once, ahead of its use, in order; a shard of
        which most is needed is read as a whole.

        They are copies, so that none keeps its block in memory.

        Raises:
            KeyError: an id is not in the dataset; says so, or why it was skipped.
            IntegrityError, OSError: as :meth:`read_shard`.
        """
        wanted = self._in_pieces(utterance_ids)
        found: dict[str, LabelledUtterance] = {}
        for is_block, num_parallel in ((False, _READ_AHEAD), (True, _BLOCKS_AT_ONCE)):
            places = [place for place in wanted if (place.block is not None) == is_block]
            for place, coming in zip(places, read_ahead(self._read, places, num_parallel=num_parallel), strict=True):
                found.update(_copies(coming.result(), wanted[place]))
        # Those whose keys led to another utterance: two in a million million.
        found.update({each: self._by_id(each) for each in utterance_ids if each not in found})
        return [found[utterance_id] for utterance_id in utterance_ids]

    def shards_of(self, utterance_ids: Sequence[str]) -> dict[str, int | None]:
        """The shard that holds each utterance; None where the dataset has no labels of it. By the index, without reading labels
        (format version 1 has no index, and reads all).

        Raises:
            IntegrityError, OSError: the index cannot be read.
        """
        found: dict[str, int | None] = {}
        for utterance_id, places in self._find(utterance_ids).items():
            # Others can have the same key.
            wanted = [each for each in places if len(places) == 1 or utterance_id in self._decoded(each)[1]]
            found[utterance_id] = wanted[0].shard if wanted else None
        return found

    def _in_pieces(self, utterance_ids: Sequence[str]) -> dict[Place, set[str]]:
        """The ids by what is to be read for them, in the order of the dataset. Raises KeyError for an id that is nowhere."""
        places = self._find(utterance_ids)
        by_block: defaultdict[int, defaultdict[Place, set[str]]] = defaultdict(lambda: defaultdict(set))
        for utterance_id in utterance_ids:
            if not places[utterance_id]:
                raise self._missing(utterance_id)
            first = places[utterance_id][0]
            by_block[first.shard][first].add(utterance_id)
        wanted: dict[Place, set[str]] = {}
        for shard, pieces in sorted(by_block.items()):
            num_bytes = sum(place.block.num_bytes if place.block else math.inf for place in pieces)
            if num_bytes > _MOST * self.manifest.shards[shard].num_bytes:
                wanted[Place(shard, None)] = set().union(*pieces.values())
            else:
                wanted.update(sorted(pieces.items()))
        return wanted

    def _by_id(self, utterance_id: str) -> LabelledUtterance:
        for _, (shard, rows) in self._decoded_places.items():
            if utterance_id in rows:
                return shard[rows[utterance_id]]
        places = self._find([utterance_id]) if self._index is None else {utterance_id: self._index.find(utterance_id)}
        for place in places[utterance_id]:
            shard, rows = self._decoded(place)
            # Another utterance can have the same key.
            if utterance_id in rows:
                return shard[rows[utterance_id]]
        raise self._missing(utterance_id)

    def _find(self, utterance_ids: Sequence[str]) -> dict[str, list[Place]]:
        if self._index is not None:
            return self._index.find_many(utterance_ids)
        shards = self._shard_of_id
        return {each: [Place(shards[each], None)] if each in shards else [] for each in utterance_ids}

    def _missing(self, utterance_id: str) -> KeyError:
        reasons = {entry.utterance_id: entry.reason for entry in self.manifest.skipped}
        why = f"it was skipped: {printable(reasons[utterance_id])}" if utterance_id in reasons else "no such utterance"
        return KeyError(f"{utterance_id}: {why} ({self.store.url})")

    @cached_property
    def _shard_of_id(self) -> dict[str, int]:
        """Format version 1 has no index: every shard is read once, and the first access by id pays for it."""
        return {each: index for index, shard in enumerate(self.iter_shards()) for each in shard.utterance_ids}

    def _decoded(self, place: Place) -> tuple[Shard, dict[str, int]]:
        """What :meth:`_read` gives, kept in memory for a while, and its rows by id."""
        found = self._decoded_places.get(place)
        if found is None:
            shard = self._read(place)
            found = shard, {utterance_id: row for row, utterance_id in enumerate(shard.utterance_ids)}
            self._decoded_places.put(place, found, _num_bytes(shard))
        return found

    def _read(self, place: Place) -> Shard:
        if place.block is None:
            return self.read_shard(place.shard)
        return self.shards.read_block(place.shard, place.block)


def _copies(shard: Shard, utterance_ids: Collection[str]) -> dict[str, LabelledUtterance]:
    """Those of the utterances that the shard or block holds."""
    found = {}
    for row, utterance_id in enumerate(shard.utterance_ids):
        if utterance_id in utterance_ids:
            utterance = shard[row]
            found[utterance_id] = replace(utterance, targets=concatenate([utterance.targets]))
    return found


def _num_bytes(shard: Shard) -> int:
    """About."""
    targets = shard.targets
    return targets.offsets.nbytes + targets.class_ids.nbytes + targets.log_probs.nbytes + targets.tail_mass.nbytes


def open_dataset(
    url: str | Path, storage_options: Mapping[str, Any] | None = None, *, cache: FileCache | None = None
) -> SoftLabelDataset:
    """Open a published dataset on a folder or object storage.

    Args:
        url: or a name, ``PREFIX#NAME:VERSION`` (see ``names.py``); without a version it is the highest.
        cache: keeps the files and blocks of shards that are read on a local disk.

    Raises:
        InputError: nothing is published there; says whether a run was begun. Or there is no such name, or a newer version of
            this package made it.
        IntegrityError: the manifest is damaged, or a name leads to other labels than those it was given to.
    """
    found, record = (url, None) if isinstance(url, Path) else located(url, storage_options)
    store = ObjectStore(found, storage_options)
    try:
        manifest = undamaged(store, lambda: read_manifest(store))
        if record is not None and manifest.content_digest != record.content_digest:
            raise IntegrityError(
                f"{url}: version {record.version} was given to the labels {record.content_digest[:12]}, {store.url} holds "
                f"{manifest.content_digest[:12]}; the dataset was replaced there"
            )
        return SoftLabelDataset(store, manifest, cache)
    except FileNotFoundError:
        begun = store.exists(layout.SPEC)
    hint = (
        "a run was begun there but is not finished: run the same job again to resume it, or see 'teacher-service status'"
        if begun
        else "check the URL"
    )
    raise InputError(f"{store.url} is not a published dataset ({layout.MANIFEST} does not exist); {hint}")
