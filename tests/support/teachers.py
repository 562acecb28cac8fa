"""Tiny teacher bundles, a tiny corpus of generated audio, and jobs on both."""

from __future__ import annotations

import builtins
import functools
import io
import json
import math
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import soundfile
import torch
from torch import Tensor, nn

from softlabel_schemas import ClassInventory, Utterance, write_corpus
from softlabel_schemas.bundle import write_bundle
from softlabel_schemas.folds import Fold
from softlabel_schemas.front_end import Fbank
from softlabel_schemas.selection import Mass, Threshold, TopK
from softlabel_schemas.strict import parse
from softlabel_schemas.targets import SoftTargets
from student_trainer.models import AcousticModel, build_acoustic_model
from teacher_service.config import JobConfig, TeacherConfig
from tests.support.targets import Float32, ranking, targets_from_dense

SAMPLE_RATE = 16_000
FRAME_SHIFT_MS = 10.0
INVENTORY = ClassInventory(names=tuple(f"senone-{index}" for index in range(12)))
ARGUMENTS: dict[str, dict[str, Any]] = {
    "tdnn": {"hidden": 8, "num_layers": 2},
    "conv_glu": {"hidden": 8, "num_layers": 1, "kernel_size": 3},
    "conformer": {"hidden": 8, "num_layers": 1, "num_heads": 2, "kernel_size": 3},
    "blstm": {"hidden": 6, "num_layers": 1},
}
OWN_FACTORY = "student_trainer.models:build_acoustic_model"
LINEAR_FACTORY = "tests.support.teachers:linear_model"


# Models


def model_arguments(architecture: str, num_mel_bins: int) -> dict[str, Any]:
    """Keywords of ``build_acoustic_model``."""
    return {
        "architecture": architecture,
        "num_features": num_mel_bins,
        "num_classes": INVENTORY.num_classes,
        "arguments": ARGUMENTS[architecture],
    }


@functools.cache
def eager_model(architecture: str, num_mel_bins: int = 40, seed: int = 0) -> AcousticModel:
    """Random weights, larger than usual so that posteriors are peaked; in evaluation mode."""
    with torch.inference_mode(False), torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_acoustic_model(**model_arguments(architecture, num_mel_bins))
        with torch.no_grad():
            model.heads[0].weight.mul_(8)
    return model.eval()


@functools.cache
def exported_program(architecture: str, num_mel_bins: int = 40, seed: int = 0) -> bytes:
    """An ordinary export with the batch and the time axis dynamic; seconds each, so made once."""
    return export(eager_model(architecture, num_mel_bins, seed), num_mel_bins)


def export(model: nn.Module, num_features: int, *, min_frames: int = 1) -> bytes:
    batch, frames = torch.export.Dim("batch", min=1, max=1 << 16), torch.export.Dim("time", min=min_frames, max=1 << 20)
    example = (torch.zeros(2, 32, num_features), torch.tensor([32, 20]))
    with warnings.catch_warnings():
        # torch.export warns about its own internals.
        warnings.simplefilter("ignore")
        program = torch.export.export(model, example, dynamic_shapes=({0: batch, 1: frames}, {0: batch}))
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
    return buffer.getvalue()


class LinearModel(nn.Module):
    """One layer; with traits that a teacher should not have. Made by :func:`linear_model`."""

    def __init__(
        self, num_features: int, num_classes: int, *, nan_above: float, delay_seconds: float, rank: int
    ) -> None:
        super().__init__()
        self.layer = nn.Linear(num_features, num_classes)
        self.nan_above, self.delay_seconds, self.rank = nan_above, delay_seconds, rank

    def forward(self, features_BTD: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        time.sleep(self.delay_seconds)
        logits = self.layer(features_BTD)
        means_B = features_BTD.sum(dim=(1, 2)) / (lengths_B * features_BTD.shape[2])
        logits = logits.masked_fill((means_B > self.nan_above)[:, None, None], torch.nan)
        return logits if self.rank == 3 else logits[0], lengths_B


def linear_model(
    num_features: int, num_classes: int, nan_above: float = 1e9, delay_seconds: float = 0.0, rank: int = 3
) -> LinearModel:
    """
    Args:
        nan_above: an utterance whose mean feature is above this gets no finite logits.
        delay_seconds: how long every batch takes.
        rank: of the logits; 3 is right.
    """
    return LinearModel(num_features, num_classes, nan_above=nan_above, delay_seconds=delay_seconds, rank=rank)


class ShortModel(LinearModel):
    """Gives one frame less than it gets."""

    def forward(self, features_BTD: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        logits_BTV, _ = super().forward(features_BTD, lengths_B)
        return logits_BTV[:, :-1], lengths_B - 1


def short_model(num_features: int, num_classes: int) -> LinearModel:
    return ShortModel(num_features, num_classes, nan_above=1e9, delay_seconds=0.0, rank=3)


class PaddingModel(LinearModel):
    """Gives frames beyond the lengths too."""

    def forward(self, features_BTD: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        logits_BTV, _ = super().forward(features_BTD, lengths_B)
        return nn.functional.pad(logits_BTV, (0, 0, 0, 3)), lengths_B


def padding_model(num_features: int, num_classes: int) -> LinearModel:
    return PaddingModel(num_features, num_classes, nan_above=1e9, delay_seconds=0.0, rank=3)


class FaultyModel(LinearModel):
    """Right, unless an utterance's mean feature is above a threshold. Made by :func:`faulty_model`."""

    def __init__(self, num_features: int, num_classes: int, *, fault: str, above: float) -> None:
        super().__init__(num_features, num_classes, nan_above=1e9, delay_seconds=0.0, rank=3)
        self.fault, self.above = fault, above

    def forward(self, features_BTD: Tensor, lengths_B: Tensor) -> Any:
        logits_BTV, lengths_B = super().forward(features_BTD, lengths_B)
        loud_B = features_BTD.sum(dim=(1, 2)) / (lengths_B * features_BTD.shape[2]) > self.above
        if not loud_B.any():
            return logits_BTV, lengths_B
        if self.fault == "device":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if self.fault == "raises":
            raise ValueError("the kernel is longer\nthan the input")
        if self.fault == "memory alone":
            raise torch.OutOfMemoryError("CUDA out of memory. Process 4711 has 78.00 GiB memory in use")
        if self.fault in ("memory", "chance"):
            if len(features_BTD) > 1:
                raise (
                    torch.OutOfMemoryError("CUDA out of memory") if self.fault == "memory" else RuntimeError("bad luck")
                )
            return logits_BTV, lengths_B
        answers: dict[str, Any] = {
            "classes": (logits_BTV[:, :, :-1], lengths_B),
            "rank": (logits_BTV[0], lengths_B),
            "not finite": (logits_BTV * torch.where(loud_B, math.nan, 1.0)[:, None, None], lengths_B),
            "one frame less": (logits_BTV, lengths_B - loud_B.long()),
            "no frames": (logits_BTV, lengths_B * ~loud_B),
            "beyond": (logits_BTV, lengths_B + 1000 * loud_B),
            "negative": (logits_BTV, lengths_B - 1000 * loud_B),
            "real lengths": (logits_BTV, lengths_B.float()),
            "one length": (logits_BTV, lengths_B[:, None]),
            "logits alone": logits_BTV,
        }
        return answers[self.fault]


def faulty_model(num_features: int, num_classes: int, fault: str, above: float) -> LinearModel:
    return FaultyModel(num_features, num_classes, fault=fault, above=above)


def not_a_model(**_: Any) -> int:
    return 42


def refusing_model(error: str, **_: Any) -> nn.Module:
    """Raises the built-in exception of that name."""
    raise getattr(builtins, error)("no such size")


def dying_model(**_: Any) -> nn.Module:
    """As where memory runs out."""
    os._exit(3)


# Bundles


def state(model: nn.Module) -> bytes:
    return safetensors.torch.save({name: tensor.contiguous() for name, tensor in model.state_dict().items()})


def write_teacher(
    folder: Path,
    architecture: str,
    *,
    num_mel_bins: int = 40,
    seed: int = 0,
    inventory: ClassInventory = INVENTORY,
    frame_shift_ms: float = FRAME_SHIFT_MS,
) -> TeacherConfig:
    """A bundle of :func:`eager_model`: exported, the recurrent one with this project's own factory."""
    recurrent = architecture == "blstm"
    write_bundle(
        folder,
        name=f"{architecture}-{num_mel_bins}",
        model=state(eager_model(architecture, num_mel_bins, seed))
        if recurrent
        else exported_program(architecture, num_mel_bins, seed),
        factory=OWN_FACTORY if recurrent else None,
        arguments=model_arguments(architecture, num_mel_bins),
        front_end=Fbank(num_mel_bins=num_mel_bins),
        inventory=inventory,
        frame_shift_ms=frame_shift_ms,
        replace=True,
    )
    return TeacherConfig(bundle=str(folder))


def write_linear_teacher(
    folder: Path,
    *,
    factory: str = LINEAR_FACTORY,
    model: bytes | None = None,
    normalize: str = "none",
    inventory: ClassInventory = INVENTORY,
    frame_shift_ms: float = FRAME_SHIFT_MS,
    seed: int = 1,
    held_out: Fold | None = None,
    **arguments: Any,
) -> TeacherConfig:
    """A bundle of :func:`linear_model`, allowed by the configuration that is returned.

    Args:
        model: other weights than those of ``seed``.
        held_out: what the bundle says of its training.
        arguments: of ``factory``, besides the numbers of features and classes.
    """
    arguments = {"num_features": 40, "num_classes": INVENTORY.num_classes} | arguments
    if model is None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = state(nn.ModuleDict({"layer": nn.Linear(arguments["num_features"], arguments["num_classes"])}))
    write_bundle(
        folder,
        name="linear",
        model=model,
        factory=factory,
        arguments=arguments,
        front_end=Fbank(normalize=normalize),
        inventory=inventory,
        frame_shift_ms=frame_shift_ms,
        held_out=held_out,
        replace=True,
    )
    return TeacherConfig(bundle=str(folder), allow_factory=factory)


# Corpus


@dataclass(frozen=True, slots=True, kw_only=True)
class Sounds:
    """A corpus on disk; utterance ``utt-001`` is ``utt-001.wav`` beside the manifest."""

    folder: Path
    utterances: tuple[Utterance, ...]

    @property
    def manifest(self) -> str:
        return str(self.folder / "corpus.parquet")

    def write(
        self, *, inventory: ClassInventory = INVENTORY, hard_label_frame_shift_ms: float = FRAME_SHIFT_MS
    ) -> Sounds:
        write_corpus(
            self.manifest,
            self.utterances,
            inventory=inventory,
            hard_label_frame_shift_ms=hard_label_frame_shift_ms,
        )
        return self


# Log mel energies without normalisation: a quiet utterance's mean is below, a loud one's above.
LOUDNESS = 14.0


def write_sounds(folder: Path, seconds: Sequence[float], *, loud: Sequence[int] = ()) -> Sounds:
    """A tone in noise for each duration. Every fourth utterance, the first among them, has no hard labels; the others
    lack one in three. The third is of split test, the rest of split train.

    Args:
        loud: indices of utterances ten thousand times as powerful as the others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(seconds))
    utterances = []
    for index, duration in enumerate(seconds):
        utterance_id, num_samples = f"utt-{index:03d}", round(duration * SAMPLE_RATE)
        hertz = rng.uniform(200, 3000)
        samples = np.sin(2 * np.pi * hertz * np.arange(num_samples) / SAMPLE_RATE) + rng.standard_normal(num_samples)
        samples *= 0.2 if index in loud else 0.002
        soundfile.write(folder / f"{utterance_id}.wav", samples.clip(-1, 1), SAMPLE_RATE, subtype="PCM_16")
        labels_T = rng.integers(0, INVENTORY.num_classes, Fbank().num_frames(num_samples)).astype(np.int32)
        labels_T[rng.random(len(labels_T)) < 1 / 3] = -1
        utterances.append(
            Utterance(
                utterance_id=utterance_id,
                audio=f"{utterance_id}.wav",
                sample_rate=SAMPLE_RATE,
                num_samples=num_samples,
                split="test" if index == 2 else "train",
                hard_labels=labels_T if index % 4 else None,
            )
        )
    return Sounds(folder=folder, utterances=tuple(utterances)).write()


# Jobs


def job_fields(manifest: str, teachers: Sequence[TeacherConfig], url: str | Path, /, **changes: Any) -> dict[str, Any]:
    """A job as JOB.toml holds it; a key of ``changes`` such as ``destination__format`` is a table and a key."""
    fields: dict[str, Any] = {
        "corpus": {"manifest": manifest},
        "teachers": [teacher.model_dump(exclude_none=True) for teacher in teachers],
        "selection": {"policy": "top_k", "k": 4},
        "destination": {"url": str(url), "shard_seconds": 2.0},
        "resources": {"batch_seconds": 4.0},
    }
    for key, value in changes.items():
        table, _, name = key.partition("__")
        if name:
            fields.setdefault(table, {})[name] = value
        else:
            fields[table] = value
    return fields


def make_job(manifest: str, teachers: Sequence[TeacherConfig], url: str | Path, /, **changes: Any) -> JobConfig:
    return parse(JobConfig, job_fields(manifest, teachers, url, **changes), where="job")


def write_job(path: Path, fields: dict[str, Any]) -> Path:
    """As TOML, whose strings, numbers and arrays are written as in JSON; it has no null."""
    lines = []
    for table, body in fields.items():
        for entries in body if isinstance(body, list) else [body]:
            lines.append(f"[[{table}]]" if isinstance(body, list) else f"[{table}]")
            lines += [f"{name} = {json.dumps(value)}" for name, value in entries.items() if value is not None]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# Selection


def select_densely(
    log_posterior_TV: Float32,
    selection: TopK | Mass | Threshold,
    temperatures: tuple[float, ...],
    labels_T: npt.NDArray[np.integer],
) -> SoftTargets:
    """The documented rule, one class at a time, in float64; tails are sums over the whole posterior."""
    kept_TV = np.zeros(log_posterior_TV.shape, dtype=bool)
    probs_TV = np.exp(log_posterior_TV.astype(np.float64))
    for frame, ranked in enumerate(ranking(log_posterior_TV)):
        mass = 0.0
        for count, class_id in enumerate(ranked[: selection.cap]):
            prob = probs_TV[frame, class_id]
            reached = isinstance(selection, Mass) and mass >= selection.mass
            too_small = isinstance(selection, Threshold) and prob < selection.min_prob
            if count and (reached or too_small):
                break
            kept_TV[frame, class_id] = True
            mass += prob
        if selection.keep_hard_label and labels_T[frame] >= 0:
            kept_TV[frame, labels_T[frame]] = True
    return targets_from_dense(log_posterior_TV, kept_TV, temperatures)
