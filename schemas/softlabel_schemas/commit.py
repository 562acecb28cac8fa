"""The commit protocol: begin, commit each shard, publish.

1. ``begin`` puts ``spec.json`` if absent; a destination begun with other settings is refused.
2. ``commit_shard`` puts the shard's files under a folder named by their content, then its commit record if absent.
3. ``publish`` puts the utterance index under names that its content gives, and then ``manifest.json`` if absent, once every
   shard has its record.

Everything written is a function of the spec and the labels, so a retry after a crash or a lost response writes the same
bytes to the same names, and "it exists with my bytes" is success. A record with other bytes means that another writer, on
hardware that rounds differently, was first: its shard stands and ours is garbage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath

from softlabel_schemas import layout
from softlabel_schemas.codec import build_codec
from softlabel_schemas.containers import CONTAINERS
from softlabel_schemas.digest import LabelHash, canonical_json, seal_canonical, sha256_hex
from softlabel_schemas.errors import InputError, IntegrityError
from softlabel_schemas.file_records import FileRecord, FileRecords
from softlabel_schemas.index_builder import IndexBuilder, check_room, put_buckets
from softlabel_schemas.inventory import ClassInventory
from softlabel_schemas.limits import MAX_DECODED_BYTES, MAX_SHARD_BYTES
from softlabel_schemas.manifest import (
    CommitRecord,
    FrameSums,
    Manifest,
    ShardRecord,
    SkippedUtterance,
    SpecDocument,
    from_bytes,
    to_bytes,
)
from softlabel_schemas.object_store import MAX_DOCUMENT_BYTES, ConditionalWriteError, ObjectStore
from softlabel_schemas.plan import ShardRange
from softlabel_schemas.shard import LabelledUtterance, ShardColumns, decode_columns, encode_columns
from softlabel_schemas.shard_blocks import check_index
from softlabel_schemas.spec import check_same_spec
from softlabel_schemas.transfers import undamaged
from softlabel_schemas.utterance_index import ShardIndex

# Writers that create the spec at once to find out whether only one of them does.
_PROVING_WRITERS = 4
COMMITS_AT_ONCE = 256


def begin(store: ObjectStore, document: SpecDocument, inventory: ClassInventory) -> None:
    """Claim a destination, or join a run of the same spec; prove that it creates conditionally.

    Who joins may have another ``on_error``: no label depends on it, and an utterance that cannot be labelled is often found
    when most shards are made.

    Raises:
        InputError: the destination was begun with another spec (every differing field is named), or it cannot create an
            object only if it is absent.
    """
    found = (inventory.digest(), inventory.num_classes)
    expected = (document.spec.inventory_digest, document.spec.num_classes)
    if found != expected:
        raise InputError(f"the class inventory has (digest, classes) {found}, the spec names {expected}")
    claims = _Claims(store)
    try:
        claims.claim(layout.SPEC, to_bytes(document))
        stored = read_spec(store)
        check_same_spec(stored.spec, document.spec, where=store.url)
        storage = document.storage.model_copy(update={"on_error": stored.storage.on_error})
        check_same_spec(stored.storage, storage, where=store.url)
        # What stands there, whose on_error may be another: a server that replaces it changes nothing.
        if not store.last_writer_wins and store.put_if_absent(layout.SPEC, to_bytes(stored)):
            raise ConditionalWriteError.because(store.url, f"it replaced {layout.SPEC}, which was there")
        # The same once more: who joins a run that was killed in between has seen no race yet.
        claims.claim(layout.INVENTORY, inventory.to_json())
    except ConditionalWriteError as error:
        claims.withdraw(error)
        raise
    if _read(store, layout.INVENTORY) != inventory.to_json():
        raise IntegrityError(f"{store.describe(layout.INVENTORY)} is not the class inventory that the spec names")


class _Claims:
    """Objects that ``begin`` creates where they are missing, each from several threads at once: the bytes are the same, so that
    it does no harm, and a server that looks first and then writes is found out. Together with the second creation of the spec,
    this needs no object of its own.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._created: list[str] = []

    def claim(self, key: str, data: bytes) -> None:
        # Looked for first: a server that ignores the condition would replace another run's object.
        if self._store.exists(key):
            return
        if self._store.last_writer_wins:
            self._store.put_if_absent(key, data)
            return
        with ThreadPoolExecutor(max_workers=_PROVING_WRITERS) as pool:
            created = sum(pool.map(lambda _: self._store.put_if_absent(key, data), range(_PROVING_WRITERS)))
        # None, where the response of the one that did was lost and its retry found the object.
        if created:
            self._created.append(key)
        if created > 1:
            raise ConditionalWriteError.because(self._store.url, f"{created} writers created {key} at once")

    def withdraw(self, error: ConditionalWriteError) -> None:
        """Delete what was created: a run that finds the spec would join, and see no race. Says so where that fails."""
        try:
            self._store.delete(self._created)
        except OSError as failure:
            objects = " and ".join(self._store.describe(key) for key in self._created)
            error.args = (f"{error}. Delete {objects} by hand, which could not be done: {failure}",)


def read_spec(store: ObjectStore) -> SpecDocument:
    """Raises InputError where no run was begun or a newer version began it, IntegrityError where the document is damaged."""
    try:
        data = _read(store, layout.SPEC)
    except FileNotFoundError:
        raise InputError(f"{store.url} holds no soft-label run: {layout.SPEC} does not exist") from None
    return from_bytes(SpecDocument, data, where=store.describe(layout.SPEC))


def commit_shard(
    store: ObjectStore,
    document: SpecDocument,
    shard_range: ShardRange,
    utterances: Sequence[LabelledUtterance],
    skipped: Sequence[SkippedUtterance],
) -> CommitRecord:
    """Encode, store and commit one shard; returns the record that stands, ours or an earlier writer's. Raises as
    :func:`encode_shard`, and InputError where the record is larger than one can be.
    """
    files, record = encode_shard(document, shard_range, utterances, skipped)
    return _store(store, document, files, record)


def commit_columns(
    store: ObjectStore,
    document: SpecDocument,
    shard_range: ShardRange,
    encoded: ShardColumns,
    sums: FrameSums,
    skipped: Sequence[SkippedUtterance],
) -> CommitRecord:
    """:func:`commit_shard` for utterances that are encoded already."""
    files, record = _shard_files(document, shard_range, encoded, sums, skipped)
    return _store(store, document, files, record)


def _store(
    store: ObjectStore, document: SpecDocument, files: Mapping[str, bytes], record: CommitRecord
) -> CommitRecord:
    folder, key = record.shard.folder, layout.commit_record(record.shard.index)
    try:
        store.put_many({f"{folder}/{name}": data for name, data in files.items()})
        # Every folder on the way: another job may have made one and not flushed it yet.
        for path in sorted({path for name in files for path in PurePosixPath(folder, name).parents}):
            store.sync("" if path == PurePosixPath() else str(path))
    except FileNotFoundError:
        # Garbage collection removes folders under us that can only lose; anything else is a fault of the disk.
        if not store.exists(key):
            raise
    if not store.put_if_absent(key, to_bytes(record)):
        return _read_commit(_read(store, key), document, record.shard.index, where=store.describe(key))
    return record


def encode_shard(
    document: SpecDocument,
    shard_range: ShardRange,
    utterances: Sequence[LabelledUtterance],
    skipped: Sequence[SkippedUtterance],
) -> tuple[dict[str, bytes], CommitRecord]:
    """The files of a shard by name, and its commit record; nothing is stored.

    Raises:
        InputError: it is larger than a shard can be.
        ValueError: the targets break an invariant; names the utterance.
        IntegrityError: what was encoded does not decode to valid targets.
    """
    frames = [u.targets.num_frames for u in utterances]
    labelled = [0 if u.stats.agreement != u.stats.agreement else n for u, n in zip(utterances, frames, strict=True)]
    sums = FrameSums(
        kept_mass=sum(u.stats.kept_mass * n for u, n in zip(utterances, frames, strict=True)),
        entropy=sum(u.stats.entropy * n for u, n in zip(utterances, frames, strict=True)),
        agreement=sum(u.stats.agreement * n for u, n in zip(utterances, labelled, strict=True) if n),
        num_labelled_frames=sum(labelled),
    )
    columns = encode_columns(utterances, build_codec(document.spec))
    return _shard_files(document, shard_range, columns, sums, skipped)


def _shard_files(
    document: SpecDocument,
    shard_range: ShardRange,
    encoded: ShardColumns,
    sums: FrameSums,
    skipped: Sequence[SkippedUtterance],
) -> tuple[dict[str, bytes], CommitRecord]:
    codec, container = build_codec(document.spec), CONTAINERS[document.storage.shard_format]
    where = f"shard {shard_range.index}"
    _check_size(sum(len(data) for data, _ in encoded.streams.values()), MAX_DECODED_BYTES, "its streams have", where)
    files = container.encode(encoded, codec.zstd_level)
    _check_size(sum(map(len, files.values())), MAX_SHARD_BYTES, "its files have", where)
    # Read back what is about to be stored: a label that cannot be read never gets a commit record.
    columns = container.decode(files, codec.streams, where=where)
    shard = decode_columns(columns, codec, where=where)
    index = ShardIndex.of(shard.utterance_ids, container.blocks(files), files)
    check_index(index, columns, files, container, where=where)
    records = FileRecords.of(
        [FileRecord(name=name, num_bytes=len(data), sha256=sha256_hex(data)) for name, data in sorted(files.items())]
    )
    record = CommitRecord(
        fingerprint=document.spec.fingerprint(),
        shard=ShardRecord(
            index=shard_range.index,
            first_row=shard_range.first_row,
            num_rows=shard_range.num_rows,
            num_utterances=len(shard),
            num_frames=shard.targets.num_frames,
            num_entries=shard.targets.num_entries,
            sums=sums,
            skipped=tuple(skipped),
            files=records,
        ),
        label_hash=shard.label_hash().to_base64(),
        index=index.to_base64() if document.spec.format_version >= 2 else None,
    )
    return files, record


def _check_size(num_bytes: int, at_most: int, what: str, where: str) -> None:
    """Raises InputError: a shard that no reader would take is no fault of the machine that made it."""
    if num_bytes > at_most:
        raise InputError(
            f"{where}: {what} {num_bytes} bytes together, expected at most {at_most}; set a smaller "
            "destination.shard_seconds"
        )


def committed_shards(store: ObjectStore) -> set[int]:
    """Indices of the shards that have a commit record; one listing."""
    indices = (layout.shard_index_of(key) for key in store.list(layout.COMMITS))
    return {index for index in indices if index is not None}


def read_published_commits(store: ObjectStore, manifest: Manifest, indices: Sequence[int]) -> list[CommitRecord]:
    """As :func:`read_commits`, of a dataset that is published; raises IntegrityError also where the manifest says something
    else of a shard than its record."""
    document = SpecDocument(spec=manifest.spec, storage=manifest.storage)
    commits = undamaged(store, lambda: read_commits(store, document, indices))
    for index, commit in zip(indices, commits, strict=True):
        if commit.shard != manifest.shards[index]:
            raise IntegrityError(f"{layout.commit_record(index)} does not match the manifest's record of shard {index}")
    return commits


def read_commits(store: ObjectStore, document: SpecDocument, indices: Sequence[int]) -> list[CommitRecord]:
    """Raises IntegrityError for a damaged record and for one that is not of this spec or shard."""
    keys = [layout.commit_record(index) for index in indices]
    return [
        _read_commit(data, document, index, where=store.describe(key))
        for index, key, data in zip(
            indices, keys, store.read_many(keys, max_bytes=[MAX_DOCUMENT_BYTES] * len(keys)), strict=True
        )
    ]


def _read_commit(data: bytes, document: SpecDocument, index: int, *, where: str) -> CommitRecord:
    record = from_bytes(CommitRecord, data, where=where)
    if (record.fingerprint, record.shard.index) != (document.spec.fingerprint(), index):
        raise IntegrityError(
            f"{where}: is of shard {record.shard.index} with fingerprint {record.fingerprint[:12]}, "
            f"expected shard {index} with {document.spec.fingerprint()[:12]}"
        )
    if (record.index is None) != (document.spec.format_version == 1):
        raise IntegrityError(f"{where}: an index of the shard belongs to format version 2, and version 2 has one")
    return record


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What a writer needs to know of the manifest; readers open it.

    Attributes:
        first_reason: why the first of the skipped utterances was; None where none was.
    """

    content_digest: str
    num_skipped: int
    first_reason: str | None


def publish(
    store: ObjectStore, document: SpecDocument, *, check: Callable[[int], None] = lambda _num_skipped: None
) -> Published:
    """Write the manifest, once every shard is committed; publishing again changes nothing.

    The manifest is put together from the canonical JSON of one record after the other, so that few of them are in memory as
    objects. The utterance index is sorted on the disk of temporary files.

    Args:
        check: told the number of skipped utterances before the manifest is created; what it raises ends the publication.

    Raises:
        InputError: shards are missing (says how many and the first), there is no room to sort the index, or the manifest is
            larger than one can be.
        IntegrityError: a commit record is damaged, or another manifest was published from the same spec.
    """
    wanted = range(document.storage.num_shards)
    missing = sorted(set(wanted) - committed_shards(store))
    if missing:
        raise InputError(
            f"{store.url} cannot be published: {len(missing)} of {len(wanted)} shards are not committed, "
            f"the first is shard {missing[0]}; run the job again to make them"
        )
    check_room(document.storage.num_rows)
    with IndexBuilder(document.storage.num_rows) as index:
        # As the run was begun, which who joined it may have done with another ``on_error``.
        return _publish_committed(store, read_spec(store), index, check)


def _publish_committed(
    store: ObjectStore, document: SpecDocument, index: IndexBuilder, check: Callable[[int], None]
) -> Published:
    wanted = range(document.storage.num_shards)
    label_hash, pieces = LabelHash(), []
    num_skipped, next_row, first_reason = 0, 0, None
    for start in range(0, len(wanted), COMMITS_AT_ONCE):
        for commit in read_commits(store, document, wanted[start : start + COMMITS_AT_ONCE]):
            shard = commit.shard
            if shard.first_row != next_row:
                raise IntegrityError(
                    f"{store.describe(layout.commit_record(shard.index))}: the shard begins at row {shard.first_row}, "
                    f"expected {next_row}"
                )
            next_row += shard.num_rows
            label_hash.update(LabelHash.from_base64(commit.label_hash))
            if commit.index is not None:
                index.add(shard.index, commit.shard_index())
            num_skipped += len(shard.skipped)
            if first_reason is None and shard.skipped:
                first_reason = shard.skipped[0].reason
            pieces.append(canonical_json(shard.model_dump(mode="json")))
    if next_row != document.storage.num_rows:
        raise IntegrityError(
            f"{store.url}: the shards cover {next_row} rows, the spec says {document.storage.num_rows}"
        )
    check(num_skipped)
    fields = {
        "content_digest": canonical_json(label_hash.hexdigest()),
        "fingerprint": canonical_json(document.spec.fingerprint()),
        "shards": b"[" + b",".join(pieces) + b"]",
        "spec": canonical_json(document.spec.fields()),
        "storage": canonical_json(document.storage.model_dump(mode="json")),
    }
    if document.spec.format_version >= 2:
        fields["index"] = canonical_json(put_buckets(store, index).to_base64())
    pieces.clear()
    data = seal_canonical(
        b"{" + b",".join(canonical_json(name) + b":" + fields.pop(name) for name in sorted(fields)) + b"}"
    )
    # What stands has these bytes or is another manifest: documents have one form.
    if not store.put_if_absent(layout.MANIFEST, data) and _read(store, layout.MANIFEST) != data:
        raise IntegrityError(f"{store.describe(layout.MANIFEST)} is not the manifest of its commit records")
    return Published(content_digest=label_hash.hexdigest(), num_skipped=num_skipped, first_reason=first_reason)


def read_manifest(store: ObjectStore) -> Manifest:
    """Raises FileNotFoundError where none is published, IntegrityError where it is damaged, InputError where it is of a newer
    format version.
    """
    return from_bytes(Manifest, _read(store, layout.MANIFEST), where=store.describe(layout.MANIFEST))


def _read(store: ObjectStore, key: str) -> bytes:
    return store.read(key, max_bytes=MAX_DOCUMENT_BYTES)
