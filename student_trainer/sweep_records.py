"""``sweep.json``: the numbers of sweeps as flat records, from which a page can be made without the runs.

    {"version": 1, "sweeps": [
      {"title": ..., "splits": [...], "corpus_digest": ..., "inventory_digest": ..., "num_utterances": ...,
       "num_frames": ... (of CTC "num_tokens"),
       "records":     [one for each arm, seed and metric],
       "differences": [one for each pair of arms and metric: paired bootstrap over utterances],
       "gains":       [one for each arm but two, where the sweep names a baseline and a reference; else there is no such key]}]}

The same results give the same bytes: nothing in it depends on times, folders or the order of work.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from softlabel_schemas.digest import canonical_json, parse_json, sha256_hex
from softlabel_schemas.errors import InputError
from softlabel_schemas.strict import StrictModel, parse
from student_trainer.arms import Arm
from student_trainer.compare import Comparison
from student_trainer.metric_names import COUNTS, NATS, Metric, leading
from student_trainer.result_files import Run
from student_trainer.significance import Difference, difference, gain_kept
from student_trainer.stored_size import changes_size, stored_bytes_per_frame
from student_trainer.sweep_config import Sweep


class Record(StrictModel):
    """One metric of one run, or of the teacher ensemble.

    Attributes:
        seed, num_parameters, config_digest: None for the ensemble.
        splits: of the evaluation, joined by ``+``.
        unit: ``percent`` or ``nats per frame``.
        labels: ``hard``, ``soft``, ``hard+soft``; None for the ensemble.
        dataset_digest: content digest of the soft labels trained on, or of each dataset where teachers were switched; None
            where there were none.
        dataset_bytes_per_frame: size as it is stored, of all datasets together.
        labels_bytes_per_frame: size of the arm's own selection of them, see ``stored_size.py``.
        config_digest: sha256 of the settings and the seed, with digests in the place of paths.
    """

    arm: str
    seed: int | None
    splits: str
    metric: Metric
    value: float
    unit: Literal["percent", "nats per frame"]
    labels: Literal["hard", "soft", "hard+soft"] | None
    num_parameters: int | None
    dataset_digest: str | tuple[str, ...] | None
    dataset_bytes_per_frame: float | None
    labels_bytes_per_frame: float | None
    config_digest: str | None


class DifferenceRecord(StrictModel):
    """Of two arms' mean error rates over the same utterances, ``arm`` less ``against``, in points.

    Attributes:
        low, high: 95% interval over utterances.
        p_value: two-sided.
        better_seeds: of ``num_seeds`` seeds that both arms have, in how many ``arm`` has the lower error; the ensemble counts
            against every seed.
    """

    arm: str
    against: str
    metric: Metric
    difference: float
    low: float
    high: float
    p_value: float
    better_seeds: int
    num_seeds: int


class GainRecord(StrictModel):
    """What share of the gain of ``reference`` over ``baseline`` in frame (of CTC, token) error an arm keeps; their difference
    is among the ``differences``.

    Attributes:
        kept: percent. None where there is no gain.
        low, high: 95% interval over utterances. None where that of the gain holds zero or is below it.
    """

    arm: str
    baseline: str
    reference: str
    kept: float | None
    low: float | None
    high: float | None


class SweepRecords(StrictModel):
    """``num_frames``: with hard labels, in what was evaluated; ``num_tokens``: of CTC, in its place."""

    title: str
    splits: tuple[str, ...]
    corpus_digest: str
    inventory_digest: str
    num_utterances: int
    num_frames: int | None = None
    num_tokens: int | None = None
    records: tuple[Record, ...]
    differences: tuple[DifferenceRecord, ...]
    gains: tuple[GainRecord, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        named = {name for found in self.differences for name in (found.arm, found.against)}
        named |= {name for found in self.gains for name in (found.arm, found.baseline, found.reference)}
        unknown = sorted(named - {record.arm for record in self.records})
        if unknown:
            raise ValueError(f"there are no records of {', '.join(unknown)}, which are among its differences or gains")
        measured = {record.arm for record in self.records if record.metric == self.leading}
        without = sorted({record.arm for record in self.records} - measured)
        if without:
            raise ValueError(f"there is no {self.leading} of {', '.join(without)}; expected one of every arm")
        if getattr(self, f"num_{self.counted}") is None:
            raise ValueError(f"num_{self.counted} is missing; the {self.leading} is of as many")
        return self

    @property
    def leading(self) -> Metric:
        """Frame error rate or, of CTC, token error rate: what every arm has."""
        return leading({record.metric for record in self.records})

    @property
    def counted(self) -> str:
        """``frames`` or ``tokens``."""
        return COUNTS[self.leading][1]

    @property
    def num_counted(self) -> int:
        found: int = getattr(self, f"num_{self.counted}")
        return found


class RecordsFile(StrictModel):
    version: Literal[1]
    sweeps: Annotated[tuple[SweepRecords, ...], Field(min_length=1)]


def load_records(path: str | Path) -> tuple[SweepRecords, ...]:
    """Of a ``sweep.json``. Raises InputError where it is missing or no such file."""
    try:
        data = parse_json(Path(path).read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; student-trainer sweep makes it") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    return parse(RecordsFile, data, where=str(path)).sweeps


def records_json(sweeps: Sequence[SweepRecords]) -> str:
    """The file's text: a line for each record, so that changes can be read."""
    return '{"version": 1, "sweeps": [\n' + ",\n".join(map(_sweep_json, sweeps)) + "\n]}\n"


def _sweep_json(sweep: SweepRecords) -> str:
    # One of the numbers, of frames and of tokens, is none.
    fields = {name: value for name, value in sweep.model_dump(mode="json").items() if value is not None}
    lists = {name: fields.pop(name) for name in ("records", "differences", "gains")}
    if not sweep.gains:
        del lists["gains"]
    head = ",\n".join(f" {_json(name)}: {_json(value)}" for name, value in fields.items())
    tables = [
        f" {_json(name)}: [\n" + ",\n".join(f"  {_json(row)}" for row in rows) + "]" for name, rows in lists.items()
    ]
    return ",\n".join(["{" + head, *tables]) + "}"


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def sweep_records(comparison: Comparison, sweep: Sweep) -> SweepRecords:
    """Of a comparison's arms; a pair that the sweep names, or its gain, is passed over where an arm of it failed.

    Args:
        comparison: with the sweep's own configurations of the runs, whose labels are measured where they lie now.
    """
    first = comparison.evaluation
    by_name = {arm.name: arm for arm in comparison.arms}
    gain = _gain(comparison, sweep)
    found = [
        record
        for left, right in _pairs(comparison, sweep)
        if _can_be_paired(left, right)
        for record in _differences(left, right)
    ]
    return SweepRecords(
        title=sweep.title,
        splits=first.splits,
        corpus_digest=first.corpus_digest,
        inventory_digest=first.inventory_digest,
        num_utterances=len(first.utterances),
        num_frames=first.num_counted if first.counted == "frames" else None,
        num_tokens=first.num_counted if first.counted == "tokens" else None,
        records=tuple(record for arm in comparison.arms for record in _records(comparison, arm)),
        differences=tuple(found),
        gains=() if gain is None else tuple(_gains(comparison.arms, by_name[gain[0]], by_name[gain[1]])),
    )


def not_compared(comparison: Comparison, sweep: Sweep) -> list[str]:
    """Warnings, of the pairs that ``sweep_records`` passes over."""
    names = {arm.name for arm in comparison.arms}
    lines = []
    for pair in sweep.pairs:
        without = [name for name in pair if name not in names]
        if without:
            said = f"{' and '.join(pair)} are not compared in sweep.json"
            lines.append(f"{said}: there are no results of {' and '.join(without)}")
    return lines + [
        f"{left.name} and {right.name} are not compared in sweep.json: they were evaluated on "
        f"{len(left.evaluations[0].utterances)} and {len(right.evaluations[0].utterances)} utterances, and need the same ones; "
        "label those that the dataset skipped, or leave them out of the corpus"
        for left, right in _pairs(comparison, sweep)
        if not _can_be_paired(left, right)
    ]


def _gain(comparison: Comparison, sweep: Sweep) -> tuple[str, str] | None:
    names = {arm.name for arm in comparison.arms}
    return None if sweep.gain is None or not names >= {*sweep.gain} else sweep.gain


def _pairs(comparison: Comparison, sweep: Sweep) -> list[tuple[Arm, Arm]]:
    """Whose difference is asked for, of arms that did not fail."""
    by_name, gain = {arm.name: arm for arm in comparison.arms}, _gain(comparison, sweep)
    pairs = [(pair.soft.name, pair.hard.name) for pair in comparison.pairs]
    asked = dict.fromkeys([*pairs, *sweep.pairs, *([(gain[1], gain[0])] if gain else [])])
    return [(by_name[left], by_name[right]) for left, right in asked if left in by_name and right in by_name]


def _can_be_paired(left: Arm, right: Arm) -> bool:
    """An ensemble whose dataset skipped utterances cannot, line by line."""
    return len(left.evaluations[0].utterances) == len(right.evaluations[0].utterances)


def _gains(arms: Sequence[Arm], baseline: Arm, reference: Arm) -> Iterator[GainRecord]:
    """Of all other students."""
    for arm in arms:
        if not arm.runs or arm.name in (baseline.name, reference.name):
            continue
        found = gain_kept(arm, baseline, reference)
        low, high = found.interval or (None, None)
        yield GainRecord(
            arm=arm.name, baseline=baseline.name, reference=reference.name, kept=found.kept, low=low, high=high
        )


def _records(comparison: Comparison, arm: Arm) -> list[Record]:
    stored = comparison.bytes_per_frame(arm)
    soft = arm.runs[0].config.soft_labels if arm.runs else None
    own = stored_bytes_per_frame(arm.runs[0].config) if soft is not None and changes_size(soft) else stored
    runs: Sequence[Run | None] = arm.runs or [None]
    values = {metric: arm.values(metric) for metric in comparison.metrics}
    return [
        Record(
            arm=arm.name,
            seed=None if run is None else run.config.seed,
            splits="+".join(comparison.evaluation.splits),
            metric=metric,
            value=of_metric[index],
            unit="nats per frame" if metric in NATS else "percent",
            labels=None if run is None else _labels(run),
            num_parameters=None if run is None else run.num_parameters,
            dataset_digest=None if run is None else run.dataset_digest,
            dataset_bytes_per_frame=stored,
            labels_bytes_per_frame=own,
            config_digest=None if run is None else sha256_hex(canonical_json([run.setup(), run.config.seed])),
        )
        for index, run in enumerate(runs)
        for metric, of_metric in values.items()
        if of_metric is not None
    ]


def _labels(run: Run) -> Literal["hard", "soft", "hard+soft"]:
    soft = run.config.soft_labels
    if soft is None:
        return "hard"
    return "soft" if soft.has_all_weight else "hard+soft"


def _differences(left: Arm, right: Arm) -> list[DifferenceRecord]:
    found = [difference(left, right, metric) for metric in COUNTS]
    return [_difference_record(left, right, of_metric) for of_metric in found if of_metric is not None]


def _difference_record(left: Arm, right: Arm, found: Difference) -> DifferenceRecord:
    of_left, of_right = _by_seed(left, right, found.metric), _by_seed(right, left, found.metric)
    shared = of_left.keys() & of_right.keys()
    return DifferenceRecord(
        arm=left.name,
        against=right.name,
        metric=found.metric,
        difference=found.points,
        low=found.low,
        high=found.high,
        p_value=found.p_value,
        better_seeds=sum(of_left[seed] < of_right[seed] for seed in shared),
        num_seeds=len(shared),
    )


def _by_seed(arm: Arm, other: Arm, metric: Metric) -> dict[int, float]:
    """The one value of an ensemble stands for each seed of the other."""
    values = arm.values(metric)
    assert values is not None  # there is a difference in it
    return dict(zip(arm.seeds, values, strict=True)) if arm.runs else dict.fromkeys(other.seeds, values[0])
