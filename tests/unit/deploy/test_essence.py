"""The questions on real speech: every SWEEP.toml is valid, and its arms differ in what their names say."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from student_trainer.config import TrainConfig
from student_trainer.sweep_config import Sweep, load_sweep
from teacher_service.config import load_job

LOCAL = Path(__file__).resolve().parents[3] / "deploy" / "local"
MODULES = ("essence", "essence_questions", "essence_settings", "essence_teachers", "recipe", "speechocean762")
EPOCHS = 12


@pytest.fixture
def essence(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(LOCAL))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("essence")


@pytest.fixture
def questions(essence: ModuleType) -> ModuleType:
    return sys.modules["essence_questions"]


@pytest.fixture
def settings(essence: ModuleType) -> ModuleType:
    return sys.modules["essence_settings"]


def trials_file(tmp_path: Path, settings: ModuleType, best: dict[str, int]) -> Path:
    """A ``sweep.json`` in which the trial of that index is the best of its kind."""
    rows = [
        {"arm": settings.trial_name(kind, trial), "metric": metric, "value": value}
        for kind, trials in settings.TRIALS.items()
        for index, trial in enumerate(trials)
        for metric, value in (("frame_error_rate", 60 - (index == best[kind])), ("phone_error_rate", 90 - index))
    ]
    path = tmp_path / "trials.json"
    path.write_text(json.dumps({"sweeps": [{"records": rows}]}))
    return path


def loaded(tmp_path: Path, question: object, chosen: object) -> Sweep:
    path = tmp_path / f"{question.name}.toml"  # type: ignore[attr-defined]
    path.write_text(question.toml(chosen, epochs=EPOCHS, seeds=5), encoding="utf-8")  # type: ignore[attr-defined]
    return load_sweep(path)


@pytest.fixture
def sweeps(questions: ModuleType, settings: ModuleType, tmp_path: Path) -> dict[str, Sweep]:
    chosen = settings.chosen(trials_file(tmp_path, settings, {"hard": 3, "soft": 1, "both": 3}))
    return {question.name: loaded(tmp_path, question, chosen) for question in questions.QUESTIONS}


def test_settings_of_each_kind_are_those_of_its_best_trial(settings: ModuleType, tmp_path: Path) -> None:
    best = {"hard": 3, "soft": 1, "both": 5}
    chosen = settings.chosen(trials_file(tmp_path, settings, best))
    assert chosen == {kind: settings.TRIALS[kind][index] for kind, index in best.items()}


def test_every_kind_has_the_same_number_of_trials_all_on_dev_speech(
    questions: ModuleType, settings: ModuleType, tmp_path: Path
) -> None:
    assert len({len(trials) for trials in settings.TRIALS.values()}) == 1
    for tuning in questions.TUNINGS:
        sweep = loaded(tmp_path, tuning, {})
        assert sweep.evaluate.splits == ("dev",)
        assert len(sweep.arms) == len(sweep.runs) == sum(map(len, settings.TRIALS.values()))
    tuned = [tuning.model for tuning in questions.TUNINGS]
    assert all(question.model in tuned for question in questions.QUESTIONS)


def test_every_question_is_a_valid_sweep_on_stored_labels(
    essence: ModuleType, sweeps: dict[str, Sweep], tmp_path: Path
) -> None:
    stored = {str(tmp_path / labels.url) for labels in sys.modules["essence_teachers"].LABELS}
    for sweep in sweeps.values():
        assert sweep.evaluate.splits == ("test",)
        assert sweep.evaluate.ensemble == str(tmp_path / "labels-test")
        assert {run.soft_labels.url for run in sweep.runs if run.soft_labels} <= stored


def test_the_share_of_all_soft_outputs_gain_is_asked_of_narrower_labels(sweeps: dict[str, Sweep]) -> None:
    gains = {name: sweep.gain for name, sweep in sweeps.items() if sweep.gain}
    assert gains == dict.fromkeys(("does-it-help", "how-much"), ("hard", "all-soft-and-hard"))


def test_arms_of_a_question_have_equal_budgets_and_models(sweeps: dict[str, Sweep]) -> None:
    """Epochs are of a run's own speech, of a quarter of the speakers say; all parts are as large."""
    for name, sweep in sweeps.items():
        heard = {run.training.epochs * len(run.corpus.train_splits) for run in sweep.runs}
        assert heard == {4 * EPOCHS * (2 if name == "longer" else 1)}
        assert len({run.model.model_dump_json() for run in sweep.runs}) == 1
        assert {run.training.precision for run in sweep.runs} == {"bfloat16"}


def test_arms_of_a_kind_have_the_settings_that_were_chosen_for_it(sweeps: dict[str, Sweep]) -> None:
    for sweep in sweeps.values():
        for run in sweep.runs:
            rate, decay = run.training.learning_rate, run.training.weight_decay
            if run.soft_labels is None:
                assert (rate, decay) == (2e-3, 0.1)
            else:
                assert decay == 0.01
                assert run.soft_labels.weight == (
                    1.0 if run.name.startswith("all-soft") and "hard" not in run.name else 0.8
                )


def test_arms_are_what_their_names_say(sweeps: dict[str, Sweep]) -> None:
    def heads(run: TrainConfig) -> tuple[int, str]:
        assert run.soft_labels is not None
        return run.soft_labels.num_heads, run.soft_labels.decoding_head

    runs = {(name, run.name): run for name, sweep in sweeps.items() for run in sweep.runs}
    assert heads(runs["does-it-help", "essence-two-heads"]) == (2, "hard")
    assert heads(runs["does-it-help", "essence-two-heads-soft-decodes"]) == (2, "soft")
    for (_, arm), run in runs.items():
        assert (run.augmentation is not None) == arm.endswith("-augmented")
        assert (run.soft_labels is None) == (arm.startswith("hard") and "soft" not in arm)
        if arm.startswith("all-soft"):
            assert run.soft_labels is not None
            assert run.soft_labels.selection is None
            assert (run.soft_labels.weight == 1) == (not arm.endswith("-and-hard"))
    for share, parts in ((25, 1), (50, 2), (100, 4)):
        alone, both = runs["unlabelled", f"hard-{share}"], runs["unlabelled", f"hard-{share}-soft-100"]
        assert len(alone.corpus.train_splits) == parts
        assert both.corpus.hard_label_splits == alone.corpus.train_splits
        assert len(both.corpus.train_splits) == 4


def test_an_arm_that_the_chosen_settings_make_the_same_as_another_is_left_out(
    questions: ModuleType, settings: ModuleType, sweeps: dict[str, Sweep], tmp_path: Path
) -> None:
    assert "essence-at-1" in sweeps["does-it-help"].arms
    chosen = settings.chosen(trials_file(tmp_path, settings, {"hard": 0, "soft": 0, "both": 2}))
    assert chosen["both"].soft["temperature"] == 1
    sweep = loaded(tmp_path, questions.QUESTIONS[0], chosen)
    assert "essence-at-1" not in sweep.arms
    assert ("sampled-50", "essence-at-1") not in sweep.pairs


def test_only_what_the_chosen_questions_need_is_labelled(essence: ModuleType, questions: ModuleType) -> None:
    def needed(*names: str) -> list[str]:
        chosen = [question for question in questions.QUESTIONS if question.name in names]
        return [labels.url for labels in essence.labels_of(chosen)]

    whole = ["labels-train", "labels-heard", "labels-dev", "labels-test", "labels-25", "labels-50"]
    assert [labels.url for labels in essence.labels_of(questions.QUESTIONS)] == whole
    assert needed("how-much") == ["labels-train", "labels-dev", "labels-test"]
    assert needed("unlabelled") == [url for url in whole if url != "labels-heard"]
    assert needed("does-it-help", "how-much") == whole[:4]


def test_a_question_finds_all_its_labels(essence: ModuleType, questions: ModuleType, sweeps: dict[str, Sweep]) -> None:
    for question in questions.QUESTIONS:
        sweep = sweeps[question.name]
        used = {url for run in sweep.runs if run.soft_labels for url in run.soft_labels.locations}
        used |= {url for url in (sweep.evaluate.ensemble, sweep.evaluate.dev_ensemble) if url}
        assert {Path(url).name for url in used} == question.labels()


def test_every_labelling_job_is_valid(essence: ModuleType, tmp_path: Path) -> None:
    for labels in sys.modules["essence_teachers"].LABELS:
        path = tmp_path / f"{labels.url}.toml"
        path.write_text(labels.job(essence.ARCHITECTURES, 638), encoding="utf-8")
        config = load_job(path)
        assert len(config.teachers) == 3 * len(labels.groups)
        assert config.targets.temperatures == (1.0, 2.0)
