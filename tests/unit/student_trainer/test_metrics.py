"""Frame and phone errors, cross-entropy and calibration error, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from softlabel_schemas import ClassInventory, InputError
from student_trainer.metrics import FramePosteriors, Metrics

INVENTORY = ClassInventory(
    names=("sil", "a-1", "a-2", "b-1", "pause", "c"),
    phones=("SIL", "a", "a", "b", "PAU", "c"),
    silence_phones=("SIL", "PAU"),
)


def posteriors(top1: list[int], confidence: list[float] | None = None, label_log_prob: float = -1.0) -> FramePosteriors:
    return FramePosteriors(
        top1_T=np.array(top1),
        confidence_T=np.full(len(top1), 0.5) if confidence is None else np.array(confidence),
        label_log_prob_T=np.full(len(top1), label_log_prob),
    )


def summary(*utterances: tuple[list[int], FramePosteriors]) -> dict[str, float]:
    metrics = Metrics(INVENTORY)
    for index, (labels, found) in enumerate(utterances):
        metrics.add(f"utt-{index}", np.array(labels, dtype=np.int64), found)
    return metrics.summary()


class TestPhoneSequence:
    @pytest.mark.parametrize(
        ("classes", "phones"),
        [
            ([], []),
            ([0, 0, 4], []),
            ([1], ["a"]),
            ([1, 1, 2, 2, 1], ["a"]),
            ([0, 1, 2, 3, 3, 0, 3, 4, 1, 5, 0], ["a", "b", "b", "a", "c"]),
            # No class was kept in a frame: it is no phone.
            ([-1, 1, -1, -1], ["a"]),
        ],
    )
    def test_runs_are_joined_and_silence_is_left_out(self, classes: list[int], phones: list[str]) -> None:
        names, _ = INVENTORY.phone_ids()
        found = Metrics(INVENTORY).phone_sequence(np.array(classes, dtype=np.int64))
        assert [names[phone] for phone in found] == phones


class TestErrors:
    def test_frame_errors_leave_out_frames_without_a_label(self) -> None:
        found = summary(([0, 1, -1, 3], posteriors([0, 2, 5, 3])), ([1, 1], posteriors([1, 5])))
        assert (found["num_utterances"], found["num_frames"]) == (2, 5)
        assert found["frame_error_rate"] == pytest.approx(100 * 2 / 5)

    def test_phone_errors(self) -> None:
        found = summary(
            # a b c against a c: one deletion; a against b a: one insertion; b against c: one substitution.
            ([0, 1, 1, 3, 5], posteriors([0, 1, 2, 0, 5])),
            ([0, 1, 1], posteriors([3, 1, 1])),
            ([3, 3], posteriors([5, 5])),
        )
        assert found["phone_error_rate"] == pytest.approx(100 * 3 / 5)
        # A wrong state of the right phone is a frame error only.
        assert found["frame_error_rate"] == pytest.approx(100 * (2 + 1 + 2) / 10)

    def test_each_utterance_is_recorded(self) -> None:
        metrics = Metrics(INVENTORY)
        metrics.add("utt-1", np.array([0, 1, -1, 3]), posteriors([0, 3, 3, 3]))
        assert metrics.utterances == [
            {
                "utterance_id": "utt-1",
                "frames": 3,
                "frame_errors": 1,
                "cross_entropy_sum": pytest.approx(3.0),
                "phones": 2,
                "phone_errors": 1,
            }
        ]

    def test_without_phones(self) -> None:
        metrics = Metrics(ClassInventory(names=("x", "y")))
        metrics.add("utt-1", np.array([0, 1]), posteriors([0, 0]))
        assert metrics.summary()["phone_error_rate"] is None
        assert metrics.summary()["frame_error_rate"] == 50.0

    def test_without_a_labelled_frame(self) -> None:
        for found in (summary(), summary(([-1, -1], posteriors([0, 1])))):
            assert found["num_frames"] == 0
            assert (found["frame_error_rate"], found["phone_error_rate"], found["calibration_error"]) == (0, 0, 0)


class TestRefused:
    def test_posteriors_that_are_not_finite(self) -> None:
        """Of a model whose weights are not."""
        message = r"utterance utt-1: the posteriors are not finite, .*; lower training\.learning_rate"
        with pytest.raises(InputError, match=message):
            summary(([1], posteriors([1])), ([1, 1], posteriors([1, 0], [0.5, math.nan])))


class TestCrossEntropy:
    def test_mean_over_labelled_frames(self) -> None:
        labels = [1, -1, 3]
        found = posteriors([1, 1, 1])
        found.label_log_prob_T[:] = np.log([0.5, 1e-9, 0.125])
        assert summary((labels, found))["cross_entropy"] == pytest.approx(2 * math.log(2))

    def test_one_unknown_probability_makes_it_unknown(self) -> None:
        assert summary(([1, 1], posteriors([1, 1])), ([1], posteriors([1], None, math.nan)))["cross_entropy"] is None
        # But not of a frame that does not count.
        unlabelled = posteriors([1, 1])
        unlabelled.label_log_prob_T[1] = math.nan
        assert summary(([1, -1], unlabelled))["cross_entropy"] == 1.0


class TestCalibrationError:
    def test_by_hand(self) -> None:
        # Bins of 1/15: 0.95 and 1.0 are in the last one, 0.5 in the eighth.
        found = summary(([1, 1, 1, -1], posteriors([1, 2, 1, 1], [0.95, 1.0, 0.5, 0.1])))
        assert found["calibration_error"] == pytest.approx(100 * (abs(1 - 1.95) + abs(1 - 0.5)) / 3)

    def test_bins_are_joined_over_utterances(self) -> None:
        right, wrong = ([1], posteriors([1], [0.9])), ([2], posteriors([1], [0.9]))
        found = summary(*[right] * 9, wrong)
        assert found["calibration_error"] == pytest.approx(0, abs=1e-9)

    def test_a_float32_confidence_just_above_one_is_in_the_last_bin(self) -> None:
        confidence = [float(np.nextafter(np.float32(1), np.float32(2)))]
        assert summary(([1], posteriors([1], confidence)))["calibration_error"] == pytest.approx(0, abs=1e-4)
