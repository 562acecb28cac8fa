"""Features that runs share are those that each would compute itself; whatever is wrong with a file, they are computed again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from softlabel_schemas.front_end import AnyFrontEnd, Precomputed
from softlabel_schemas.utterance_reader import UtteranceError, UtteranceReader
from student_trainer.augmentation import Augmenter
from student_trainer.config import Augmentation, TrainConfig
from student_trainer.data import TrainingData, Variant
from student_trainer.run_folder import RunFolder
from student_trainer.shared_features import SharedFeatures
from student_trainer.sweep_config import EvaluateConfig
from student_trainer.sweep_task import train_and_evaluate
from tests.support.speech import (
    FRONT_END,
    SoftDataset,
    Speech,
    save_corpus,
    train_config,
    write_soft_labels,
    write_speech,
)

HOURS = 36_000.0
SPEEDS = (0.9, 1.0, 1.1)


@pytest.fixture
def speech(tmp_path: Path) -> Speech:
    return write_speech(tmp_path / "speech", hashed=True)


@pytest.fixture
def labels(speech: Speech) -> SoftDataset:
    return write_soft_labels(speech.folder / "labels", speech.split("train"))


@pytest.fixture
def shared(tmp_path: Path) -> SharedFeatures:
    return SharedFeatures(tmp_path / "features", HOURS)


def without_audio(speech: Speech) -> None:
    for path in speech.folder.glob("*.wav"):
        path.unlink()


def computed(speech: Speech) -> list[npt.NDArray[np.float32]]:
    reader = UtteranceReader(speech.corpus)
    return [reader.features(utterance, [FRONT_END])[0] for utterance in speech.corpus]


class Computing:
    """Counts the rows that were computed."""

    def __init__(self, rows: list[npt.NDArray[np.float32]]) -> None:
        self.rows, self.count = rows, 0

    def __call__(self, row: int) -> npt.NDArray[np.float32]:
        self.count += 1
        return self.rows[row]


def check_same(found: Any, expected: list[npt.NDArray[np.float32]]) -> None:
    assert found is not None
    for row, features_TD in enumerate(expected):
        assert found[row].dtype == np.float32
        assert found[row].tobytes() == features_TD.tobytes()
        assert found[row].shape == features_TD.shape


def evaluated(config: TrainConfig) -> Any:
    found = RunFolder(config.output).read_json("evaluation-test.json")
    return {key: value for key, value in found.items() if key != "run"}


@pytest.mark.parametrize("augmentation", [None, {"speeds": SPEEDS}])
def test_a_run_ends_as_it_would_alone(
    speech: Speech, labels: SoftDataset, shared: SharedFeatures, augmentation: dict[str, Any] | None
) -> None:
    """And without the audio, once another has been there."""

    def run(name: str, seed: int) -> TrainConfig:
        settings = {"url": labels.url, "seed": seed, "training__epochs": 2, "augmentation": augmentation}
        return train_config(speech, speech.folder / name, **settings)

    alone, first, second = run("alone", 1), run("first", 0), run("second", 1)
    train_and_evaluate(alone, EvaluateConfig())
    train_and_evaluate(first, EvaluateConfig(), shared.folder)
    assert len(list(shared.folder.iterdir())) == 2 + (3 if augmentation else 1)
    without_audio(speech)
    train_and_evaluate(second, EvaluateConfig(), shared.folder)
    assert evaluated(second) == evaluated(alone)
    weights = [(Path(config.output) / "model.safetensors").read_bytes() for config in (alone, second)]
    assert weights[0] == weights[1]


def test_are_computed_once(speech: Speech, shared: SharedFeatures) -> None:
    expected = computed(speech)
    compute = Computing(expected)
    for _ in range(2):
        check_same(shared.of(speech.corpus, FRONT_END, 1.0, compute), expected)
    other = SharedFeatures(shared.folder, HOURS)
    check_same(other.of(speech.corpus, FRONT_END, 1.0, compute), expected)
    assert compute.count == len(expected)
    assert len(list(shared.folder.iterdir())) == 1


def test_cannot_be_written_to(speech: Speech, shared: SharedFeatures) -> None:
    """A run would change what the others learn from."""
    found = shared.of(speech.corpus, FRONT_END, 1.0, Computing(computed(speech)))
    assert found is not None
    with pytest.raises(ValueError, match="read-only"):
        found[0][:] = 0


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"", lambda data: b"\1" + data[1:]])
def test_a_damaged_file_is_made_again(speech: Speech, shared: SharedFeatures, damage: Callable[[bytes], bytes]) -> None:
    expected = computed(speech)
    compute = Computing(expected)
    shared.of(speech.corpus, FRONT_END, 1.0, compute)
    (path,) = shared.folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    check_same(shared.of(speech.corpus, FRONT_END, 1.0, compute), expected)
    assert compute.count == 2 * len(expected)
    assert path.read_bytes() == whole
    assert list(shared.folder.iterdir()) == [path]


def test_of_something_else_are_others(speech: Speech, shared: SharedFeatures) -> None:
    rows = computed(speech)
    compute = Computing(rows)
    first, *rest = speech.utterances
    changed = [replace(first, sha256="0" * 64), replace(first, num_samples=first.num_samples - 1)]
    corpora = [speech.corpus, *(save_corpus(speech.folder, [each, *rest]).corpus for each in changed)]
    corpora.append(corpora[0].with_table(corpora[0].table.slice(1)))
    kinds: list[tuple[Any, AnyFrontEnd, float]] = [(corpus, FRONT_END, 1.0) for corpus in corpora]
    kinds += [(corpora[0], FRONT_END, 0.9), (corpora[0], FRONT_END.model_copy(update={"low_freq": 30.0}), 1.0)]
    for kind in kinds:
        assert shared.of(*kind, compute) is not None
    assert len(list(shared.folder.iterdir())) == len(kinds)
    assert compute.count == len(kinds) * len(rows) - 1


def test_what_is_not_kept(tmp_path: Path, speech: Speech, shared: SharedFeatures) -> None:
    """Audio of which nobody says what it holds, much speech, and features that are stored already."""
    compute = Computing(computed(speech))
    unhashed = save_corpus(speech.folder, [replace(speech.utterances[0], sha256=None), *speech.utterances[1:]])
    seconds = float(speech.corpus.seconds().sum())
    assert shared.of(unhashed.corpus, FRONT_END, 1.0, compute) is None
    hashed = save_corpus(speech.folder, speech.utterances).corpus
    assert SharedFeatures(shared.folder, seconds - 0.01).of(hashed, FRONT_END, 1.0, compute) is None
    stored = Precomputed(num_features=24, frame_shift_ms=30.0)
    assert shared.of(hashed, stored, 1.0, compute) is None
    assert not shared.folder.exists()
    assert compute.count == 0
    assert SharedFeatures(shared.folder, seconds).of(hashed, FRONT_END, 1.0, compute) is not None


def test_nobody_waits_for_them_any_more(speech: Speech, shared: SharedFeatures) -> None:
    given_up = threading.Event()
    rows = computed(speech)

    def compute(row: int) -> npt.NDArray[np.float32]:
        if row == 3:
            given_up.set()
        assert row < 4
        return rows[row]

    assert shared.of(speech.corpus, FRONT_END, 1.0, compute, given_up) is None
    assert not shared.folder.exists()


def test_without_room_a_run_has_its_own(tmp_path: Path, speech: Speech, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    expected = computed(speech)
    found = SharedFeatures(tmp_path / "file" / "features", HOURS).of(speech.corpus, FRONT_END, 1.0, Computing(expected))
    check_same(found, expected)
    assert capsys.readouterr().err.startswith("warning: features cannot be kept for other runs: ")


def test_audio_that_cannot_be_read_ends_the_run_as_ever(speech: Speech, shared: SharedFeatures) -> None:
    (speech.folder / "train-07.wav").unlink()
    data = TrainingData(speech.corpus, FRONT_END, shared=shared)
    with pytest.raises(UtteranceError, match=r"utterance train-07: train-07\.wav does not exist"):
        data.load(range(3))
    assert not shared.folder.exists()


def test_at_every_speed_they_are_those_of_one_run(speech: Speech, shared: SharedFeatures) -> None:
    augmenter = Augmenter(Augmentation(speeds=SPEEDS), FRONT_END, 0)
    wanted = {row: [Variant(speed) for speed in SPEEDS] for row in range(5)}
    alone = TrainingData(speech.corpus, FRONT_END, augmenter=augmenter).load_variants(wanted)
    found = TrainingData(speech.corpus, FRONT_END, augmenter=augmenter, shared=shared).load_variants(wanted)
    assert found.keys() == alone.keys()
    for key, example in found.items():
        assert example.features.tobytes() == alone[key].features.tobytes()
        assert example.hard_labels is not None
        assert np.array_equal(example.hard_labels, alone[key].hard_labels)  # type: ignore[arg-type]
