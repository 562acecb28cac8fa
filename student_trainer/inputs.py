"""What a run is made from: its corpus, inventory and soft labels, read and checked against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from softlabel_schemas.cache import FileCache
from softlabel_schemas.corpus import Corpus, check_hard_labels, load_corpus
from softlabel_schemas.dataset import SoftLabelDataset, open_dataset
from softlabel_schemas.deprecation import warn_if_deprecated
from softlabel_schemas.errors import InputError, IntegrityError
from softlabel_schemas.folds import without_fold
from softlabel_schemas.front_end import Fbank
from softlabel_schemas.inventory import ClassInventory
from softlabel_schemas.manifest import SkippedUtterance
from softlabel_schemas.tempering import warn_of_floor
from student_trainer.augmentation import Augmenter
from student_trainer.config import SoftLabelConfig, TrainConfig
from student_trainer.ctc import Spelling, check_transcripts, transcripts_digest
from student_trainer.data import TrainingData
from student_trainer.evaluate import check_labels
from student_trainer.hard_labels import (
    check_label_frames,
    check_something_to_learn,
    label_column,
    labelled_digest,
    with_labels_in_use,
)
from student_trainer.left_out import leave_out_skipped
from student_trainer.models import ENCODERS
from student_trainer.shared_features import SharedFeatures
from student_trainer.soft_labels import SoftLabels
from student_trainer.token_errors import check_transcribed


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Attributes:
    corpus: the training speech, with the utterances that the dataset skipped, which ``data`` is without.
    datasets: of soft labels; of several, one teaches each batch.
    left_out: by the URL of the dataset that skipped them.
    transcripts_digest: of its texts, where they are the hard labels; the corpus digest is not over them.
    hard_labels_digest: of the utterances whose hard labels are in use, where not all splits' are; the same holds.
    """

    corpus: Corpus
    inventory: ClassInventory
    datasets: tuple[SoftLabelDataset, ...]
    left_out: Mapping[str, tuple[SkippedUtterance, ...]]
    data: TrainingData
    transcripts_digest: str | None
    hard_labels_digest: str | None

    @property
    def checked(self) -> CheckedInputs:
        return CheckedInputs(
            corpus=self.data.corpus,
            inventory=self.inventory,
            urls=tuple(dataset.store.url for dataset in self.datasets),
            content_digests=tuple(dataset.manifest.content_digest for dataset in self.datasets),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedInputs:
    """What :func:`open_inputs` found to fit together, for other processes.

    Attributes:
        corpus: the utterances to train on.
        urls: of the datasets, with their versions: a name that has none may mean another one by then.
        content_digests: of the datasets.
    """

    corpus: Corpus
    inventory: ClassInventory
    urls: tuple[str, ...]
    content_digests: tuple[str, ...]


def open_inputs(config: TrainConfig, shared: SharedFeatures | None = None) -> Inputs:
    """Raises InputError where inputs do not fit together; names both.

    Args:
        shared: see ``TrainingData``.
    """
    if isinstance(config.front_end, Fbank):
        config.front_end.check()
    inventory = ClassInventory.load(config.corpus.inventory)
    where, labels = config.corpus.manifest, label_column(config)
    whole_corpus = training_speech(config)
    corpus = with_labels_in_use(whole_corpus, config)
    datasets = () if config.soft_labels is None else _open_datasets(config, config.soft_labels.locations)
    for dataset in datasets:
        warn_if_deprecated(dataset.store)
        warn_of_floor(dataset.manifest.spec, where=dataset.store.url)
    left_out: dict[str, tuple[SkippedUtterance, ...]] = {}
    for dataset in datasets:
        # Before any check: an utterance can have been skipped because of its labels.
        corpus, left_out[dataset.store.url] = leave_out_skipped(corpus, dataset)
    check_hard_labels(corpus, inventory, where=where)
    _check_frame_shift(corpus, config)
    check_something_to_learn(corpus, config.soft_labels, labels, where=where)
    data = _training_data(config, corpus, inventory, datasets, shared)
    if data.spelling is not None:
        # A user's own encoder may drop frames; stored features have as many as they have.
        keeps_frames = config.model.architecture in ENCODERS
        front_end = config.front_end if keeps_frames and isinstance(config.front_end, Fbank) else None
        # Some epoch draws the highest speed.
        fastest = None if data.augmenter is None else max(data.augmenter.speeds)
        check_transcripts(corpus, data.spelling, front_end, fastest)
    return Inputs(
        corpus=whole_corpus,
        inventory=inventory,
        datasets=datasets,
        left_out=left_out,
        data=data,
        transcripts_digest=None if config.ctc is None else transcripts_digest(whole_corpus),
        hard_labels_digest=None if config.corpus.hard_label_splits is None else labelled_digest(corpus, labels),
    )


def reopen_inputs(config: TrainConfig, checked: CheckedInputs) -> TrainingData:
    """The data of :func:`open_inputs` in another process, without what it checked.

    Raises:
        IntegrityError: a dataset was replaced since.
    """
    datasets = _open_datasets(config, checked.urls)
    for dataset, expected in zip(datasets, checked.content_digests, strict=True):
        found = dataset.manifest.content_digest
        if found != expected:
            raise IntegrityError(
                f"{dataset.store.url} was replaced since this run began: its labels were {expected[:12]}, they are {found[:12]}"
            )
    return _training_data(config, checked.corpus, checked.inventory, datasets)


def training_speech(config: TrainConfig) -> Corpus:
    """Of the training splits, as the manifest has it. Raises InputError."""
    return _heard(load_corpus(config.corpus.manifest).select_splits(config.corpus.train_splits), config)


def open_dev(
    config: TrainConfig, inventory: ClassInventory, shared: SharedFeatures | None = None
) -> TrainingData | None:
    """The dev speech; None where the run has none. Raises InputError where an utterance has no hard labels or not one for
    each frame, or with CTC a transcript that cannot be spelled; or where there is nothing to count errors among."""
    splits = config.corpus.dev_splits
    if not splits:
        return None
    # After every epoch the same: kept where training speech of that size is.
    keep_seconds, spelling = config.training.pool_seconds, None
    where, corpus = config.corpus.manifest, _heard(load_corpus(config.corpus.manifest).select_splits(splits), config)
    if config.ctc is None:
        check_labels(corpus, inventory, splits, where=where)
        check_label_frames(corpus, config, where=where)
    else:
        check_transcribed(corpus, splits, where=where)
        spelling = Spelling(inventory, config.ctc.units)
        check_transcripts(corpus, spelling)
    return TrainingData(corpus, config.front_end, spelling=spelling, keep_seconds=keep_seconds, shared=shared)


def _heard(corpus: Corpus, config: TrainConfig) -> Corpus:
    """Without the speakers that are held out."""
    held_out = config.corpus.held_out
    return corpus if held_out is None else without_fold(corpus, held_out, where=config.corpus.manifest)


def _open_datasets(config: TrainConfig, urls: Sequence[str]) -> tuple[SoftLabelDataset, ...]:
    cache = None if config.soft_labels is None else file_cache(config.soft_labels)
    return tuple(open_dataset(url, cache=cache) for url in urls)


def _training_data(
    config: TrainConfig,
    corpus: Corpus,
    inventory: ClassInventory,
    datasets: Sequence[SoftLabelDataset],
    shared: SharedFeatures | None = None,
) -> TrainingData:
    """Raises InputError where a dataset does not fit the corpus or the inventory, or is not fit for what is asked."""
    soft, digest = config.soft_labels, inventory.digest()
    soft_labels = [SoftLabels(dataset, soft, corpus, digest) for dataset in datasets if soft is not None]
    augmenter = spelling = None
    if config.augmentation is not None:
        # The configuration's own check; stored features cannot be augmented.
        assert isinstance(config.front_end, Fbank)
        augmenter = Augmenter(config.augmentation, config.front_end, config.seed)
    if config.ctc is not None and not (soft is not None and soft.has_all_weight):
        spelling = Spelling(inventory, config.ctc.units)
    return TrainingData(corpus, config.front_end, soft_labels, augmenter, spelling, shared=shared)


def file_cache(config: SoftLabelConfig) -> FileCache | None:
    """Where files that are read from object storage are kept, if anywhere."""
    return None if config.cache is None else FileCache(config.cache, int(config.cache_gib * 2**30))


def _check_frame_shift(corpus: Corpus, config: TrainConfig) -> None:
    labels, features = corpus.hard_label_frame_shift_ms, config.front_end.output_frame_shift_ms
    if labels is not None and config.model.architecture in ENCODERS and labels != features:
        raise InputError(
            f"hard labels have a frame shift of {labels:g} ms, the front end gives {features:g} ms; "
            "set front_end.stack (or frame_shift_ms) so that they agree"
        )
