"""What the student's benchmark is made of: students, batches, and a corpus with soft labels, in the shapes of speechocean762:
16 kHz, 40 mel bins, three 10 ms frames stacked, some 4 s an utterance, 40 s a batch, top 20."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from softlabel_schemas import ClassInventory, Corpus, Utterance, load_corpus, open_dataset, write_corpus
from softlabel_schemas.commit import begin, publish
from softlabel_schemas.digest import sha256_hex
from softlabel_schemas.front_end import Fbank, Precomputed
from softlabel_schemas.manifest import SpecDocument
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.selection import TopK
from softlabel_schemas.shard import LabelledUtterance, UtteranceStats
from softlabel_schemas.spec import StorageSpec
from softlabel_schemas.targets import SoftTargets, offsets_of
from student_trainer.batch import Example
from student_trainer.config import SoftLabelConfig, TrainConfig
from student_trainer.data import TrainingData
from student_trainer.run_folder import RunFolder, build_model
from student_trainer.soft_labels import SoftLabels
from student_trainer.train import Progress, _Trainer
from tests.support.datasets import SPEC, commit_rows, cut_evenly

FRONT_END = Fbank(stack=3)
STORED = Precomputed(num_features=FRONT_END.num_features, frame_shift_ms=FRONT_END.output_frame_shift_ms)
BATCH_SECONDS = 40.0
TOP_K = 20
# As in deploy/local/essence_questions.py.
STUDENTS: dict[str, dict[str, Any]] = {"small": {"hidden": 64, "num_layers": 4, "kernel_size": 3}, "member": {}}
# Of each: utterances have between half and one and a half of it.
_MEAN_SECONDS = 4.0
_SHARD_SECONDS = 600.0


def inventory(num_classes: int) -> ClassInventory:
    return ClassInventory(names=tuple(f"senone-{index}" for index in range(num_classes)))


def make_trainer(student: str, num_classes: int, **soft_labels: Any) -> _Trainer:
    """The trainer of ``student``, as ``train`` makes it; without ``soft_labels`` of the hard loss alone."""
    unused = {"manifest": "unused", "inventory": "unused"}
    config = _config(student, unused, {"url": "unused", "weight": 0.8, **soft_labels} if soft_labels else None)
    torch.manual_seed(0)
    model = build_model(config, inventory(num_classes))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.training.learning_rate, weight_decay=config.training.weight_decay
    )
    return _Trainer(config, RunFolder(config.output), {}, (), model, optimizer, Progress())


def _config(student: str, corpus: dict[str, Any], soft_labels: dict[str, Any] | None) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "name": student,
            "output": "unused",
            "corpus": corpus,
            "soft_labels": soft_labels,
            "front_end": FRONT_END.model_dump(),
            "model": {"architecture": "conv_glu", "arguments": STUDENTS[student]},
            "training": {"batch_seconds": BATCH_SECONDS, "num_threads": 1},
        }
    )


def random_targets(rng: np.random.Generator, num_frames: int, num_classes: int) -> SoftTargets:
    """Top ``TOP_K`` of each frame: probabilities fall by half from rank to rank, more or less, and 3% are outside."""
    k = min(TOP_K, num_classes)
    strides_T1 = rng.integers(1, num_classes // k, (num_frames, 1), endpoint=True)
    ids_TK = (rng.integers(0, num_classes, (num_frames, 1)) + strides_T1 * np.arange(k)) % num_classes
    log_probs_TK = np.cumsum(-rng.exponential(0.7, (num_frames, k)), axis=1)
    log_probs_TK += np.log(0.97) - np.log(np.exp(log_probs_TK).sum(axis=1, keepdims=True))
    return SoftTargets(
        num_classes=num_classes,
        temperatures=(1.0, 2.0),
        offsets=offsets_of(np.full(num_frames, k)),
        class_ids=ids_TK.astype(np.int32).ravel(),
        log_probs=log_probs_TK.astype(np.float32).ravel(),
        tail_mass=np.tile(np.array([[0.03, 0.1]], dtype=np.float32), (num_frames, 1)),
    )


def random_examples(num_classes: int, seconds: float) -> list[Example]:
    """One batch, all frames labelled."""
    rng = np.random.default_rng(0)
    frames = rng.uniform(0.9, 1.1, max(1, round(seconds / _MEAN_SECONDS))) * 1000 * _MEAN_SECONDS
    return [
        Example(
            utterance_id=f"{index}",
            features=rng.standard_normal((num_frames, FRONT_END.num_features)).astype(np.float32),
            hard_labels=rng.integers(0, num_classes, num_frames),
            soft=random_targets(rng, num_frames, num_classes),
        )
        for index, num_frames in enumerate((frames / FRONT_END.output_frame_shift_ms).astype(int))
    ]


Label = Callable[[Corpus, SpecDocument], Sequence[LabelledUtterance]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyCorpus:
    """Noise in ``folder``, with labels of ``num_classes`` classes and a published dataset of soft labels."""

    folder: Path
    num_classes: int

    @property
    def corpus(self) -> Corpus:
        return load_corpus(str(self.folder / "corpus.parquet"))

    def config(self, student: str) -> TrainConfig:
        """Of a run on it; the features are computed from the audio."""
        (self.folder / "inventory.json").write_bytes(inventory(self.num_classes).to_json())
        corpus = {"manifest": str(self.folder / "corpus.parquet"), "inventory": str(self.folder / "inventory.json")}
        return _config(student, corpus, {"url": str(self.folder / "labels")})

    def data(self, *, soft: bool = True, stored_features: bool = False) -> TrainingData:
        """Features are computed from the audio, or read from the files that hold them."""
        corpus, url = self.corpus, str(self.folder / "labels")
        digest = inventory(self.num_classes).digest()
        labels = [SoftLabels(open_dataset(url), SoftLabelConfig(url=url), corpus, digest)] if soft else []
        return TrainingData(corpus, STORED if stored_features else FRONT_END, labels)


def write_toy_corpus(folder: Path, *, seconds: float, num_classes: int, label: Label) -> ToyCorpus:
    """``label`` gives the soft labels of all rows, in order. Rows share eight files: which ones
    does not change what reading costs."""
    rng = np.random.default_rng(0)
    sounds = (rng.uniform(0.5, 1.5, 8) * _MEAN_SECONDS * FRONT_END.sample_rate).astype(int)
    for index, num_samples in enumerate(sounds):
        samples = 0.1 * rng.standard_normal(num_samples).astype(np.float32)
        np.save(folder / f"{index}.npy", FRONT_END.compute(32_768 * samples))
        soundfile.write(folder / f"{index}.wav", samples, FRONT_END.sample_rate, subtype="PCM_16")
    hashes = [sha256_hex((folder / f"{index}.wav").read_bytes()) for index in range(8)]
    rows = []
    for index in range(max(8, round(seconds / _MEAN_SECONDS))):
        num_samples = int(sounds[index % 8])
        labels_T = rng.integers(0, num_classes, FRONT_END.num_frames(num_samples)).astype(np.int32)
        rows.append(
            Utterance(
                utterance_id=f"utt-{index:06d}",
                audio=f"{index % 8}.wav",
                features=f"{index % 8}.npy",
                sha256=hashes[index % 8],
                sample_rate=FRONT_END.sample_rate,
                num_samples=num_samples,
                split="train",
                hard_labels=labels_T,
            )
        )
    own = inventory(num_classes)
    shift = FRONT_END.output_frame_shift_ms
    write_corpus(folder / "corpus.parquet", rows, inventory=own, hard_label_frame_shift_ms=shift)
    toy = ToyCorpus(folder=folder, num_classes=num_classes)
    _publish(toy, own, label)
    return toy


def random_labels(corpus: Corpus, document: SpecDocument) -> list[LabelledUtterance]:
    rng, stats = np.random.default_rng(1), UtteranceStats(kept_mass=0.97, entropy=1.0, agreement=0.5)
    return [
        LabelledUtterance(
            utterance_id=row.utterance_id,
            targets=random_targets(rng, FRONT_END.num_frames(row.num_samples), document.spec.num_classes),
            stats=stats,
        )
        for row in corpus
    ]


def _publish(toy: ToyCorpus, own: ClassInventory, label: Label) -> None:
    corpus = toy.corpus
    num_shards = max(1, round(float(corpus.seconds().sum()) / _SHARD_SECONDS))
    document = SpecDocument(
        spec=SPEC.model_copy(
            update={
                "inventory_digest": own.digest(),
                "num_classes": own.num_classes,
                "frame_shift_ms": FRONT_END.output_frame_shift_ms,
                "temperatures": (1.0, 2.0),
                "selection": TopK(k=min(TOP_K, own.num_classes)),
            }
        ),
        storage=StorageSpec(
            shard_format="parquet",
            num_shards=num_shards,
            num_rows=len(corpus),
            shard_seconds=_SHARD_SECONDS,
            batch_seconds=BATCH_SECONDS,
            on_error="fail",
        ),
    )
    store = ObjectStore(str(toy.folder / "labels"))
    begin(store, document, own)
    rows = label(corpus, document)
    for shard_range in cut_evenly(len(rows), num_shards):
        commit_rows(store, document, shard_range, rows)
    publish(store, document)
