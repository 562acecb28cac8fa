"""A job made ready: everything checked and planned before a model is loaded or a GPU is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from softlabel_schemas.bundle import BundleReader
from softlabel_schemas.commit import begin, committed_shards, publish, read_commits
from softlabel_schemas.corpus import Corpus, check_hard_labels, load_corpus
from softlabel_schemas.errors import InputError
from softlabel_schemas.inventory import ClassInventory, check_same_inventory
from softlabel_schemas.manifest import Manifest, SpecDocument
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.plan import ShardRange, plan_shards
from softlabel_schemas.spec import DatasetSpec, StorageSpec, TeacherSpec
from teacher_service.config import JobConfig
from teacher_service.teacher import check_factory


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedJob:
    """What every shard of the job is a function of."""

    config: JobConfig
    document: SpecDocument
    inventory: ClassInventory
    plan: list[ShardRange]
    seconds_of_shard: list[float]

    def store(self) -> ObjectStore:
        return ObjectStore(self.config.destination.url, self.config.destination.storage_options)


def load_job_corpus(config: JobConfig) -> Corpus:
    corpus = load_corpus(config.corpus.manifest)
    return corpus if config.corpus.splits is None else corpus.select_splits(config.corpus.splits)


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
        check_same_inventory(first.inventory, reader.inventory, expected_in=first.store.url, found_in=reader.store.url)
        if reader.description.frame_shift_ms != first.description.frame_shift_ms:
            raise InputError(
                f"teachers have different frame shifts: {first.store.url} {first.description.frame_shift_ms:g} ms, "
                f"{reader.store.url} {reader.description.frame_shift_ms:g} ms"
            )
    corpus = load_job_corpus(config)
    check_hard_labels(corpus, first.inventory, where=config.corpus.manifest)
    shift = corpus.hard_label_frame_shift_ms
    if shift is not None and shift != first.description.frame_shift_ms:
        raise InputError(
            f"the teachers' frame shift is {first.description.frame_shift_ms:g} ms, "
            f"the corpus has hard labels every {shift:g} ms"
        )
    plan = plan_shards(corpus.seconds(), config.destination.shard_seconds)
    seconds = corpus.seconds()
    total_weight = sum(teacher.weight for teacher in config.teachers)
    spec = DatasetSpec(
        corpus_digest=corpus.digest,
        inventory_digest=first.inventory.digest(),
        num_classes=first.inventory.num_classes,
        frame_shift_ms=first.description.frame_shift_ms,
        teachers=tuple(
            TeacherSpec(
                name=reader.description.name, digest=reader.description.digest(), weight=teacher.weight / total_weight
            )
            for teacher, reader in zip(config.teachers, readers, strict=True)
        ),
        combination=config.combination.method,
        temperatures=config.targets.temperatures,
        selection=config.selection,
        codec=config.targets.codec,
        precision=config.resources.precision,
    )
    storage = StorageSpec(
        shard_format=config.destination.format,
        num_shards=len(plan),
        num_rows=len(corpus),
        shard_seconds=config.destination.shard_seconds,
        batch_seconds=config.resources.batch_seconds,
        on_error=config.errors.on_error,
    )
    return PreparedJob(
        config=config,
        document=SpecDocument(spec=spec, storage=storage),
        inventory=first.inventory,
        plan=plan,
        seconds_of_shard=[float(seconds[r.first_row : r.first_row + r.num_rows].sum()) for r in plan],
    )


def missing_shards(job: PreparedJob) -> list[ShardRange]:
    """Begin or join the run at the destination; the shards without a commit record."""
    store = job.store()
    begin(store, job.document, job.inventory)
    done = committed_shards(store)
    return [shard_range for shard_range in job.plan if shard_range.index not in done]


def publish_job(job: PreparedJob) -> Manifest:
    """Publish, unless more utterances were skipped than the job allows. Raises InputError."""
    store, errors = job.store(), job.config.errors
    if errors.on_error == "skip":
        commits = read_commits(store, job.document, [shard_range.index for shard_range in job.plan])
        check_skipped(job, sum(len(commit.shard.skipped) for commit in commits))
    return publish(store, job.document)


def check_skipped(job: PreparedJob, num_skipped: int) -> None:
    """Raises InputError where more than ``errors.max_skipped_fraction`` of all utterances were skipped."""
    num_rows, allowed = job.document.storage.num_rows, job.config.errors.max_skipped_fraction
    if num_skipped > allowed * num_rows:
        raise InputError(
            f"{num_skipped} of {num_rows} utterances could not be labelled, more than errors.max_skipped_fraction = "
            f"{allowed:g} allows; the reasons are in the commit records under {job.config.destination.url}/commits"
        )
