"""Records of a sweep, as they would be of arms with these frame errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from student_trainer.sweep_records import DifferenceRecord, GainRecord, Record, SweepRecords

HARD, ESSENCE, ENSEMBLE = "hard", "essence", "ensemble"


def make_records(
    frame_errors: Mapping[str, Sequence[float]],
    sizes: Mapping[str, float],
    *,
    title: str = "How much is enough?",
    gains: Sequence[GainRecord] = (),
) -> SweepRecords:
    """Arms by name, with the frame error of each seed; those with a size (bytes per frame) have soft labels. The arm
    ``ensemble`` has neither seeds nor labels."""
    return SweepRecords(
        title=title,
        splits=("test",),
        corpus_digest="c" * 64,
        inventory_digest="a" * 64,
        num_utterances=996,
        num_frames=123_456,
        records=tuple(
            _record(arm, None if arm == ENSEMBLE else seed, value, sizes.get(arm))
            for arm, values in frame_errors.items()
            for seed, value in enumerate(values)
        ),
        differences=(),
        gains=tuple(gains),
    )


def _record(arm: str, seed: int | None, value: float, size: float | None) -> Record:
    labels: Any = None if seed is None else "hard" if size is None else "hard+soft"
    return Record(
        arm=arm,
        seed=seed,
        splits="test",
        metric="frame_error_rate",
        value=value,
        unit="percent",
        labels=labels,
        num_parameters=None if seed is None else 136_000,
        dataset_digest=None if size is None else "d" * 64,
        dataset_bytes_per_frame=size,
        labels_bytes_per_frame=size,
        config_digest=None,
    )


def difference_record(arm: str, against: str, difference: float, **changes: Any) -> DifferenceRecord:
    fields = {"metric": "frame_error_rate", "low": difference - 1, "high": difference + 1, "p_value": 0.01}
    return DifferenceRecord(
        **{
            "arm": arm,
            "against": against,
            "difference": difference,
            "better_seeds": 2,
            "num_seeds": 2,
            **fields,
            **changes,
        }
    )
