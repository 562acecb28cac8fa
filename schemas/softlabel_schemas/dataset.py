"""Open, read and verify a published dataset.

>>> dataset = open_dataset("s3://bucket/labels")               # doctest: +SKIP
>>> dataset["utterance-17"].targets.top1_T()                   # doctest: +SKIP
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from softlabel_schemas import layout
from softlabel_schemas.cache import FileCache
from softlabel_schemas.codec import build_codec
from softlabel_schemas.commit import read_commits, read_manifest, read_spec
from softlabel_schemas.containers import CONTAINERS
from softlabel_schemas.digest import LabelHash, sha256_hex
from softlabel_schemas.errors import InputError, IntegrityError
from softlabel_schemas.inventory import ClassInventory
from softlabel_schemas.manifest import FileRecord, Manifest, ShardRecord, SpecDocument
from softlabel_schemas.object_store import MAX_DOCUMENT_BYTES, ObjectStore
from softlabel_schemas.read_ahead import read_ahead
from softlabel_schemas.shard import LabelledUtterance, Shard, decode_columns
from softlabel_schemas.strict import printable
from softlabel_schemas.targets import concatenate, offsets_of

# Decoded shards kept for access by utterance: neighbours are usually asked for next.
_CACHED_SHARDS = 2
# Enough to hide the latency of an object store behind the decoding.
_READ_AHEAD = 4

ResultT = TypeVar("ResultT")


class SoftLabelDataset:
    """A published dataset; opened with one read, shards are read when asked for. Made by :func:`open_dataset`."""

    def __init__(self, store: ObjectStore, manifest: Manifest, cache: FileCache | None = None) -> None:
        self.store = store
        self.manifest = manifest
        self._files = cache
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
        return _undamaged(self.store, self._read_inventory)

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
        if not 0 <= index < self.num_shards:
            raise IndexError(f"shard {index} asked for, the dataset has {self.num_shards}")
        record = self.manifest.shards[index]
        where = f"{self.store.describe(record.folder)} (shard {index})"
        files = self._read_files(record, where)
        columns = CONTAINERS[self.manifest.storage.shard_format].decode(files, self._codec.streams, where=where)
        shard = decode_columns(columns, self._codec, where=where)
        found = (len(shard), shard.targets.num_frames, shard.targets.num_entries)
        expected = (record.num_utterances, record.num_frames, record.num_entries)
        if found != expected:
            raise IntegrityError(f"{where}: (utterances, frames, entries) are {found}, its record says {expected}")
        return shard

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

    def _read_files(self, record: ShardRecord, where: str) -> dict[str, bytes]:
        """The shard's files, each as it was written; from the cache where it has them."""
        found = {}
        if self._files is not None:
            for file in record.files:
                data = self._files.get(file.sha256, file.num_bytes)
                if data is not None:
                    found[file.name] = data
        missing = [file for file in record.files if file.name not in found]
        keys = [f"{record.folder}/{file.name}" for file in missing]
        try:
            fetched = self.store.read_many(keys, max_bytes=[file.num_bytes for file in missing])
            for file, key, data in zip(missing, keys, fetched, strict=True):
                found[file.name] = data
                if not self.store.is_local and not _is_as_written(data, file):
                    # A transfer can be damaged; what is stored stays so.
                    found[file.name] = self.store.read(key, max_bytes=file.num_bytes)
        except FileNotFoundError as error:
            raise IntegrityError(f"{where}: a file is missing: {error}") from None
        except IntegrityError as error:
            raise IntegrityError(f"{where}: a file was changed after writing: {error}") from None
        for file in missing:
            data = found[file.name]
            if not _is_as_written(data, file):
                raise IntegrityError(
                    f"{where}: {file.name} was changed after writing: expected {file.num_bytes} bytes with sha256 "
                    f"{file.sha256}, found {len(data)} with {sha256_hex(data)}"
                )
            if self._files is not None:
                self._files.put(file.sha256, data)
        return {file.name: found[file.name] for file in record.files}

    def __iter__(self) -> Iterator[LabelledUtterance]:
        for shard in self.iter_shards():
            yield from shard

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

    def read_utterances(self, utterance_ids: Sequence[str]) -> list[LabelledUtterance]:
        """Utterances in the order of their ids; each shard that holds some is read once, ahead of its use, in order.

        They are copies, so that none keeps its shard in memory.

        Raises:
            KeyError: an id is not in the dataset; says so, or why it was skipped.
            IntegrityError, OSError: as :meth:`read_shard`.
        """
        indices = np.array([self._index_of(utterance_id) for utterance_id in utterance_ids], dtype=np.int64)
        shard_of = np.searchsorted(self._utterance_offsets, indices, side="right") - 1
        within = indices - self._utterance_offsets[shard_of]
        found: dict[int, LabelledUtterance] = {}
        needed = np.unique(shard_of).tolist()
        for shard_index, shard in zip(needed, self.iter_shards(needed), strict=True):
            for position in np.flatnonzero(shard_of == shard_index).tolist():
                utterance = shard[int(within[position])]
                found[position] = replace(utterance, targets=concatenate([utterance.targets]))
        return [found[position] for position in range(len(utterance_ids))]

    def _index_of(self, utterance_id: str) -> int:
        if utterance_id not in self._indices:
            reasons = {entry.utterance_id: entry.reason for entry in self.manifest.skipped}
            why = (
                f"it was skipped: {printable(reasons[utterance_id])}"
                if utterance_id in reasons
                else "no such utterance"
            )
            raise KeyError(f"{utterance_id}: {why} ({self.store.url})")
        return self._indices[utterance_id]

    @cached_property
    def _indices(self) -> dict[str, int]:
        """Reads every shard once; the first access by id pays for it."""
        return {utterance.utterance_id: index for index, utterance in enumerate(self)}


def _is_as_written(data: bytes, file: FileRecord) -> bool:
    return len(data) == file.num_bytes and sha256_hex(data) == file.sha256


def _undamaged(store: ObjectStore, read: Callable[[], ResultT]) -> ResultT:
    """``read()``, once more where it finds damage and a transfer may have done it."""
    try:
        return read()
    except IntegrityError:
        if store.is_local:
            raise
    return read()


def open_dataset(
    url: str | Path, storage_options: Mapping[str, Any] | None = None, *, cache: FileCache | None = None
) -> SoftLabelDataset:
    """Open a published dataset on a folder or any fsspec URL.

    Args:
        cache: keeps the files of shards that are read on a local disk.

    Raises:
        InputError: nothing is published there; says whether a run was begun.
        IntegrityError: the manifest is damaged.
    """
    store = ObjectStore(url, storage_options)
    try:
        return SoftLabelDataset(store, _undamaged(store, lambda: read_manifest(store)), cache)
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

    After each good shard it yields ``(shard index, "")``, so that a caller can show progress. It holds a few shards at a time.
    """
    yield from ((None, problem) for problem in _verify_documents(dataset))
    content, all_good = LabelHash(), True
    seen: set[str] = set()
    shards = range(dataset.num_shards)
    checks = read_ahead(lambda index: _verify_shard(dataset, index), shards, num_parallel=_READ_AHEAD)
    for index, coming in zip(shards, checks, strict=True):
        try:
            label_hash, utterance_ids = coming.result()
        except (IntegrityError, FileNotFoundError) as error:
            all_good = False
            yield index, str(error)
            continue
        repeated = seen.intersection(utterance_ids)
        seen.update(utterance_ids)
        if repeated:
            all_good = False
            yield index, f"shard {index}: utterance {printable(min(repeated))} is in an earlier shard too"
            continue
        content.update(label_hash)
        yield index, ""
    if all_good and content.hexdigest() != dataset.manifest.content_digest:
        yield None, f"content digest is {content.hexdigest()}, the manifest says {dataset.manifest.content_digest}"


def _verify_documents(dataset: SoftLabelDataset) -> Iterator[str]:
    manifest, store = dataset.manifest, dataset.store
    try:
        if _undamaged(store, lambda: read_spec(store)) != SpecDocument(spec=manifest.spec, storage=manifest.storage):
            yield f"{store.describe(layout.SPEC)}: is not the spec in the manifest"
    except (InputError, IntegrityError) as error:
        yield str(error)
    try:
        num_classes = dataset.inventory.num_classes
        if num_classes != manifest.spec.num_classes:
            yield f"the inventory has {num_classes} classes, the spec {manifest.spec.num_classes}"
    except IntegrityError as error:
        yield str(error)


def _verify_shard(dataset: SoftLabelDataset, index: int) -> tuple[LabelHash, tuple[str, ...]]:
    """The shard's label hash and utterance ids; all of the shard itself is checked."""
    manifest, store = dataset.manifest, dataset.store
    document = SpecDocument(spec=manifest.spec, storage=manifest.storage)
    commit = _undamaged(store, lambda: read_commits(store, document, [index])[0])
    if commit.shard != manifest.shards[index]:
        raise IntegrityError(f"{layout.commit_record(index)} does not match the manifest's record of shard {index}")
    label_hash, shard = LabelHash(), dataset.read_shard(index)
    for digest in shard.label_digests():
        label_hash.add_utterance(digest)
    if label_hash.to_base64() != commit.label_hash:
        raise IntegrityError(f"shard {index}: its labels are not those that were committed")
    return label_hash, shard.utterance_ids
