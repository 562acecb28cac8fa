"""The synthesised demo corpus: reproducible, labelled without gaps, and split without overlap."""

import hashlib
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("espeakng_loader", reason="the demo corpus is synthesised with the package espeakng-loader")
pytest.importorskip("soxr", reason="the demo corpus is resampled with the package soxr")

import synthesis

from tests.support.speech import write_speech

SPLITS = ("train", "dev", "test")
# Two sentences for each voice, so that reproducibility is checked for every voice that the corpus uses.
SMALL = {"num_train_sentences": 12, "num_dev_sentences": 4, "num_test_sentences": 6}


def digest(utterances: list[Any]) -> str:
    """Hash everything that an utterance consists of."""
    result = hashlib.sha256()
    for utterance in utterances:
        result.update(repr((utterance.utterance_id, utterance.speaker, utterance.text, utterance.segments)).encode())
        result.update(utterance.samples.tobytes())
    return result.hexdigest()


@pytest.fixture(scope="module")
def corpus() -> list[Any]:
    """Synthesise the corpus in the sizes of the demo."""
    return list(synthesis.synthesize_corpus(num_train_sentences=300, num_dev_sentences=40, num_test_sentences=60))


def segments_of(*items: tuple[str, int, int]) -> list[Any]:
    return [synthesis.PhoneSegment(phone=phone, start=start, end=end) for phone, start, end in items]


def digest_of_run() -> str:
    """Hash a small corpus and an utterance of a breathy voice, whose noise would expose a seed taken from the clock."""
    result = digest(list(synthesis.synthesize_corpus(**SMALL)))
    with synthesis.Synthesizer() as synthesizer:
        samples, _ = synthesizer.say("she sang a song", "en+f2", rate_wpm=170, pitch=50)
    return result + hashlib.sha256(samples.tobytes()).hexdigest()


def test_fresh_processes_and_a_used_one_give_identical_bytes() -> None:
    program = (
        f"import sys, time; time.sleep(1.1); sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r};"
        " import test_synthesis; print(test_synthesis.digest_of_run())"
    )
    # The processes start in different seconds and fill freed memory with different bytes, so that neither the clock nor
    # what the allocator happens to return can go unnoticed.
    digests = {digest_of_run(), digest_of_run()}
    for fill in ("85", "170"):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "MALLOC_PERTURB_": fill},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout.strip())
    assert len(digests) == 1


def test_seed_changes_the_corpus() -> None:
    size = {"num_train_sentences": 6, "num_dev_sentences": 0, "num_test_sentences": 0}
    first, second = (list(synthesis.synthesize_corpus(**size, seed=seed)) for seed in (0, 1))
    assert len(first) == len(second) == 6
    assert [item.text for item in first] != [item.text for item in second]


def test_negative_number_of_sentences_is_refused() -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        next(synthesis.synthesize_corpus(num_train_sentences=-1, num_dev_sentences=0, num_test_sentences=0))


def test_sizes_and_signal(corpus: list[Any]) -> None:
    assert [sum(item.split == split for item in corpus) for split in SPLITS] == [300, 40, 60]
    assert len({item.utterance_id for item in corpus}) == 400
    for item in corpus:
        assert item.samples.dtype == np.int16
        assert item.samples.ndim == 1
        assert 1.5 < len(item.samples) / synthesis.SAMPLE_RATE < 4.5
        assert 4 <= len(item.text.split()) <= 9
        assert 300 < np.abs(item.samples.astype(np.int32)).max() < 32767


def test_segments_cover_the_signal_without_gaps(corpus: list[Any]) -> None:
    for item in corpus:
        assert item.segments[0].start == 0
        assert item.segments[-1].end == len(item.samples)
        assert all(segment.start < segment.end for segment in item.segments)
        for left, right in pairwise(item.segments):
            assert left.end == right.start
            assert not left.phone == right.phone == "SIL"
        assert item.segments[-1].phone == "SIL"


def test_boundaries_agree_with_the_signal() -> None:
    with synthesis.Synthesizer() as synthesizer:
        samples, segments = synthesizer.say("yesterday, she sang", "en+m1", rate_wpm=170, pitch=50)
    assert " ".join(segment.phone for segment in segments) == "j E s t 3 d eI SIL S i: s a N SIL"
    power = {
        segment: float(np.mean(samples[segment.start : segment.end].astype(np.float64) ** 2)) for segment in segments
    }
    pauses = [power[segment] for segment in segments if segment.phone == "SIL"]
    vowels = [power[segment] for segment in segments if segment.phone in {"E", "eI", "i:", "a"}]
    assert max(pauses) < 0.01 * min(vowels)
    # Fricatives oscillate fast and vowels slowly, which a shift of the labels against the signal would blur.
    crossings = {
        segment: float(np.mean(np.diff(np.signbit(samples[segment.start : segment.end]).astype(np.int8)) != 0))
        for segment in segments
    }
    fricatives = [crossings[segment] for segment in segments if segment.phone in {"s", "S"}]
    slow = [crossings[segment] for segment in segments if segment.phone in {"E", "eI", "i:", "a", "N"}]
    assert min(fricatives) > max(slow)


def test_splits_share_neither_texts_nor_voices(corpus: list[Any]) -> None:
    assert len({item.text for item in corpus}) == len(corpus)
    speakers = [{item.speaker for item in corpus if item.split == split} for split in SPLITS]
    assert [len(names) for names in speakers] == [len(synthesis.VOICES[split]) for split in SPLITS]
    variants = [voice.partition("+")[2] for split in SPLITS for voice in synthesis.VOICES[split]]
    assert len(variants) == len(set(variants))
    assert not set(variants) & {"f2", "f3", "f5"}
    assert len(set.union(*speakers)) == len(variants)


def test_every_phone_of_dev_and_test_occurs_in_train(corpus: list[Any]) -> None:
    inventory = {segment.phone for item in corpus if item.split == "train" for segment in item.segments}
    assert {segment.phone for item in corpus for segment in item.segments} == inventory
    assert 35 <= len(inventory) <= 50
    assert "SIL" in inventory
    assert not any(phone.startswith(("'", ",", "_")) for phone in inventory)


def test_unknown_voices_are_named() -> None:
    with synthesis.Synthesizer() as synthesizer:
        # The library itself accepts any variant silently.
        for voice in ("en+nobody", "nowhere", "en+"):
            with pytest.raises(RuntimeError) as caught:
                synthesizer.say("hello", voice, rate_wpm=170, pitch=50)
            assert repr(voice) in str(caught.value)
            assert "'en-us'" in str(caught.value)
            assert "'m1'" in str(caught.value)


def test_say_checks_its_arguments_and_state() -> None:
    synthesizer = synthesis.Synthesizer()
    with pytest.raises(RuntimeError, match="not open"):
        synthesizer.say("hello", "en", rate_wpm=170, pitch=50)
    with synthesizer:
        for rate_wpm, pitch in ((10, 50), (170, 100)):
            with pytest.raises(ValueError, match="rate_wpm must be in"):
                synthesizer.say("hello", "en", rate_wpm=rate_wpm, pitch=pitch)


def test_missing_parts_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("espeakng_loader.get_data_path", lambda: str(tmp_path))
        with pytest.raises(RuntimeError, match="cannot use its data"), synthesis.Synthesizer():
            pass
    with monkeypatch.context() as patch:
        patch.setattr("espeakng_loader.get_library_path", lambda: str(tmp_path / "missing.so"))
        with pytest.raises(RuntimeError, match="cannot load the eSpeak NG library"), synthesis.Synthesizer():
            pass
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(RuntimeError, match="needs the package espeakng-loader"), synthesis.Synthesizer():
        pass


def test_frame_labels_take_the_segment_and_third_at_the_centre() -> None:
    segments = segments_of(("SIL", 0, 30), ("a", 30, 60), ("t", 60, 64), ("SIL", 64, 95))
    phones, states = synthesis.frame_labels(segments, num_frames=9, frame_shift=10)
    # The centres are 5, 15, ... 85; "t" holds none of them.
    assert phones == ["SIL"] * 3 + ["a"] * 3 + ["SIL"] * 3
    assert states == [0, 1, 2, 0, 1, 2, 0, 1, 2]


def test_frame_labels_at_boundaries_and_behind_the_end() -> None:
    segments = segments_of(("a", 0, 5), ("b", 5, 25))
    # A centre on a boundary belongs to the segment that starts there; the last segment covers what remains.
    phones, states = synthesis.frame_labels(segments, num_frames=5, frame_shift=10)
    assert phones == ["b"] * 5
    assert states == [0, 1, 2, 2, 2]
    assert synthesis.frame_labels(segments, num_frames=3, frame_shift=10, states_per_phone=1)[1] == [0, 0, 0]
    assert synthesis.frame_labels(segments, num_frames=0, frame_shift=10) == ([], [])


def test_frame_labels_refuse_senseless_arguments() -> None:
    segments = segments_of(("a", 0, 5))
    for given, arguments in (
        ([], {"num_frames": 1, "frame_shift": 10}),
        (segments, {"num_frames": -1, "frame_shift": 10}),
        (segments, {"num_frames": 1, "frame_shift": 0}),
        (segments, {"num_frames": 1, "frame_shift": 10, "states_per_phone": 0}),
    ):
        with pytest.raises(ValueError, match="frame labels need"):
            synthesis.frame_labels(given, **arguments)


def test_frame_labels_of_the_corpus_use_every_state(corpus: list[Any]) -> None:
    shift = 160
    states: set[int] = set()
    for item in corpus[:20]:
        num_frames = len(item.samples) // shift
        phones, labels = synthesis.frame_labels(item.segments, num_frames=num_frames, frame_shift=shift)
        assert len(phones) == len(labels) == num_frames
        states |= set(labels)
    assert states == {0, 1, 2}


def test_a_demo_of_another_size_is_refused(tmp_path: Path) -> None:
    """Its corpus would be taken for this one's."""
    write_speech(tmp_path)
    demo = Path(synthesis.__file__).parent / "demo.py"
    done = subprocess.run(
        [sys.executable, demo, tmp_path, "--sentences", "21"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert f"{tmp_path} holds the demo with --sentences 20, now 21; give what it has, or use another" in done.stderr
