"""A tiny corpus of tones with hard labels, soft labels published for it, and student runs on both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
from torch import Tensor, nn

from softlabel_schemas import ClassInventory, Corpus, Utterance, load_corpus, write_corpus
from softlabel_schemas.commit import begin, publish
from softlabel_schemas.digest import sha256_hex
from softlabel_schemas.front_end import Fbank
from softlabel_schemas.manifest import SkippedUtterance, SpecDocument
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.selection import AnySelection, TopK
from softlabel_schemas.shard import LabelledUtterance, UtteranceStats
from softlabel_schemas.spec import StorageSpec
from softlabel_schemas.targets import SoftTargets
from student_trainer.config import TrainConfig
from tests.support.datasets import SPEC, Row, commit_rows, cut_evenly
from tests.support.targets import dense_posterior, ranking, targets_from_dense

# Two classes for each of the phones a and b, one for c.
INVENTORY = ClassInventory(
    names=("sil", "a-1", "a-2", "b-1", "b-2", "c"),
    phones=("sil", "a", "a", "b", "b", "c"),
    silence_phones=("sil",),
)
SAMPLE_RATE = 8_000
FRONT_END = Fbank(sample_rate=SAMPLE_RATE, num_mel_bins=8, stack=3)
FRAME_SHIFT_MS = 30.0
TEMPERATURES = (1.0, 2.0)
_SAMPLES_PER_FRAME = round(SAMPLE_RATE * FRAME_SHIFT_MS / 1000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Speech:
    """A corpus on disk: 20 utterances of split train, 3 of dev, 3 of test; 10 to 30 frames each."""

    folder: Path
    manifest: str
    inventory: str
    utterances: tuple[Utterance, ...]

    @property
    def corpus(self) -> Corpus:
        return load_corpus(self.manifest)

    def split(self, name: str) -> list[Utterance]:
        return [utterance for utterance in self.utterances if utterance.split == name]

    def located(self, *splits: str) -> list[Utterance]:
        """With absolute paths, for a manifest in another folder."""
        chosen = [utterance for utterance in self.utterances if not splits or utterance.split in splits]
        return [replace(utterance, audio=f"{self.folder}/{utterance.audio}") for utterance in chosen]


def write_speech(
    folder: Path, *, unlabelled: Sequence[str] = (), unlabelled_share: float = 0.1, hashed: bool = False
) -> Speech:
    """Each class is a tone; runs of 2 to 5 frames. ``unlabelled`` utterances get no hard labels, nor does every tenth
    frame of the others (``unlabelled_share``). ``hashed``: the manifest has the audio's sha256, as imported ones do."""
    rng = np.random.default_rng(762)
    folder.mkdir(parents=True, exist_ok=True)
    utterances = []
    for index, split in enumerate(["train"] * 20 + ["dev"] * 3 + ["test"] * 3):
        utterance_id = f"{split}-{index:02d}"
        runs = rng.integers(2, 6, rng.integers(5, 9))
        labels_T = np.repeat(rng.integers(0, INVENTORY.num_classes, len(runs)), runs).astype(np.int32)[:30]
        # The last frame is not whole, as in real recordings.
        samples = _tones(labels_T, rng)[: len(labels_T) * _SAMPLES_PER_FRAME - int(rng.integers(0, 100))]
        soundfile.write(folder / f"{utterance_id}.wav", samples, SAMPLE_RATE, subtype="PCM_16")
        labels_T[rng.random(len(labels_T)) < unlabelled_share] = -1
        utterances.append(
            Utterance(
                utterance_id=utterance_id,
                audio=f"{utterance_id}.wav",
                sha256=sha256_hex((folder / f"{utterance_id}.wav").read_bytes()) if hashed else None,
                sample_rate=SAMPLE_RATE,
                num_samples=len(samples),
                split=split,
                hard_labels=None if utterance_id in unlabelled else labels_T,
            )
        )
    return save_corpus(folder, utterances)


def save_corpus(folder: Path, utterances: Sequence[Utterance], *, frame_shift_ms: float = FRAME_SHIFT_MS) -> Speech:
    """Write the manifest and the inventory; the utterances' files are there already."""
    (folder / "inventory.json").write_bytes(INVENTORY.to_json())
    write_corpus(folder / "corpus.parquet", utterances, inventory=INVENTORY, hard_label_frame_shift_ms=frame_shift_ms)
    return Speech(
        folder=folder,
        manifest=str(folder / "corpus.parquet"),
        inventory=str(folder / "inventory.json"),
        utterances=tuple(utterances),
    )


def _tones(labels_T: npt.NDArray[np.int32], rng: np.random.Generator) -> npt.NDArray[np.float64]:
    seconds_N = np.arange(len(labels_T) * _SAMPLES_PER_FRAME) / SAMPLE_RATE
    hertz_N = np.repeat(300.0 + 500.0 * labels_T, _SAMPLES_PER_FRAME)
    return 0.3 * np.sin(2 * np.pi * hertz_N * seconds_N) + 0.01 * rng.standard_normal(len(seconds_N))


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftDataset:
    """A published dataset and the whole posteriors it was selected from, float32 [T, V] by utterance id."""

    url: str
    log_posteriors: dict[str, npt.NDArray[np.float32]]
    targets: dict[str, SoftTargets]


def write_soft_labels(
    url: str | Path,
    utterances: Sequence[Utterance],
    *,
    selection: AnySelection | None = None,
    skipped: Mapping[str, str] | None = None,
    extra_frames: Mapping[str, int] | None = None,
    front_end: Fbank = FRONT_END,
    inventory: ClassInventory = INVENTORY,
    num_shards: int = 3,
    spec: Mapping[str, Any] | None = None,
) -> SoftDataset:
    """Random posteriors that favour the hard label, the top of each frame published without loss in that order.

    Args:
        selection: TopK is done, any other is only claimed; the default is top 3 with the hard label.
        skipped: utterance id -> reason.
        extra_frames: utterance id -> frames more than there should be.
        spec: fields to replace.
    """
    selection = TopK(k=3, keep_hard_label=True) if selection is None else selection
    rng = np.random.default_rng(len(utterances))
    rows: list[Row] = []
    log_posteriors, all_targets = {}, {}
    for utterance in utterances:
        utterance_id = utterance.utterance_id
        if utterance_id in (skipped or {}):
            rows.append(SkippedUtterance(utterance_id=utterance_id, reason=(skipped or {})[utterance_id]))
            continue
        num_frames = front_end.num_frames(utterance.num_samples) + (extra_frames or {}).get(utterance_id, 0)
        labels_T = np.full(num_frames, -1)
        if utterance.hard_labels is not None and len(utterance.hard_labels) == num_frames:
            labels_T = utterance.hard_labels
        log_posterior_TV = _random_posterior(rng, labels_T, inventory.num_classes)
        kept_TV = np.zeros(log_posterior_TV.shape, dtype=bool)
        num_kept = selection.k if isinstance(selection, TopK) else 3
        np.put_along_axis(kept_TV, ranking(log_posterior_TV)[:, :num_kept], True, axis=1)
        if selection.keep_hard_label:
            kept_TV[np.flatnonzero(labels_T >= 0), labels_T[labels_T >= 0]] = True
        targets = targets_from_dense(log_posterior_TV, kept_TV, (spec or {}).get("temperatures", TEMPERATURES))
        stats = UtteranceStats(kept_mass=float(targets.kept_mass_T().mean()), entropy=1.0, agreement=float("nan"))
        rows.append(LabelledUtterance(utterance_id=utterance_id, targets=targets, stats=stats))
        log_posteriors[utterance_id], all_targets[utterance_id] = log_posterior_TV, targets
    fields = {
        "inventory_digest": inventory.digest(),
        "num_classes": inventory.num_classes,
        "frame_shift_ms": front_end.output_frame_shift_ms,
        "temperatures": TEMPERATURES,
        "selection": selection,
        "codec": "packed-f32",
    }
    document = SpecDocument(
        spec=SPEC.model_copy(update=fields | dict(spec or {})),
        storage=StorageSpec(
            shard_format="parquet",
            num_shards=num_shards,
            num_rows=len(rows),
            shard_seconds=60.0,
            batch_seconds=60.0,
            on_error="skip",
        ),
    )
    store = ObjectStore(url)
    begin(store, document, inventory)
    for shard_range in cut_evenly(len(rows), num_shards):
        commit_rows(store, document, shard_range, rows)
    publish(store, document)
    return SoftDataset(url=str(url), log_posteriors=log_posteriors, targets=all_targets)


def _random_posterior(
    rng: np.random.Generator, labels_T: npt.NDArray[np.integer], num_classes: int
) -> npt.NDArray[np.float32]:
    logits_TV = 1.5 * rng.standard_normal((len(labels_T), num_classes))
    labelled = np.flatnonzero(labels_T >= 0)
    logits_TV[labelled, labels_T[labelled]] += 3.0
    return np.log(dense_posterior(logits_TV, 1.0)).astype(np.float32)


def train_config(speech: Speech, output: str | Path, *, url: str | None = None, **changes: Any) -> TrainConfig:
    """Three epochs of a very small TDNN, some five steps each; a key of ``changes`` such as ``training__epochs`` is a
    table and a key."""
    config: dict[str, Any] = {
        "name": "student",
        "output": str(output),
        "seed": 7,
        "corpus": {"manifest": speech.manifest, "inventory": speech.inventory},
        "front_end": FRONT_END.model_dump(),
        "model": {"architecture": "tdnn", "arguments": {"hidden": 16, "num_layers": 2}},
        "training": {"epochs": 3, "batch_seconds": 1.5, "learning_rate": 0.01, "num_threads": 1},
    }
    if url is not None:
        config["soft_labels"] = {"url": url, "temperature": 2.0}
    for key, value in changes.items():
        table, _, name = key.partition("__")
        if name:
            config.setdefault(table, {})[name] = value
        else:
            config[table] = value
    return TrainConfig.model_validate(config)


def without_labels(utterance: Utterance) -> Utterance:
    return replace(utterance, hard_labels=None)


class PairEncoder(nn.Module):
    """A user's own encoder, which drops every second frame; made by :func:`pair_encoder`."""

    def __init__(self, num_features: int, hidden: int) -> None:
        super().__init__()
        self.output_dim, self.subsampling = hidden, 2
        self.layer = nn.Linear(num_features, hidden)

    def forward(self, features_BTD: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(features_BTD[:, ::2]).tanh(), (lengths_B + 1) // 2


def pair_encoder(num_features: int, hidden: int = 8) -> PairEncoder:
    return PairEncoder(num_features, hidden)


class TiedEncoder(nn.Module):
    """A user's own encoder with a layer that is there twice; made by :func:`tied_encoder`."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.output_dim = num_features
        self.layer = nn.Linear(num_features, num_features)
        self.again = self.layer

    def forward(self, features_BTD: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        return self.again(self.layer(features_BTD).tanh()).tanh(), lengths_B


def tied_encoder(num_features: int) -> TiedEncoder:
    return TiedEncoder(num_features)


def not_an_encoder(num_features: int) -> nn.Module:
    """Lacks ``output_dim``."""
    return nn.Linear(num_features, 2)
