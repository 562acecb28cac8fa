"""The questions on real speech: every SWEEP.toml is valid, and its arms differ in what their names say."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from pathlib import Path

import essence
import essence_questions as questions
import essence_settings as settings
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import speechocean762
from click.testing import CliRunner
from essence_arms import LABELS_TRAIN_EXACT, Question, trials_of
from essence_questions import EIGHT_BYTES
from essence_settings import Kind, Settings
from essence_teachers import LABELS, Labels
from recipe import Workspace

from softlabel_schemas import load_corpus
from softlabel_schemas.tempering import obstacle
from student_trainer.config import TrainConfig
from student_trainer.sweep_config import Sweep, load_sweep
from teacher_service.config import JobConfig, load_job

EPOCHS = 12
PRECISION = "float32"
ALL_QUESTIONS = (*questions.QUESTIONS, *questions.FURTHER_QUESTIONS)
Kinds = dict[Kind, Settings]


def trials_file(tmp_path: Path, best: dict[str, int]) -> Path:
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


def with_chosen(name: str, settings: Kinds) -> Kinds:
    """``name``: of the trial of eight bytes that is the best."""
    errors = {arm.name: float(arm.name != name) for arm in EIGHT_BYTES.arms}
    return settings | {"chosen": EIGHT_BYTES.best(errors, settings)}


def loaded(tmp_path: Path, question: Question, chosen: Kinds) -> Sweep:
    path = tmp_path / f"{question.name}.toml"
    path.write_text(question.toml(chosen, epochs=EPOCHS, seeds=5, precision=PRECISION), encoding="utf-8")
    return load_sweep(path)


@pytest.fixture
def sweeps(tmp_path: Path) -> dict[str, Sweep]:
    chosen = settings.chosen(trials_file(tmp_path, {"hard": 3, "soft": 1, "both": 3}))
    chosen = with_chosen("sampled-20-without-silence", chosen)
    return {question.name: loaded(tmp_path, question, chosen) for question in ALL_QUESTIONS}


def test_settings_of_each_kind_are_those_of_its_best_trial(tmp_path: Path) -> None:
    best = {"hard": 3, "soft": 1, "both": 5}
    chosen = settings.chosen(trials_file(tmp_path, best))
    assert chosen == {kind: settings.TRIALS[kind][index] for kind, index in best.items()}


def test_every_kind_has_as_many_trials_at_the_same_learning_rates_all_on_dev_speech(tmp_path: Path) -> None:
    rates = {kind: [trial.training["learning_rate"] for trial in trials] for kind, trials in settings.TRIALS.items()}
    assert list(rates.values()) == [rates["hard"]] * 3
    assert len(set(rates["hard"])) == 3
    tunings = [trials_of(name, model, settings.NUM_TRIALS) for name, model in questions.MODELS.items()]
    for tuning in tunings:
        sweep = loaded(tmp_path, tuning, {})
        assert sweep.evaluate.splits == ("dev",)
        assert len(sweep.arms) == len(sweep.runs) == sum(map(len, settings.TRIALS.values()))
    tuned = [tuning.model for tuning in tunings]
    assert all(question.model in tuned for question in ALL_QUESTIONS)


def test_every_question_is_a_valid_sweep_on_stored_labels(sweeps: dict[str, Sweep], tmp_path: Path) -> None:
    stored = {str(tmp_path / labels.url) for labels in LABELS}
    for sweep in sweeps.values():
        assert sweep.evaluate.splits == ("test",)
        assert sweep.evaluate.ensemble == str(tmp_path / "labels-test")
        assert {run.soft_labels.url for run in sweep.runs if run.soft_labels} <= stored


def test_the_share_of_all_soft_outputs_gain_is_asked_of_narrower_labels(sweeps: dict[str, Sweep]) -> None:
    gains = {name: sweep.gain for name, sweep in sweeps.items() if sweep.gain}
    assert gains == dict.fromkeys(("does-it-help", "how-much"), ("hard", "all-soft-and-hard"))


def test_arms_of_a_question_have_equal_budgets_and_models(sweeps: dict[str, Sweep]) -> None:
    """Epochs are of a run's own speech, of a quarter of the speakers say; all parts have as many of them."""
    for name, sweep in sweeps.items():
        heard = {run.training.epochs * len(run.corpus.train_splits) for run in sweep.runs}
        assert heard == {4 * EPOCHS * {"longer": 2, "longer-small": 3, "much-longer": 4}.get(name, 1)}
        assert len({run.model.model_dump_json() for run in sweep.runs}) == 1
        assert {run.training.precision for run in sweep.runs} == {PRECISION}


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


def test_an_arm_that_the_chosen_settings_make_the_same_as_another_is_left_out(tmp_path: Path) -> None:
    chosen = settings.chosen(trials_file(tmp_path, {"hard": 0, "soft": 0, "both": 2}))
    (how_much,) = [question for question in ALL_QUESTIONS if question.trials]
    pair = ("8-bytes-chosen", "all-soft-and-hard")
    other = loaded(tmp_path, how_much, with_chosen("sampled-13", chosen))
    assert "8-bytes-chosen" in other.arms
    assert pair in other.pairs
    same = loaded(tmp_path, how_much, with_chosen("budget-ghost", chosen))
    assert "8-bytes-chosen" not in same.arms
    assert pair not in same.pairs


def test_only_what_the_chosen_questions_need_is_labelled() -> None:
    def needed(*names: str) -> list[str]:
        chosen = [question for question in ALL_QUESTIONS if question.name in names]
        return [labels.url for labels in essence.labels_of(chosen, 1)]

    whole = ["labels-train", "labels-heard", "labels-dev", "labels-test", "labels-25", "labels-50"]
    assert [labels.url for labels in essence.labels_of(questions.QUESTIONS, 1)] == whole
    # The second trial of all soft outputs is of temperature 2.
    assert [labels.url for labels in essence.labels_of(questions.QUESTIONS, 2)] == [
        "labels-train",
        "labels-train-exact",
        *whole[1:],
    ]
    assert needed("how-much") == ["labels-train", "labels-dev", "labels-test"]
    assert needed("unlabelled") == [url for url in whole if url != "labels-heard"]
    assert needed("does-it-help", "how-much") == whole[:4]


def test_a_question_finds_all_its_labels(sweeps: dict[str, Sweep]) -> None:
    for question in ALL_QUESTIONS:
        sweep = sweeps[question.name]
        used = {url for run in sweep.runs if run.soft_labels for url in run.soft_labels.locations}
        used |= {url for url in (sweep.evaluate.ensemble, sweep.evaluate.dev_ensemble) if url}
        names = {Path(url).name for url in used} | ({"labels-dev"} if question.trials else set())
        # What the chosen temperature needs is made for the trials that chose it.
        assert names - {LABELS_TRAIN_EXACT} == question.labels()


def load_text(labels: Labels, folder: Path) -> JobConfig:
    path = folder / f"{labels.url}.toml"
    path.write_text(labels.job(essence.ARCHITECTURES, 638), encoding="utf-8")
    return load_job(path)


def test_every_labelling_job_is_valid(tmp_path: Path) -> None:
    for labels in LABELS:
        config = load_text(labels, tmp_path)
        assert len(config.teachers) == 3 * len(labels.groups)
        for temperature in config.targets.temperatures:
            assert obstacle(config.selection, config.targets.codec, temperature, 638) is None


def test_soft_targets_of_another_temperature_are_of_labels_that_tell_it(tmp_path: Path) -> None:
    """In the trials, and where they were chosen for a question."""
    told = {labels.url: load_text(labels, tmp_path).targets.temperatures for labels in LABELS}
    chosen = settings.chosen(trials_file(tmp_path, {"hard": 0, "soft": 1, "both": 2}))
    tuning = trials_of("small", questions.SMALL, settings.NUM_TRIALS)
    sweeps = [loaded(tmp_path, tuning, {}), loaded(tmp_path, questions.QUESTIONS[0], chosen)]
    tempered = [run for sweep in sweeps for run in sweep.runs if run.soft_labels and run.soft_labels.temperature != 1]
    assert len(tempered) == 3 + 5
    for run in tempered:
        assert run.soft_labels is not None
        assert run.soft_labels.temperature in told[Path(run.soft_labels.locations[0]).name]


def test_trials_are_judged_by_their_mean_over_seeds(tmp_path: Path) -> None:
    """The lowest mean over seeds of the frame error."""
    rows = [("a", 3.0), ("a", 1.0), ("b", 1.9), ("b", 1.9)]
    records = [{"arm": arm, "metric": "frame_error_rate", "value": value} for arm, value in rows]
    records.append({"arm": "a", "metric": "phone_error_rate", "value": 0.0})
    (tmp_path / "sweep.json").write_text(json.dumps({"sweeps": [{"records": records}]}))
    assert settings.dev_errors(tmp_path / "sweep.json") == {"a": 2.0, "b": 1.9}


def test_the_trials_of_a_question_are_on_dev_speech(tmp_path: Path) -> None:
    both = Settings(soft={"weight": 0.9, "temperature": 1.0}, training={"learning_rate": 1e-3})
    sweep = loaded(tmp_path, EIGHT_BYTES, {"both": both})
    assert sweep.evaluate.splits == ("dev",)
    assert len(sweep.runs) == 3 * len(EIGHT_BYTES.arms)
    assert {run.training.learning_rate for run in sweep.runs} == {1e-3}
    chosen = with_chosen("budget-uniform", {"both": both})["chosen"]
    assert chosen.training == both.training
    assert chosen.soft == {"weight": 0.9, "temperature": 1.0, **EIGHT_BYTES.arms[1].soft}


def test_a_corpus_is_there_once_all_is(tmp_path: Path) -> None:
    """``corpus.parquet`` counts as done: killed before the inventory is written, the next start would fail for want of it."""
    utterances = [f"{speaker:02}" for speaker in range(speechocean762.NUM_DEV_SPEAKERS + 1)]
    (tmp_path / "flac").mkdir()
    for utterance in utterances:
        soundfile.write(tmp_path / "flac" / f"{utterance}.flac", np.zeros(16_000), 16_000)
    lines = ["utt\tspeaker\tsplit\ttext", *(f"{utterance}\t{utterance}\ttrain\tA" for utterance in utterances)]
    (tmp_path / "utterances.tsv").write_text("\n".join(lines) + "\n")
    num = len(utterances)
    columns = {"utterance_id": utterances, "senone": [[7] * 100] * num, "phone": [["AA"] * 100] * num}
    pq.write_table(pa.table(columns), tmp_path / "alignments.parquet")
    output = tmp_path / "output"
    (output / "inventory.json").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        speechocean762.prepare(tmp_path, output)
    assert not (output / "corpus.parquet").exists()
    (output / "inventory.json").rmdir()
    speechocean762.prepare(tmp_path, output)
    assert len(load_corpus(output / "corpus.parquet")) == num


class Listing(Workspace):
    """Runs nothing."""

    def command(self, *words: str) -> None:
        self.write("commands", " ".join(words))


def test_a_graph_that_was_not_finished_is_made_again(tmp_path: Path) -> None:
    """Its folder is there before its description, which is written last."""
    workspace = Listing(tmp_path)
    (tmp_path / "graph").mkdir()
    (tmp_path / "graph" / "words.txt").touch()
    essence.make_graph(workspace, Path("lexicon.txt"))
    assert (tmp_path / "commands").read_text().startswith("student-trainer graph --corpus corpus.parquet")
    (tmp_path / "commands").unlink()
    (tmp_path / "graph" / "graph.json").touch()
    essence.make_graph(workspace, Path("lexicon.txt"))
    assert not workspace.exists("commands")


def test_words_without_a_lexicon_are_refused_before_the_corpus_is_read(tmp_path: Path) -> None:
    result = CliRunner().invoke(essence.main, [str(tmp_path), str(tmp_path / "output")])
    assert result.exit_code == 2
    assert "lexicon.txt does not exist; words are decoded with it" in result.stderr
    assert not (tmp_path / "output").exists()


def test_make_installs_all_that_the_experiment_runs(tmp_path: Path) -> None:
    """In a fresh clone: teachers' and sweeps' Ray, torch, and the decoder of words."""
    root = Path(__file__).parents[3]
    command = ["make", "--dry-run", "essence", f"VENV={tmp_path}"]
    made = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    (extras,) = re.findall(r"--editable \"\.\[(.*)\]\"", made)
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {"ray", "torch", "kaldi-decoder", "kaldifst"} <= packages(
        extras.split(","), project["optional-dependencies"]
    )


def packages(extras: list[str], known: dict[str, list[str]]) -> set[str]:
    """Of these extras and of those that they name in turn."""
    found = set()
    for requirement in (requirement for extra in extras for requirement in known[extra]):
        name, _, own = requirement.partition("[")
        found |= (
            packages(own.rstrip("]").split(","), known) if name == "essence-distill" else {re.split("[<>=[]", name)[0]}
        )
    return found
