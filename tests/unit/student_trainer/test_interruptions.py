"""Training over a store that fails, and a user who interrupts: no step is lost, and the result is as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from softlabel_schemas import InputError, IntegrityError, retrying
from softlabel_schemas.object_store import ObjectStore
from student_trainer import train as train_module
from student_trainer.cli import main
from student_trainer.config import TrainConfig, load_config
from student_trainer.data import TrainingData
from student_trainer.interrupts import interrupts_held
from student_trainer.run_folder import RunFolder
from student_trainer.train import train
from tests.support.disturbed import train_until_killed
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.rgw import s3_environment
from tests.support.speech import SoftDataset, Speech, train_config, write_soft_labels, write_speech
from tests.support.trainings import write_toml

ROOT = Path(__file__).parents[3]
# Three pools in an epoch, each loaded from the store, of 8, 8 and 4 steps; no checkpoint but at the end of an epoch.
POOLS = {"training__pool_seconds": 1.0, "training__batch_seconds": 0.1}
# The failing step lies in the second epoch, in whose first pool batches are still collated: its third is not yet asked for.
EPOCH, STEP = 1, 2


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Speech:
    return write_speech(tmp_path_factory.mktemp("interruptions") / "speech")


@pytest.fixture(scope="module")
def labels(speech: Speech) -> SoftDataset:
    return write_soft_labels(speech.folder / "labels", speech.split("train"))


@pytest.fixture(scope="module")
def undisturbed(speech: Speech, labels: SoftDataset) -> TrainConfig:
    config = train_config(speech, speech.folder / "undisturbed", url=labels.url, **POOLS)
    assert train(config)
    return config


@pytest.fixture
def config(speech: Speech, labels: SoftDataset, tmp_path: Path) -> TrainConfig:
    return train_config(speech, tmp_path / "run", url=labels.url, **POOLS)


def results(config: TrainConfig) -> tuple[bytes, list[dict[str, Any]]]:
    """Weights and history, less its seconds."""
    history = json.loads((Path(config.output) / "run.json").read_bytes())["history"]
    for record in history:
        del record["seconds"]
    return (Path(config.output) / "model.safetensors").read_bytes(), history


def progress(config: TrainConfig) -> tuple[int, int]:
    found = torch.load(Path(config.output) / "checkpoint.pt", weights_only=True)["progress"]
    return found["epoch"], found["step"]


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Makes something happen once, just before the step of (EPOCH, STEP)."""

    def install(function: Callable[[], None]) -> None:
        step, pending = train_module._Trainer._step, [function]

        def stepping(self: Any, *args: Any) -> dict[str, float]:
            if (self.at.epoch, self.at.step) == (EPOCH, STEP) and pending:
                pending.pop()()
            return step(self, *args)

        monkeypatch.setattr(train_module._Trainer, "_step", stepping)

    return install


class TestFailingStore:
    @pytest.mark.parametrize("error", [OSError("the store is gone"), IntegrityError("a shard is damaged")])
    def test_a_load_that_fails(
        self,
        config: TrainConfig,
        undisturbed: TrainConfig,
        at_step: Callable[[Callable[[], None]], None],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        error: Exception,
    ) -> None:
        def fail(*_: object, **__: object) -> None:
            raise error

        with monkeypatch.context() as patch:
            at_step(lambda: patch.setattr(ObjectStore, "read_many", fail))
            with pytest.raises(type(error), match=str(error)):
                train(config)
        # It got past the step at which reading began to fail: what was loaded was used.
        assert progress(config) > (EPOCH, STEP)
        epoch, step = progress(config)
        message = f"the checkpoint is of epoch {epoch + 1}, step {step}; the same command goes on from there"
        assert message in capsys.readouterr().err
        assert train(config)
        assert results(config) == results(undisturbed)

    def test_before_the_first_step_there_is_nothing_to_save(
        self, config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def fail(*_: object, **__: object) -> None:
            raise OSError("the store is gone")

        monkeypatch.setattr(ObjectStore, "read_many", fail)
        with pytest.raises(OSError, match="the store is gone"):
            train(config)
        assert not (Path(config.output) / "checkpoint.pt").exists()
        assert "checkpoint" not in capsys.readouterr().err

    def test_a_disk_that_is_full_too(
        self,
        config: TrainConfig,
        undisturbed: TrainConfig,
        at_step: Callable[[Callable[[], None]], None],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def fail(*_: object, **__: object) -> None:
            raise OSError("No space left on device")

        with monkeypatch.context() as patch:

            def fill_up() -> None:
                patch.setattr(ObjectStore, "read_many", fail)
                patch.setattr(ObjectStore, "put", fail)

            at_step(fill_up)
            with pytest.raises(OSError, match="No space left"):
                train(config)
        assert progress(config) == (EPOCH, 0)
        errors = capsys.readouterr().err
        assert "no checkpoint could be written: No space left on device" in errors
        assert f"the checkpoint is of epoch {EPOCH + 1}, step 0" in errors
        assert train(config)
        assert results(config) == results(undisturbed)

    def test_a_step_that_fails_half_way_is_not_saved(
        self, config: TrainConfig, undisturbed: TrainConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its weights are changed, its count is not."""
        step = train_module._Trainer._step

        def torn(self: Any, *args: Any) -> dict[str, float]:
            losses = step(self, *args)
            if (self.at.epoch, self.at.step) == (EPOCH, STEP):
                raise OSError("torn")
            return losses

        with monkeypatch.context() as patch:
            patch.setattr(train_module._Trainer, "_step", torn)
            with pytest.raises(OSError, match="torn"):
                train(config)
        assert progress(config) == (EPOCH, 0)
        assert train(config)
        assert results(config) == results(undisturbed)


class TestOutOfMemory:
    @pytest.mark.parametrize(
        ("error", "text"),
        [
            (
                torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
                r" \(CUDA .* 2\.00 GiB\.\); lower",
            ),
            (MemoryError(), "; lower"),
            (
                RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
                r" \(.* 9 bytes\); lower",
            ),
        ],
    )
    def test_names_the_setting_and_keeps_the_checkpoint(
        self,
        config: TrainConfig,
        undisturbed: TrainConfig,
        at_step: Callable[[Callable[[], None]], None],
        error: Exception,
        text: str,
    ) -> None:
        def fail() -> None:
            raise error

        at_step(fail)
        message = (
            rf"out of memory at epoch 2, step {STEP}{text} training\.batch_seconds \(0\.1\), .* in another output folder; .* "
            r"the last checkpoint, of epoch 2, step 0, stays in "
        )
        with pytest.raises(InputError, match=message):
            train(config)
        assert progress(config) == (EPOCH, 0)
        assert train(config)
        assert results(config) == results(undisturbed)

    def test_the_command_ends_with_one_message(
        self, speech: Speech, labels: SoftDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object, **__: object) -> None:
            raise MemoryError

        monkeypatch.setattr(TrainingData, "load_variants", fail)
        result = CliRunner().invoke(main, ["train", str(write_toml(tmp_path, speech, labels.url))])
        assert (result.exit_code, result.stdout) == (2, "")
        assert "error: out of memory at epoch 1, step 0; lower training.batch_seconds (1.5)" in result.stderr
        assert "checkpoint" not in result.stderr

    def test_any_other_error_of_torch_is_as_it_was(
        self, config: TrainConfig, at_step: Callable[[Callable[[], None]], None]
    ) -> None:
        def fail() -> None:
            raise RuntimeError("shapes do not fit")

        at_step(fail)
        with pytest.raises(RuntimeError, match="shapes do not fit"):
            train(config)


def main_thread_waits() -> bool:
    """For the result of another thread."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    return any(caller.f_code is Future.result.__code__ for caller, _ in traceback.walk_stack(frame))


class TestCtrlC:
    def interrupted_at(self, config: TrainConfig) -> tuple[int, int]:
        with pytest.raises(KeyboardInterrupt):
            train(config)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        return progress(config)

    def test_within_a_step(
        self, config: TrainConfig, undisturbed: TrainConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Between the gradients and the new weights: the step is finished first."""
        clip, calls = train_module.clip_grad_norm_, []

        def interrupting(*args: Any) -> torch.Tensor:
            calls.append(args)
            if len(calls) == 4:
                os.kill(os.getpid(), signal.SIGINT)
            return clip(*args)

        with monkeypatch.context() as patch:
            patch.setattr(train_module, "clip_grad_norm_", interrupting)
            assert self.interrupted_at(config) == (0, 4)
        assert train(config)
        assert results(config) == results(undisturbed)

    def test_while_waiting_for_a_pool(
        self, config: TrainConfig, undisturbed: TrainConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By the thread that loads it, which goes on as long as a store may: the checkpoint is not kept waiting."""
        load, calls, checkpoints = TrainingData.load_variants, [], []
        write, may_end = RunFolder.write_checkpoint, threading.Event()

        def interrupting(self: TrainingData, *args: Any) -> Any:
            if threading.current_thread() is threading.main_thread():
                # Of the dev split.
                return load(self, *args)
            calls.append(args)
            if len(calls) == 5:
                while not main_thread_waits():
                    time.sleep(0.001)
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                if not may_end.wait(30):
                    # Whoever should let it end waits for it: the checkpoint comes after.
                    may_end.set()
            return load(self, *args)

        def writing(self: RunFolder, state: dict[str, Any]) -> None:
            checkpoints.append(may_end.is_set())
            write(self, state)

        with monkeypatch.context() as patch:
            patch.setattr(TrainingData, "load_variants", interrupting)
            patch.setattr(RunFolder, "write_checkpoint", writing)
            self.interrupted_at(config)
            may_end.set()
        assert checkpoints[-1] is False
        assert train(config)
        assert results(config) == results(undisturbed)

    def test_while_the_dev_split_is_evaluated(
        self, config: TrainConfig, undisturbed: TrainConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        posteriors, calls = train_module.model_posteriors, []

        def interrupting(*args: Any) -> Iterator[Any]:
            calls.append(args)
            for found in posteriors(*args):
                if len(calls) == 2:
                    os.kill(os.getpid(), signal.SIGINT)
                yield found

        with monkeypatch.context() as patch:
            patch.setattr(train_module, "model_posteriors", interrupting)
            epoch, step = self.interrupted_at(config)
        # All steps of the second epoch are done, the epoch is not.
        assert epoch == 1
        assert step == results(undisturbed)[1][1]["steps"]
        assert train(config)
        assert results(config) == results(undisturbed)

    @pytest.mark.parametrize("writer", ["write_model", "write_json", "write_checkpoint"])
    def test_while_an_epoch_is_written(
        self, config: TrainConfig, undisturbed: TrainConfig, monkeypatch: pytest.MonkeyPatch, writer: str
    ) -> None:
        write, calls = getattr(RunFolder, writer), []

        def interrupting(self: RunFolder, *args: Any) -> None:
            calls.append(args)
            if len(calls) == 1:
                os.kill(os.getpid(), signal.SIGINT)
            write(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, writer, interrupting)
            assert self.interrupted_at(config) == (1, 0)
        assert train(config)
        assert results(config) == results(undisturbed)

    def test_elsewhere_than_in_the_main_thread_nothing_is_changed(self) -> None:
        before, seen = signal.getsignal(signal.SIGINT), []

        def hold() -> None:
            with interrupts_held():
                seen.append(signal.getsignal(signal.SIGINT))

        thread = threading.Thread(target=hold)
        thread.start()
        thread.join()
        assert seen == [before]

    def test_an_ignored_interrupt_stays_ignored(self) -> None:
        """As under nohup."""
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            with interrupts_held():
                os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        finally:
            signal.signal(signal.SIGINT, before)


# Over a real server that fails


TOML = """
name = "student"
output = "run"
seed = 7
corpus = {{ manifest = "{speech.manifest}", inventory = "{speech.inventory}" }}
soft_labels = {{ url = "{url}", temperature = 2.0 {more} }}
front_end = {{ kind = "fbank", sample_rate = 8000, num_mel_bins = 8, stack = 3 }}
model = {{ architecture = "tdnn", arguments = {{ hidden = 16, num_layers = 2 }} }}

[training]
epochs = 3
batch_seconds = 0.1
pool_seconds = 1.0
learning_rate = 0.01
checkpoint_minutes = 1e-9
num_threads = 1
"""


@pytest.fixture
def proxy(s3: Any) -> Iterator[FaultProxy]:
    """In front of the S3 server, for this process and its children."""
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    with (
        FaultProxy(s3.endpoint, seed=5) as proxy,
        s3_environment({**environment, "AWS_ENDPOINT_URL": proxy.endpoint}),
    ):
        yield proxy


@pytest.fixture
def toml(speech: Speech, proxy: FaultProxy, new_url: Callable[[str], str], tmp_path: Path) -> Path:
    url = write_soft_labels(new_url("s3"), speech.split("train")).url
    path = tmp_path / "train.toml"
    path.write_text(TOML.format(speech=speech, url=url, more=', cache = "cache", cache_gib = 0.001'))
    return path


def student_trainer(*args: str) -> Result:
    return CliRunner().invoke(main, args)


class TestFlakyServer:
    def test_faults_are_waited_out(self, toml: Path, proxy: FaultProxy, undisturbed: TrainConfig) -> None:
        # Without the cache, so that every pool is read anew.
        toml.write_text(toml.read_text().replace(', cache = "cache", cache_gib = 0.001', ""))
        proxy.share = 0.2
        result = student_trainer("train", str(toml))
        assert result.exit_code == 0, result.output
        assert sum(proxy.counts().values()) >= 4
        assert results(load_config(toml)) == results(undisturbed)

    def test_with_a_cache_every_file_is_fetched_once(
        self, toml: Path, proxy: FaultProxy, undisturbed: TrainConfig
    ) -> None:
        assert student_trainer("train", str(toml)).exit_code == 0
        assert results(load_config(toml)) == results(undisturbed)
        assert (toml.parent / "cache").is_dir()
        # Another run needs no shard of the server.
        rule = proxy.rule(Fault.RESET, path="/shards/")
        toml.write_text(toml.read_text().replace('output = "run"', 'output = "again"'))
        assert student_trainer("train", str(toml)).exit_code == 0
        assert rule.applied == 0
        assert results(load_config(toml)) == results(undisturbed)

    def test_a_server_that_is_down_for_long(
        self,
        toml: Path,
        proxy: FaultProxy,
        undisturbed: TrainConfig,
        at_step: Callable[[Callable[[], None]], None],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        toml.write_text(toml.read_text().replace(', cache = "cache", cache_gib = 0.001', "").replace("1e-9", "60.0"))
        at_step(lambda: proxy.rule(Fault.ERROR_500) and None)
        with monkeypatch.context() as patch:
            patch.setattr(retrying, "GIVE_UP_SECONDS", 0.5)
            result = student_trainer("train", str(toml))
        assert result.exit_code == 2
        assert "the same command goes on from there" in result.stderr
        assert "gave up after" in result.stderr.splitlines()[-1]
        config = load_config(toml)
        assert progress(config) > (EPOCH, STEP)
        proxy.clear_rules()
        assert student_trainer("train", str(toml)).exit_code == 0
        assert results(config) == results(undisturbed)

    def test_killed_in_the_middle_of_it(self, toml: Path, proxy: FaultProxy, undisturbed: TrainConfig) -> None:
        proxy.share = 0.1
        train_until_killed(toml)
        config = load_config(toml)
        assert progress(config) == (EPOCH, STEP)
        assert student_trainer("train", str(toml)).exit_code == 0
        assert results(config) == results(undisturbed)
