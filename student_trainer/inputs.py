"""What a run is made from: its corpus, inventory and soft labels, read and checked against each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from softlabel_schemas.cache import FileCache
from softlabel_schemas.corpus import Corpus, check_hard_labels, load_corpus
from softlabel_schemas.dataset import SoftLabelDataset, open_dataset
from softlabel_schemas.deprecation import warn_if_deprecated
from softlabel_schemas.errors import InputError
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
    datasets = _open_datasets(config)
    left_out: dict[str, tuple[SkippedUtterance, ...]] = {}
    for dataset in datasets:
        # Before any check: an utterance can have been skipped because of its labels.
        corpus, left_out[dataset.store.url] = leave_out_skipped(corpus, dataset)
    spelling = None
    if config.ctc is not None and not (config.soft_labels is not None and config.soft_labels.has_all_weight):
        spelling = Spelling(inventory, config.ctc.units)
    check_hard_labels(corpus, inventory, where=where)
    _check_frame_shift(corpus, config)
    check_something_to_learn(corpus, config.soft_labels, labels, where=where)
    soft, digest = config.soft_labels, inventory.digest()
    soft_labels = [SoftLabels(dataset, soft, corpus, digest) for dataset in datasets if soft is not None]
    augmenter = None
    if config.augmentation is not None:
        # The configuration's own check; stored features cannot be augmented.
        assert isinstance(config.front_end, Fbank)
        augmenter = Augmenter(config.augmentation, config.front_end, config.seed)
    if spelling is not None:
        # A user's own encoder may drop frames; stored features have as many as they have.
        keeps_frames = config.model.architecture in ENCODERS
        front_end = config.front_end if keeps_frames and isinstance(config.front_end, Fbank) else None
        # Some epoch draws the highest speed.
        check_transcripts(corpus, spelling, front_end, None if augmenter is None else max(augmenter.speeds))
    return Inputs(
        corpus=whole_corpus,
        inventory=inventory,
        datasets=datasets,
        left_out=left_out,
        data=TrainingData(corpus, config.front_end, soft_labels, augmenter, spelling, shared=shared),
        transcripts_digest=None if config.ctc is None else transcripts_digest(whole_corpus),
        hard_labels_digest=None if config.corpus.hard_label_splits is None else labelled_digest(corpus, labels),
    )


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


def _open_datasets(config: TrainConfig) -> tuple[SoftLabelDataset, ...]:
    soft = config.soft_labels
    if soft is None:
        return ()
    cache = file_cache(soft)
    datasets = tuple(open_dataset(url, cache=cache) for url in soft.locations)
    for dataset in datasets:
        warn_if_deprecated(dataset.store)
        warn_of_floor(dataset.manifest.spec, where=dataset.store.url)
    return datasets


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
