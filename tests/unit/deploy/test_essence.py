"""The questions on real speech: every SWEEP.toml is valid, and its arms differ in what their names say."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from student_trainer.sweep_config import Sweep, load_sweep

LOCAL = Path(__file__).resolve().parents[3] / "deploy" / "local"


@pytest.fixture
def essence(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(LOCAL))
    for name in ("essence", "recipe", "speechocean762"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("essence")


@pytest.fixture
def sweeps(essence: ModuleType, tmp_path: Path) -> dict[str, Sweep]:
    loaded = {}
    for question in essence.QUESTIONS:
        path = tmp_path / f"{question.name}.toml"
        path.write_text(question.toml(epochs=15, seeds=5), encoding="utf-8")
        loaded[question.name] = load_sweep(path)
    return loaded


def test_every_question_is_a_valid_sweep_on_one_dataset(sweeps: dict[str, Sweep], tmp_path: Path) -> None:
    soft = [run.soft_labels for sweep in sweeps.values() for run in sweep.runs if run.soft_labels]
    assert {labels.url for labels in soft} == {str(tmp_path / "labels-train")}
    for sweep in sweeps.values():
        assert "hard" in sweep.arms
        assert next(run for run in sweep.runs if run.name == "hard").soft_labels is None


def test_arms_of_a_question_have_equal_budgets_and_models(sweeps: dict[str, Sweep]) -> None:
    for sweep in sweeps.values():
        assert len({run.training.model_dump_json() for run in sweep.runs}) == 1
        assert len({run.model.model_dump_json() for run in sweep.runs}) == 1


def test_arms_are_what_their_names_say(sweeps: dict[str, Sweep]) -> None:
    runs = {(name, run.name): run for name, sweep in sweeps.items() for run in sweep.runs}
    heads = runs["does-it-help", "top-20-and-hard-two-heads"].soft_labels
    assert heads is not None
    assert heads.num_heads == 2
    for (_, arm), run in runs.items():
        assert (run.augmentation is not None) == arm.endswith("-augmented")
        if arm.startswith("all-soft"):
            assert run.soft_labels is not None
            assert run.soft_labels.selection is None
            assert (run.soft_labels.weight == 1) == (not arm.endswith("-and-hard"))
