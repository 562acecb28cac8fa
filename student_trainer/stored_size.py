"""What an arm's own labels take to store: a wide dataset serves a whole sweep, its size says nothing of a narrow arm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from softlabel_schemas.codec import build_codec
from softlabel_schemas.command_line import progress
from softlabel_schemas.containers import CONTAINERS
from softlabel_schemas.corpus import Utterance
from softlabel_schemas.dataset import SoftLabelDataset, open_dataset
from softlabel_schemas.shard import LabelledUtterance, encode_columns
from softlabel_schemas.targets import SoftTargets
from student_trainer.config import SoftLabelConfig, TrainConfig
from student_trainer.hard_labels import with_labels_in_use
from student_trainer.inputs import file_cache, training_speech
from student_trainer.soft_labels import SoftLabels


def stored_bytes_per_frame(config: TrainConfig) -> float:
    """Bytes per frame of the soft labels that a run uses, had they been captured as it narrows them, of all its datasets
    together; 0 without soft labels.

    Measured, not estimated: they are encoded with the dataset's codec and container, in its shards. A frame whose weight is 0
    keeps no entry. A selection has the tail masses that it needs, at temperature 1 and at the run's own; without one, all that
    is stored counts. As for a published dataset, the index and the manifest are not counted.

    Raises:
        InputError, IntegrityError: as training does.
    """
    soft_labels = config.soft_labels
    return (
        0.0 if soft_labels is None else sum(_bytes_per_frame(config, soft_labels, url) for url in soft_labels.locations)
    )


def _bytes_per_frame(config: TrainConfig, soft_labels: SoftLabelConfig, url: str) -> float:
    corpus = with_labels_in_use(training_speech(config), config)
    dataset = open_dataset(url, cache=file_cache(soft_labels))
    labels = SoftLabels(dataset, soft_labels, corpus, dataset.manifest.spec.inventory_digest)
    utterances = {utterance.utterance_id: utterance for utterance in corpus}
    num_bytes = num_frames = 0
    with progress(f"size of {config.name}", dataset.num_shards, "shards") as advance:
        for done, shard in enumerate(dataset.iter_shards(), start=1):
            stored = [row for row in shard if row.utterance_id in utterances]
            narrowed = _narrowed(labels, [utterances[row.utterance_id] for row in stored], stored)
            num_frames += sum(targets.num_frames for targets in narrowed)
            if narrowed:
                num_bytes += _encoded_bytes(dataset, soft_labels, stored, narrowed)
            advance(done)
    return num_bytes / max(num_frames, 1)


def changes_size(config: SoftLabelConfig) -> bool:
    """Whether it uses less than the dataset stores."""
    return config.selection is not None or config.frames is not None


def _narrowed(
    labels: SoftLabels, utterances: Sequence[Utterance], stored: Sequence[LabelledUtterance]
) -> list[SoftTargets]:
    found = []
    for weighted in labels.from_stored(utterances, stored):
        targets = weighted.soft
        if weighted.weights_T is not None:
            targets = targets.keep(np.repeat(weighted.weights_T > 0, targets.counts_T))
        found.append(_normalized(targets))
    return found


def _at_temperatures(targets: SoftTargets, wanted: set[float]) -> SoftTargets:
    """With the tail masses of these temperatures alone."""
    kept = [index for index, temperature in enumerate(targets.temperatures) if temperature in wanted]
    return replace(
        targets,
        temperatures=tuple(targets.temperatures[index] for index in kept),
        tail_mass=np.ascontiguousarray(targets.tail_mass[:, kept]),
    )


def _normalized(targets: SoftTargets) -> SoftTargets:
    """Kept and tail mass sum to 1 again, as they do at capture: those that were decoded are off by the codec's error, more
    than is encoded a second time."""
    total_T = targets.kept_mass_T() + targets.tail_mass[:, 0]
    log_total_E = np.repeat(np.log(total_T), targets.counts_T)
    tail_mass = targets.tail_mass.copy()
    tail_mass[:, 0] /= total_T
    log_probs = np.minimum(targets.log_probs - log_total_E, 0).astype(np.float32)
    return replace(targets, log_probs=log_probs, tail_mass=tail_mass)


def _encoded_bytes(
    dataset: SoftLabelDataset,
    config: SoftLabelConfig,
    stored: Sequence[LabelledUtterance],
    targets: Sequence[SoftTargets],
) -> int:
    manifest = dataset.manifest
    if config.selection is not None:
        targets = [_at_temperatures(each, {1.0, config.temperature}) for each in targets]
    # A narrow selection needs fewer bytes to count its entries, too.
    own = {"selection": config.selection or manifest.spec.selection, "temperatures": targets[0].temperatures}
    codec = build_codec(manifest.spec.model_copy(update=own))
    container = CONTAINERS[manifest.storage.shard_format]
    rows = [replace(row, targets=each) for row, each in zip(stored, targets, strict=True)]
    return sum(map(len, container.encode(encode_columns(rows, codec), codec.zstd_level).values()))
