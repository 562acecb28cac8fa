"""CTC: the loss against all alignments, its mix with the soft loss, spelling, greedy decoding, and a student that learns."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from softlabel_schemas import ClassInventory, InputError, write_corpus
from student_trainer import train as train_module
from student_trainer.batch import Batch, Example, TokenTargets, collate
from student_trainer.cli import main
from student_trainer.config import TrainConfig, Units
from student_trainer.ctc import Spelling, ctc_loss
from student_trainer.data import TrainingData
from student_trainer.evaluate import evaluate_run
from student_trainer.inputs import open_inputs
from student_trainer.loss import SparseTargets, soft_loss
from student_trainer.run_folder import RunFolder
from student_trainer.token_errors import TokenMetrics, greedy, load_transcribed_corpus, token_metrics
from student_trainer.train import train
from tests.support.speech import Speech
from tests.support.trainings import model_bytes
from tests.support.transcripts import CTC_FRONT_END, ctc_config, write_ctc_labels, write_transcribed

BLANK, NUM_CLASSES = 1, 3
LENGTHS = [4, 3, 2]
# The second utterance has no transcript, the third an empty one.
TOKENS = [[0, 0], None, []]


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Speech:
    return write_transcribed(tmp_path_factory.mktemp("ctc"))


@pytest.fixture(scope="module")
def run(speech: Speech) -> TrainConfig:
    config = ctc_config(speech, speech.folder / "run")
    assert train(config)
    return config


def make_batch(tokens: list[list[int] | None]) -> Batch:
    return collate(
        [
            Example(
                utterance_id=f"utt-{row}",
                features=np.zeros((length, 2), dtype=np.float32),
                hard_labels=None,
                soft=None,
                tokens=None if own is None else np.array(own, dtype=np.int64),
            )
            for row, (length, own) in enumerate(zip(LENGTHS, tokens, strict=True))
        ]
    )


def token_targets(tokens: list[list[int] | None]) -> TokenTargets:
    found = make_batch(tokens).tokens
    assert found is not None
    return found


def collapsed(path: tuple[int, ...]) -> list[int]:
    """The definition: runs joined, then blanks left out."""
    return [token for token, _ in itertools.groupby(path) if token != BLANK]


class TestLoss:
    def test_it_sums_over_all_alignments(self) -> None:
        """Nats per frame of the utterances that have a transcript; of padding and of the others nothing."""
        generator = torch.Generator().manual_seed(0)
        logits_NV = torch.randn(sum(LENGTHS), NUM_CLASSES, generator=generator)
        found = ctc_loss(logits_NV, torch.tensor(LENGTHS), token_targets(TOKENS), blank=BLANK)
        expected, num_frames = 0.0, 0
        for probs_TV, tokens in zip(logits_NV.double().softmax(dim=1).split(LENGTHS), TOKENS, strict=True):
            if tokens is None:
                continue
            paths = itertools.product(range(NUM_CLASSES), repeat=len(probs_TV))
            likelihood = sum(
                math.prod(probs_TV[t, token].item() for t, token in enumerate(path))
                for path in paths
                if collapsed(path) == tokens
            )
            expected -= math.log(likelihood)
            num_frames += len(probs_TV)
        assert found.item() == pytest.approx(expected / num_frames, rel=1e-5)

    def test_without_any_transcript_it_is_nothing(self) -> None:
        logits_NV = torch.randn(sum(LENGTHS), NUM_CLASSES, requires_grad=True)
        assert make_batch([None] * 3).tokens is None
        targets = TokenTargets(
            tokens_L=torch.zeros(0, dtype=torch.int64),
            lengths_B=torch.full((3,), -1),
            min_frames_B=torch.zeros(3, dtype=torch.int64),
        )
        loss = ctc_loss(logits_NV, torch.tensor(LENGTHS), targets, blank=BLANK)
        loss.backward()
        assert loss.item() == 0
        assert logits_NV.grad is not None
        assert not logits_NV.grad.any()

    @pytest.mark.parametrize("temperature", [1.0, 2.0])
    def test_the_gradient_of_the_mix(self, temperature: float) -> None:
        """Against finite differences, with a frame whose soft target has no weight."""
        generator = torch.Generator().manual_seed(1)
        num_frames = sum(LENGTHS)
        targets = SparseTargets(
            ids_NK=torch.tensor([[0, 1], [1, 2], [2, 0]] * 3),
            probs_NK=torch.tensor([[0.6, 0.3]] * num_frames, dtype=torch.float64),
            tail_N=torch.full((num_frames,), 0.1, dtype=torch.float64),
            weights_N=torch.tensor([1.0, 0.0, 0.5] * 3, dtype=torch.float64),
        )
        labels_N = torch.full((num_frames,), -1)

        def mix(logits_NV: torch.Tensor) -> torch.Tensor:
            hard = ctc_loss(logits_NV, torch.tensor(LENGTHS), token_targets(TOKENS), blank=BLANK)
            soft = soft_loss(logits_NV, targets, temperature=temperature, tail="ghost", labels_N=labels_N)
            return 0.3 * hard + 0.7 * soft

        logits_NV = torch.randn(num_frames, NUM_CLASSES, dtype=torch.float64, generator=generator).requires_grad_()
        (found_NV,) = torch.autograd.grad(mix(logits_NV), logits_NV)
        step = 1e-5
        with torch.no_grad():
            # One logit moved at a time.
            steps = step * torch.eye(logits_NV.numel(), dtype=torch.float64).view(-1, *logits_NV.shape)
            expected = [(mix(logits_NV + each) - mix(logits_NV - each)) / (2 * step) for each in steps]
        torch.testing.assert_close(found_NV.flatten(), torch.stack(expected), rtol=1e-6, atol=1e-8)

    def test_frames_that_a_transcript_needs(self) -> None:
        assert token_targets([[0, 0, 2], None, []]).min_frames_B.tolist() == [4, 0, 0]


@given(st.lists(st.integers(0, 3), max_size=12))
def test_greedy_is_the_definition(path: list[int]) -> None:
    assert greedy(np.array(path, dtype=np.int64), BLANK).tolist() == collapsed(tuple(path))


@pytest.mark.parametrize(
    ("delimiter", "units", "path", "errors"),
    [
        # As wav2vec2-base-960h ends; a blank parts the two delimiters.
        ("|", "characters", "||H.I|.|HEE|", 0),
        ("|", "characters", "HI..HE", 1),
        ("|", "characters", "|H|I|HE|", 1),
        ("|", "characters", "|.||", 5),
        ("|", "characters", "...", 5),
        (" ", "characters", " HI . HE ", 0),
        # No character, but a word as others.
        ("|", "words", "H|", 2),
    ],
)
def test_word_delimiters_that_no_transcript_has(delimiter: str, units: Units, path: str, errors: int) -> None:
    """At the ends of what was decoded, and repeated: as white space of a transcript they count for nothing."""
    inventory = ClassInventory(names=(".", delimiter, "H", "I", "E"), blank=".")
    spelling = Spelling(inventory, units)
    metrics = TokenMetrics(inventory, spelling)
    reference = spelling.tokens_L({"characters": " HI  HE", "words": "H I E"}[units], "utt")
    metrics.add("utt", reference, np.array([inventory.names.index(name) for name in path]))
    assert metrics.utterances[0]["token_errors"] == errors


class TestSpelling:
    INVENTORY = ClassInventory(names=("<pad>", "|", "A", "B", "AB"), blank="<pad>")

    def test_characters_and_words(self) -> None:
        characters = Spelling(self.INVENTORY, "characters")
        tokens_L = characters.tokens_L("  A  BA", "utt")
        assert tokens_L.tolist() == [2, 1, 3, 2]
        assert characters.words(tokens_L) == ["A", "BA"]
        words = Spelling(self.INVENTORY, "words")
        assert words.tokens_L("A AB", "utt").tolist() == [2, 4]
        assert words.words(tokens_L) is None
        assert words.tokens_L("", "utt").tolist() == []

    def test_a_space_without_a_delimiter(self) -> None:
        spelling = Spelling(ClassInventory(names=("-", " ", "a"), blank="-"), "characters")
        assert spelling.tokens_L("a a", "utt").tolist() == [2, 1, 2]
        assert spelling.words(np.array([2, 1, 2, 2])) == ["a", "aa"]

    @pytest.mark.parametrize("text", ["A C", "a", "A <pad>"])
    def test_what_is_no_token(self, text: str) -> None:
        message = f"utterance utt: its transcript has {text.split()[-1]!r}, which is no token of the class inventory"
        with pytest.raises(InputError, match=re.escape(message)):
            Spelling(self.INVENTORY, "words").tokens_L(text, "utt")

    def test_an_inventory_without_a_blank(self) -> None:
        with pytest.raises(InputError, match="names no blank, which CTC needs"):
            Spelling(ClassInventory(names=("a", "b")), "words")


class TestStudent:
    def test_it_learns(self, speech: Speech, run: TrainConfig) -> None:
        history = RunFolder(run.output).read_json("run.json")["history"]
        assert history[-1]["hard_loss"] < 0.1 * history[0]["hard_loss"]
        assert history[-1]["dev"]["token_error_rate"] < 35
        result = evaluate_run(run.output, speech.manifest, ["test"], None)
        assert result["num_tokens"] == sum(len((u.text or "").split()) for u in speech.split("test"))
        assert result["token_error_rate"] < 35
        assert "word_error_rate" not in result

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_logits_that_are_not_finite(
        self, speech: Speech, run: TrainConfig, monkeypatch: pytest.MonkeyPatch, value: float
    ) -> None:
        """NaN is the likeliest class 0, the blank; what lies behind the last frame is nobody's."""
        model, _, inventory = RunFolder(run.output).load_model()
        corpus = load_transcribed_corpus(speech.manifest, ["test"])
        data = TrainingData(corpus, run.front_end, spelling=Spelling(inventory, "words"))
        forward, frames = model.forward, list[int]()

        def diverged(features_BTD: torch.Tensor, lengths_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits_BTV, lengths_B = forward(features_BTD, lengths_B)
            logits_BTV = functional.pad(logits_BTV, (0, 0, 0, 1), value=value)
            logits_BTV[0, frames, 1] = value
            return logits_BTV, lengths_B

        monkeypatch.setattr(model, "forward", diverged)
        assert len(token_metrics(model, data, inventory).utterances) == len(corpus)
        frames.append(3)
        with pytest.raises(InputError, match=r"utterance test-\d+: the posteriors are not finite, .*learning_rate"):
            token_metrics(model, data, inventory)

    def test_the_command_prints_token_errors(self, speech: Speech, run: TrainConfig) -> None:
        arguments = ["evaluate", run.output, "--corpus", speech.manifest, "--split", "test"]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        evaluation = RunFolder(run.output).read_json("evaluation-test.json")
        assert result.stdout == f"token_error_rate   {evaluation['token_error_rate']:.3f}\n"
        refused = CliRunner().invoke(main, [*arguments, "--ctc", "words"])
        assert (refused.exit_code, "a RUN knows what it was trained with" in refused.output) == (2, True)
        report = ["--split", "test", "--report", str(speech.folder / "report.html")]
        compared = CliRunner().invoke(main, ["compare", run.output, *report])
        assert (compared.exit_code, compared.output.split("\n")[0].endswith("parameters  token error %")) == (0, True)

    def test_other_transcripts_are_another_run(self, speech: Speech, run: TrainConfig, tmp_path: Path) -> None:
        changed = [replace(u, text=f"{u.text} c") if i == 0 else u for i, u in enumerate(speech.utterances)]
        write_corpus(tmp_path / "corpus.parquet", changed)
        corpus = run.corpus.model_copy(update={"manifest": str(tmp_path / "corpus.parquet")})
        with pytest.raises(InputError, match="a run with another transcripts_digest"):
            train(run.model_copy(update={"corpus": corpus}))

    def test_other_labels_in_use_and_other_dev_transcripts(self, speech: Speech, tmp_path: Path) -> None:
        """None of which is in the corpus digest."""
        url = write_ctc_labels(tmp_path / "labels", speech.split("train")).url
        splits = {"corpus__train_splits": ["train", "more"], "corpus__hard_label_splits": ["train"]}
        here = replace(speech, manifest=str(tmp_path / "corpus.parquet"))
        config = ctc_config(here, tmp_path / "run", url=url, training__epochs=1, **splits)

        def write(more: Sequence[int], dev_text: str | None = None) -> None:
            """``more``: rows that have no part in the CTC loss."""
            rows = [replace(u, split="more") if i in more else u for i, u in enumerate(speech.utterances)]
            texts = [dev_text or u.text if u.split == "dev" else u.text for u in rows]
            write_corpus(here.manifest, [replace(u, text=text) for u, text in zip(rows, texts, strict=True)])

        write([0, 1])
        assert train(config)
        write([2, 3])
        with pytest.raises(InputError, match="a run with another hard_labels_digest"):
            train(config)
        write([0, 1], dev_text="c")
        with pytest.raises(InputError, match="a run with another dev_transcripts_digest"):
            train(config)
        write([0, 1])
        assert not train(config)

    @pytest.mark.parametrize(
        ("utterance_id", "text", "message"),
        [
            (
                "train-00",
                "a-1 " * 80,
                r"its transcript needs 159 frames, the model gives \d+; leave it out of the corpus",
            ),
            ("train-00", "a-1 nonsense", "its transcript has 'nonsense', which is no token"),
            ("train-00", None, "1 of 20 training utterances have no hard labels in use"),
            ("dev-20", "nonsense", "utterance dev-20: its transcript has 'nonsense', which is no token"),
        ],
    )
    def test_transcripts_that_are_refused(
        self, speech: Speech, tmp_path: Path, utterance_id: str, text: str | None, message: str
    ) -> None:
        """Before the first step: a text that is mended later makes it another run."""
        utterances = [replace(u, text=text) if u.utterance_id == utterance_id else u for u in speech.utterances]
        write_corpus(tmp_path / "corpus.parquet", utterances)
        config = ctc_config(replace(speech, manifest=str(tmp_path / "corpus.parquet")), tmp_path / "run")
        with pytest.raises(InputError, match=message):
            train(config)
        assert not (tmp_path / "run").exists()

    def test_a_transcript_without_room_in_fewer_frames(self, speech: Speech, tmp_path: Path) -> None:
        """Known only from the batches of an encoder that drops frames."""
        num_frames = CTC_FRONT_END.num_frames(speech.utterances[0].num_samples)
        full = " ".join(["a-1", "b-1"] * num_frames).split()[:num_frames]
        utterances = [replace(u, text=" ".join(full)) if i == 0 else u for i, u in enumerate(speech.utterances)]
        write_corpus(tmp_path / "corpus.parquet", utterances)
        own = {"architecture": "tests.support.speech:pair_encoder", "arguments": {}}
        here = replace(speech, manifest=str(tmp_path / "corpus.parquet"))
        message = (
            rf"train-00: its transcript needs {num_frames} frames, the model gives {(num_frames + 1) // 2}; leave it"
        )
        with pytest.raises(InputError, match=message):
            train(ctc_config(here, tmp_path / "run", model=own))

    def test_what_has_no_weight_is_not_used(
        self, speech: Speech, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whatever the transcripts, none of them among it: the soft loss alone decides. With any weight they are refused."""
        url = write_ctc_labels(tmp_path / "labels", speech.split("train")).url
        soft_labels = {"url": url, "temperature": 2.0, "weight": 1.0}

        def config(name: str, texts: Sequence[str | None], **changes: Any) -> TrainConfig:
            rows = [replace(u, text=text) for u, text in zip(speech.utterances, texts, strict=False)]
            write_corpus(tmp_path / f"{name}.parquet", [*rows, *speech.utterances[len(rows) :]])
            here = replace(speech, manifest=str(tmp_path / f"{name}.parquet"))
            return ctc_config(here, tmp_path / name, soft_labels=soft_labels | changes, training__epochs=2)

        own = config("own", [])
        assert train(own)
        monkeypatch.setattr(train_module, "ctc_loss", lambda *_, **__: pytest.fail("CTC's loss was made"))
        others = config("others", ["nonsense", "a-1 " * 80])
        none = config("none", [None] * 20)
        for other in (others, none):
            assert train(other)
            assert model_bytes(other) == model_bytes(own)
        with pytest.raises(InputError, match="its transcript has 'nonsense', which is no token"):
            train(config("falling", ["nonsense"], final_weight=0.9))

    def test_dev_speech_without_a_token(self, speech: Speech, tmp_path: Path) -> None:
        """Its token error rate would be 0 from the first epoch on, whose weights would be kept."""
        write_corpus(
            tmp_path / "corpus.parquet", [replace(u, text=" ") if u.split == "dev" else u for u in speech.utterances]
        )
        here = replace(speech, manifest=str(tmp_path / "corpus.parquet"))
        with pytest.raises(InputError, match=r"the transcripts of \['dev'\] are all empty"):
            train(ctc_config(here, tmp_path / "run"))

    def test_other_speeds(self, speech: Speech, tmp_path: Path) -> None:
        """Transcripts have no times: nothing of them is moved."""
        config = ctc_config(speech, tmp_path / "run", augmentation={"speeds": [0.9, 1.1]}, training__epochs=2)
        assert train(config)

    def test_a_transcript_that_only_some_speeds_have_room_for(self, speech: Speech, tmp_path: Path) -> None:
        """Said at once, not in the epoch that draws such a speed."""
        num_frames = CTC_FRONT_END.num_frames(speech.utterances[0].num_samples)
        text = " ".join(["a-1", "b-1"] * num_frames).split()[:num_frames]
        full = [replace(u, text=" ".join(text)) if i == 0 else u for i, u in enumerate(speech.utterances)]
        write_corpus(tmp_path / "corpus.parquet", full)
        here = replace(speech, manifest=str(tmp_path / "corpus.parquet"))
        slow = ctc_config(here, tmp_path / "run", augmentation={"speeds": [0.9, 1.0]}, training__epochs=1)
        assert open_inputs(slow).data.corpus[0].text == " ".join(text)
        fast = ctc_config(here, tmp_path / "run", augmentation={"speeds": [0.9, 1.0, 1.1]}, training__epochs=1)
        message = (
            rf"utterance train-00: its transcript needs {num_frames} frames, at speed 1\.1 there are \d+; leave it out"
        )
        with pytest.raises(InputError, match=message):
            open_inputs(fast)


@pytest.mark.parametrize(
    ("soft", "message"),
    [
        ({"tail": "to_hard_label"}, "needs hard labels of frames; with [ctc] there are none"),
        ({"frames": {"disagreeing": 0.0}}, "soft_labels.frames.disagreeing needs hard labels of frames"),
        (
            {"selection": {"policy": "top_k", "k": 2, "frames": {"disagreeing": 0.0}}},
            "soft_labels.selection.frames.disagreeing needs hard labels of frames",
        ),
    ],
)
def test_settings_that_need_labels_of_frames(speech: Speech, soft: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ctc_config(speech, speech.folder / "other", soft_labels={"url": "labels"} | soft)


def test_the_inventory_of_before_has_the_digest_of_before() -> None:
    """Golden: FORMAT.md's example."""
    inventory = ClassInventory(names=("a", "b", "c", "d", "e"))
    assert inventory.digest() == "c3edbe0ace7fa6a237f8515869ba6e603d635a49af7e33898e3e2dcb50e10a69"
    with_blank = ClassInventory(names=inventory.names, blank="c")
    assert json.loads(with_blank.to_json())["blank"] == "c"
    assert ClassInventory.from_json(with_blank.to_json(), where="here").blank_id == 2
    with pytest.raises(ValueError, match="blank 'x' is not the name of a class"):
        ClassInventory(names=("a",), blank="x")
