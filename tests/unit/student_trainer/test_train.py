"""The training loop: it learns, and a run that was stopped anywhere ends as one that was not."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from softlabel_schemas import InputError, IntegrityError
from softlabel_schemas.front_end import Precomputed
from student_trainer import train as train_module
from student_trainer.cli import main
from student_trainer.config import TrainConfig, load_config
from student_trainer.run_folder import RunFolder
from student_trainer.train import train
from tests.support.disturbed import train_until_killed
from tests.support.speech import (
    INVENTORY,
    SoftDataset,
    Speech,
    save_corpus,
    train_config,
    without_labels,
    write_soft_labels,
    write_speech,
)

# A checkpoint after every step.
ALWAYS = {"training__checkpoint_minutes": 1e-9}
POOLS = {"training__pool_seconds": 1.0}


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Speech:
    return write_speech(tmp_path_factory.mktemp("train") / "speech")


@pytest.fixture(scope="module")
def labels(speech: Speech) -> SoftDataset:
    return write_soft_labels(speech.folder / "labels", speech.split("train"))


@pytest.fixture(scope="module")
def uninterrupted(speech: Speech, labels: SoftDataset) -> TrainConfig:
    config = train_config(speech, speech.folder / "uninterrupted", url=labels.url)
    assert train(config)
    return config


@pytest.fixture(scope="module")
def without_dev(speech: Speech, labels: SoftDataset) -> TrainConfig:
    config = train_config(speech, speech.folder / "without-dev", url=labels.url, corpus__dev_splits=[])
    assert train(config)
    return config


def history(config: TrainConfig) -> list[dict[str, Any]]:
    """Less the seconds, the only entry that may differ."""
    records = json.loads((Path(config.output) / "run.json").read_bytes())["history"]
    for record in records:
        assert record.pop("seconds") > 0
    return records


def model_bytes(config: TrainConfig) -> bytes:
    return (Path(config.output) / "model.safetensors").read_bytes()


def checkpoint(config: TrainConfig) -> dict[str, Any]:
    return torch.load(Path(config.output) / "checkpoint.pt", weights_only=True)


class _StoppedError(Exception):
    pass


@pytest.fixture
def stop_before(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Makes training stop just before a step of an epoch; (-1, -1) lets it run again."""
    step, place = train_module._Trainer._step, [(-1, -1)]

    def stopping(self: Any, *args: Any) -> dict[str, float]:
        if (self.at.epoch, self.at.step) == place[0]:
            raise _StoppedError
        return step(self, *args)

    monkeypatch.setattr(train_module._Trainer, "_step", stopping)

    def stop(epoch: int, at_step: int) -> None:
        place[0] = (epoch, at_step)

    return stop


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
        config = train_config(
            save_corpus(tmp_path, here), tmp_path / "run", url=labels.url, soft_labels__weight=1.0, **ALWAYS
        )
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


class TestResume:
    def assert_same_result(self, config: TrainConfig, expected: TrainConfig) -> None:
        assert model_bytes(config) == model_bytes(expected)
        assert history(config) == history(expected)
        found, wanted = checkpoint(config), checkpoint(expected)
        for name, value in wanted["model"].items():
            assert torch.equal(found["model"][name], value)

    @pytest.mark.parametrize(
        ("changes", "stop", "resumed_at"),
        [
            (ALWAYS, (1, 3), (1, 3)),
            (ALWAYS, (0, 1), (0, 1)),
            (ALWAYS, (2, 0), (2, 0)),
            ({}, (1, 3), (1, 0)),
            ({}, (0, 3), (0, 0)),
        ],
    )
    def test_after_an_exception(
        self,
        speech: Speech,
        labels: SoftDataset,
        uninterrupted: TrainConfig,
        tmp_path: Path,
        stop_before: Callable[[int, int], None],
        monkeypatch: pytest.MonkeyPatch,
        changes: dict[str, Any],
        stop: tuple[int, int],
        resumed_at: tuple[int, int],
    ) -> None:
        """Mid-epoch checkpoints resume at the step, epoch checkpoints at the epoch; both end alike."""
        config = train_config(speech, tmp_path / "run", url=labels.url, **changes)
        stop_before(*stop)
        with pytest.raises(_StoppedError):
            train(config)
        stop_before(-1, -1)
        steps: list[tuple[int, int]] = []
        step = train_module._Trainer._step
        monkeypatch.setattr(
            train_module._Trainer,
            "_step",
            lambda self, *args: steps.append((self.at.epoch, self.at.step)) or step(self, *args),
        )
        assert train(config)
        assert steps[0] == resumed_at
        assert len(steps) == len(set(steps))
        self.assert_same_result(config, uninterrupted)

    def test_in_small_pools(
        self, speech: Speech, labels: SoftDataset, tmp_path: Path, stop_before: Callable[[int, int], None]
    ) -> None:
        whole = train_config(speech, tmp_path / "whole", url=labels.url, **POOLS)
        assert train(whole)
        config = train_config(speech, tmp_path / "run", url=labels.url, **POOLS, **ALWAYS)
        for place in ((0, 2), (1, 5), (2, 7)):
            stop_before(*place)
            with pytest.raises(_StoppedError):
                train(config)
        stop_before(-1, -1)
        assert train(config)
        self.assert_same_result(config, whole)

    @pytest.mark.parametrize("epoch", [2, 3])
    @pytest.mark.parametrize("writer", ["write_model", "write_json", "write_checkpoint"])
    def test_after_a_kill_between_the_files_of_an_epoch(
        self,
        speech: Speech,
        labels: SoftDataset,
        without_dev: TrainConfig,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        writer: str,
        epoch: int,
    ) -> None:
        """Without a dev split, every epoch's model is written."""
        config = train_config(speech, tmp_path / "run", url=labels.url, corpus__dev_splits=[])
        write, calls = getattr(RunFolder, writer), []

        def killed(self: RunFolder, *args: Any) -> None:
            calls.append(args)
            if len(calls) == epoch:
                raise _StoppedError
            write(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, writer, killed)
            with pytest.raises(_StoppedError):
                train(config)
        assert train(config)
        self.assert_same_result(config, without_dev)

    def test_after_sigkill(
        self, speech: Speech, labels: SoftDataset, uninterrupted: TrainConfig, tmp_path: Path
    ) -> None:
        toml = write_toml(tmp_path, speech, labels.url)
        train_until_killed(toml)
        config = load_config(toml)
        progress = checkpoint(config)["progress"]
        assert (progress["epoch"], progress["step"]) == (1, 2)
        assert train(config)
        self.assert_same_result(config, uninterrupted)

    def test_a_complete_run_is_left_alone(self, uninterrupted: TrainConfig) -> None:
        before = {path.name: path.stat().st_mtime_ns for path in Path(uninterrupted.output).rglob("*")}
        assert not train(uninterrupted)
        assert {path.name: path.stat().st_mtime_ns for path in Path(uninterrupted.output).rglob("*")} == before

    def test_a_folder_may_be_moved(self, uninterrupted: TrainConfig, tmp_path: Path) -> None:
        moved = uninterrupted.model_copy(update={"output": str(tmp_path / "moved")})
        Path(moved.output).mkdir()
        (Path(moved.output) / "checkpoint.pt").write_bytes((Path(uninterrupted.output) / "checkpoint.pt").read_bytes())
        assert not train(moved)

    def test_another_configuration(self, uninterrupted: TrainConfig) -> None:
        other = uninterrupted.model_copy(update={"seed": 8})
        message = f"another config_digest .{uninterrupted.digest()}, now {other.digest()}"
        with pytest.raises(InputError, match=message):
            train(other)

    def test_another_dataset_or_corpus(self, speech: Speech, tmp_path: Path) -> None:
        config = train_config(
            speech,
            tmp_path / "run",
            url=str(tmp_path / "labels"),
            training__epochs=1,
            corpus__manifest=str(tmp_path / "corpus.parquet"),
        )
        here = speech.located()
        save_corpus(tmp_path, here)
        first = write_soft_labels(tmp_path / "labels", speech.split("train"))
        assert train(config)
        (tmp_path / "labels").rename(tmp_path / "first")
        write_soft_labels(tmp_path / "labels", speech.split("train")[::-1])
        with pytest.raises(InputError, match="another dataset_digest"):
            train(config)
        (tmp_path / "labels").rename(tmp_path / "second")
        (tmp_path / "first").rename(first.url)
        save_corpus(tmp_path, [replace(here[0], hard_labels=here[0].hard_labels[::-1].copy()), *here[1:]])
        with pytest.raises(InputError, match="another corpus_digest"):
            train(config)
        save_corpus(tmp_path, here)
        assert not train(config)

    def test_an_encoder_whose_code_has_changed(self, uninterrupted: TrainConfig, tmp_path: Path) -> None:
        state = checkpoint(uninterrupted)
        del state["model"]["encoder.norms.1.bias"]
        RunFolder(tmp_path).write_checkpoint(state)
        with pytest.raises(InputError, match=r"(?s)does not fit the model .*encoder\.norms\.1\.bias"):
            train(uninterrupted.model_copy(update={"output": str(tmp_path)}))

    def test_checkpoints_come_in_time_however_small_the_pools(
        self, speech: Speech, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With a clock that goes a second at each look: no pool lasts as long as the time between checkpoints."""
        seconds = iter(range(10**6))
        monkeypatch.setattr(train_module, "time", SimpleNamespace(monotonic=lambda: float(next(seconds))))
        places = []
        write = RunFolder.write_checkpoint

        def remember(self: RunFolder, state: dict[str, Any]) -> None:
            places.append((state["progress"]["epoch"], state["progress"]["step"]))
            write(self, state)

        monkeypatch.setattr(RunFolder, "write_checkpoint", remember)
        config = train_config(
            speech,
            tmp_path / "run",
            **POOLS,
            training__epochs=1,
            training__batch_seconds=0.1,
            training__checkpoint_minutes=9 / 60,
        )
        assert train(config)
        assert len(places) >= 3
        assert places[-1] == (1, 0)


class TestCheckpoint:
    def test_names_all_it_was_made_from(self, speech: Speech, labels: SoftDataset, uninterrupted: TrainConfig) -> None:
        from softlabel_schemas import open_dataset

        identity = checkpoint(uninterrupted)["identity"]
        assert identity["config_digest"] == uninterrupted.digest()
        assert identity["dataset_digest"] == open_dataset(labels.url).manifest.content_digest
        assert identity["inventory_digest"] == INVENTORY.digest()
        assert identity["corpus_digest"] == speech.corpus.select_splits(["train"]).digest
        run = json.loads((Path(uninterrupted.output) / "run.json").read_bytes())
        assert {name: run[name] for name in identity} == identity
        model, config, inventory = RunFolder(uninterrupted.output).load_model()
        assert (config, inventory) == (uninterrupted, INVENTORY)
        assert identity["num_parameters"] == sum(value.numel() for value in model.state_dict().values())

    @pytest.mark.parametrize("damage", ["truncated", "empty", "not an archive", "a tensor's bit", "not a checkpoint"])
    def test_a_damaged_one_is_refused(self, uninterrupted: TrainConfig, tmp_path: Path, damage: str) -> None:
        data = bytearray((Path(uninterrupted.output) / "checkpoint.pt").read_bytes())
        weight = checkpoint(uninterrupted)["model"]["heads.0.weight"].numpy().tobytes()
        if damage == "a tensor's bit":
            data[data.index(weight) + len(weight) // 2] ^= 1
        damaged = {"truncated": data[: len(data) // 2], "empty": b"", "not an archive": b"x" * 1000}.get(damage, data)
        (tmp_path / "checkpoint.pt").write_bytes(damaged)
        if damage == "not a checkpoint":
            torch.save({"weights": torch.zeros(2)}, tmp_path / "checkpoint.pt")
        config = uninterrupted.model_copy(update={"output": str(tmp_path)})
        with pytest.raises(
            IntegrityError, match=r"checkpoint\.pt cannot be read .*; delete it to train from the start"
        ):
            train(config)

    def test_no_flipped_bit_is_read_silently(self, uninterrupted: TrainConfig, tmp_path: Path) -> None:
        data = (Path(uninterrupted.output) / "checkpoint.pt").read_bytes()
        expected = checkpoint(uninterrupted)
        rng = np.random.default_rng(0)
        detected = 0
        for bit in rng.integers(0, 8 * len(data), 100):
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << (bit % 8)
            (tmp_path / "checkpoint.pt").write_bytes(flipped)
            try:
                found = RunFolder(tmp_path).read_checkpoint()
            except IntegrityError:
                detected += 1
                continue
            # Alignment between records and repeated headers are not read.
            assert found is not None
            assert str(found) == str(expected)
        assert detected > 50


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
        message = rf"the loss is nan at epoch 1, step \d \(utterances {utterances[2].utterance_id}, \.\.\.\)"
        with pytest.raises(InputError, match=message):
            train(config)
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
        self, speech: Speech, tmp_path: Path, stop_before: Callable[[int, int], None]
    ) -> None:
        here = speech.located()
        here[-4] = without_labels(here[-4])
        assert here[-4].split == "dev"
        stop_before(0, 0)
        with pytest.raises(InputError, match=r"1 utterances of \['dev'\] have no hard labels"):
            train(train_config(save_corpus(tmp_path, here), tmp_path / "run"))
        assert not (tmp_path / "run").exists()

    def test_labels_and_model_of_other_lengths(self, speech: Speech, tmp_path: Path) -> None:
        own = {"architecture": "tests.support.speech:pair_encoder", "arguments": {}}
        config = train_config(speech, tmp_path / "run", model=own)
        with pytest.raises(InputError, match=r"utterance train-\d\d: the model gives \d+ frames, there are \d+ labels"):
            train(config)


def write_toml(folder: Path, speech: Speech, url: str) -> Path:
    """The run of ``train_config``, with a checkpoint after every step."""
    path = folder / "train.toml"
    path.write_text(
        f"""
name = "student"
output = "run"
seed = 7
corpus = {{ manifest = "{speech.manifest}", inventory = "{speech.inventory}" }}
soft_labels = {{ url = "{url}", temperature = 2.0 }}
front_end = {{ kind = "fbank", sample_rate = 8000, num_mel_bins = 8, stack = 3 }}
model = {{ architecture = "tdnn", arguments = {{ hidden = 16, num_layers = 2 }} }}

[training]
epochs = 3
batch_seconds = 1.5
learning_rate = 0.01
checkpoint_minutes = 1e-9
num_threads = 1
"""
    )
    return path


class TestCommand:
    def test_interrupted_resumed_and_complete(
        self, speech: Speech, labels: SoftDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        toml = write_toml(tmp_path, speech, labels.url)
        step = train_module._Trainer._step

        def interrupted(self: Any, *args: Any) -> dict[str, float]:
            if self.at.epoch == 1:
                raise KeyboardInterrupt
            return step(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(train_module._Trainer, "_step", interrupted)
            result = CliRunner().invoke(main, ["train", str(toml)])
        assert result.exit_code == 130
        assert result.stderr.splitlines()[-1] == "interrupted"
        result = CliRunner().invoke(main, ["train", str(toml)])
        assert (result.exit_code, result.stdout) == (0, f"{tmp_path}/run: trained 3 epochs\n")
        result = CliRunner().invoke(main, ["train", str(toml)])
        assert result.exit_code == 0
        assert result.stdout == f"{tmp_path}/run: already complete (3 epochs); nothing to do\n"

    def test_a_damaged_checkpoint_exits_with_1_another_configuration_with_2(
        self, speech: Speech, labels: SoftDataset, tmp_path: Path
    ) -> None:
        toml = write_toml(tmp_path, speech, labels.url)
        (tmp_path / "run").mkdir()
        (tmp_path / "run/checkpoint.pt").write_bytes(b"damaged")
        result = CliRunner().invoke(main, ["train", str(toml)])
        assert (result.exit_code, result.stdout) == (1, "")
        assert "checkpoint.pt cannot be read" in result.stderr
        RunFolder(tmp_path / "run").write_checkpoint(
            {"identity": {"config_digest": "0" * 64}, "model": {}, "optimizer": {}, "progress": {}}
        )
        result = CliRunner().invoke(main, ["train", str(toml)])
        assert (result.exit_code, result.stdout) == (2, "")
        assert "holds a run with another config_digest" in result.stderr
