"""Records of a sweep, arm by arm, as the page of results and its figures need them."""

from __future__ import annotations

from dataclasses import dataclass, field

from student_trainer.metric_names import Metric
from student_trainer.spread import Spread, spread_of
from student_trainer.sweep_records import Record, SweepRecords


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmRecords:
    """
    Attributes:
        first: any record of the arm; all but its seed, metric and value are those of the whole arm.
        values: by seed; the ensemble has one, of the seed None.
    """

    first: Record
    values: dict[Metric, dict[int | None, float]] = field(default_factory=dict)

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

    def spread(self, metric: Metric) -> Spread:
        return spread_of(list(self.values[metric].values()))

    def seeds_with(self, other: ArmRecords, metric: Metric) -> list[tuple[float, float]]:
        """Values of both, for each seed that both have; the ensemble's stands beside every seed."""
        own, others = self.values.get(metric, {}), other.values.get(metric, {})
        if other.is_ensemble:
            others = {seed: value for seed in own for value in others.values()}
        return [(value, others[seed]) for seed, value in own.items() if seed in others]


def spread_of_difference(arm: ArmRecords, against: ArmRecords, metric: Metric) -> float | None:
    """Standard deviation of ``arm`` less ``against`` over seeds that both have: how much of it is the luck of a seed."""
    differences = [own - other for own, other in arm.seeds_with(against, metric)]
    return spread_of(differences).std if differences else None


def shares_of_gain(arm: ArmRecords, baseline: ArmRecords, reference: ArmRecords, metric: Metric) -> list[float]:
    """In percent, of each seed that all three have; no list where the reference gains nothing in one of them."""
    own, none, whole = (each.values[metric] for each in (arm, baseline, reference))
    seeds = [seed for seed in own if seed in none and seed in whole]
    if any(none[seed] <= whole[seed] for seed in seeds):
        return []
    return [100 * (none[seed] - own[seed]) / (none[seed] - whole[seed]) for seed in seeds]


def arms_of(sweep: SweepRecords) -> list[ArmRecords]:
    """In the order of the records."""
    arms: dict[str, ArmRecords] = {}
    for record in sweep.records:
        arm = arms.setdefault(record.arm, ArmRecords(first=record))
        arm.values.setdefault(record.metric, {})[record.seed] = record.value
    return list(arms.values())
