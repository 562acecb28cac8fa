"""Features that runs share are those that each would compute itself; whatever is wrong with a file, they are computed again."""

from __future__ import annotations

import resource
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

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
    assert not list(shared.folder.iterdir())


@pytest.mark.parametrize("full", [False, True])
def test_without_room_a_run_has_its_own(
    tmp_path: Path, speech: Speech, capsys: pytest.CaptureFixture[str], full: bool
) -> None:
    """In a folder that cannot be made, and on a disk that is full after some."""
    (tmp_path / "file").touch()
    folder = tmp_path / "full" if full else tmp_path / "file" / "features"
    data = TrainingData(speech.corpus, FRONT_END, shared=SharedFeatures(folder, HOURS))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if full:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))
        found = data.load(range(len(speech.corpus)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    check_same([example.features for example in found.values()], computed(speech))
    told = capsys.readouterr().err
    assert told.startswith("warning: features cannot be kept for other runs: ")
    assert told.count("\n") == 1
    assert not folder.exists() or not list(folder.iterdir())


def test_audio_that_cannot_be_read_ends_a_run_that_asks_for_it(speech: Speech, shared: SharedFeatures) -> None:
    (row,) = (row for row, utterance in enumerate(speech.corpus) if utterance.utterance_id == "train-07")
    (speech.folder / "train-07.wav").unlink()
    data = TrainingData(speech.corpus, FRONT_END, shared=shared)
    assert len(data.load([0, 1, 2])) == 3
    with pytest.raises(UtteranceError, match=r"utterance train-07: train-07\.wav does not exist"):
        data.load([row])
    assert not list(shared.folder.iterdir())


def test_storage_that_fails_is_not_the_fault_of_the_file(speech: Speech, shared: SharedFeatures) -> None:
    """The run ends by it, after a checkpoint, and goes on later."""

    def compute(row: int) -> npt.NDArray[np.float32]:
        raise TimeoutError("no answer")

    with pytest.raises(TimeoutError, match="no answer"):
        shared.of(speech.corpus, FRONT_END, 1.0, compute)
    assert not list(shared.folder.iterdir())
    assert shared.of(speech.corpus, FRONT_END, 1.0, Computing(computed(speech))) is not None


def test_of_two_runs_that_begin_together_the_first_file_stays(speech: Speech, shared: SharedFeatures) -> None:
    rows, others = computed(speech), []

    def compute(row: int) -> npt.NDArray[np.float32]:
        if row == 3:
            other = SharedFeatures(shared.folder, HOURS)
            check_same(other.of(speech.corpus, FRONT_END, 1.0, Computing(rows)), rows)
            others.extend(path.stat().st_ino for path in shared.folder.iterdir() if path.name.count("-") == 1)
        return rows[row]

    check_same(shared.of(speech.corpus, FRONT_END, 1.0, compute), rows)
    (path,) = shared.folder.iterdir()
    assert path.stat().st_ino in others


def test_a_file_that_cannot_be_read_counts_as_not_there(speech: Speech, shared: SharedFeatures) -> None:
    expected = computed(speech)
    shared.of(speech.corpus, FRONT_END, 1.0, Computing(expected))
    (path,) = shared.folder.iterdir()
    path.unlink()
    path.symlink_to(path.with_name("nowhere"))
    check_same(shared.of(speech.corpus, FRONT_END, 1.0, Computing(expected)), expected)


def test_only_own_files_are_removed(speech: Speech, shared: SharedFeatures) -> None:
    shared.of(speech.corpus, FRONT_END, 1.0, Computing(computed(speech)))
    (path,) = shared.folder.iterdir()
    left_by_a_kill = path.with_name(f"{path.name[:32]}.tmp-{'0' * 32}")
    mine = path.with_name("mine.npy")
    for each in (left_by_a_kill, mine):
        each.touch()
    shared.remove()
    assert list(shared.folder.iterdir()) == [mine]
    mine.unlink()
    shared.remove()
    assert not shared.folder.exists()
    shared.remove()


def test_an_evaluation_that_is_left_computes_no_more(
    speech: Speech, shared: SharedFeatures, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, events = TrainingData(speech.corpus, FRONT_END, shared=shared), []
    batches_of = data._batches_to_evaluate

    def watched(device: torch.device, given_up: threading.Event) -> Any:
        events.append(given_up)
        yield from batches_of(device, given_up)

    monkeypatch.setattr(data, "_batches_to_evaluate", watched)
    batches = data.batches_to_evaluate(torch.device("cpu"))
    next(batches)
    assert not events[0].is_set()
    batches.close()
    assert events[0].is_set()
    # The thread is then at the next batch.
    again = TrainingData(speech.corpus, FRONT_END, shared=SharedFeatures(shared.folder / "other", HOURS))
    assert list(again._batches_to_evaluate(torch.device("cpu"), events[0])) == []
    assert not (shared.folder / "other").exists() or not list((shared.folder / "other").iterdir())


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
