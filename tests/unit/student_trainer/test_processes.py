"""Batches made by several processes: the same run, and no step lost where one of them fails or is killed, or by Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import get_worker_info

from softlabel_schemas import InputError, IntegrityError, open_dataset
from student_trainer import train as train_module
from student_trainer.config import TrainConfig
from student_trainer.data import Step, TrainingData
from student_trainer.inputs import open_inputs
from student_trainer.order import Order
from student_trainer.processes import is_lost_process, steps_of_processes
from student_trainer.source import TrainingSource
from student_trainer.train import train
from tests.support.processes import LIMIT_SECONDS, descendants, end, finish, gone, wait_for
from tests.support.speech import SoftDataset, Speech, train_config
from tests.support.trainings import checkpoint, history, model_bytes, write_toml

ROOT = Path(__file__).parents[3]
# Three pools in an epoch, of 8, 8 and 4 steps; checkpoints at the end of an epoch alone.
POOLS = {"training__pool_seconds": 1.0, "training__batch_seconds": 0.1}
PROCESSES = {**POOLS, "training__num_processes": 2}


@pytest.fixture
def config(speech: Speech, labels: SoftDataset, tmp_path: Path) -> TrainConfig:
    return train_config(speech, tmp_path / "run", url=labels.url, **PROCESSES)


@pytest.fixture(scope="module")
def undisturbed(speech: Speech, labels: SoftDataset) -> TrainConfig:
    """Without processes."""
    config = train_config(speech, speech.folder / "undisturbed", url=labels.url, **POOLS)
    assert train(config)
    return config


def assert_same_result(config: TrainConfig, expected: TrainConfig) -> None:
    assert model_bytes(config) == model_bytes(expected)
    assert history(config) == history(expected)


def progress(config: TrainConfig) -> tuple[int, int]:
    found = checkpoint(config)["progress"]
    return found["epoch"], found["step"]


def both(config: TrainConfig, **place: int) -> tuple[list[Step], Iterator[Step]]:
    """The steps as this process makes them, and as two others do."""
    training, source = config.training, TrainingSource(config, open_inputs(config))
    order = Order(seed=config.seed, batch_seconds=training.batch_seconds, pool_seconds=training.pool_seconds)
    more: dict[str, Any] = {"num_epochs": 3, "first_epoch": 0, "first_step": 0, **place, "device": torch.device("cpu")}
    expected = list(source.data.steps(order, temperature=2.0, **more))
    return expected, steps_of_processes(source, order, num_processes=2, **more)


def assert_same_steps(found: Iterator[Step], expected: list[Step]) -> None:
    for step, other in zip(found, expected, strict=True):
        assert (step.epoch, step.step, step.num_steps) == (other.epoch, other.step, other.num_steps)
        assert step.batch.utterance_ids == other.batch.utterance_ids
        assert torch.equal(step.batch.features_BTD, other.batch.features_BTD)
        assert step.batch.targets is not None
        assert other.batch.targets is not None
        assert torch.equal(step.batch.targets.probs_NK, other.batch.targets.probs_NK)


class TestSteps:
    def test_they_are_the_same_from_anywhere(self, speech: Speech, labels: SoftDataset, tmp_path: Path) -> None:
        """Over the end of an epoch that leaves the turn to the second process."""
        config = train_config(
            speech, tmp_path / "run", url=labels.url, training__pool_seconds=1.0, training__batch_seconds=0.7
        )
        expected, found = both(config, first_step=1)
        assert (expected[0].num_steps - 1) % 2 == 1
        assert_same_steps(found, expected)

    def test_one_of_them_is_killed(self, config: TrainConfig) -> None:
        """While the next step is waited for. The others end, whoever keeps the error."""
        _, found = both(config)
        next(found)
        active_children()[0].kill()
        with pytest.raises(RuntimeError) as raised:
            list(found)
        assert is_lost_process(raised.value)
        assert not active_children()


class Exhausted(TrainingSource):
    """Of a machine whose memory the processes use up."""

    @property
    def data(self) -> TrainingData:
        if get_worker_info() is not None:
            raise MemoryError("Unable to allocate 6 GiB")
        return super().data


class Unreadable(TrainingSource):
    """Of a script that a new process cannot import, or whose objects it cannot make."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        raise ValueError("cannot be made here")


class TestRuns:
    def test_a_run_goes_on_without_them_and_with_them(
        self, config: TrainConfig, undisturbed: TrainConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A setting that decides nothing: a checkpoint of either is the other's."""
        config = always_saving(config)
        step = train_module._Trainer._step

        def failing(self: Any, *args: Any) -> dict[str, float]:
            if (self.at.epoch, self.at.step) == place:
                raise OSError("the disk is gone")
            return step(self, *args)

        monkeypatch.setattr(train_module._Trainer, "_step", failing)
        for place, each in (((0, 3), config), ((1, 5), without(config)), ((3, 0), config)):
            if place[0] < 3:
                with pytest.raises(OSError, match="the disk is gone"):
                    train(each)
                assert progress(config) == place
            else:
                assert train(each)
            assert not active_children()
        assert_same_result(config, undisturbed)

    def test_labels_that_are_damaged(
        self, config: TrainConfig, labels: SoftDataset, undisturbed: TrainConfig, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The error of a process is that of the run, without the process's traceback."""
        dataset = open_dataset(labels.url)
        record = dataset.manifest.shards[1]
        path = Path(labels.url, record.folder, record.files[0].name)
        data = path.read_bytes()
        path.write_bytes(data[:-10] + bytes(10))
        try:
            with pytest.raises(IntegrityError, match=r"shard 1\).* was changed after writing") as raised:
                train(config)
        finally:
            path.write_bytes(data)
        assert "Traceback" not in str(raised.value)
        assert "\n" not in str(raised.value)
        assert not active_children()
        assert train(config)
        assert_same_result(config, undisturbed)

    def test_a_process_that_is_killed(
        self,
        config: TrainConfig,
        undisturbed: TrainConfig,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """As by a machine without memory. The weights may be torn, as the error comes at any time: then nothing is written."""
        step = train_module._Trainer._step

        def killing(self: Any, *args: Any) -> dict[str, float]:
            if (self.at.epoch, self.at.step) == (1, 2):
                for process in active_children():
                    process.kill()
            return step(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(train_module._Trainer, "_step", killing)
            with pytest.raises(ChildProcessError, match=r"lower training\.num_processes \(2\)"):
                train(config)
        assert "the same command goes on from there" in capsys.readouterr().err
        assert progress(config) >= (1, 0)
        assert train(config)
        assert_same_result(config, undisturbed)

    def test_memory_that_is_not_enough(self, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(train_module, "TrainingSource", Exhausted)
        message = (
            r"out of memory at epoch 1, step 0 \(Unable to allocate 6 GiB\); lower training\.batch_seconds \(0\.1\), "
            r"training\.num_processes \(2\), training\.pool_seconds"
        )
        with pytest.raises(InputError, match=message):
            train(config)
        assert not active_children()

    def test_processes_that_cannot_start(
        self, config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(train_module, "TrainingSource", Unreadable)
        with pytest.raises(ChildProcessError, match=r"exited unexpectedly.*\); it may have said why, above"):
            train(config)
        assert "ValueError: cannot be made here" in capfd.readouterr().err
        assert not active_children()

    def test_a_run_that_is_done_but_for_its_end(
        self, config: TrainConfig, undisturbed: TrainConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """No process is started for it."""
        end = train_module._Trainer._epoch_end

        def interrupting(self: Any, *args: Any) -> None:
            if self.at.epoch == 2:
                raise KeyboardInterrupt
            end(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(train_module._Trainer, "_epoch_end", interrupting)
            with pytest.raises(KeyboardInterrupt):
                train(config)
        monkeypatch.delattr(train_module, "steps_of_processes")
        assert train(config)
        assert_same_result(config, undisturbed)

    def test_a_corpus_that_is_kept_in_memory_needs_none(
        self, speech: Speech, labels: SoftDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[int] = []
        step = train_module._Trainer._step
        monkeypatch.setattr(
            train_module._Trainer, "_step", lambda *args: seen.append(len(active_children())) or step(*args)
        )
        assert train(train_config(speech, tmp_path / "run", url=labels.url, training__num_processes=2))
        assert set(seen) == {0}


@pytest.fixture
def command(speech: Speech, labels: SoftDataset, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """At work, with a checkpoint; long enough to be interrupted. The batches on their way are more than a pipe takes."""
    toml = write_toml(tmp_path, speech, labels.url)
    settings = ("batch_seconds = 2.0", "pool_seconds = 2.0", "num_processes = 2")
    text = toml.read_text().replace("batch_seconds = 1.5", "\n".join(settings)).replace("epochs = 3", "epochs = 2000")
    toml.write_text(text.replace("num_mel_bins = 8", "num_mel_bins = 80"))
    run = subprocess.Popen(
        [sys.executable, "-c", "from student_trainer.cli import main; main()", "train", str(toml)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/schemas", "TMPDIR": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for((tmp_path / "run" / "checkpoint.pt").exists, run)
    yield run
    if run.poll() is None:
        end(run)


def ctrl_c(command: subprocess.Popen[str]) -> None:
    """As a terminal sends it: to the run and to its processes. Twice: as of someone who has no patience."""
    for _ in range(2):
        os.killpg(command.pid, signal.SIGINT)


def stop_all(command: subprocess.Popen[str]) -> None:
    """As Slurm and systemd do."""
    os.killpg(command.pid, signal.SIGTERM)


@pytest.mark.parametrize("stop", [ctrl_c, subprocess.Popen.terminate, stop_all])
def test_stopped(command: subprocess.Popen[str], stop: Callable[[subprocess.Popen[str]], None], tmp_path: Path) -> None:
    """One message, a checkpoint, and nobody left."""
    processes = descendants(command.pid)
    assert len(processes) >= 3
    stop(command)
    _, _, stderr = finish(command)
    assert command.returncode == 130
    assert "Traceback" not in stderr
    assert "the same command goes on from there" in stderr
    assert stderr.splitlines()[-1] == "interrupted"
    assert all(map(gone, processes))
    assert not list(tmp_path.glob("training-corpus-*"))


def test_killed(command: subprocess.Popen[str], tmp_path: Path) -> None:
    """The run alone. Its processes end by themselves, however many batches are on their way, and remove the corpus's file."""
    processes = descendants(command.pid)
    assert len(processes) >= 3
    command.kill()
    finish(command)
    deadline = time.monotonic() + LIMIT_SECONDS
    while not all(map(gone, processes)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not list(tmp_path.glob("training-corpus-*"))


def always_saving(config: TrainConfig) -> TrainConfig:
    """After every step."""
    return config.model_copy(update={"training": config.training.model_copy(update={"checkpoint_minutes": 1e-9})})


def without(config: TrainConfig) -> TrainConfig:
    return config.model_copy(update={"training": config.training.model_copy(update={"num_processes": None})})
