"""Arms: the runs of one name are its seeds. Read from run folders and evaluations; refused where they do not fit together.

runs/essence-0, runs/essence-1, ...  -->  Arm("essence"): one Run and one Evaluation for each seed
ensemble-test.json                   -->  Arm("ensemble"): one Evaluation, no Run
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field

from softlabel_schemas.errors import InputError
from softlabel_schemas.manifest import SkippedUtterance
from softlabel_schemas.strict import ModelT, StrictModel, parse
from student_trainer.config import CACHE_FIELDS, TrainConfig
from student_trainer.evaluate import evaluation_name
from student_trainer.run_folder import RUN, RunFolder

Metric = Literal["frame_error_rate", "phone_error_rate", "word_error_rate", "cross_entropy", "calibration_error"]
# Of a run's setup: how many utterances of the corpus it was trained without.
LEFT_OUT = "utterances_left_out"
METRICS: tuple[Metric, ...] = (
    "frame_error_rate",
    "phone_error_rate",
    "word_error_rate",
    "cross_entropy",
    "calibration_error",
)
# Of the rates that are errors among units: the fields of an utterance that count both.
COUNTS: dict[Metric, tuple[str, str]] = {
    "frame_error_rate": ("frame_errors", "frames"),
    "phone_error_rate": ("phone_errors", "phones"),
    "word_error_rate": ("word_errors", "words"),
}


class _Record(StrictModel):
    """Keys that a comparison does not need are passed over; NaN stands for a value that is not known."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=True)


class UtteranceErrors(_Record):
    """Phones and words are None where they were not counted."""

    utterance_id: str
    frames: int
    frame_errors: int
    phones: int | None = None
    phone_errors: int | None = None
    words: int | None = None
    word_errors: int | None = None


class Evaluation(_Record):
    """``evaluation-<splits>.json``: rates in percent, cross-entropy in nats per frame.

    Attributes:
        word_error_rate, graph_digest: None where no words were decoded.
        left_out: of a dataset's evaluation, the utterances it has no labels for.
    """

    kind: Literal["student", "ensemble"]
    name: str
    splits: tuple[str, ...]
    corpus_digest: str
    inventory_digest: str
    frame_error_rate: float
    phone_error_rate: float | None
    word_error_rate: float | None = None
    graph_digest: str | None = None
    cross_entropy: float | None
    calibration_error: float
    utterances: Annotated[tuple[UtteranceErrors, ...], Field(min_length=1)]
    left_out: tuple[SkippedUtterance, ...] = ()

    def frames_U(self) -> npt.NDArray[np.float64]:
        return np.array([utterance.frames for utterance in self.utterances], dtype=np.float64)


class DevResult(_Record):
    frame_error_rate: float


class Epoch(_Record):
    epoch: int
    dev: DevResult | None = None


class Run(_Record):
    """``run.json``. ``dataset_digest``: a list where teachers were switched."""

    config: TrainConfig
    corpus_digest: str
    inventory_digest: str
    dataset_digest: str | tuple[str, ...] | None
    num_parameters: int
    left_out: tuple[SkippedUtterance, ...] = ()
    history: tuple[Epoch, ...]

    @property
    def dataset_digests(self) -> tuple[str, ...]:
        return (self.dataset_digest,) if isinstance(self.dataset_digest, str) else self.dataset_digest or ()

    def setup(self) -> dict[str, Any]:
        """What decides the result, less the seed, by dotted name. Digests stand for paths."""
        exclude: dict[str, Any] = {
            "output": True,
            "seed": True,
            "corpus": {"manifest", "inventory"},
            "training": {"num_threads", "checkpoint_minutes", "device"},
        }
        if self.config.soft_labels:
            exclude["soft_labels"] = {"url", "urls", *CACHE_FIELDS}
        data = {"corpus_digest": self.corpus_digest, "dataset_digest": self.dataset_digest}
        return _flat(self.config.model_dump(mode="json", exclude=exclude)) | data | {LEFT_OUT: len(self.left_out)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Over seeds; ``std`` is the sample standard deviation (ddof = 1), None for a single value."""

    mean: float
    std: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """Runs that differ in nothing but their seed; or one evaluation without a run, such as the teacher ensemble's."""

    name: str
    kind: Literal["student", "ensemble"]
    evaluations: tuple[Evaluation, ...]
    runs: tuple[Run, ...] = ()

    @property
    def seeds(self) -> list[int]:
        return [run.config.seed for run in self.runs]

    @property
    def is_soft(self) -> bool:
        return bool(self.runs) and self.runs[0].config.soft_labels is not None

    @property
    def is_hard_only(self) -> bool:
        return bool(self.runs) and not self.is_soft

    def values(self, metric: Metric) -> list[float] | None:
        """One for each seed; None where the metric is not known."""
        values = [getattr(evaluation, metric) for evaluation in self.evaluations]
        return None if None in values else values

    def spread(self, metric: Metric) -> Spread | None:
        values = self.values(metric)
        if values is None:
            return None
        return Spread(mean=float(np.mean(values)), std=float(np.std(values, ddof=1)) if len(values) > 1 else None)

    @property
    def frame_error(self) -> Spread:
        """Of the one metric that is always known, percent."""
        spread = self.spread("frame_error_rate")
        assert spread is not None
        return spread

    def errors_U(self, metric: Metric) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None:
        """Each utterance's errors, their mean over seeds, and its frames, phones or words, both [U]; None where not known."""
        errors, units = (
            [[getattr(utterance, field) for utterance in e.utterances] for e in self.evaluations]
            for field in COUNTS[metric]
        )
        if any(None in of_seed for of_seed in (*errors, *units)):
            return None
        return np.asarray(np.mean(errors, axis=0), dtype=np.float64), np.asarray(units[0], dtype=np.float64)


def load_arms(runs: Sequence[str], evaluations: Sequence[str], splits: Sequence[str]) -> list[Arm]:
    """Arms in the order given, evaluations without a run last.

    Raises:
        InputError: a file is missing (says which command makes it), runs of one name differ in more than their seed, or
            results are not of the same splits, corpus, utterances and class inventory.
    """
    runs_by_name: dict[str, list[tuple[str, Run, Evaluation]]] = {}
    by_location: dict[str, Evaluation] = {}
    for location in dict.fromkeys(runs):
        run, evaluation = _load_run(Path(location), splits)
        runs_by_name.setdefault(run.config.name, []).append((location, run, evaluation))
        by_location[location] = evaluation
    arms = [_arm(name, seeds) for name, seeds in runs_by_name.items()]
    for location in dict.fromkeys(evaluations):
        made_by = (
            f"make it with: student-trainer evaluate --dataset URL --corpus CORPUS {_options(splits)} --output FILE"
        )
        by_location[location] = _load(Evaluation, Path(location), made_by)
        arms.append(_evaluated(by_location[location], Path(location), {arm.name for arm in arms}))
    _check_alike(by_location, splits)
    return arms


def _load_run(path: Path, splits: Sequence[str]) -> tuple[Run, Evaluation]:
    # Before the rest, whose errors of frames it does not have.
    if (path / RUN).exists() and RunFolder(path).config().ctc is not None:
        raise InputError(f"{path} was trained with CTC: it has no errors of frames, which a comparison is about")
    run = _load(Run, path / RUN, "make a run with: student-trainer train TRAIN.toml")
    epochs = run.config.training.epochs
    if len(run.history) < epochs:
        raise InputError(
            f"{path} has trained {len(run.history)} of {epochs} epochs; finish it with 'student-trainer train', "
            "then evaluate it again"
        )
    made_by = f"student-trainer evaluate {path} --corpus {run.config.corpus.manifest} {_options(splits)}"
    evaluation = _load(Evaluation, path / evaluation_name(splits), f"make it with: {made_by}")
    if evaluation.inventory_digest != run.inventory_digest:
        raise InputError(f"{path}: trained and evaluated with different class inventories; run: {made_by}")
    return run, evaluation


def _load(model: type[ModelT], path: Path, hint: str) -> ModelT:
    if not path.exists():
        raise InputError(f"{path} does not exist; {hint}")
    return parse(model, RunFolder(path.parent).read_json(path.name), where=str(path))


def _options(splits: Sequence[str]) -> str:
    return " ".join(f"--split {split}" for split in splits)


def _arm(name: str, seeds: Sequence[tuple[str, Run, Evaluation]]) -> Arm:
    """Raises InputError unless the runs differ in their seed and in nothing else."""
    first_location, first, _ = seeds[0]
    seen: dict[int, str] = {}
    for location, run, _ in seeds:
        unlike = unlike_settings(first.setup(), run.setup())
        if unlike:
            raise InputError(
                f"{first_location} and {location} are both named '{name}' but are not seeds of one arm: "
                f"{'; '.join(unlike)}; give each arm its own name"
            )
        if run.config.seed in seen:
            raise InputError(f"{seen[run.config.seed]} and {location} are the same arm and seed ({run.config.seed})")
        seen[run.config.seed] = location
    ordered = sorted(seeds, key=lambda seed: seed[1].config.seed)
    return Arm(
        name=name,
        kind="student",
        evaluations=tuple(evaluation for _, _, evaluation in ordered),
        runs=tuple(run for _, run, _ in ordered),
    )


def _evaluated(evaluation: Evaluation, path: Path, taken: set[str]) -> Arm:
    """A row of its own; where the name is taken, the file's stem tells them apart."""
    name = evaluation.name if evaluation.name not in taken else f"{evaluation.name} ({path.stem})"
    if name in taken:
        raise InputError(f"{path}: there is a result named '{name}' already; rename the file to tell them apart")
    return Arm(name=name, kind=evaluation.kind, evaluations=(evaluation,))


def _check_alike(evaluations: Mapping[str, Evaluation], splits: Sequence[str]) -> None:
    first_location, first = next(iter(evaluations.items()))
    if first.splits != tuple(splits):
        raise InputError(f"{first_location} was evaluated on {list(first.splits)}, --split says {list(splits)}")
    frames = {utterance.utterance_id: utterance.frames for utterance in first.utterances}
    graphs = ((location, evaluation.graph_digest) for location, evaluation in evaluations.items())
    first_graph = next((found for found in graphs if found[1] is not None), None)
    for location, evaluation in evaluations.items():
        where = f"{first_location} and {location} cannot be compared"
        for name, what in (
            ("splits", "splits"),
            ("inventory_digest", "class inventories"),
            ("corpus_digest", "corpora"),
        ):
            expected, found = getattr(first, name), getattr(evaluation, name)
            if expected != found:
                raise InputError(f"{where}: {what} differ ({expected} and {found}); evaluate both on the same data")
        if first_graph is not None and evaluation.graph_digest not in (None, first_graph[1]):
            raise InputError(
                f"{first_graph[0]} and {location} cannot be compared: their words were decoded with different graphs "
                f"({first_graph[1]} and {evaluation.graph_digest}); evaluate both with the same graph"
            )
        found_frames = {utterance.utterance_id: utterance.frames for utterance in evaluation.utterances}
        left_out = {entry.utterance_id for entry in evaluation.left_out}
        wanted_frames = {name: number for name, number in frames.items() if name not in left_out}
        if list(found_frames.items()) != list(wanted_frames.items()):
            unlike = sorted(set(wanted_frames.items()) ^ set(found_frames.items()))
            raise InputError(
                f"{where}: {len(wanted_frames)} and {len(found_frames)} utterances, not the same ones or not in the same order"
                + (f" (utterance {unlike[0][0]})" if unlike else "")
                + "; evaluate both on the same data"
            )


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}{key}.") if isinstance(inner, Mapping) else {f"{prefix}{key}": inner}
    return flat


def unlike_settings(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[str]:
    """``name: left value against right value`` for each setting that differs."""
    names = dict.fromkeys([*left, *right])
    return [
        f"{name}: {left.get(name)} against {right.get(name)}" for name in names if left.get(name) != right.get(name)
    ]
