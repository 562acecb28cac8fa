"""A student as a teacher: the bundle's logits are the run's, at every batch and time size."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from softlabel_schemas import InputError, IntegrityError
from softlabel_schemas.bundle import BundleReader, ExportedProgram, Factory, TeacherBundle
from student_trainer import models
from student_trainer.cli import main
from student_trainer.export import export
from student_trainer.models import AcousticModel
from student_trainer.run_folder import MODEL, RUN, RunFolder, build_model
from teacher_service.config import TeacherConfig
from teacher_service.teacher import load_teacher
from tests.support.speech import FRONT_END, INVENTORY, Speech, train_config, write_speech
from tests.support.trees import tree

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "tdnn": {"hidden": 16, "num_layers": 3},
    "conv_glu": {"hidden": 16, "num_layers": 2},
    "conformer": {"hidden": 16, "num_layers": 1, "num_heads": 2, "kernel_size": 5},
    "blstm": {"hidden": 8},
    "tests.support.speech:pair_encoder": {"hidden": 8},
    "tests.support.speech:tied_encoder": {},
}


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Speech:
    return write_speech(tmp_path_factory.mktemp("export"))


def write_run(speech: Speech, path: Path, architecture: str, **changes: Any) -> AcousticModel:
    """A run with a model that was never trained, in evaluation mode."""
    config = train_config(
        speech, path, model={"architecture": architecture, "arguments": ARCHITECTURES[architecture]}, **changes
    )
    torch.manual_seed(1)
    model = build_model(config, INVENTORY)
    folder = RunFolder(path)
    history = [{"epoch": epoch + 1} for epoch in range(config.training.epochs)]
    folder.write_json(RUN, {"config": config.model_dump(mode="json"), "history": history})
    folder.write_inventory(INVENTORY)
    folder.write_model(model)
    return model.eval()


def assert_same_logits(bundle: Path, model: AcousticModel, *, allow_factory: str | None = None) -> None:
    config = TeacherConfig(bundle=str(bundle), allow_factory=allow_factory)
    teacher = load_teacher(config, BundleReader(config.bundle), weight=1.0, device="cpu", precision="float32")
    torch.manual_seed(2)
    # torch.export traced 2 utterances of 32 frames.
    for batch, frames in ((1, 1), (1, 47), (5, 2), (3, 100)):
        features_BTD = torch.randn(batch, frames, FRONT_END.num_features)
        lengths_B = torch.randint(1, frames + 1, (batch,))
        lengths_B[0] = frames
        with torch.no_grad():
            expected_BTV, expected_lengths_B = model(features_BTD, lengths_B)
        found_BTV, found_lengths_B = teacher.logits(features_BTD, lengths_B)
        torch.testing.assert_close(found_BTV, expected_BTV, atol=1e-5, rtol=0)
        assert torch.equal(found_lengths_B, expected_lengths_B)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_bundle_gives_the_logits_of_the_run(speech: Speech, tmp_path: Path, architecture: str) -> None:
    model = write_run(speech, tmp_path / "run", architecture)
    description = export(tmp_path / "run", tmp_path / "bundle")
    traced = architecture in ("tdnn", "conv_glu", "conformer")
    assert isinstance(description.model, ExportedProgram if traced else Factory)
    # What imports a module by name must be allowed by the job.
    allowed = architecture if ":" in architecture else None
    if allowed:
        with pytest.raises(InputError, match="allow_factory"):
            assert_same_logits(tmp_path / "bundle", model)
    assert_same_logits(tmp_path / "bundle", model, allow_factory=allowed)


class TestDescription:
    def test_is_read_back(self, speech: Speech, tmp_path: Path) -> None:
        write_run(speech, tmp_path / "run", "blstm")
        description = export(tmp_path / "run", tmp_path / "bundle", name="teacher-1")
        reader = BundleReader(tmp_path / "bundle")
        assert reader.description == description
        assert reader.inventory == INVENTORY
        assert len(reader.read_model()) > 0
        assert TeacherBundle.model_validate_json((tmp_path / "bundle/teacher.json").read_bytes()) == description
        assert (description.name, description.num_classes) == ("teacher-1", 6)
        assert description.front_end == FRONT_END
        assert description.frame_shift_ms == 30.0
        assert isinstance(description.model, Factory)
        assert description.model.factory == "student_trainer.models:build_acoustic_model"

    def test_an_encoder_that_drops_frames_has_a_longer_frame_shift(self, speech: Speech, tmp_path: Path) -> None:
        write_run(speech, tmp_path / "run", "tests.support.speech:pair_encoder")
        assert export(tmp_path / "run", tmp_path / "bundle").frame_shift_ms == 60.0


@pytest.mark.parametrize("architecture", ["tdnn", "blstm"])
def test_of_two_heads_the_hard_one_goes_along(speech: Speech, tmp_path: Path, architecture: str) -> None:
    model = write_run(speech, tmp_path / "run", architecture, url="labels", soft_labels__num_heads=2)
    hard, soft = model.heads
    assert not torch.equal(hard.weight, soft.weight)
    export(tmp_path / "run", tmp_path / "bundle")
    assert_same_logits(tmp_path / "bundle", model)
    config = TeacherConfig(bundle=str(tmp_path / "bundle"))
    teacher = load_teacher(config, BundleReader(config.bundle), weight=1.0, device="cpu", precision="float32")
    heads = {name for name in teacher.model.state_dict() if name.startswith("heads")}
    assert heads == {"heads.0.weight", "heads.0.bias"}


def test_a_bundle_does_not_depend_on_where_this_program_lies(speech: Speech, tmp_path: Path) -> None:
    """Nor says it to whom the bundle is given."""
    write_run(speech, tmp_path / "run", "conformer")
    export(tmp_path / "run", tmp_path / "bundle")
    with zipfile.ZipFile(tmp_path / "bundle" / "model.pt2") as archive:
        found = [
            name for name in archive.namelist() if str(Path(models.__file__).parent).encode() in archive.read(name)
        ]
    assert found == []


class TestCommand:
    def test_prints_what_it_wrote(self, speech: Speech, tmp_path: Path) -> None:
        write_run(speech, tmp_path / "run", "blstm")
        bundle = str(tmp_path / "bundle")
        result = CliRunner().invoke(main, ["export", str(tmp_path / "run"), bundle])
        assert result.exit_code == 0, result.output
        digest = BundleReader(bundle).description.digest()
        assert result.stdout == f"{bundle}: student, 6 classes, digest {digest}\n"

    def test_a_run_that_is_not_complete(self, speech: Speech, tmp_path: Path) -> None:
        """What it labels would be as good as an early epoch, and say nothing of it."""
        write_run(speech, tmp_path / "run", "blstm")
        folder = RunFolder(tmp_path / "run")
        run = folder.read_json(RUN)
        folder.write_json(RUN, {**run, "history": run["history"][:-1]})
        with pytest.raises(
            InputError, match=r"run has trained \d of \d epochs; finish it with 'student-trainer train'"
        ):
            export(folder.path, tmp_path / "bundle")
        assert not (tmp_path / "bundle").exists()

    def test_another_bundle_is_not_replaced(self, speech: Speech, tmp_path: Path) -> None:
        """Its model may be what a dataset was labelled with. The same one may be written again."""
        for name in ("blstm", "tdnn"):
            write_run(speech, tmp_path / name, name)
        first = export(tmp_path / "blstm", tmp_path / "bundle")
        before = tree(tmp_path / "bundle")
        with pytest.raises(InputError, match=r"bundle holds another bundle already; give another folder, or delete"):
            export(tmp_path / "tdnn", tmp_path / "bundle")
        assert export(tmp_path / "blstm", tmp_path / "bundle") == first
        assert tree(tmp_path / "bundle") == before

    def test_without_a_trained_model(self, speech: Speech, tmp_path: Path) -> None:
        write_run(speech, tmp_path / "run", "blstm")
        (tmp_path / "run/model.safetensors").unlink()
        with pytest.raises(InputError, match="holds no trained model yet"):
            export(tmp_path / "run", tmp_path / "bundle")
        result = CliRunner().invoke(main, ["export", str(tmp_path / "nothing"), str(tmp_path / "bundle")])
        assert result.exit_code == 2
        assert "is not a training run" in result.stderr
        assert not (tmp_path / "bundle").exists()


def test_a_changed_bit_of_the_weights_is_noticed(speech: Speech, tmp_path: Path) -> None:
    write_run(speech, tmp_path / "run", "tdnn")
    weights = tmp_path / "run" / MODEL
    data = weights.read_bytes()
    for position in (len(data) - 1, len(data) // 2, 12):
        weights.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        with pytest.raises(IntegrityError):
            RunFolder(tmp_path / "run").load_model()
    weights.write_bytes(data)
    RunFolder(tmp_path / "run").load_model()
