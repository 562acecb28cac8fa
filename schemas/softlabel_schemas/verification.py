"""Verify a published dataset: every byte and every invariant."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa

from softlabel_schemas import layout
from softlabel_schemas.commit import read_published_commits, read_spec
from softlabel_schemas.containers import CONTAINERS
from softlabel_schemas.dataset import SoftLabelDataset
from softlabel_schemas.digest import LabelHash, sha256_hex
from softlabel_schemas.errors import InputError, IntegrityError
from softlabel_schemas.index_builder import IndexBuilder
from softlabel_schemas.manifest import SpecDocument
from softlabel_schemas.read_ahead import read_ahead
from softlabel_schemas.shard_blocks import check_index
from softlabel_schemas.strict import printable
from softlabel_schemas.transfers import undamaged
from softlabel_schemas.unique_ids import UniqueIds
from softlabel_schemas.utterance_index import ShardIndex

_READ_AHEAD = 4
_BUCKETS_AT_ONCE = 16


def verify(dataset: SoftLabelDataset) -> Iterator[tuple[int | None, str]]:
    """Check every byte and every invariant; yields ``(shard index, problem)``, None for the dataset as a whole.

    After each good shard it yields ``(shard index, "")``, so that a caller can show progress. It holds a few shards at a time;
    the utterance index is made once more, and ids are compared, on the disk of temporary files.
    """
    with IndexBuilder(dataset.manifest.storage.num_rows) as index, UniqueIds() as ids:
        yield from _verify(dataset, index, ids)


def _verify(dataset: SoftLabelDataset, made: IndexBuilder, ids: UniqueIds) -> Iterator[tuple[int | None, str]]:
    yield from ((None, problem) for problem in _verify_documents(dataset))
    content, good = LabelHash(), list[int]()
    shards = range(dataset.num_shards)
    checks = read_ahead(lambda index: _verify_shard(dataset, index), shards, num_parallel=_READ_AHEAD)
    for index, coming in zip(shards, checks, strict=True):
        try:
            label_hash, utterance_ids, shard_index = coming.result()
        except (IntegrityError, FileNotFoundError) as error:
            yield index, str(error)
            continue
        good.append(index)
        ids.add(_column(utterance_ids))
        content.update(label_hash)
        if shard_index is not None:
            made.add(index, shard_index)
        yield index, ""
    all_good = len(good) == dataset.num_shards
    # Shards are read once more only where a hash was met twice.
    repeated = ids.first_repeated(_column(dataset.read_shard(index).utterance_ids) for index in good)
    if repeated is not None:
        all_good = False
        yield None, f"utterance {printable(repeated[0])} is there {repeated[1]} times, in different shards"
    yield from ((None, problem) for problem in _verify_index(dataset, made if all_good else None))
    if all_good and content.hexdigest() != dataset.manifest.content_digest:
        yield None, f"content digest is {content.hexdigest()}, the manifest says {dataset.manifest.content_digest}"


def _column(utterance_ids: Sequence[str]) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(utterance_ids, pa.string())])


def _verify_documents(dataset: SoftLabelDataset) -> Iterator[str]:
    manifest, store = dataset.manifest, dataset.store
    try:
        if undamaged(store, lambda: read_spec(store)) != SpecDocument(spec=manifest.spec, storage=manifest.storage):
            yield f"{store.describe(layout.SPEC)}: is not the spec in the manifest"
    except (InputError, IntegrityError) as error:
        yield str(error)
    try:
        num_classes = dataset.inventory.num_classes
        if num_classes != manifest.spec.num_classes:
            yield f"the inventory has {num_classes} classes, the spec {manifest.spec.num_classes}"
    except IntegrityError as error:
        yield str(error)


def _verify_shard(dataset: SoftLabelDataset, index: int) -> tuple[LabelHash, tuple[str, ...], ShardIndex | None]:
    """The shard's label hash, utterance ids and index; all of the shard itself is checked."""
    manifest, store = dataset.manifest, dataset.store
    (commit,) = read_published_commits(store, manifest, [index])
    files, columns = dataset.shards.read_columns(index)
    shard = dataset.shards.decode(index, columns)
    label_hash = shard.label_hash()
    if label_hash.to_base64() != commit.label_hash:
        raise IntegrityError(f"shard {index}: its labels are not those that were committed")
    if commit.index is None:
        return label_hash, shard.utterance_ids, None
    container, shard_index = CONTAINERS[manifest.storage.shard_format], commit.shard_index()
    check_index(shard_index, columns, files, container, where=dataset.shards.describe(index))
    return label_hash, shard.utterance_ids, shard_index


def _verify_index(dataset: SoftLabelDataset, made: IndexBuilder | None) -> Iterator[str]:
    """Check that the buckets are as they were written and, where the indices of all shards are at hand, that they hold these
    and nothing else."""
    if dataset.manifest.index is None:
        return
    table, store = dataset.manifest.bucket_table(), dataset.store
    expected = (sha256_hex(data) for data in made.buckets()) if made else (table.sha256(i) for i in range(len(table)))

    def problem(bucket: int) -> str:
        key, sha256 = layout.index_bucket(bucket, table.sha256(bucket)), table.sha256(bucket)

        def check() -> None:
            if sha256_hex(store.read(key, max_bytes=table.num_bytes(bucket))) != sha256:
                raise IntegrityError(f"{store.describe(key)}: was changed after writing, expected sha256 {sha256}")

        try:
            undamaged(store, check)
        except FileNotFoundError as error:
            return f"a bucket of the utterance index is missing: {error}"
        except IntegrityError as error:
            return str(error)
        return ""

    problems = read_ahead(problem, range(len(table)), num_parallel=_BUCKETS_AT_ONCE)
    try:
        for bucket, (sha256, coming) in enumerate(zip(expected, problems, strict=True)):
            if sha256 != table.sha256(bucket):
                yield f"bucket {bucket} of the utterance index does not hold the utterances of the shards"
            if found := coming.result():
                yield found
    except InputError as error:
        yield str(error)
