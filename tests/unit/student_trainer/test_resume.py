"""A training that was stopped anywhere, or killed, ends as one that was not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from softlabel_schemas import InputError
from student_trainer import train as train_module
from student_trainer.cli import main
from student_trainer.config import TrainConfig, load_config
from student_trainer.run_folder import RunFolder
from student_trainer.train import train
from tests.support.disturbed import train_until_killed
from tests.support.speech import SoftDataset, Speech, save_corpus, train_config, write_soft_labels
from tests.support.trainings import checkpoint, history, model_bytes, write_toml

# A checkpoint after every step.
ALWAYS = {"training__checkpoint_minutes": 1e-9}
POOLS = {"training__pool_seconds": 1.0}


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

    def test_a_second_training_in_the_folder_of_one_at_work(
        self, speech: Speech, labels: SoftDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Before the first checkpoint: one's ``run.json`` would stand beside the other's weights."""
        config = train_config(speech, tmp_path / "run", url=labels.url)
        other = config.model_copy(update={"seed": 8})
        step, digests = train_module._Trainer._step, list[str | None]()

        def at_work(self: Any, *args: Any) -> dict[str, float]:
            if (self.at.epoch, self.at.step) == (0, 1) and not digests:
                digests.append(None)
                assert train(other)
                digests[0] = RunFolder(config.output).weights_digest()
            return step(self, *args)

        monkeypatch.setattr(train_module._Trainer, "_step", at_work)
        with pytest.raises(InputError, match=f"another training was begun in {config.output} after this one"):
            train(config)
        assert RunFolder(config.output).config() == other
        assert [RunFolder(config.output).weights_digest()] == digests
        assert not train(other)

    def test_a_folder_may_be_moved(self, uninterrupted: TrainConfig, tmp_path: Path) -> None:
        moved = uninterrupted.model_copy(update={"output": str(tmp_path / "moved")})
        Path(moved.output).mkdir()
        (Path(moved.output) / "checkpoint.pt").write_bytes((Path(uninterrupted.output) / "checkpoint.pt").read_bytes())
        assert not train(moved)

    def test_another_configuration(self, uninterrupted: TrainConfig) -> None:
        other = uninterrupted.model_copy(update={"seed": 8})
        with pytest.raises(
            InputError, match=r"holds a run of other settings than these \(seed: 7 against 8\); set them back"
        ):
            train(other)

    def test_what_does_not_decide_the_result_may_change(
        self, speech: Speech, labels: SoftDataset, uninterrupted: TrainConfig, tmp_path: Path
    ) -> None:
        """The contents of the files have digests of their own, wherever they lie."""
        for name in ("labels", "corpus.parquet", "inventory.json"):
            (tmp_path / name).symlink_to({"labels": labels.url}.get(name, speech.folder / name))
        folder = tmp_path / "run"
        folder.mkdir()
        (folder / "checkpoint.pt").write_bytes((Path(uninterrupted.output) / "checkpoint.pt").read_bytes())
        moved = train_config(
            speech,
            folder,
            name="renamed",
            url=str(tmp_path / "labels"),
            corpus__manifest=str(tmp_path / "corpus.parquet"),
            corpus__inventory=str(tmp_path / "inventory.json"),
            training__checkpoint_minutes=3.0,
        )
        assert not train(moved)

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

    def test_another_dev_set(self, speech: Speech, tmp_path: Path) -> None:
        """The best epoch would be chosen by errors that cannot be compared."""
        here = speech.located()
        config = train_config(save_corpus(tmp_path, here), tmp_path / "run", training__epochs=1)
        assert train(config)
        changed = [replace(u, hard_labels=u.hard_labels[::-1].copy()) if u.split == "dev" else u for u in here]
        save_corpus(tmp_path, changed)
        with pytest.raises(InputError, match="another dev_corpus_digest"):
            train(config)

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
        other = load_config(toml).model_copy(update={"seed": 8})
        RunFolder(tmp_path / "run").write_checkpoint(
            {
                "identity": {"config": other.model_dump(mode="json")},
                "model": {},
                "optimizer": {},
                "progress": {},
            }
        )
        result = CliRunner().invoke(main, ["train", str(toml)])
        assert (result.exit_code, result.stdout) == (2, "")
        assert "holds a run of other settings than these (seed: 8 against 7)" in result.stderr
