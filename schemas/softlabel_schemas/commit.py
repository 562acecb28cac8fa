"""The commit protocol: begin, commit each shard, publish.

1. ``begin`` puts ``spec.json`` if absent; a destination begun with other settings is refused.
2. ``commit_shard`` puts the shard's files under a folder named by their content, then its commit record if absent.
3. ``publish`` puts ``manifest.json`` if absent, once every shard has its record.

Everything written is a function of the spec and the labels, so a retry after a crash or a lost response writes the same
bytes to the same names, and "it exists with my bytes" is success. A record with other bytes means that another writer, on
hardware that rounds differently, was first: its shard stands and ours is garbage.
"""

from __future__ import annotations

from collections.abc import Sequence

from softlabel_schemas import layout
from softlabel_schemas.codec import build_codec
from softlabel_schemas.containers import CONTAINERS
from softlabel_schemas.digest import LabelHash, sha256_hex
from softlabel_schemas.errors import InputError, IntegrityError
from softlabel_schemas.inventory import ClassInventory
from softlabel_schemas.manifest import (
    CommitRecord,
    FileRecord,
    FrameSums,
    Manifest,
    ShardRecord,
    SkippedUtterance,
    SpecDocument,
    from_bytes,
    shard_digest,
    to_bytes,
)
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.plan import ShardRange
from softlabel_schemas.shard import LabelledUtterance, decode_columns, encode_columns
from softlabel_schemas.spec import check_same_spec


def begin(store: ObjectStore, document: SpecDocument, inventory: ClassInventory) -> None:
    """Claim a destination, or join a run of the same spec.

    Raises:
        InputError: the destination was begun with another spec; every differing field is named.
    """
    found = (inventory.digest(), inventory.num_classes)
    expected = (document.spec.inventory_digest, document.spec.num_classes)
    if found != expected:
        raise InputError(f"the class inventory has (digest, classes) {found}, the spec names {expected}")
    data = to_bytes(document)
    if not store.put_if_absent(layout.SPEC, data):
        stored = read_spec(store)
        check_same_spec(stored.spec, document.spec, where=store.url)
        check_same_spec(stored.storage, document.storage, where=store.url)
    if not store.put_if_absent(layout.INVENTORY, inventory.to_json()) and (
        store.read(layout.INVENTORY) != inventory.to_json()
    ):
        raise IntegrityError(f"{store.describe(layout.INVENTORY)} is not the class inventory that the spec names")


def read_spec(store: ObjectStore) -> SpecDocument:
    """Raises InputError where no run was begun, IntegrityError where the document is damaged."""
    try:
        data = store.read(layout.SPEC)
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
    """Encode, store and commit one shard; returns the record that stands, ours or an earlier writer's.

    Raises:
        ValueError: the targets break an invariant; names the utterance.
        IntegrityError: what was encoded does not decode to valid targets.
    """
    codec, container = build_codec(document.spec), CONTAINERS[document.storage.shard_format]
    where = f"shard {shard_range.index}"
    files = container.encode(encode_columns(utterances, codec))
    # Read back what is about to be stored: a label that cannot be read never gets a commit record.
    shard = decode_columns(container.decode(files, where=where), codec, where=where)
    label_hash = LabelHash()
    for digest in shard.label_digests():
        label_hash.add_utterance(digest)
    records = tuple(
        FileRecord(name=name, num_bytes=len(data), sha256=sha256_hex(data)) for name, data in sorted(files.items())
    )
    frames = [u.targets.num_frames for u in utterances]
    labelled = [0 if u.stats.agreement != u.stats.agreement else n for u, n in zip(utterances, frames, strict=True)]
    record = CommitRecord(
        fingerprint=document.spec.fingerprint(),
        shard=ShardRecord(
            index=shard_range.index,
            first_row=shard_range.first_row,
            num_rows=shard_range.num_rows,
            num_utterances=len(utterances),
            num_frames=shard.targets.num_frames,
            num_entries=shard.targets.num_entries,
            sums=FrameSums(
                kept_mass=sum(u.stats.kept_mass * n for u, n in zip(utterances, frames, strict=True)),
                entropy=sum(u.stats.entropy * n for u, n in zip(utterances, frames, strict=True)),
                agreement=sum(u.stats.agreement * n for u, n in zip(utterances, labelled, strict=True) if n),
                num_labelled_frames=sum(labelled),
            ),
            skipped=tuple(skipped),
            files=records,
        ),
        label_hash=label_hash.to_base64(),
    )
    folder = layout.shard_folder(shard_range.index, shard_digest(records))
    for name, data in sorted(files.items()):
        store.put(f"{folder}/{name}", data)
    for subfolder in sorted({f"{folder}/{name}".rpartition("/")[0] for name in files}):
        store.sync(subfolder)
    key = layout.commit_record(shard_range.index)
    if not store.put_if_absent(key, to_bytes(record)):
        return _read_commit(store.read(key), document, shard_range.index, where=store.describe(key))
    return record


def committed_shards(store: ObjectStore) -> set[int]:
    """Indices of the shards that have a commit record; one listing."""
    indices = (layout.shard_index_of(key) for key in store.list(layout.COMMITS))
    return {index for index in indices if index is not None}


def read_commits(store: ObjectStore, document: SpecDocument, indices: Sequence[int]) -> list[CommitRecord]:
    """Raises IntegrityError for a damaged record and for one that is not of this spec or shard."""
    keys = [layout.commit_record(index) for index in indices]
    return [
        _read_commit(data, document, index, where=store.describe(key))
        for index, key, data in zip(indices, keys, store.read_many(keys), strict=True)
    ]


def _read_commit(data: bytes, document: SpecDocument, index: int, *, where: str) -> CommitRecord:
    record = from_bytes(CommitRecord, data, where=where)
    if (record.fingerprint, record.shard.index) != (document.spec.fingerprint(), index):
        raise IntegrityError(
            f"{where}: is of shard {record.shard.index} with fingerprint {record.fingerprint[:12]}, "
            f"expected shard {index} with {document.spec.fingerprint()[:12]}"
        )
    return record


def publish(store: ObjectStore, document: SpecDocument) -> Manifest:
    """Write the manifest, once every shard is committed; publishing again returns the one that stands.

    Raises:
        InputError: shards are missing; says how many and the first few.
        IntegrityError: a commit record is damaged, or another manifest was published from the same spec.
    """
    wanted = range(document.storage.num_shards)
    missing = sorted(set(wanted) - committed_shards(store))
    if missing:
        raise InputError(
            f"{store.url} cannot be published: {len(missing)} of {len(wanted)} shards are not committed, "
            f"the first is shard {missing[0]}; run the job again to make them"
        )
    commits = read_commits(store, document, list(wanted))
    label_hash = LabelHash()
    for commit in commits:
        label_hash.update(LabelHash.from_base64(commit.label_hash))
    manifest = Manifest(
        fingerprint=document.spec.fingerprint(),
        content_digest=label_hash.hexdigest(),
        spec=document.spec,
        storage=document.storage,
        shards=tuple(commit.shard for commit in commits),
    )
    if not store.put_if_absent(layout.MANIFEST, to_bytes(manifest)):
        stored = read_manifest(store)
        if stored != manifest:
            raise IntegrityError(f"{store.describe(layout.MANIFEST)} is not the manifest of its commit records")
    return manifest


def read_manifest(store: ObjectStore) -> Manifest:
    """Raises FileNotFoundError where none is published, IntegrityError where it is damaged."""
    return from_bytes(Manifest, store.read(layout.MANIFEST), where=store.describe(layout.MANIFEST))
