"""Where a run computes. Without a GPU, torch's device "meta" stands for one: it computes nothing, and most operators refuse, as
CUDA's do, what mixes devices."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import pytest
import torch

from softlabel_schemas import InputError
from student_trainer.batch import Batch
from student_trainer.config import TrainConfig
from student_trainer.device import evaluation_device, has_bfloat16, training_device
from student_trainer.evaluate import evaluate_run
from student_trainer.loss import SparseTargets, hard_and_soft_loss, hard_loss
from student_trainer.run_folder import RunFolder
from student_trainer.train import train
from tests.support.speech import train_config, write_speech

META = torch.device("meta")
NUM_CLASSES = 12
LENGTHS = [9, 4]


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


class TestChoice:
    @pytest.mark.usefixtures("no_gpu")
    def test_without_a_gpu(self) -> None:
        for name in ("auto", "cpu"):
            assert training_device(name) == torch.device("cpu")
        for name in ("cuda", "cuda:1"):
            with pytest.raises(
                InputError, match=rf'training\.device is "{name}", torch .* finds 0 CUDA devices here; use'
            ):
                training_device(name)
            # A run that was trained elsewhere can be evaluated here.
            assert evaluation_device(name) == torch.device("cpu")

    @pytest.mark.usefixtures("two_gpus")
    def test_with_two(self) -> None:
        assert training_device("auto") == training_device("cuda") == torch.device("cuda")
        assert training_device("cuda:1") == evaluation_device("cuda:1") == torch.device("cuda:1")
        assert training_device("cpu") == evaluation_device("cpu") == torch.device("cpu")
        with pytest.raises(InputError, match="finds 2 CUDA devices here"):
            training_device("cuda:2")
        assert evaluation_device("cuda:2") == torch.device("cuda")


class TestBfloat16:
    @pytest.mark.skipif(platform.machine() != "x86_64", reason="reads the flags of an x86 processor from /proc/cpuinfo")
    def test_found_where_the_processor_says_so(self) -> None:
        (flags, *_) = (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
        has_avx512 = {"avx512vl", "avx512bw", "avx512dq"} <= set(flags.split())
        assert has_bfloat16(torch.device("cpu")) == has_avx512

    @pytest.mark.parametrize(("precision", "told"), [("bfloat16", 1), ("float32", 0)])
    def test_told_that_it_is_slow(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        precision: str,
        told: int,
    ) -> None:
        """Where it is; and a run that is finished says nothing."""
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        speech = write_speech(tmp_path / "speech")
        config = train_config(speech, tmp_path / "run", training__epochs=1, training__precision=precision)
        warning = 'warning: training.precision is "bfloat16", for which this machine (cpu) has no instructions'
        assert train(config)
        assert capsys.readouterr().err.count(warning) == told
        assert not train(config)
        assert "warning" not in capsys.readouterr().err


def make_batch() -> Batch:
    num_frames = sum(LENGTHS)
    return Batch(
        utterance_ids=("a", "b"),
        features_BTD=torch.zeros(len(LENGTHS), max(LENGTHS), 40),
        lengths_B=torch.tensor(LENGTHS),
        labels_N=torch.zeros(num_frames, dtype=torch.int64),
        label_lengths_B=torch.tensor(LENGTHS),
        targets=SparseTargets(
            ids_NK=torch.zeros(num_frames, 3, dtype=torch.int64),
            probs_NK=torch.full((num_frames, 3), 0.3),
            tail_N=torch.full((num_frames,), 0.1),
            weights_N=torch.ones(num_frames),
        ),
    )


class TestBatch:
    def test_on_the_cpu_it_is_itself(self) -> None:
        batch = make_batch()
        assert batch.to(torch.device("cpu")) is batch

    def test_every_tensor_moves(self) -> None:
        batch = make_batch().to(META)
        assert batch.utterance_ids == ("a", "b")
        assert batch.targets is not None
        tensors = [getattr(part, name) for part in (batch, batch.targets) for name in type(part).__dataclass_fields__]
        moved = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
        assert len(moved) == 8
        assert {tensor.device.type for tensor in moved} == {"meta"}


@pytest.mark.parametrize("tail", ["renormalize", "ghost", "to_hard_label", "uniform"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_no_loss_mixes_devices(tail: Any, temperature: float) -> None:
    batch = make_batch().to(META)
    assert batch.targets is not None
    logits_NV = torch.zeros(sum(LENGTHS), NUM_CLASSES, device=META, requires_grad=True)
    both = hard_and_soft_loss(
        logits_NV, logits_NV, batch.targets, temperature=temperature, tail=tail, labels_N=batch.labels_N
    )
    (sum(both) + hard_loss(logits_NV, batch.labels_N)).backward()
    assert logits_NV.grad is not None
    assert logits_NV.grad.device == META


def test_a_run_names_its_device_and_moves_with_its_folder(tmp_path: Path, no_gpu: None) -> None:
    """The run goes on, and is evaluated, where another device is."""
    speech = write_speech(tmp_path / "speech")
    config = train_config(speech, tmp_path / "run", training__epochs=1, training__device="cuda")
    with pytest.raises(InputError, match=r'training\.device is "cuda"'):
        train(config)
    here = TrainConfig.model_validate(
        config.model_dump() | {"training": config.training.model_dump() | {"device": "cpu"}}
    )
    assert train(here)
    run = RunFolder(config.output).read_json("run.json")
    assert run["config"]["training"]["device"] == "cpu"
    assert not train(train_config(speech, tmp_path / "run", training__epochs=1))
    assert evaluate_run(config.output, speech.manifest, ["dev"], None)["num_utterances"] > 0
