"""Garbage collection: what attempts that died or lost have left at a destination, told from what anyone may need.

It needs no lock and no pause, beside any number of running jobs, because of one rule of the commit protocol: a commit record
is final and names one folder (FORMAT.md, "Why shards are named by content").

===================================================  ==========================================================
found                                                is
===================================================  ==========================================================
another folder of a shard that has a commit record   garbage at once: a writer that still fills it can only lose
a folder of a shard that has no commit record        kept: a job may be about to commit it, or makes use of it when resumed
a temporary name of a local writer                   garbage after an hour: who still writes it fails once and tries again
an unfinished upload in parts (S3)                   garbage after a day
a bucket of the index that the manifest does not     garbage, beside a manifest; without one kept: a job may be about to
name                                                 publish it, or makes use of it when resumed
whatever a commit record or the manifest names       kept
any name that a dataset does not use                 kept, not even reported
===================================================  ==========================================================
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from softlabel_schemas import layout
from softlabel_schemas.commit import committed_shards, read_commits, read_manifest, read_spec
from softlabel_schemas.errors import IntegrityError
from softlabel_schemas.local_files import TEMPORARY
from softlabel_schemas.manifest import Manifest, ShardRecord, SpecDocument
from softlabel_schemas.object_store import ObjectStore, StoredObject

TEMPORARY_AGE = timedelta(hours=1)
UPLOAD_AGE = timedelta(hours=24)
_LEFTOVER = re.compile(r"^(.+)" + re.escape(TEMPORARY) + r"[0-9a-f]{32}$")
# Commit records in memory at a time.
_RECORDS_AT_ONCE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A folder, a bucket of the index, a temporary file or an unfinished upload, and why it is garbage or is kept.

    Attributes:
        keys: the objects that belong to it.
        num_bytes: of all of them; 0 for an upload, whose size no store tells.
        upload_id: of an unfinished upload, whose only key it is; else None.
    """

    path: str
    reason: str
    keys: tuple[str, ...]
    num_bytes: int
    upload_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    garbage: tuple[Finding, ...]
    kept: tuple[Finding, ...]

    @property
    def num_bytes(self) -> int:
        return sum(finding.num_bytes for finding in self.garbage)


@dataclass(slots=True)
class _Sorter:
    garbage: list[Finding] = field(default_factory=list)
    kept: list[Finding] = field(default_factory=list)


def find_garbage(store: ObjectStore) -> Findings:
    """Look through a destination; nothing is changed.

    Raises:
        InputError: no run was begun there.
        IntegrityError: the spec, the manifest or a commit record that decides is damaged, or the folder that a commit record
            names is not whole: then the other folders of that shard may be all that is left of it.
    """
    document = read_spec(store)
    found = _Sorter()
    # In this order: what a record names was stored before it, so that the listing holds it.
    published = _published(store)
    committed = committed_shards(store) & set(range(document.storage.num_shards))
    objects = store.list("", temporaries=True)
    _sort_folders(found, store, document, published.shards if published else (), committed, objects)
    _sort_buckets(found, published, objects)
    _sort_temporaries(found, store, objects)
    for key, upload_id in store.stale_uploads("", UPLOAD_AGE):
        if layout.is_ours(key):
            reason = "an upload that was never finished, more than a day old"
            found.garbage.append(Finding(path=key, reason=reason, keys=(key,), num_bytes=0, upload_id=upload_id))
    return Findings(garbage=tuple(found.garbage), kept=tuple(found.kept))


def delete_garbage(store: ObjectStore, garbage: Iterable[Finding]) -> None:
    """Delete what :func:`find_garbage` found; what is gone already is passed over."""
    for finding in garbage:
        if finding.upload_id is None:
            store.delete(finding.keys)
        else:
            with suppress(FileNotFoundError):
                store.abort_upload(finding.path, finding.upload_id)


def _published(store: ObjectStore) -> Manifest | None:
    try:
        return read_manifest(store)
    except FileNotFoundError:
        return None


def _sort_folders(
    found: _Sorter,
    store: ObjectStore,
    document: SpecDocument,
    published: Sequence[ShardRecord],
    committed: set[int],
    objects: Mapping[str, StoredObject],
) -> None:
    folders: defaultdict[int, defaultdict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for key in objects:
        place = layout.shard_folder_of(key)
        if place is not None and place[0] < document.storage.num_shards:
            folders[place[0]][place[1]].append(key)

    def finding(folder: str, keys: Sequence[str], reason: str) -> Finding:
        num_bytes = sum(objects[key].num_bytes for key in keys)
        return Finding(path=folder, reason=reason, keys=tuple(keys), num_bytes=num_bytes)

    for index in sorted(folders.keys() - committed):
        reason = f"shard {index} is not committed: a job that runs, or is resumed, makes use of it"
        found.kept += [finding(folder, keys, reason) for folder, keys in sorted(folders[index].items())]
    # A single folder is the one that the record names, or the last there is of a damaged shard.
    doubtful = [index for index in sorted(committed & folders.keys()) if len(folders[index]) > 1]
    for start in range(0, len(doubtful), _RECORDS_AT_ONCE):
        indices = doubtful[start : start + _RECORDS_AT_ONCE]
        for index, commit in zip(indices, read_commits(store, document, indices), strict=True):
            referenced = [commit.shard, *published[index : index + 1]]
            for record in referenced:
                _check_whole(store, record, objects)
            needed = {record.folder for record in referenced}
            reason = f"shard {index} was committed as {commit.shard.folder}"
            others = sorted((folder, keys) for folder, keys in folders[index].items() if folder not in needed)
            found.garbage += [finding(folder, keys, reason) for folder, keys in others]


def _sort_buckets(found: _Sorter, published: Manifest | None, objects: Mapping[str, StoredObject]) -> None:
    """A dataset of format version 1 has no such names: there they would be somebody's objects."""
    if published is not None and published.index is None:
        return
    named: set[str] = set()
    if published is not None:
        table = published.bucket_table()
        named = {layout.index_bucket(bucket, table.sha256(bucket)) for bucket in range(len(table))}
    place, reason = found.garbage, "the manifest names other buckets of the utterance index"
    if published is None:
        place, reason = found.kept, "nothing is published: a job that publishes, or is resumed, makes use of it"
    for key, stored in objects.items():
        if layout.is_index_bucket(key) and key not in named:
            place.append(Finding(path=key, reason=reason, keys=(key,), num_bytes=stored.num_bytes))


def _check_whole(store: ObjectStore, record: ShardRecord, objects: Mapping[str, StoredObject]) -> None:
    for file in record.files:
        key = f"{record.folder}/{file.name}"
        if key not in objects or objects[key].num_bytes != file.num_bytes:
            size = f"has {objects[key].num_bytes} bytes" if key in objects else "is missing"
            raise IntegrityError(
                f"{store.describe(key)} {size}, the record of shard {record.index} says {file.num_bytes} bytes; "
                "nothing was deleted, since another folder of the shard may hold what is left of it"
            )


def _sort_temporaries(found: _Sorter, store: ObjectStore, objects: Mapping[str, StoredObject]) -> None:
    """An object store has no such names: there it would be somebody's object."""
    if not store.is_local:
        return
    now = datetime.now(UTC)
    for key, stored in objects.items():
        match = _LEFTOVER.match(key)
        if match is None or not layout.is_ours(match.group(1)):
            continue
        old = now - stored.modified > TEMPORARY_AGE
        reason = "left by a writer that was killed, more than an hour ago" if old else "less than an hour old"
        place = found.garbage if old else found.kept
        place.append(Finding(path=key, reason=reason, keys=(key,), num_bytes=stored.num_bytes))
