"""``student-trainer graph``, ``tune-decoder`` and ``evaluate --graph``: one after the other, on tones that stand for phones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from softlabel_schemas import InputError
from softlabel_schemas.frame_selection import FrameSelection
from softlabel_schemas.selection import TopK
from student_trainer.cli import main
from student_trainer.ctc import transcripts_digest
from student_trainer.evaluate import WordDecoding, evaluate_dataset
from student_trainer.run_folder import RUN, RunFolder, build_model
from student_trainer.tune import tune_run
from tests.support.speech import INVENTORY, Speech, save_corpus, train_config, write_soft_labels, write_speech
from tests.support.uninstalled import uninstall
from tests.support.words import write_graph, write_words_speech


def student_trainer(*args: str | Path) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def done(*args: str | Path) -> str:
    result = student_trainer(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Speech:
    folder = tmp_path_factory.mktemp("words")
    return write_words_speech(folder / "words", write_speech(folder / "speech", unlabelled_share=0.0))


@pytest.fixture(scope="module")
def graph(speech: Speech) -> Path:
    path = speech.folder / "graph"
    options = ["--lexicon", speech.folder / "lexicon.txt", "--inventory", speech.inventory, "--output", path]
    printed = done("graph", "--corpus", speech.manifest, "--split", "train", *options)
    assert printed.startswith(f"{path}: 3 words, ")
    return path


@pytest.fixture(scope="module")
def run(speech: Speech) -> Path:
    """A run of a model that was never trained."""
    folder = RunFolder(speech.folder / "run")
    config = train_config(speech, folder.path)
    torch.manual_seed(0)
    folder.write_json(RUN, {"config": config.model_dump(mode="json"), "history": []})
    folder.write_inventory(INVENTORY)
    folder.write_model(build_model(config, INVENTORY))
    return folder.path


@pytest.fixture(scope="module")
def decoder(speech: Speech, graph: Path) -> Path:
    """Settings for the ensemble of dev labels."""
    path = speech.folder / "decoder.json"
    labels = write_soft_labels(speech.folder / "labels-dev", speech.split("dev"))
    options = ["--graph", graph, "--corpus", speech.manifest, "--split", "dev", "--output", path]
    printed = done("tune-decoder", "--dataset", labels.url, *options)
    tuned = json.loads(path.read_bytes())
    assert printed.splitlines()[-1].split() == ["word_error_rate", f"{tuned['word_error_rate']:.3f}"]
    return path


def test_settings_are_the_best_that_were_tried(decoder: Path) -> None:
    tuned = json.loads(decoder.read_bytes())
    rates = [trial["word_error_rate"] for trial in tuned["trials"]]
    assert tuned["word_error_rate"] == min(rates) < max(rates)
    assert tuned["settings"] == tuned["trials"][rates.index(min(rates))]["settings"]
    assert tuned["splits"] == ["dev"]


def test_the_ensemble(speech: Speech, graph: Path, decoder: Path, tmp_path: Path) -> None:
    labels = write_soft_labels(tmp_path / "labels-test", speech.split("test"))
    output = tmp_path / "ensemble.json"
    options = ["--corpus", speech.manifest, "--split", "test", "--output", output]
    plain = done("evaluate", "--dataset", labels.url, *options)
    without: dict[str, Any] = json.loads(output.read_bytes())
    printed = done("evaluate", "--dataset", labels.url, *options, "--graph", graph, "--decoder", decoder)
    result: dict[str, Any] = json.loads(output.read_bytes())
    # Words are added to what is said without them.
    assert printed.startswith(plain)
    assert {name: result[name] for name in without if name != "utterances"} == {
        name: value for name, value in without.items() if name != "utterances"
    }
    texts = {utterance.utterance_id: utterance.text or "" for utterance in speech.split("test")}
    records = result["utterances"]
    assert [record["words"] for record in records] == [len(texts[r["utterance_id"]].split()) for r in records]
    num_words, num_errors = (sum(record[name] for record in records) for name in ("words", "word_errors"))
    assert result["word_error_rate"] == pytest.approx(100 * num_errors / num_words)
    # The labels favour the right class of each frame.
    assert result["word_error_rate"] < 50
    assert result["out_of_vocabulary_rate"] == 0
    assert result["decoder"] == json.loads(decoder.read_bytes())["settings"]
    assert f"word_error_rate    {result['word_error_rate']:.3f}\n{num_words} words, 0.00% of them not" in printed


def test_the_transcripts_are_named_where_words_are_decoded(
    speech: Speech, graph: Path, decoder: Path, tmp_path: Path
) -> None:
    """With those of utterances that the dataset skipped: of whatever is left out, the same ones are compared."""
    test = speech.split("test")
    url = write_soft_labels(tmp_path / "labels", test, skipped={test[0].utterance_id: "broken"}).url
    decoding = WordDecoding(graph=str(graph), settings=str(decoder))
    found = evaluate_dataset(url, speech.manifest, ["test"], str(tmp_path / "ensemble.json"), decoding)
    assert len(found["utterances"]) == 2
    assert found["transcripts_digest"] == transcripts_digest(speech.corpus.select_splits(["test"]))
    without = evaluate_dataset(url, speech.manifest, ["test"], str(tmp_path / "ensemble.json"))
    assert "transcripts_digest" not in without


def test_a_run(speech: Speech, graph: Path, run: Path) -> None:
    """Its settings stand in its folder."""
    options = ["--graph", graph, "--corpus", speech.manifest]
    before = student_trainer("evaluate", run, *options, "--split", "test")
    assert before.exit_code == 2
    assert "decoder.json does not exist; choose the decoder's settings on a dev split" in before.stderr
    done("tune-decoder", run, *options, "--split", "dev")
    done("evaluate", run, *options, "--split", "test")
    result = json.loads((run / "evaluation-test.json").read_bytes())
    assert result["decoder"] == json.loads((run / "decoder.json").read_bytes())["settings"]
    assert result["transcripts_digest"] == transcripts_digest(speech.corpus.select_splits(["test"]))
    assert result["word_error_rate"] > 0


def test_words_that_the_graph_does_not_have(speech: Speech, tmp_path: Path) -> None:
    """A graph without SEE: each of them is out of vocabulary, and an error."""
    small = write_graph(tmp_path, ["AH BEE", "BEE AH"])
    labels = {name: write_soft_labels(tmp_path / name, speech.split(name)).url for name in ("dev", "test")}
    options = ["--graph", small.path, "--corpus", speech.manifest]
    settings, output = tmp_path / "decoder.json", tmp_path / "ensemble.json"
    done("tune-decoder", "--dataset", labels["dev"], *options, "--split", "dev", "--output", settings)
    options += ["--dataset", labels["test"], "--decoder", settings, "--split", "test", "--output", output]
    done("evaluate", *options)
    result = json.loads(output.read_bytes())
    for record, utterance in zip(result["utterances"], speech.split("test"), strict=True):
        assert record["oov_words"] == (utterance.text or "").split().count("SEE")
        assert record["word_errors"] >= record["oov_words"]
    assert result["out_of_vocabulary_rate"] > 0


def test_refusals(speech: Speech, graph: Path, decoder: Path, run: Path, tmp_path: Path) -> None:
    data = ["--corpus", speech.manifest]
    cases = [
        (["tune-decoder", run, "--graph", graph, *data, "--split", "train"], "was made from split train"),
        (["evaluate", run, "--graph", graph, "--decoder", decoder, *data, "--split", "dev"], "was chosen on split dev"),
        (["evaluate", run, "--graph", graph, "--decoder", decoder, *data, "--split", "train"], "made from split train"),
        (["evaluate", run, "--decoder", decoder, *data, "--split", "test"], "--decoder needs --graph"),
        (
            ["evaluate", "--dataset", "x", "--output", "y", "--graph", graph, *data, "--split", "test"],
            "needs --decoder",
        ),
        (["tune-decoder", "--dataset", "x", "--graph", graph, *data, "--split", "dev"], "--dataset needs --output"),
        (["tune-decoder", "--graph", graph, *data, "--split", "dev"], "give a RUN or --dataset"),
    ]
    for args, message in cases:
        result = student_trainer(*args)
        assert result.exit_code == 2
        assert message in result.stderr
    # Datasets and splits whose errors would choose nothing.
    dropped = TopK(k=3, frames=FrameSelection(silence=0))
    url = write_soft_labels(tmp_path / "dropped", speech.split("dev"), selection=dropped).url
    silent = save_corpus(tmp_path, [replace(u, text=" ") if u.split == "dev" else u for u in speech.located()])
    tune = ["tune-decoder", "--graph", graph, "--split", "dev", "--output", tmp_path / "x.json", "--corpus"]
    labels = write_soft_labels(tmp_path / "labels", speech.split("dev")).url
    for args, message in (
        (
            [*tune, speech.manifest, "--dataset", url],
            "was labelled without some frames (selection.frames drops silence)",
        ),
        ([*tune, silent.manifest, "--dataset", labels], "the transcripts of ['dev'] have no words"),
        ([*tune, silent.manifest, run], "the transcripts of ['dev'] have no words"),
    ):
        result = student_trainer(*args)
        assert result.exit_code == 2
        assert message in result.stderr
    assert not (tmp_path / "x.json").exists()
    with pytest.raises(InputError, match=r"no frame of \[\] has a hard label"):
        tune_run(run, speech.manifest, [], str(graph), str(tmp_path / "x.json"))
    other = write_graph(tmp_path, ["AH SEE BEE"])
    result = student_trainer("evaluate", run, "--graph", other.path, "--decoder", decoder, *data, "--split", "test")
    assert result.exit_code == 2
    assert "tune again with this graph" in result.stderr


@pytest.mark.parametrize(
    ("package", "command"),
    [
        ("kaldifst", "graph --split train --lexicon l --inventory i --output g"),
        ("kaldi_decoder", "tune-decoder RUN --split dev --graph none"),
        ("kaldi_decoder", "evaluate RUN --split test --graph none"),
        ("kaldi_decoder", "evaluate --dataset LABELS --split dev --graph none --decoder none --output LABELS.json"),
    ],
)
def test_without_the_decoder_the_extra_is_named(
    speech: Speech, run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str, command: str
) -> None:
    """Before anything is decoded, and before the graph that such a machine has none of is missed."""
    labels = write_soft_labels(tmp_path / "labels", speech.split("dev")).url
    uninstall(monkeypatch, package)
    arguments = command.replace("RUN", str(run)).replace("LABELS", labels).split()
    result = student_trainer(*arguments, "--corpus", speech.manifest)
    assert result.exit_code == 2
    assert package in result.stderr
    assert result.stderr.endswith("; this needs: pip install 'essence-distill[decode]'\n")


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    uninstall(monkeypatch, "ray")
    result = student_trainer("sweep", "sweep.toml")
    assert result.exit_code == 2
    assert result.stderr.endswith("; this needs: pip install 'essence-distill[sweep]'\n")
