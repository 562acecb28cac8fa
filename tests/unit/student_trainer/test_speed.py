"""Speed perturbation: what is heard, and labels and targets at the same times."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from softlabel_schemas import InputError
from softlabel_schemas.front_end import Fbank
from student_trainer.batch import Example
from student_trainer.speed import at_speed, features_at_speed, num_samples_at, retimed, source_frames, take_frames
from tests.support.targets import assert_same_targets, random_log_posterior, targets_from_dense

RATE = 8_000
SPEEDS = (0.9, 1.1, 1.37)
FRONT_END = Fbank(sample_rate=RATE, num_mel_bins=8, stack=3)
SHIFT = 0.030


def tone(hertz: float, seconds: float) -> npt.NDArray[np.float32]:
    return (1e4 * np.sin(2 * np.pi * hertz * np.arange(round(RATE * seconds)) / RATE)).astype(np.float32)


class TestWaveform:
    def test_speed_1_is_the_recording(self) -> None:
        samples = tone(440, 0.5)
        assert at_speed(samples, 1.0) is samples

    @pytest.mark.parametrize("speed", SPEEDS)
    def test_tempo_and_pitch_change_together(self, speed: float) -> None:
        played = at_speed(tone(440, 2.0), speed)
        assert played.dtype == np.float32
        assert len(played) == pytest.approx(2.0 * RATE / speed, abs=1)
        spectrum = np.abs(np.fft.rfft(played * np.hanning(len(played))))
        assert spectrum.argmax() * RATE / len(played) == pytest.approx(440 * speed, abs=1.0)

    @pytest.mark.parametrize("speed", SPEEDS)
    def test_nothing_is_delayed(self, speed: float) -> None:
        clicks = np.zeros(RATE, dtype=np.float32)
        times = np.array([1_000, 4_000, 7_000])
        clicks[times] = 1e4
        played = np.abs(at_speed(clicks, speed))
        found = [
            int(time / speed) - 50 + played[int(time / speed) - 50 : int(time / speed) + 50].argmax() for time in times
        ]
        np.testing.assert_allclose(found, times / speed, atol=1)

    def test_it_is_the_same_every_time(self) -> None:
        samples = np.random.default_rng(0).standard_normal(RATE).astype(np.float32)
        np.testing.assert_array_equal(at_speed(samples, 1.1), at_speed(samples, 1.1))

    @pytest.mark.parametrize("speed", [*SPEEDS, 0.5, 2.0])
    def test_how_long_it_is(self, speed: float) -> None:
        """To the sample, halves among them: whether a transcript fits depends on it."""
        for num_samples in range(1_000, 1_010):
            assert len(at_speed(np.zeros(num_samples, dtype=np.float32), speed)) == num_samples_at(num_samples, speed)

    def test_nothing_left(self) -> None:
        with pytest.raises(InputError, match=r"60 samples at speed 2 are less than half a frame shift"):
            features_at_speed(np.zeros(60, dtype=np.float32), FRONT_END, 2.0)


@given(
    seed=st.integers(0, 2**32 - 1),
    speed=st.floats(0.5, 2.0),
    num_segments=st.integers(1, 6),
)
def test_labels_change_at_their_times_over_the_speed(seed: int, speed: float, num_segments: int) -> None:
    """Within half a frame, from labels that are themselves within half a frame."""
    rng = np.random.default_rng(seed)
    borders = np.cumsum(rng.uniform(0.2, 0.5, num_segments))
    num_samples = round(RATE * borders[-1])
    labels_T = labels_at(borders, FRONT_END.num_frames(num_samples), 1.0)
    features_TD = np.zeros((FRONT_END.num_frames(round(num_samples / speed)), 1), dtype=np.float32)
    example = Example(utterance_id="a", features=features_TD, hard_labels=labels_T, soft=None)
    found_T = retimed(example, speed).hard_labels
    assert found_T is not None
    assert len(found_T) == len(features_TD)
    changes = np.flatnonzero(np.diff(found_T)) + 1
    # Labels as recorded change at a multiple of the shift; half a frame at either rate is the most that this may add.
    recorded = (np.flatnonzero(np.diff(labels_T)) + 1) * SHIFT
    np.testing.assert_allclose(changes * SHIFT, recorded / speed, atol=SHIFT / 2 + 1e-9)
    np.testing.assert_allclose(recorded, borders[:-1], atol=SHIFT / 2 + 1e-9)


def labels_at(borders: npt.NDArray[np.float64], num_frames: int, speed: float) -> npt.NDArray[np.int64]:
    """The segment that each frame's centre is in."""
    centres = (np.arange(num_frames) + 0.5) * SHIFT * speed
    return np.minimum(np.searchsorted(borders, centres, side="right"), len(borders) - 1).astype(np.int64)


@pytest.mark.parametrize("speed", SPEEDS)
def test_labels_stay_with_what_is_heard(speed: float) -> None:
    """Two tones in turn; which one a frame of the changed speech holds is seen in its features."""
    rng = np.random.default_rng(1)
    seconds = rng.integers(5, 12, 8) * SHIFT
    samples = np.concatenate([tone((500, 1_500)[i % 2], duration) for i, duration in enumerate(seconds)])
    borders = np.cumsum(seconds)
    labels_T = labels_at(borders, FRONT_END.num_frames(len(samples)), 1.0) % 2
    played = at_speed(samples, speed)
    features_TD = features_at_speed(samples, FRONT_END, speed)
    assert len(features_TD) == FRONT_END.num_frames(len(played))
    found_T = retimed(
        Example(utterance_id="a", features=features_TD, hard_labels=labels_T, soft=None), speed
    ).hard_labels
    energy_TB = features_TD.reshape(len(features_TD), 3, 8)[:, 1]
    is_high_T = energy_TB[:, 4:].mean(axis=1) > energy_TB[:, :4].mean(axis=1)
    centres = (np.arange(len(features_TD)) + 0.5) * SHIFT
    # Of a frame with a border in it, either is right.
    is_clear_T = np.abs(centres[:, None] - borders / speed).min(axis=1) > SHIFT / 2
    assert is_clear_T.sum() > 30
    np.testing.assert_array_equal(np.asarray(found_T)[is_clear_T], is_high_T[is_clear_T])


class TestFrames:
    def test_by_hand(self) -> None:
        assert source_frames(4, 4, 1.0).tolist() == [0, 1, 2, 3]
        assert source_frames(5, 4, 0.8).tolist() == [0, 1, 2, 2, 3]
        assert source_frames(3, 5, 1.5).tolist() == [0, 2, 3]
        # Behind the end of the recording.
        assert source_frames(5, 4, 1.0).tolist() == [0, 1, 2, 3, 3]

    @given(seed=st.integers(0, 2**32 - 1), num_frames=st.integers(1, 12))
    def test_targets_are_taken_whole(self, seed: int, num_frames: int) -> None:
        rng = np.random.default_rng(seed)
        log_posterior_TV = random_log_posterior(rng, num_frames, 5, scale=2.0)
        kept_TV = rng.random((num_frames, 5)) < 0.5
        frames_T = np.sort(rng.integers(0, num_frames, rng.integers(1, 20)))
        found = take_frames(targets_from_dense(log_posterior_TV, kept_TV, (1.0, 2.0)), frames_T)
        expected = targets_from_dense(log_posterior_TV[frames_T], kept_TV[frames_T], (1.0, 2.0))
        assert_same_targets(found.validate(), expected)

    def test_labels_targets_and_weights_go_together(self) -> None:
        log_posterior_TV = random_log_posterior(np.random.default_rng(0), 10, 5, scale=2.0)
        soft = targets_from_dense(log_posterior_TV, log_posterior_TV > -2, (1.0,))
        example = Example(
            utterance_id="a",
            features=np.zeros((9, 4), dtype=np.float32),
            hard_labels=np.arange(10),
            soft=soft,
            frame_weights=np.linspace(0, 1, 10, dtype=np.float32),
        )
        found = retimed(example, 1.1)
        frames_T = source_frames(9, 10, 1.1)
        assert found.features is example.features
        np.testing.assert_array_equal(found.hard_labels, frames_T)
        np.testing.assert_array_equal(found.frame_weights, np.linspace(0, 1, 10, dtype=np.float32)[frames_T])
        assert found.soft is not None
        assert_same_targets(found.soft, take_frames(soft, frames_T))
