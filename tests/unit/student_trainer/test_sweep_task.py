"""One run of a sweep that decodes words, without Ray: each step is passed over once it is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from student_trainer.config import TrainConfig
from student_trainer.run_folder import RunFolder
from student_trainer.sweep_config import EvaluateConfig, Sweep, load_sweep
from student_trainer.sweep_task import evaluate_ensemble, train_and_evaluate
from tests.support.sweeps import write_sweep, write_words


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    folder = tmp_path_factory.mktemp("task")
    write_words(folder)
    return load_sweep(write_sweep(folder, "sweep", seeds=[0], epochs=1, words=True))


@pytest.fixture(scope="module")
def run(sweep: Sweep) -> TrainConfig:
    """Trained, its decoder tuned, evaluated."""
    train_and_evaluate(sweep.runs[1], sweep.evaluate)
    return sweep.runs[1]


def read(config: TrainConfig, name: str) -> Any:
    return json.loads((Path(config.output) / name).read_bytes())


def written(config: TrainConfig) -> dict[str, int]:
    """When each result was, ns."""
    names = ("model.safetensors", "decoder.json", "evaluation-test.json")
    return {name: (Path(config.output) / name).stat().st_mtime_ns for name in names}


def test_words_are_decoded_as_is_best_for_the_run_on_dev_speech(run: TrainConfig) -> None:
    tuned, evaluation = read(run, "decoder.json"), read(run, "evaluation-test.json")
    assert tuned["splits"] == ["dev"]
    assert evaluation["decoder"] == tuned["settings"]
    assert evaluation["word_error_rate"] > 0


def test_what_is_done_is_passed_over(sweep: Sweep, run: TrainConfig) -> None:
    before = written(run)
    train_and_evaluate(run, sweep.evaluate)
    assert written(run) == before


def test_what_was_evaluated_before_training_went_on_is_evaluated_again(sweep: Sweep, run: TrainConfig) -> None:
    """Someone looks at a run that is not done; it is then trained to its end, and killed before its evaluation."""
    right = read(run, "evaluation-test.json")
    RunFolder(run.output).write_json(
        "evaluation-test.json", right | {"weights_digest": "0" * 64, "frame_error_rate": 99.0}
    )
    train_and_evaluate(run, sweep.evaluate)
    assert read(run, "evaluation-test.json") == right


def test_words_that_were_not_asked_for_before_are_decoded_later(sweep: Sweep) -> None:
    """With the same model."""
    config = sweep.runs[0]
    train_and_evaluate(config, EvaluateConfig())
    model = (Path(config.output) / "model.safetensors").stat().st_mtime_ns
    assert "word_error_rate" not in read(config, "evaluation-test.json")
    assert not (Path(config.output) / "decoder.json").exists()
    train_and_evaluate(config, sweep.evaluate)
    assert read(config, "evaluation-test.json")["word_error_rate"] > 0
    assert written(config)["model.safetensors"] == model


def test_the_ensemble_has_a_decoder_of_its_own(sweep: Sweep) -> None:
    result = evaluate_ensemble(sweep)
    assert result is not None
    tuned = json.loads((sweep.output / "ensemble-decoder.json").read_bytes())
    found = json.loads(Path(result).read_bytes())
    assert tuned["splits"] == ["dev"]
    assert found["decoder"] == tuned["settings"]
    # Its posteriors favour the right class of each frame; a student of one epoch says little.
    assert found["word_error_rate"] < 50
