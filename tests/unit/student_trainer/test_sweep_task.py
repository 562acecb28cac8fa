"""One run of a sweep that decodes words, without Ray: each step is passed over once it is done; and what is found before any
run starts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softlabel_schemas import InputError
from student_trainer import sweep as sweep_module
from student_trainer.config import TrainConfig
from student_trainer.ctc import transcripts_digest
from student_trainer.graph_folder import make_graph
from student_trainer.run_folder import RunFolder
from student_trainer.sweep import run_sweep
from student_trainer.sweep_config import EvaluateConfig, Sweep, load_sweep
from student_trainer.sweep_task import evaluate_ensemble, train_and_evaluate
from tests.support.speech import INVENTORY, Speech, save_corpus, write_soft_labels
from tests.support.sweeps import write_ctc, write_sweep, write_words
from tests.support.uninstalled import uninstall


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Speech:
    return write_words(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def sweep(speech: Speech) -> Sweep:
    return load_sweep(write_sweep(speech.folder, "sweep", seeds=[0], epochs=1, words=True))


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


def check_evaluated_again(run: TrainConfig, settings: EvaluateConfig, **other: Any) -> None:
    """Where what was evaluated is not what it would be now."""
    right = read(run, "evaluation-test.json")
    RunFolder(run.output).write_json("evaluation-test.json", right | other | {"frame_error_rate": 99.0})
    train_and_evaluate(run, settings)
    assert read(run, "evaluation-test.json") == right


@pytest.mark.parametrize("name", ["weights_digest", "corpus_digest", "transcripts_digest", "graph_digest"])
def test_what_was_evaluated_of_something_else_is_evaluated_again(sweep: Sweep, run: TrainConfig, name: str) -> None:
    """Such as other weights: someone looks at a run that is not done; it is then trained to its end, and killed before its
    evaluation."""
    check_evaluated_again(run, sweep.evaluate, **{name: "0" * 64})


def test_what_was_evaluated_on_other_splits_is_evaluated_again(sweep: Sweep, run: TrainConfig) -> None:
    """A file's name joins splits by a hyphen, which a split may have in its own."""
    check_evaluated_again(run, sweep.evaluate, splits=["te", "st"])


def test_another_test_set_and_another_graph(speech: Speech, sweep: Sweep, run: TrainConfig) -> None:
    before = read(run, "evaluation-test.json")
    lexicon = str(speech.folder / "lexicon.txt")
    graph = make_graph(speech.manifest, ["train"], lexicon, INVENTORY, str(speech.folder / "other"), ngram_order=1)
    other = sweep.evaluate.model_copy(update={"graph": graph.path})
    train_and_evaluate(run, other)
    assert read(run, "evaluation-test.json")["graph_digest"] == graph.description.digest() != before["graph_digest"]
    changed = [replace(u, hard_labels=np.roll(u.hard_labels, 7)) if u.split == "test" else u for u in speech.utterances]
    try:
        corpus = save_corpus(speech.folder, changed).corpus
        train_and_evaluate(run, other)
        assert read(run, "evaluation-test.json")["corpus_digest"] == corpus.select_splits(["test"]).digest
    finally:
        save_corpus(speech.folder, speech.utterances)
    train_and_evaluate(run, sweep.evaluate)
    assert read(run, "evaluation-test.json") == before


def test_other_transcripts_of_dev_speech(speech: Speech, sweep: Sweep, run: TrainConfig) -> None:
    """The decoder's settings were chosen by them; they decide nothing else."""
    before = read(run, "decoder.json")
    changed = [replace(u, text=u.text.split()[0]) if u.split == "dev" else u for u in speech.utterances]
    try:
        corpus = save_corpus(speech.folder, changed).corpus
        train_and_evaluate(run, sweep.evaluate)
        tuned = read(run, "decoder.json")
        assert tuned["transcripts_digest"] == transcripts_digest(corpus.select_splits(["dev"]))
        assert tuned["word_error_rate"] != before["word_error_rate"]
        assert read(run, "evaluation-test.json")["decoder"] == tuned["settings"]
    finally:
        save_corpus(speech.folder, speech.utterances)
    train_and_evaluate(run, sweep.evaluate)
    assert read(run, "decoder.json") == before


def test_settings_that_were_chosen_after_the_evaluation(sweep: Sweep, run: TrainConfig) -> None:
    """As where a sweep was killed in between."""
    check_evaluated_again(run, sweep.evaluate, decoder={"acoustic_scale": 0.1})


def test_other_transcripts_of_ctc(tmp_path: Path) -> None:
    write_ctc(tmp_path)
    sweep = load_sweep(write_sweep(tmp_path, "sweep", seeds=[0], epochs=1, ctc=True))
    run = sweep.runs[0]
    train_and_evaluate(run, sweep.evaluate)
    evaluated = (Path(run.output) / "evaluation-test.json").stat().st_mtime_ns
    train_and_evaluate(run, sweep.evaluate)
    assert (Path(run.output) / "evaluation-test.json").stat().st_mtime_ns == evaluated
    check_evaluated_again(run, sweep.evaluate, transcripts_digest="0" * 64)


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


class _StartedError(Exception):
    pass


class TestBeforeAnyRunStarts:
    """What could not be evaluated once all is trained."""

    @pytest.fixture(autouse=True)
    def no_runs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def start(*_: Any, **__: Any) -> None:
            raise _StartedError

        monkeypatch.setattr(sweep_module, "run_on_ray", start)

    @pytest.mark.parametrize(
        ("line", "other", "message"),
        [
            ("[evaluate]", '[evaluate]\nsplits = ["tset"]', "the corpus has no split tset"),
            ("[evaluate]", '[evaluate]\nsplits = ["dev"]', "the decoder's settings are chosen on split dev"),
            (
                "[evaluate]",
                '[evaluate]\nsplits = ["train"]',
                "evaluate.splits has train, which the arm 'hard' trains on",
            ),
            ('ensemble = "labels-test"', 'ensemble = "none"', "none is not a published dataset"),
            ('ensemble = "labels-test"', 'ensemble = "labels"', "labels: no soft targets for utterance test-23"),
            ('dev_ensemble = "labels-dev"', 'dev_ensemble = "none"', "none is not a published dataset"),
            ('graph = "graph"', 'graph = "none"', "none holds no decoding graph"),
        ],
    )
    def test_what_is_missing_or_of_other_speech(self, speech: Speech, line: str, other: str, message: str) -> None:
        path = write_sweep(speech.folder, "refused", words=True)
        path.write_text(path.read_text().replace(f"\n{line}\n", f"\n{other}\n"))
        with pytest.raises(InputError, match=message):
            run_sweep(path)

    def test_no_decoder(self, speech: Speech, monkeypatch: pytest.MonkeyPatch) -> None:
        uninstall(monkeypatch, "kaldi_decoder")
        with pytest.raises(InputError, match=r"kaldi_decoder.*; this needs: pip install 'essence-distill\[decode\]'"):
            run_sweep(write_sweep(speech.folder, "undecoded", words=True))

    def test_arms_and_an_ensemble_of_other_classes(self, speech: Speech) -> None:
        inventory = INVENTORY.model_copy(update={"silence_phones": ()})
        (speech.folder / "other.json").write_bytes(inventory.to_json())
        arm = '[[arms]]\nname = "other"\ncorpus = { inventory = "other.json" }\n'
        own, other = INVENTORY.digest()[:12], inventory.digest()[:12]
        with pytest.raises(InputError, match=f"'hard' and 'other' have different class inventories, {own} and {other}"):
            run_sweep(write_sweep(speech.folder, "classes", arms=arm))
        write_soft_labels(speech.folder / "labels-other", speech.split("test"), inventory=inventory)
        path = write_sweep(speech.folder, "ensemble-classes")
        path.write_text(path.read_text().replace('"labels-test"', '"labels-other"'))
        with pytest.raises(InputError, match=rf"are of class inventory {other} \(6 classes\), the arms' is {own}"):
            run_sweep(path)

    def test_another_number_of_labels_in_what_is_evaluated(self, speech: Speech, tmp_path: Path) -> None:
        for name in ("labels", "labels-test"):
            (tmp_path / name).symlink_to(speech.folder / name)
        here = speech.located()
        here[-1] = replace(here[-1], hard_labels=here[-1].hard_labels[:-2].copy())
        save_corpus(tmp_path, here)
        with pytest.raises(InputError, match=f"utterance {here[-1].utterance_id}: the model gives .* with 1 of 3"):
            run_sweep(write_sweep(tmp_path, "sweep"))

    def test_transcripts_in_other_units(self, tmp_path: Path) -> None:
        write_ctc(tmp_path)
        path = write_sweep(tmp_path, "sweep", ctc=True)
        path.write_text(path.read_text().replace('units = "words"', 'units = "characters"'))
        with pytest.raises(InputError, match=r"utterance test-23: its transcript has .*, which is no token"):
            run_sweep(path)

    def test_what_fits_is_run(self, speech: Speech, tmp_path: Path) -> None:
        write_ctc(tmp_path)
        for path in (write_sweep(speech.folder, "fits", words=True), write_sweep(tmp_path, "fits", ctc=True)):
            with pytest.raises(_StartedError):
                run_sweep(path)
