"""Any [positions x classes] teacher: an image classifier, with one position, and a causal language model of 70,000 tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from softlabel_schemas import open_dataset
from softlabel_schemas.cli import main as softlabels
from student_trainer.config import TrainConfig
from student_trainer.run_folder import RunFolder
from student_trainer.train import train
from teacher_service.cli import main as teacher_service
from teacher_service.config import TeacherConfig
from teacher_service.job import prepare
from tests.support.beyond_speech import (
    IMAGE_CLASSES,
    NUM_PIXELS,
    NUM_TOKENS,
    SECOND_MS,
    TOKENS,
    CausalLanguageModel,
    ImageClassifier,
    write_positions,
    write_teacher,
)
from tests.support.labelling import run_here
from tests.support.teachers import job_fields, make_job, write_job

NUM_KEPT = 4
TOP = {"policy": "top_k", "k": NUM_KEPT, "keep_hard_label": True}


def invoke(command: Any, *arguments: str) -> None:
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output


def check_labels(url: Path, logits: list[torch.Tensor], labels: list[np.ndarray]) -> None:
    """The best classes of the model, and the hard label, with their log-probabilities."""
    dataset = open_dataset(url)
    assert len(dataset) == len(logits)
    for index, (logits_TV, labels_T) in enumerate(zip(logits, labels, strict=True)):
        targets = dataset[f"{index}"].targets
        assert targets.num_frames == len(logits_TV)
        log_probs_TV = logits_TV.double().log_softmax(dim=1)
        best_TK = log_probs_TV.topk(NUM_KEPT).indices.tolist()
        for t in range(targets.num_frames):
            own = targets.frames(t, t + 1)
            assert set(own.class_ids.tolist()) == {*best_TK[t], int(labels_T[t])}
            expected = log_probs_TV[t, own.class_ids.astype(np.int64)].exp().sqrt().numpy()
            # What the default codec rounds the square root of a probability by, and half a step of packed-u8's.
            np.testing.assert_allclose(np.exp(own.log_probs / 2), expected, rtol=1 / 60, atol=1 / 300)


def student(url: Path, manifest: str, num_features: int, output: Path, architecture: str) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "name": "student",
            "output": str(output),
            "corpus": {
                "manifest": manifest,
                "inventory": str(Path(manifest).parent / "inventory.json"),
                "dev_splits": [],
            },
            "soft_labels": {"url": str(url)},
            "front_end": {"kind": "precomputed", "num_features": num_features, "frame_shift_ms": SECOND_MS},
            "model": {"architecture": architecture},
            "training": {"epochs": 3, "batch_seconds": 8, "learning_rate": 0.02, "num_threads": 1},
        }
    )


def check_learns(config: TrainConfig) -> None:
    assert train(config)
    history = RunFolder(config.output).read_json("run.json")["history"]
    assert history[-1]["soft_loss"] < history[0]["soft_loss"]
    assert history[-1]["hard_loss"] < history[0]["hard_loss"]


@pytest.mark.ray
def test_an_image_classifier(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [rng.standard_normal((1, NUM_PIXELS)).astype(np.float32) for _ in range(24)]
    labels = [rng.integers(0, IMAGE_CLASSES.num_classes, 1) for _ in images]
    manifest = write_positions(tmp_path / "images", images, labels, IMAGE_CLASSES)
    torch.manual_seed(0)
    model = ImageClassifier()
    write_teacher(tmp_path / "classifier", model, NUM_PIXELS, IMAGE_CLASSES)
    teachers = [TeacherConfig(bundle=str(tmp_path / "classifier"))]
    job = job_fields(manifest, teachers, tmp_path / "labels", selection=TOP, destination__shard_seconds=10)
    invoke(teacher_service, "run", str(write_job(tmp_path / "job.toml", job)))
    invoke(softlabels, "verify", str(tmp_path / "labels"))
    with torch.inference_mode():
        logits = model(torch.from_numpy(np.stack(images)), torch.ones(len(images), dtype=torch.int64))[0]
    check_labels(tmp_path / "labels", list(logits), labels)
    check_learns(student(tmp_path / "labels", manifest, NUM_PIXELS, tmp_path / "run", "tdnn"))


def test_a_causal_language_model(tmp_path: Path) -> None:
    """Ids beyond 16 bits come through every codec; the hard label is the token that follows."""
    rng = np.random.default_rng(1)
    texts = [rng.integers(NUM_TOKENS - 3000, NUM_TOKENS, length + 1) for length in (7, 12, 1, 9)]
    ids, labels = [text[:-1, None] for text in texts], [text[1:] for text in texts]
    manifest = write_positions(tmp_path / "texts", ids, labels, TOKENS)
    torch.manual_seed(0)
    model = CausalLanguageModel()
    write_teacher(tmp_path / "lm", model, 1, TOKENS)
    teachers = [TeacherConfig(bundle=str(tmp_path / "lm"))]
    with torch.inference_mode():
        logits = [model(torch.from_numpy(own)[None].float(), torch.tensor([len(own)]))[0][0] for own in ids]
    for codec, container in (("mtf-sqrt", "parquet"), ("packed-u8", "zarr"), ("packed-f32", "parquet")):
        destination = {"targets": {"codec": codec}, "destination__format": container, "destination__shard_seconds": 10}
        job = prepare(make_job(manifest, teachers, tmp_path / codec, selection=TOP, **destination))
        run_here(job)
        check_labels(tmp_path / codec, logits, labels)
        stored = np.concatenate([utterance.targets.class_ids for utterance in open_dataset(tmp_path / codec)])
        assert stored.max() > 2**16
    encoder = "tests.support.beyond_speech:token_encoder"
    check_learns(student(tmp_path / "mtf-sqrt", manifest, 1, tmp_path / "run", encoder))
