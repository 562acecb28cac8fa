"""Learning rate and soft weight in the course of a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from student_trainer import train as train_module
from student_trainer.config import SoftLabelConfig, TrainConfig, TrainingConfig
from student_trainer.loss import hard_and_soft_loss
from student_trainer.schedule import learning_rate, soft_weight
from student_trainer.train import train
from tests.support.disturbed import train_until_the_store_fails
from tests.support.speech import train_config, write_soft_labels, write_speech


class TestLearningRate:
    def test_rises_then_falls_to_zero(self) -> None:
        config = TrainingConfig(epochs=10, warmup=0.2, learning_rate=1.0)
        rates = [learning_rate(config, done) for done in (0, 1, 2, 6, 10)]
        assert rates == pytest.approx([0.01, 0.5, 1.0, 0.5, 0.0])
        assert all(0 < learning_rate(config, done) <= 1 for done in np.linspace(0, 9.99, 50))

    def test_without_warm_up(self) -> None:
        config = TrainingConfig(epochs=3, warmup=0.0, learning_rate=1.0)
        assert learning_rate(config, 0) == 1.0
        assert math.isclose(learning_rate(config, 3), 0.0, abs_tol=1e-12)


class TestSoftWeight:
    @pytest.mark.parametrize("done", [0.0, 0.3, 1.0])
    def test_is_constant_without_a_final_one(self, done: float) -> None:
        assert soft_weight(SoftLabelConfig(url="labels", weight=0.7), done) == 0.7

    @pytest.mark.parametrize(("first", "final"), [(0.8, 0.2), (0.2, 1.0), (1.0, 0.0)])
    def test_is_linear_to_the_final_one(self, first: float, final: float) -> None:
        config = SoftLabelConfig(url="labels", weight=first, final_weight=final)
        found = [soft_weight(config, done) for done in (0.0, 0.25, 1.0)]
        assert found == pytest.approx([first, 0.75 * first + 0.25 * final, final])

    def test_in_the_loop_also_of_a_resumed_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """From the gradients of the two losses, step by step; stopped within the second epoch."""
        speech = write_speech(tmp_path / "speech")
        url = write_soft_labels(tmp_path / "labels", speech.split("train")).url
        found: list[dict[str, float]] = []

        def watched(*args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
            hard, soft = hard_and_soft_loss(*args, **options)
            weights: dict[str, float] = {}
            hard.register_hook(lambda gradient: weights.update(hard=float(gradient)))
            soft.register_hook(lambda gradient: weights.update(soft=float(gradient)))
            found.append(weights)
            return hard, soft

        monkeypatch.setattr(train_module, "hard_and_soft_loss", watched)
        settings = {"soft_labels__weight": 1.0, "soft_labels__final_weight": 0.25, "training__epochs": 2}
        # A checkpoint after every step.
        settings["training__checkpoint_minutes"] = 1e-9
        config = train_config(speech, tmp_path / "run", url=url, **settings)
        train_until_the_store_fails(config, monkeypatch)
        assert train(config)
        steps_done = np.concatenate(
            [np.arange(steps) / steps + epoch for epoch, steps in enumerate(step_counts(config))]
        )
        assert len(found) == len(steps_done) > 8
        expected = 1.0 - 0.75 * steps_done / 2
        np.testing.assert_allclose([weights["soft"] for weights in found], expected, rtol=1e-6)
        np.testing.assert_allclose([weights["hard"] for weights in found], 1 - expected, atol=1e-6)


def step_counts(config: TrainConfig) -> list[int]:
    return [record["steps"] for record in json.loads((Path(config.output) / "run.json").read_bytes())["history"]]
