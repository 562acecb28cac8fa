"""The training loop learns what it is told to, keeps the best epoch, and refuses what it cannot learn from."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from softlabel_schemas import InputError
from softlabel_schemas.front_end import Precomputed
from student_trainer import train as train_module
from student_trainer.inputs import open_inputs
from student_trainer.models import AcousticModel
from student_trainer.run_folder import RunFolder, build_model
from student_trainer.torch_data import StepDataset
from student_trainer.train import train
from tests.support.speech import (
    FRONT_END,
    INVENTORY,
    SoftDataset,
    Speech,
    save_corpus,
    train_config,
    without_labels,
    write_soft_labels,
)
from tests.support.trainings import checkpoint, history, model_bytes


class _StoppedError(Exception):
    pass


class TestLearning:
    def test_from_hard_labels(self, speech: Speech, tmp_path: Path) -> None:
        config = train_config(speech, tmp_path / "run")
        assert train(config)
        records = history(config)
        assert [record["epoch"] for record in records] == [1, 2, 3]
        assert records[-1]["hard_loss"] < 0.7 * records[0]["hard_loss"]
        assert records[-1]["dev"]["frame_error_rate"] < 40
        assert "soft_loss" not in records[0]
        assert checkpoint(config)["identity"]["dataset_digest"] is None

    @pytest.mark.parametrize("tail", ["renormalize", "ghost", "to_hard_label", "uniform"])
    def test_from_both(self, speech: Speech, labels: SoftDataset, tmp_path: Path, tail: str) -> None:
        config = train_config(speech, tmp_path / "run", url=labels.url, soft_labels__tail=tail, training__epochs=2)
        assert train(config)
        records = history(config)
        assert records[-1]["hard_loss"] < 0.9 * records[0]["hard_loss"]
        assert records[-1]["soft_loss"] < records[0]["soft_loss"]

    def test_from_soft_labels_alone(self, speech: Speech, tmp_path: Path) -> None:
        """Of utterances without hard labels; those of the dev split, which it is judged by, have some."""
        labels = write_soft_labels(tmp_path / "labels", speech.split("train"))
        here = [without_labels(u) if u.split == "train" else u for u in speech.located()]
        config = train_config(save_corpus(tmp_path, here), tmp_path / "run", url=labels.url, soft_labels__weight=1.0)
        assert train(config)
        records = history(config)
        assert {record["hard_loss"] for record in records} == {0}
        assert records[-1]["soft_loss"] < 0.98 * records[0]["soft_loss"]
        assert records[-1]["dev"]["frame_error_rate"] < 50

    def test_two_heads(self, speech: Speech, labels: SoftDataset, tmp_path: Path) -> None:
        config = train_config(speech, tmp_path / "run", url=labels.url, soft_labels__num_heads=2, training__epochs=2)
        assert train(config)
        records = history(config)
        assert records[-1]["hard_loss"] < 0.9 * records[0]["hard_loss"]
        assert records[-1]["soft_loss"] < records[0]["soft_loss"]
        model, _, _ = RunFolder(config.output).load_model()
        assert len(model.heads) == 2

    def test_in_bfloat16(self, speech: Speech, labels: SoftDataset, tmp_path: Path) -> None:
        """Other roundings, the same lesson; the weights stay float32."""
        runs = []
        for precision in ("float32", "bfloat16"):
            config = train_config(speech, tmp_path / precision, url=labels.url, training__precision=precision)
            assert train(config)
            runs.append(config)
        single, half = (history(config) for config in runs)
        assert single != half
        assert all(tensor.dtype == torch.float32 for tensor in checkpoint(runs[1])["model"].values())
        for name in ("hard_loss", "soft_loss"):
            assert half[-1][name] == pytest.approx(single[-1][name], rel=0.05)
        assert half[-1]["hard_loss"] < 0.9 * half[0]["hard_loss"]

    @pytest.mark.parametrize(
        ("num_heads", "decoding_head", "changed"), [(1, "hard", {0}), (2, "hard", {1}), (2, "soft", {0})]
    )
    def test_the_soft_loss_trains_its_head(
        self,
        speech: Speech,
        labels: SoftDataset,
        tmp_path: Path,
        num_heads: int,
        decoding_head: str,
        changed: set[int],
    ) -> None:
        """Without a hard label in the corpus, and without decay, only the soft loss moves an output layer."""
        nothing = [replace(u, hard_labels=np.full_like(u.hard_labels, -1)) for u in speech.located("train")]
        corpus = save_corpus(tmp_path, nothing)
        weights = []
        for epochs in (1, 2):
            config = train_config(
                corpus,
                tmp_path / f"run-{epochs}",
                url=labels.url,
                soft_labels__num_heads=num_heads,
                soft_labels__decoding_head=decoding_head,
                corpus__dev_splits=[],
                training__epochs=epochs,
                training__weight_decay=0.0,
            )
            assert train(config)
            model, _, _ = RunFolder(config.output).load_model()
            weights.append([head.weight for head in model.heads])
        assert {head for head, pair in enumerate(zip(*weights, strict=True)) if not torch.equal(*pair)} == changed

    def test_the_weight_mixes_the_two_gradients(
        self, speech: Speech, labels: SoftDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gradients: list[list[torch.Tensor]] = []

        def first_only(parameters: Iterable[torch.nn.Parameter], _: float) -> None:
            gradients.append([parameter.grad for parameter in parameters if parameter.grad is not None])
            raise _StoppedError

        monkeypatch.setattr(train_module, "clip_grad_norm_", first_only)
        soft_labels = {"url": labels.url}

        def stopped(**settings: Any) -> None:
            with pytest.raises(_StoppedError):
                train(train_config(speech, tmp_path / "run", **settings))

        stopped()
        stopped(**soft_labels, soft_labels__weight=0.25)
        monkeypatch.setattr(train_module, "hard_loss", lambda logits_NV, _: 0 * logits_NV.sum())
        stopped(**soft_labels, soft_labels__weight=1.0)
        for hard, mixed, soft in zip(*gradients, strict=True):
            torch.testing.assert_close(mixed, 0.75 * hard + 0.25 * soft, atol=1e-6, rtol=0)

    def test_the_seed_decides(self, speech: Speech, tmp_path: Path) -> None:
        runs = []
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            config = train_config(speech, tmp_path / name, seed=seed, training__epochs=1)
            assert train(config)
            runs.append(model_bytes(config))
        assert runs[0] == runs[1]
        assert runs[0] != runs[2]


class TestBestEpoch:
    @pytest.mark.parametrize(("dev_splits", "best"), [(["dev"], 2), ([], 4)])
    def test_its_weights_are_kept(
        self, speech: Speech, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dev_splits: list[str], best: int
    ) -> None:
        errors = iter([30.0, 10.0, 20.0, 15.0])

        class Scripted(train_module.Metrics):
            def summary(self) -> dict[str, Any]:
                return super().summary() | {"frame_error_rate": next(errors)}

        weights = []
        write = RunFolder.write_checkpoint

        def remember(self: RunFolder, state: dict[str, Any]) -> None:
            weights.append({name: value.clone() for name, value in state["model"].items()})
            write(self, state)

        monkeypatch.setattr(train_module, "Metrics", Scripted)
        monkeypatch.setattr(RunFolder, "write_checkpoint", remember)
        config = train_config(speech, tmp_path / "run", corpus__dev_splits=dev_splits, training__epochs=4)
        assert train(config)
        model, _, _ = RunFolder(config.output).load_model()
        same = [
            epoch
            for epoch, state in enumerate(weights, start=1)
            if all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        ]
        assert same == [best]


class TestTensorboard:
    def test_holds_the_history(self, speech: Speech, labels: SoftDataset, tmp_path: Path) -> None:
        config = train_config(speech, tmp_path / "run", url=labels.url)
        assert train(config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

            events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
        found = {
            name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]
        }
        for name in ("hard_loss", "soft_loss"):
            assert found[name] == [(r["epoch"], pytest.approx(r[name])) for r in history(config)]
        for name in ("frame_error_rate", "phone_error_rate", "cross_entropy", "calibration_error"):
            assert found[name] == [(r["epoch"], pytest.approx(r["dev"][name])) for r in history(config)]


class TestRefusals:
    def test_a_loss_that_is_not_finite(self, tmp_path: Path, speech: Speech) -> None:
        """Features so large that the model overflows, as a user's own front end may write."""
        utterances = []
        for index, utterance in enumerate(speech.split("train")[:4]):
            features_TD = np.random.default_rng(index).standard_normal((len(utterance.hard_labels), 4))
            features_TD[3, 1] = 3e38 if index == 2 else 0
            np.save(tmp_path / f"{index}.npy", features_TD.astype(np.float32))
            utterances.append(replace(utterance, audio=None, features=f"{index}.npy"))
        front_end = Precomputed(num_features=4, frame_shift_ms=30.0)
        config = train_config(
            save_corpus(tmp_path, utterances),
            tmp_path / "run",
            front_end=front_end.model_dump(),
            corpus__dev_splits=[],
            training__batch_seconds=0.1,
        )
        message = rf"the loss is nan, .*, at epoch 1, step \d \(utterances {utterances[2].utterance_id}, \.\.\.\)"
        with pytest.raises(InputError, match=message):
            train(config)
        assert not (tmp_path / "run/model.safetensors").exists()

    def test_a_gradient_that_is_not_finite(
        self, speech: Speech, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of the only step, behind which no loss is computed with the weights that it leaves."""

        def overflowing(*args: Any) -> AcousticModel:
            model = build_model(*args)
            next(model.parameters()).register_hook(lambda gradient: gradient * math.inf)
            return model

        monkeypatch.setattr(train_module, "build_model", overflowing)
        changes = {"corpus__dev_splits": [], "training__epochs": 1, "training__batch_seconds": 1000.0}
        with pytest.raises(
            InputError, match=r"the loss is \d\S+, the norm of its gradient (inf|nan), at epoch 1, step 0 "
        ):
            train(train_config(speech, tmp_path / "run", **changes))
        assert not (tmp_path / "run/model.safetensors").exists()

    def test_frame_shifts_that_differ(self, speech: Speech, tmp_path: Path) -> None:
        config = train_config(speech, tmp_path / "run", front_end__stack=2)
        with pytest.raises(InputError, match="labels have a frame shift of 30 ms, the front end gives 20 ms"):
            train(config)

    def test_hard_labels_of_another_inventory(self, speech: Speech, tmp_path: Path) -> None:
        other = INVENTORY.model_copy(update={"silence_phones": ()})
        (tmp_path / "other.json").write_bytes(other.to_json())
        config = train_config(speech, tmp_path / "run", corpus__inventory=str(tmp_path / "other.json"))
        with pytest.raises(InputError, match=f"inventory {INVENTORY.digest()[:12]}, .* {other.digest()[:12]}"):
            train(config)

    def test_a_dev_utterance_without_labels_before_the_first_step(
        self, speech: Speech, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        here = speech.located()
        here[-4] = without_labels(here[-4])
        assert here[-4].split == "dev"

        def step(*_: Any) -> None:
            raise _StoppedError

        monkeypatch.setattr(train_module._Trainer, "_step", step)
        with pytest.raises(InputError, match=r"1 utterances of \['dev'\] have no hard labels"):
            train(train_config(save_corpus(tmp_path, here), tmp_path / "run"))
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("split", ["train", "dev"])
    def test_another_number_of_labels_before_the_first_step(
        self, speech: Speech, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str
    ) -> None:
        """Mended later, the corpus would be another one and the run would start anew."""

        def step(*_: Any) -> None:
            raise _StoppedError

        monkeypatch.setattr(train_module._Trainer, "_step", step)
        here = speech.located()
        rows = [row for row, utterance in enumerate(here) if utterance.split == split][1:3]
        for row in rows:
            here[row] = replace(here[row], hard_labels=here[row].hard_labels[:-1].copy())
        num_labels, num_utterances = len(here[rows[0]].hard_labels), len(speech.split(split))
        config = train_config(save_corpus(tmp_path, here), tmp_path / "run")
        message = (
            rf"utterance {here[rows[0]].utterance_id}: the model gives {num_labels + 1} frames, there are {num_labels} labels; "
            rf"so it is with 2 of {num_utterances} utterances"
        )
        with pytest.raises(InputError, match=message):
            train(config)
        # A loop of one's own may have a model of other frames.
        assert len(StepDataset(config)._source.data.corpus) == 20

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_mel_bins": 128}, r"no filterbank of num_mel_bins 128, .* at 8000 Hz .*; use fewer bins"),
            ({"high_freq": 5000.0}, r"high_freq 5000 .* at 8000 Hz .*, or frequencies from 0 to 4000 Hz"),
            ({"low_freq": 4000.0}, r"low_freq 4000"),
            ({"frame_length_ms": 0.01}, r"frame_length_ms 0\.01"),
        ],
    )
    def test_a_filterbank_that_cannot_be_computed(
        self, speech: Speech, tmp_path: Path, changes: dict[str, Any], message: str
    ) -> None:
        front_end = FRONT_END.model_copy(update=changes)
        with pytest.raises(InputError, match=message):
            open_inputs(train_config(speech, tmp_path / "run", front_end=front_end.model_dump()))

    def test_labels_and_model_of_other_lengths(self, speech: Speech, tmp_path: Path) -> None:
        own = {"architecture": "tests.support.speech:pair_encoder", "arguments": {}}
        config = train_config(speech, tmp_path / "run", model=own)
        with pytest.raises(InputError, match=r"utterance train-\d\d: the model gives \d+ frames, there are \d+ labels"):
            train(config)
