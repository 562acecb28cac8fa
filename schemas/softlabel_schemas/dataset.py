"""Open, read and verify a published dataset.

>>> dataset = open_dataset("s3://bucket/labels")               # doctest: +SKIP
>>> dataset["utterance-17"].targets.top1_T()                   # doctest: +SKIP
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from softlabel_schemas import layout
from softlabel_schemas.codec import build_codec
from softlabel_schemas.commit import read_commits, read_manifest, read_spec
from softlabel_schemas.containers import CONTAINERS
from softlabel_schemas.digest import LabelHash, sha256_hex
from softlabel_schemas.errors import InputError, IntegrityError
from softlabel_schemas.inventory import ClassInventory
from softlabel_schemas.manifest import Manifest, ShardRecord, SpecDocument
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.shard import LabelledUtterance, Shard, decode_columns
from softlabel_schemas.targets import offsets_of

# Decoded shards kept for access by utterance: neighbours are usually asked for next.
_CACHED_SHARDS = 2


class SoftLabelDataset:
    """A published dataset; opened with one read, shards are read when asked for. Made by :func:`open_dataset`."""

    def __init__(self, store: ObjectStore, manifest: Manifest) -> None:
        self.store = store
        self.manifest = manifest
        self._codec = build_codec(manifest.spec)
        self._utterance_offsets = offsets_of([shard.num_utterances for shard in manifest.shards])
        self._cache: OrderedDict[int, Shard] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Number of labelled utterances."""
        return int(self._utterance_offsets[-1])

    @property
    def num_shards(self) -> int:
        return len(self.manifest.shards)

    @cached_property
    def inventory(self) -> ClassInventory:
        where = self.store.describe(layout.INVENTORY)
        try:
            data = self.store.read(layout.INVENTORY)
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
        if not 0 <= index < self.num_shards:
            raise IndexError(f"shard {index} asked for, the dataset has {self.num_shards}")
        record = self.manifest.shards[index]
        where = f"{self.store.describe(record.folder)} (shard {index})"
        files = self._read_files(record, where)
        columns = CONTAINERS[self.manifest.storage.shard_format].decode(files, where=where)
        shard = decode_columns(columns, self._codec, where=where)
        found = (len(shard), shard.targets.num_frames, shard.targets.num_entries)
        expected = (record.num_utterances, record.num_frames, record.num_entries)
        if found != expected:
            raise IntegrityError(f"{where}: (utterances, frames, entries) are {found}, its record says {expected}")
        return shard

    def _read_files(self, record: ShardRecord, where: str) -> dict[str, bytes]:
        try:
            contents = self.store.read_many([f"{record.folder}/{file.name}" for file in record.files])
        except FileNotFoundError as error:
            raise IntegrityError(f"{where}: a file is missing: {error}") from None
        for file, data in zip(record.files, contents, strict=True):
            if len(data) != file.num_bytes or sha256_hex(data) != file.sha256:
                raise IntegrityError(
                    f"{where}: {file.name} was changed after writing: expected {file.num_bytes} bytes with sha256 "
                    f"{file.sha256}, found {len(data)} with {sha256_hex(data)}"
                )
        return {file.name: data for file, data in zip(record.files, contents, strict=True)}

    def __iter__(self) -> Iterator[LabelledUtterance]:
        for index in range(self.num_shards):
            yield from self.read_shard(index)

    def __getitem__(self, key: int | str) -> LabelledUtterance:
        """One utterance by index (0 .. len - 1) or id. Raises IndexError or KeyError."""
        index = self._index_of(key) if isinstance(key, str) else key
        if not 0 <= index < len(self):
            raise IndexError(f"utterance {index} asked for, the dataset has {len(self)}")
        shard_index = int(np.searchsorted(self._utterance_offsets, index, side="right")) - 1
        return self._cached_shard(shard_index)[index - int(self._utterance_offsets[shard_index])]

    def _cached_shard(self, index: int) -> Shard:
        with self._lock:
            if index in self._cache:
                self._cache.move_to_end(index)
                return self._cache[index]
        shard = self.read_shard(index)
        with self._lock:
            self._cache[index] = shard
            while len(self._cache) > _CACHED_SHARDS:
                self._cache.popitem(last=False)
        return shard

    def _index_of(self, utterance_id: str) -> int:
        if utterance_id not in self._indices:
            reasons = {entry.utterance_id: entry.reason for entry in self.manifest.skipped}
            why = f"it was skipped: {reasons[utterance_id]}" if utterance_id in reasons else "no such utterance"
            raise KeyError(f"{utterance_id}: {why} ({self.store.url})")
        return self._indices[utterance_id]

    @cached_property
    def _indices(self) -> dict[str, int]:
        """Reads every shard once; the first access by id pays for it."""
        return {utterance.utterance_id: index for index, utterance in enumerate(self)}


def open_dataset(url: str | Path, storage_options: Mapping[str, Any] | None = None) -> SoftLabelDataset:
    """Open a published dataset on a folder or any fsspec URL.

    Raises:
        InputError: nothing is published there; says whether a run was begun.
        IntegrityError: the manifest is damaged.
    """
    store = ObjectStore(url, storage_options)
    try:
        return SoftLabelDataset(store, read_manifest(store))
    except FileNotFoundError:
        begun = store.exists(layout.SPEC)
    hint = (
        "a run was begun there but is not finished: run the same job again to resume it, or see 'teacher-service status'"
        if begun
        else "check the URL"
    )
    raise InputError(f"{store.url} is not a published dataset ({layout.MANIFEST} does not exist); {hint}")


def verify(dataset: SoftLabelDataset) -> Iterator[tuple[int | None, str]]:
    """Check every byte and every invariant; yields ``(shard index, problem)``, None for the dataset as a whole.

    After each good shard it yields ``(shard index, "")``, so that a caller can show progress.
    """
    manifest, store = dataset.manifest, dataset.store
    document = SpecDocument(spec=manifest.spec, storage=manifest.storage)
    try:
        if read_spec(store) != document:
            yield None, f"{store.describe(layout.SPEC)}: is not the spec in the manifest"
        num_classes = dataset.inventory.num_classes
        if num_classes != manifest.spec.num_classes:
            yield None, f"the inventory has {num_classes} classes, the spec {manifest.spec.num_classes}"
    except (InputError, IntegrityError, FileNotFoundError) as error:
        yield None, str(error)
    content, all_good = LabelHash(), True
    seen: set[str] = set()
    for index in range(dataset.num_shards):
        try:
            content.update(_verify_shard(dataset, document, index, seen))
            yield index, ""
        except (IntegrityError, FileNotFoundError) as error:
            all_good = False
            yield index, str(error)
    if all_good and content.hexdigest() != manifest.content_digest:
        yield None, f"content digest is {content.hexdigest()}, the manifest says {manifest.content_digest}"


def _verify_shard(dataset: SoftLabelDataset, document: SpecDocument, index: int, seen: set[str]) -> LabelHash:
    """The shard's label hash; ``seen`` collects the utterance ids of the dataset."""
    commit = read_commits(dataset.store, document, [index])[0]
    if commit.shard != dataset.manifest.shards[index]:
        raise IntegrityError(f"{layout.commit_record(index)} does not match the manifest's record of shard {index}")
    label_hash, shard = LabelHash(), dataset.read_shard(index)
    repeated = seen.intersection(shard.utterance_ids)
    if repeated:
        raise IntegrityError(f"shard {index}: utterance {min(repeated)} is in an earlier shard too")
    seen.update(shard.utterance_ids)
    for digest in shard.label_digests():
        label_hash.add_utterance(digest)
    if label_hash.to_base64() != commit.label_hash:
        raise IntegrityError(f"shard {index}: its labels are not those that were committed")
    return label_hash
