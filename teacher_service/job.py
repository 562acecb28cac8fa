"""A job made ready: everything checked and planned before a model is loaded or a GPU is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from softlabel_schemas import layout
from softlabel_schemas.about import begin_about
from softlabel_schemas.bundle import BundleReader
from softlabel_schemas.codec import build_codec
from softlabel_schemas.commit import (
    COMMITS_AT_ONCE,
    Published,
    begin,
    committed_shards,
    publish,
    read_commits,
)
from softlabel_schemas.corpus import check_label_inventory, check_label_range
from softlabel_schemas.corpus_file import CorpusFile
from softlabel_schemas.errors import InputError
from softlabel_schemas.frame_selection import silence_classes
from softlabel_schemas.inventory import ClassInventory, check_same_inventory
from softlabel_schemas.limits import MAX_DECODED_BYTES, PARQUET_STREAM_BYTES
from softlabel_schemas.manifest import SpecDocument
from softlabel_schemas.object_store import MAX_DOCUMENT_BYTES, ObjectStore
from softlabel_schemas.plan import ShardRange
from softlabel_schemas.selection import TopK, max_entries_per_frame
from softlabel_schemas.spec import DatasetSpec, StorageSpec, TeacherSpec
from softlabel_schemas.tempering import check_tempered, warn_of_floor
from teacher_service.config import JobConfig
from teacher_service.teacher import check_factory, check_held_out

# Of the manifest's JSON: of a shard's record, of each of its files, and the files of a Zarr shard besides those that its size
# adds (one for each MiB of a stream).
_RECORD_BYTES = 480
_FILE_BYTES = 130
_ZARR_FILES = 24
# Of a skipped utterance, with its id twice: the reason names it. 136 with ids of 24 characters.
_SKIPPED_BYTES = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedJob:
    """What every shard of the job is a function of; holds no row of the corpus."""

    config: JobConfig
    document: SpecDocument
    inventory: ClassInventory
    corpus: CorpusFile
    plan: list[ShardRange]
    seconds_of_shard: list[float]

    def store(self) -> ObjectStore:
        destination = self.config.destination
        return ObjectStore(
            destination.url,
            destination.storage_options,
            last_writer_wins=destination.accept_last_writer_wins,
        )


def prepare(config: JobConfig) -> PreparedJob:
    """Check teachers against each other and against the corpus, and cut the corpus into shards.

    Raises:
        InputError: something is missing or does not fit; both values are named.
    """
    if config.destination.url.startswith("memory:"):
        raise InputError("destination.url: memory:// is not shared between processes; use a folder or an object store")
    readers = [BundleReader(teacher.bundle) for teacher in config.teachers]
    first = readers[0]
    for teacher, reader in zip(config.teachers, readers, strict=True):
        check_factory(teacher, reader)
        check_held_out(teacher, reader, config.corpus.num_folds)
        check_same_inventory(first.inventory, reader.inventory, expected_in=first.store.url, found_in=reader.store.url)
        if reader.description.frame_shift_ms != first.description.frame_shift_ms:
            raise InputError(
                f"teachers have different frame shifts: {first.store.url} {first.description.frame_shift_ms:g} ms, "
                f"{reader.store.url} {reader.description.frame_shift_ms:g} ms"
            )
    if config.selection.frames is not None:
        silence_classes(first.inventory, config.selection.frames)
    corpus = CorpusFile(config.corpus.manifest, config.corpus.splits)
    scan = corpus.scan(config.destination.shard_seconds)
    check_label_inventory(scan.inventory_digest, first.inventory, where=config.corpus.manifest)
    if config.errors.on_error == "fail":
        # With "skip" only the utterances that have them are left out.
        check_label_range(scan.label_range, first.inventory, where=config.corpus.manifest)
    shift = scan.hard_label_frame_shift_ms
    if shift is not None and shift != first.description.frame_shift_ms:
        raise InputError(
            f"the teachers' frame shift is {first.description.frame_shift_ms:g} ms, "
            f"the corpus has hard labels every {shift:g} ms"
        )
    num_folds = config.corpus.num_folds
    spec = DatasetSpec(
        corpus_digest=scan.digest,
        inventory_digest=first.inventory.digest(),
        num_classes=first.inventory.num_classes,
        frame_shift_ms=first.description.frame_shift_ms,
        teachers=tuple(
            TeacherSpec(
                name=reader.description.name, digest=reader.description.digest(), weight=weight, fold=teacher.fold
            )
            for teacher, reader, weight in zip(config.teachers, readers, _weights(config), strict=True)
        ),
        combination=config.combination.method,
        temperatures=config.targets.temperatures,
        selection=config.selection,
        codec=config.targets.codec,
        precision=config.resources.precision,
        num_folds=num_folds,
        speakers_digest=None if num_folds is None else scan.speakers.digest(where=config.corpus.manifest),
    )
    for temperature in spec.temperatures:
        check_tempered(spec, temperature, where="targets.temperatures")
    warn_of_floor(spec, where="selection")
    _check_manifest_size(config, spec, sum(scan.seconds_of_shard), len(scan.plan), scan.num_rows)
    _check_shard_size(config, spec, max(scan.seconds_of_shard, default=0.0))
    storage = StorageSpec(
        shard_format=config.destination.format,
        num_shards=len(scan.plan),
        num_rows=scan.num_rows,
        shard_seconds=config.destination.shard_seconds,
        batch_seconds=config.resources.batch_seconds,
        on_error=config.errors.on_error,
    )
    return PreparedJob(
        config=config,
        document=SpecDocument(spec=spec, storage=storage),
        inventory=first.inventory,
        corpus=corpus,
        plan=scan.plan,
        seconds_of_shard=scan.seconds_of_shard,
    )


def _weights(config: JobConfig) -> list[float]:
    """Of each teacher, normalised over those of its fold, or over all where there are no folds."""
    return [
        teacher.weight / sum(other.weight for other in config.teachers if other.fold == teacher.fold)
        for teacher in config.teachers
    ]


def _check_manifest_size(config: JobConfig, spec: DatasetSpec, seconds: float, num_shards: int, num_rows: int) -> None:
    """Raises InputError where the manifest may become too large to be published: better now than after the labelling."""
    may_skip = config.errors.on_error == "skip"
    num_skipped = int(config.errors.max_skipped_fraction * num_rows) if may_skip else 0
    num_bytes = num_shards * _RECORD_BYTES + num_skipped * _SKIPPED_BYTES
    if config.destination.format == "zarr":
        num_frames = 1000 * seconds / spec.frame_shift_ms
        entries = num_frames * max_entries_per_frame(spec.selection, spec.num_classes)
        # At most 8 bytes an entry and 2 + 4 for each tail a frame; a chunk is 1 MiB.
        chunks = (8 * entries + (2 + 4 * len(spec.temperatures)) * num_frames) / 2**20
        num_bytes += int(_FILE_BYTES * (_ZARR_FILES * num_shards + chunks))
    if num_bytes > MAX_DOCUMENT_BYTES:
        raise InputError(
            f"{num_shards} shards and {num_skipped} skipped utterances may need a manifest of {num_bytes / 2**20:.0f} MiB, it "
            f"can have {MAX_DOCUMENT_BYTES >> 20}; set a larger destination.shard_seconds, a smaller "
            'errors.max_skipped_fraction, or destination.format = "parquet", whose shards are one file each'
        )


def _check_shard_size(config: JobConfig, spec: DatasetSpec, seconds: float) -> None:
    """Raises InputError where the longest shard, of ``seconds``, has a stream that is too large for it: better now than after
    its labelling. Of other policies than top_k, and of frames that are dropped, nobody knows it before.
    """
    if not isinstance(spec.selection, TopK) or spec.selection.frames is not None:
        return
    entries = min(spec.selection.k, spec.num_classes)
    num_bytes = build_codec(spec).least_bytes(entries) * 1000 * seconds / spec.frame_shift_ms
    at_most = PARQUET_STREAM_BYTES if config.destination.format == "parquet" else MAX_DECODED_BYTES
    if num_bytes >= at_most:
        raise InputError(
            f"the longest shard, of {seconds:,.1f} s, would have a stream of {num_bytes / 2**30:.1f} GiB at {entries} entries "
            f"a frame with the codec {spec.codec}, expected less than {at_most / 2**30:g}; set destination.shard_seconds below "
            f"{seconds * at_most / num_bytes:.4g}, or a smaller selection.k"
        )


def missing_shards(job: PreparedJob) -> list[ShardRange]:
    """Begin or join the run at the destination; the shards without a commit record."""
    store = job.store()
    begin(store, job.document, job.inventory)
    begin_about(store, job.config.description)
    done = committed_shards(store)
    return [shard_range for shard_range in job.plan if shard_range.index not in done]


def num_skipped(job: PreparedJob, missing: list[ShardRange]) -> int:
    """In the shards that are committed, those that are not among ``missing``. Raises InputError where that is more than the job
    allows: one that was stopped for it would leave out as many once more before it is stopped again."""
    left = {shard_range.index for shard_range in missing}
    done = [shard_range.index for shard_range in job.plan if shard_range.index not in left]
    store, count = job.store(), 0
    for start in range(0, len(done), COMMITS_AT_ONCE):
        commits = read_commits(store, job.document, done[start : start + COMMITS_AT_ONCE])
        count += sum(len(commit.shard.skipped) for commit in commits)
    check_skipped(job, count)
    return count


def publish_job(job: PreparedJob) -> Published:
    """Publish, unless more utterances were skipped than the job allows. Raises InputError. What is published stays."""
    store = job.store()
    if store.exists(layout.MANIFEST):
        return publish(store, job.document)
    return publish(store, job.document, check=partial(check_skipped, job))


def max_skipped(job: PreparedJob) -> int:
    """Of all utterances; none where those that cannot be labelled end the job."""
    errors = job.config.errors
    return math.floor(errors.max_skipped_fraction * job.document.storage.num_rows) if errors.on_error == "skip" else 0


def check_skipped(job: PreparedJob, num_skipped: int) -> None:
    """Raises InputError where more utterances were skipped than the job allows."""
    if num_skipped > max_skipped(job):
        errors = job.config.errors
        allowed = (
            f"max_skipped_fraction = {errors.max_skipped_fraction:g}"
            if errors.on_error == "skip"
            else 'on_error = "fail"'
        )
        raise InputError(
            f"{num_skipped} of {job.document.storage.num_rows} utterances could not be labelled, more than errors.{allowed} "
            f"allows; the reasons are in the commit records under {job.config.destination.url}/commits; to have utterances "
            "labelled that can be by now, remove the records that name them while no job runs, and run again"
        )
