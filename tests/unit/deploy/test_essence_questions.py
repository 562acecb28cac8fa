"""The sweeps of the experiment, without training: every one is valid, and takes the settings that its trials have found."""

from __future__ import annotations

import json
from pathlib import Path

import essence_settings
import pytest
from essence_arms import Question, trials_of
from essence_questions import EIGHT_BYTES, MODELS, QUESTIONS

from student_trainer.sweep_config import load_sweep

Kinds = dict[essence_settings.Kind, essence_settings.Settings]


def with_chosen(name: str, settings: Kinds) -> Kinds:
    errors = {arm.name: float(arm.name != name) for arm in EIGHT_BYTES.arms}
    return settings | {"chosen": EIGHT_BYTES.best(errors, settings)}


SETTINGS = with_chosen("sampled-13", {kind: trials[-1] for kind, trials in essence_settings.TRIALS.items()})
SWEEPS = [EIGHT_BYTES, *QUESTIONS, *(trials_of(name, model, 6) for name, model in MODELS.items())]


@pytest.mark.parametrize("question", SWEEPS, ids=lambda question: question.name)
def test_a_valid_sweep_with_equal_budgets(question: Question, tmp_path: Path) -> None:
    path = tmp_path / "sweep.toml"
    path.write_text(question.toml(SETTINGS, epochs=3, seeds=5))
    sweep = load_sweep(path)
    assert sweep.arms == tuple(arm.name for arm in question.arms)
    assert len(sweep.runs) == question.seeds * len(question.arms)
    # Those with hard labels of a share alone hear that share more often.
    shares = {"hard-50": 2, "hard-25": 4}
    assert {
        run.training.epochs / shares.get(run.name, 1) for run in sweep.runs if run.model == sweep.runs[0].model
    } == {3 * question.num_epochs}
    assert (sweep.evaluate.splits == ("dev",)) is question.on_dev


def test_the_best_trial_is_taken(tmp_path: Path) -> None:
    """The lowest mean over seeds; other metrics and arms do not count."""
    rows = [("a", 3.0), ("a", 1.0), ("b", 1.9), ("b", 1.9)]
    records = [{"arm": arm, "metric": "frame_error_rate", "value": value} for arm, value in rows]
    records.append({"arm": "a", "metric": "phone_error_rate", "value": 0.0})
    (tmp_path / "sweep.json").write_text(json.dumps({"sweeps": [{"records": records}]}))
    assert essence_settings.dev_errors(tmp_path / "sweep.json") == {"a": 2.0, "b": 1.9}


def test_a_chosen_arm_that_is_there_already_is_left_out(tmp_path: Path) -> None:
    (how_much,) = [question for question in QUESTIONS if question.trials]
    assert "8-bytes-chosen" in how_much.toml(SETTINGS, epochs=1, seeds=1)
    both = SETTINGS | {"both": essence_settings.Settings(soft={"weight": 0.8, "temperature": 1.0})}
    assert "8-bytes-chosen" not in how_much.toml(with_chosen("budget-ghost", both), epochs=1, seeds=1)
