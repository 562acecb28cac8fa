"""From a Hugging Face CTC model to a student that can teach: import, label, train with both losses, evaluate, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner

pytest.importorskip("transformers", reason="no Hugging Face: pip install '.[hf]'")

from softlabel_schemas import Utterance, load_corpus, open_dataset, write_corpus
from softlabel_schemas.bundle import BundleReader
from softlabel_schemas.front_end import Fbank
from student_trainer.cli import main as student_trainer
from student_trainer.config import SoftLabelConfig, TrainConfig
from student_trainer.evaluate import evaluate_dataset, evaluate_run
from student_trainer.export import export
from student_trainer.run_folder import RunFolder
from student_trainer.soft_labels import SoftLabels
from student_trainer.train import train
from teacher_service.cli import main as teacher_service
from teacher_service.config import TeacherConfig
from teacher_service.job import prepare
from tests.support.hugging_face import save_folder, tiny_model
from tests.support.teachers import job_fields, make_job, write_job

pytestmark = pytest.mark.ray

SAMPLE_RATE = 16_000
TEXTS = ("AB C", "B", "C AC", "BA")


def write_utterances(folder: Path) -> Path:
    """Noise of four lengths, with transcripts in the tokens of the tiny model."""
    rng = np.random.default_rng(0)
    utterances = []
    for index, text in enumerate(TEXTS):
        num_samples = 9600 + 1711 * index
        soundfile.write(folder / f"{index}.wav", 0.1 * rng.standard_normal(num_samples), SAMPLE_RATE, subtype="PCM_16")
        utterances.append(
            Utterance(
                utterance_id=f"utt-{index}",
                audio=f"{index}.wav",
                sample_rate=SAMPLE_RATE,
                num_samples=num_samples,
                split="dev" if index == 3 else "train",
                text=text,
            )
        )
    write_corpus(folder / "corpus.parquet", utterances)
    return folder / "corpus.parquet"


def invoke(command: Any, *arguments: str) -> str:
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_from_a_folder_to_a_student(tmp_path: Path) -> None:
    manifest = str(write_utterances(tmp_path))
    folder = save_folder(tmp_path / "tiny-hubert", tiny_model("hubert", "layer"))
    invoke(teacher_service, "import-hf", str(folder), str(tmp_path / "teacher"))
    fields = job_fields(manifest, [TeacherConfig(bundle=str(tmp_path / "teacher"))], tmp_path / "labels")
    job = write_job(tmp_path / "job.toml", {**fields, "selection": {"policy": "top_k", "k": 8}})
    invoke(teacher_service, "run", str(job))
    dataset = open_dataset(tmp_path / "labels")
    assert dataset.manifest.spec.frame_shift_ms == 20.0
    assert dataset.inventory.blank == "<pad>"
    front_end = Fbank(stack=2, snip_edges=True)
    for utterance in load_corpus(manifest):
        targets = dataset[utterance.utterance_id].targets
        assert targets.num_frames == front_end.num_frames(utterance.num_samples)
        np.testing.assert_allclose(targets.kept_mass_T(), 1.0, atol=1e-2)

    config = TrainConfig.model_validate(
        {
            "name": "student",
            "output": str(tmp_path / "run"),
            "corpus": {"manifest": manifest, "inventory": str(tmp_path / "teacher" / "inventory.json")},
            "soft_labels": {"url": str(tmp_path / "labels"), "frames": {"blank": 0.0}},
            "ctc": {},
            "front_end": front_end.model_dump(),
            "model": {"architecture": "tdnn", "arguments": {"hidden": 16, "num_layers": 2}},
            "training": {"epochs": 6, "batch_seconds": 1.5, "learning_rate": 0.01, "num_threads": 1},
        }
    )
    assert config.soft_labels is not None
    check_blank_weights(config.soft_labels, manifest)
    assert train(config)
    history = RunFolder(config.output).read_json("run.json")["history"]
    for name in ("hard_loss", "soft_loss"):
        assert history[-1][name] < history[0][name]
    result = evaluate_run(config.output, manifest, ["dev"], None)
    assert (result["num_tokens"], result["num_words"]) == (2, 1)
    ensemble = evaluate_dataset(
        str(tmp_path / "labels"), manifest, ["dev"], str(tmp_path / "e.json"), None, "characters"
    )
    found = dataset["utt-3"].targets.top1_T()
    assert ensemble["utterances"][0]["frames"] == len(found)
    arguments = ["--corpus", manifest, "--split", "train", "--ctc", "characters", "--output", str(tmp_path / "e.json")]
    printed = invoke(student_trainer, "evaluate", "--dataset", str(tmp_path / "labels"), *arguments)
    assert "token_error_rate" in printed
    assert "word_error_rate" in printed

    # The student has the teacher's classes, blank included, and its frames: it joins the ensemble.
    export(config.output, tmp_path / "student")
    assert BundleReader(tmp_path / "student").inventory == dataset.inventory
    teachers = [TeacherConfig(bundle=str(tmp_path / name)) for name in ("teacher", "student")]
    assert prepare(make_job(manifest, teachers, tmp_path / "both")).inventory == dataset.inventory


def check_blank_weights(config: SoftLabelConfig, manifest: str) -> None:
    """0 where the teacher's likeliest class is the blank, 1 elsewhere; the tiny model has frames of both."""
    corpus = load_corpus(manifest)
    dataset = open_dataset(config.url)
    soft_labels = SoftLabels(dataset, config, corpus, dataset.inventory.digest())
    weights = soft_labels.of(list(corpus))
    is_blank = np.concatenate([each.soft.top1_T() == dataset.inventory.blank_id for each in weights])
    found = np.concatenate([each.weights_T for each in weights if each.weights_T is not None])
    np.testing.assert_array_equal(found, 1.0 - is_blank)
    assert 0 < is_blank.mean() < 1
