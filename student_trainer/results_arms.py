"""Records of a sweep, arm by arm, as the page of results and its figures need them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from student_trainer.metric_names import Metric
from student_trainer.sweep_records import Record, SweepRecords


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmRecords:
    """
    Attributes:
        first: any record of the arm; all but its seed, metric and value are those of the whole arm.
        values: one for each seed.
    """

    first: Record
    values: dict[Metric, list[float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.first.arm

    @property
    def is_ensemble(self) -> bool:
        return self.first.seed is None

    @property
    def num_seeds(self) -> int:
        """0 for the ensemble."""
        return 0 if self.is_ensemble else max(map(len, self.values.values()))

    def spread(self, metric: Metric) -> tuple[float, float | None]:
        """Mean and sample standard deviation (ddof = 1), None for a single value."""
        values = self.values[metric]
        return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def arms_of(sweep: SweepRecords) -> list[ArmRecords]:
    """In the order of the records."""
    arms: dict[str, ArmRecords] = {}
    for record in sweep.records:
        arm = arms.setdefault(record.arm, ArmRecords(first=record))
        arm.values.setdefault(record.metric, []).append(record.value)
    return list(arms.values())
