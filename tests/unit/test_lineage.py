"""From a student's checkpoint to its dataset, and from there to the corpus, the teachers and the code; and who needs what."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import softlabel_schemas.cli
from softlabel_schemas import load_corpus, open_dataset
from softlabel_schemas.about import Description, read_about, write_about
from softlabel_schemas.bundle import BundleReader
from softlabel_schemas.deprecation import Deprecation, deprecate
from softlabel_schemas.names import tag, wanted_address
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.version import SOFTWARE
from student_trainer.inputs import open_inputs
from student_trainer.train import train
from teacher_service.job import prepare
from tests.support.labelling import run_here
from tests.support.speech import train_config, write_soft_labels, write_speech
from tests.support.teachers import Sounds, make_job, write_linear_teacher, write_sounds

ROOT = Path(__file__).parents[2]
DESCRIPTION = {
    "title": "Tones",
    "owner": "tests",
    "licence": "CC0-1.0",
    "corpus": "tones in noise",
    "languages": ["zxx"],
}


def label(sounds: Sounds, folder: Path, **changes: Any) -> Any:
    """The dataset of the teacher in ``folder``; its job."""
    teacher = write_linear_teacher(folder / "teacher")
    job = prepare(make_job(sounds.manifest, [teacher], folder / "labels", **changes))
    run_here(job)
    return job


def test_a_dataset_names_its_corpus_its_teachers_and_the_code(tmp_path: Path) -> None:
    sounds = write_sounds(tmp_path / "sounds", [0.5, 0.4])
    label(sounds, tmp_path, description=DESCRIPTION)
    dataset = open_dataset(tmp_path / "labels")
    spec = dataset.manifest.spec
    assert spec.corpus_digest == load_corpus(sounds.manifest).digest
    bundle = BundleReader(str(tmp_path / "teacher")).description
    assert [(teacher.name, teacher.digest) for teacher in spec.teachers] == [(bundle.name, bundle.digest())]
    about = read_about(dataset.store)
    assert about is not None
    assert about.software == SOFTWARE
    assert about.description.model_dump(mode="json", exclude_none=True) == DESCRIPTION


def test_the_description_decides_nothing_and_may_change(tmp_path: Path) -> None:
    sounds = write_sounds(tmp_path / "sounds", [0.5, 0.4])
    plain = label(sounds, tmp_path)
    before = (tmp_path / "labels" / "manifest.json").read_bytes()
    described = label(sounds, tmp_path, description=DESCRIPTION)
    assert described.document == plain.document
    assert (tmp_path / "labels" / "manifest.json").read_bytes() == before
    about = read_about(ObjectStore(tmp_path / "labels"))
    assert about is not None
    assert about.description.title == "Tones"


def test_a_job_without_a_description_leaves_what_was_said_of_its_dataset_since(tmp_path: Path) -> None:
    sounds = write_sounds(tmp_path / "sounds", [0.5, 0.4])
    label(sounds, tmp_path)
    store = ObjectStore(tmp_path / "labels")
    write_about(store, Description(title="Tones", licence="CC-BY-4.0"))
    label(sounds, tmp_path)
    about = read_about(store)
    assert about is not None
    assert about.description == Description(title="Tones", licence="CC-BY-4.0")


def test_the_version_is_that_of_the_distribution() -> None:
    fields = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert fields["tool"]["hatch"]["version"]["path"] == "schemas/softlabel_schemas/version.py"
    assert fields["project"]["dynamic"] == ["version"]


def test_nothing_that_reads_a_dataset_needs_its_teachers_or_its_audio(tmp_path: Path) -> None:
    sounds = write_sounds(tmp_path / "sounds", [0.5, 0.4])
    label(sounds, tmp_path)
    shutil.rmtree(tmp_path / "teacher")
    shutil.rmtree(tmp_path / "sounds")
    url = str(tmp_path / "labels")
    for args in (
        ["verify", url],
        ["describe", url],
        ["card", url],
        ["catalog", url],
        ["diff", url, url],
    ):
        result = CliRunner().invoke(softlabel_schemas.cli.main, args)
        assert result.exit_code == 0, result.stderr


def test_a_student_hears_of_what_a_codec_adds_up_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does of thousands of classes."""
    monkeypatch.setattr("softlabel_schemas.tempering._WARNED_MASS", 1e-6)
    speech = write_speech(tmp_path / "speech")
    url = write_soft_labels(tmp_path / "labels", speech.split("train"), spec={"codec": "mtf-sqrt"}).url
    open_inputs(train_config(speech, tmp_path / "run", url=url))
    assert f"warning: {url}: codec 'mtf-sqrt' stores every probability below 6.8e-06 as" in capsys.readouterr().err


def test_a_checkpoint_names_its_dataset_and_a_student_hears_of_deprecation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    speech = write_speech(tmp_path / "speech")
    write_soft_labels(tmp_path / "labels-1", speech.split("train"))
    tag(str(tmp_path / "labels-1"), wanted_address(f"{tmp_path}#tones"))
    deprecate(ObjectStore(tmp_path / "labels-1"), Deprecation(reason="wrong lexicon", use=f"{tmp_path}#tones:2"))
    config = train_config(speech, tmp_path / "run", url=f"{tmp_path}#tones:1", training__epochs=1)
    assert train(config)
    warning = f"warning: {tmp_path}/labels-1 is deprecated: wrong lexicon; use {tmp_path}#tones:2\n"
    assert warning in capsys.readouterr().err
    digest = open_dataset(tmp_path / "labels-1").manifest.content_digest
    assert json.loads((tmp_path / "run" / "run.json").read_bytes())["dataset_digest"] == digest
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert checkpoint["identity"]["dataset_digest"] == digest
