"""Loading a bundle and running it: what fits, and the one message where something does not."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from softlabel_schemas import InputError, IntegrityError
from softlabel_schemas.bundle import BundleReader, write_bundle
from softlabel_schemas.front_end import Fbank
from teacher_service.config import TeacherConfig
from teacher_service.job import prepare
from teacher_service.teacher import Teacher, check_factory, load_teacher, load_teachers
from tests.support.teachers import (
    INVENTORY,
    LINEAR_FACTORY,
    OWN_FACTORY,
    eager_model,
    make_job,
    state,
    write_linear_teacher,
    write_sounds,
    write_teacher,
)

LENGTHS = [9, 14, 3]


def load(config: TeacherConfig, precision: str = "float32") -> Teacher:
    return load_teacher(config, BundleReader(config.bundle), weight=0.25, device="cpu", precision=precision)


def batch(num_features: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(LENGTHS), max(LENGTHS), num_features, generator=generator), torch.tensor(LENGTHS)


@pytest.mark.parametrize(("architecture", "num_mel_bins"), [("tdnn", 40), ("blstm", 40), ("conv_glu", 64)])
def test_logits_are_those_of_the_model(tmp_path: Path, architecture: str, num_mel_bins: int) -> None:
    teacher = load(write_teacher(tmp_path, architecture, num_mel_bins=num_mel_bins))
    assert (teacher.name, teacher.weight) == (f"{architecture}-{num_mel_bins}", 0.25)
    assert teacher.front_end.num_features == num_mel_bins
    found_BTV, found_B = teacher.logits(*batch(num_mel_bins))
    with torch.inference_mode():
        expected_BTV, _ = eager_model(architecture, num_mel_bins)(*batch(num_mel_bins))
    torch.testing.assert_close(found_BTV, expected_BTV, rtol=1e-4, atol=1e-5)
    assert found_B.tolist() == LENGTHS


@pytest.mark.parametrize("architecture", ["tdnn", "blstm", "conformer"])
def test_bfloat16(tmp_path: Path, architecture: str) -> None:
    """Also for an exported program, whose graph names float32 in places: two or three digits are left."""
    config = write_teacher(tmp_path, architecture)
    found_BTV, _ = load(config, "bfloat16").logits(*batch())
    expected_BTV, _ = load(config).logits(*batch())
    assert (found_BTV.dtype, expected_BTV.dtype) == (torch.bfloat16, torch.float32)
    assert not torch.equal(found_BTV.float(), expected_BTV)
    torch.testing.assert_close(found_BTV.float(), expected_BTV, rtol=0.05, atol=0.05)


def test_bfloat16_without_instructions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_teacher(tmp_path, "tdnn")
    teachers = {precision: load(config, precision) for precision in ("float32", "bfloat16")}
    for has_onednn in (False, True):
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda has=has_onednn: has)
        for supported in (False, True):
            # The operator's answer is the processor's own.
            monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda has=supported: has, raising=True)
            assert not teachers["float32"].emulates_bfloat16
            assert teachers["bfloat16"].emulates_bfloat16 == (not (has_onednn and supported))


# Factories


def test_a_users_factory_must_be_allowed_by_the_job(tmp_path: Path) -> None:
    config = write_linear_teacher(tmp_path)
    assert load(config).logits(*batch())[0].shape == (3, 14, INVENTORY.num_classes)
    message = f'if you trust it, say so in the job: allow_factory = "{LINEAR_FACTORY}"'
    for allowed in (None, "tests.support.teachers:not_a_model"):
        with pytest.raises(InputError, match=re.escape(message)):
            load(TeacherConfig(bundle=config.bundle, allow_factory=allowed))


def test_the_projects_own_factory_needs_permission_for_a_users_encoder_alone(tmp_path: Path) -> None:
    config = write_linear_teacher(tmp_path / "own", factory=OWN_FACTORY, architecture="blstm", arguments={})
    check_factory(TeacherConfig(bundle=config.bundle), BundleReader(config.bundle))
    encoder = "tests.support.teachers:not_a_model"
    config = write_linear_teacher(tmp_path / "users", factory=OWN_FACTORY, architecture=encoder, arguments={})
    for allowed in (None, OWN_FACTORY):
        with pytest.raises(InputError, match=re.escape(f'say so in the job: allow_factory = "{encoder}"')):
            load(TeacherConfig(bundle=config.bundle, allow_factory=allowed))
    check_factory(TeacherConfig(bundle=config.bundle, allow_factory=encoder), BundleReader(config.bundle))


@pytest.mark.parametrize(
    ("factory", "arguments", "message"),
    [
        ("tests.support.teachers:no_such_name", {}, "no_such_name cannot be called with .*has no attribute"),
        (LINEAR_FACTORY, {"widht": 3}, "linear_model cannot be called with .*unexpected keyword argument 'widht'"),
        (
            "tests.support.teachers:refusing_model",
            {"error": "ValueError"},
            "refusing_model cannot be called with .*: ValueError: no such size",
        ),
        ("tests.support.teachers:not_a_model", {}, "not_a_model returned int, expected a torch module"),
    ],
)
def test_a_factory_that_cannot_be_used(tmp_path: Path, factory: str, arguments: dict[str, Any], message: str) -> None:
    config = write_linear_teacher(tmp_path, factory=factory, **arguments)
    with pytest.raises(InputError, match=f"^{re.escape(str(tmp_path))}: .*{message}"):
        load(config)


@pytest.mark.parametrize("error", [OSError, MemoryError, RuntimeError])
def test_a_factory_that_fails_on_this_machine(tmp_path: Path, error: type[Exception]) -> None:
    """Another may have the memory, or see the storage: an InputError would end the job."""
    config = write_linear_teacher(tmp_path, factory="tests.support.teachers:refusing_model", error=error.__name__)
    with pytest.raises(error, match=r"^no such size$"):
        load(config)


def test_a_package_that_this_machine_lacks(tmp_path: Path) -> None:
    """Another may have it."""
    config = write_linear_teacher(tmp_path, factory="no_such_package.models:build")
    message = f"{tmp_path}: this machine lacks a package that the model needs: No module named 'no_such_package'"
    with pytest.raises(OSError, match=f"^{re.escape(message)}$"):
        load(config)


# Weights


@pytest.mark.parametrize("num_damaged", [1, 2])
def test_weights_that_were_damaged_on_their_way_are_fetched_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_damaged: int
) -> None:
    reader = BundleReader(write_linear_teacher(tmp_path).bundle)
    data = reader.read_model()
    answers = [b"damaged"] * num_damaged + [data]
    monkeypatch.setattr(reader.store, "is_local", False)
    monkeypatch.setattr(reader.store, "read", lambda _: answers.pop(0))
    if num_damaged == 1:
        assert reader.read_model() == data
    else:
        with pytest.raises(IntegrityError, match=r"model\.safetensors: sha256 is "):
            reader.read_model()


def test_weights_that_are_not_those_of_the_bundle(tmp_path: Path) -> None:
    for name, config in {
        "model.pt2": write_teacher(tmp_path / "exported", "tdnn"),
        "model.safetensors": write_linear_teacher(tmp_path / "factory"),
    }.items():
        path = Path(config.bundle) / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        with pytest.raises(
            IntegrityError, match=rf"{name}: sha256 is [0-9a-f]{{64}}, teacher\.json says [0-9a-f]{{64}}"
        ):
            load(config)


@pytest.mark.parametrize(
    "model",
    [
        state(nn.Linear(40, 12)),
        state(nn.ModuleDict({"layer": nn.Linear(41, 12)})),
        safetensors.torch.save({"layer.weight": torch.zeros(12, 40)}),
        b"not safetensors",
        b"",
    ],
    ids=["other names", "another shape", "one missing", "another format", "empty"],
)
def test_weights_that_do_not_fit_the_factory(tmp_path: Path, model: bytes) -> None:
    config = write_linear_teacher(tmp_path, model=model)
    with pytest.raises(IntegrityError, match=f"weights do not fit {LINEAR_FACTORY}"):
        load(config)


def test_a_program_that_is_none(tmp_path: Path) -> None:
    write_bundle(
        tmp_path,
        name="torn",
        model=b"not an archive",
        factory=None,
        arguments={},
        front_end=Fbank(),
        inventory=INVENTORY,
        frame_shift_ms=10.0,
    )
    message = f"{tmp_path}/model.pt2 is not a readable torch.export program: File is not a zip file"
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        load(TeacherConfig(bundle=str(tmp_path)))


def test_a_bundle_that_was_replaced_since_the_job_was_prepared(tmp_path: Path) -> None:
    """By one with other weights, or with the same ones and another front end; another name is of no account."""
    sounds, bundle = write_sounds(tmp_path / "sounds", [0.3]), tmp_path / "teacher"
    job = prepare(make_job(sounds.manifest, [write_linear_teacher(bundle)], tmp_path / "labels"))
    expected = BundleReader(bundle).description.digest()
    changes: list[dict[str, Any]] = [{"seed": 2}, {"normalize": "utterance"}]
    for change in changes:
        write_linear_teacher(bundle, **change)
        found = BundleReader(bundle).description.digest()
        message = (
            f"{bundle} changed while the job was running: expected the bundle with the digest {expected}, found {found}"
        )
        with pytest.raises(InputError, match=re.escape(message)):
            load_teachers(job.config, job.document.spec)
    write_linear_teacher(bundle)
    description = bundle / "teacher.json"
    description.write_text(description.read_text().replace('"name":"linear"', '"name":"renamed"'))
    (teacher,) = load_teachers(job.config, job.document.spec)
    assert teacher.name == "renamed"


# What comes out


def test_another_number_of_classes_than_the_inventory(tmp_path: Path) -> None:
    teacher = load(write_linear_teacher(tmp_path, num_classes=7))
    message = "teacher 'linear' gives logits of shape (3, 14, 7), expected [3, frames, 12]"
    with pytest.raises(InputError, match=re.escape(message)):
        teacher.logits(*batch())


def test_logits_of_another_rank(tmp_path: Path) -> None:
    teacher = load(write_linear_teacher(tmp_path, rank=2))
    message = "teacher 'linear' gives logits of shape (14, 12), expected [3, frames, 12]"
    with pytest.raises(InputError, match=re.escape(message)):
        teacher.logits(*batch())


class OnGpu(torch.Tensor):
    """Stays where it is when it is moved."""

    def to(self, *_: Any, **__: Any) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def test_on_a_gpu_the_logits_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever reads them on another stream. Lengths on the CPU, as here, would be read without."""
    teacher, steps = load(write_linear_teacher(tmp_path)), list[str]()
    teacher.model.register_forward_hook(lambda *_: steps.append("model"))
    stream = SimpleNamespace(synchronize=lambda: steps.append("waited"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: {"cuda": stream}[device.type])
    features_BTD, lengths_B = (each.as_subclass(OnGpu) for each in batch())
    replace(teacher, device=torch.device("cuda")).logits(features_BTD, lengths_B)
    assert steps == ["model", "waited"]
    teacher.logits(*batch())
    assert steps == ["model", "waited", "model"]
