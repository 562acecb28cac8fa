"""Arms: the runs of one name are its seeds. Read from run folders and evaluations; refused where they do not fit together.

runs/essence-0, runs/essence-1, ...  -->  Arm("essence"): one Run and one Evaluation for each seed
ensemble-test.json                   -->  Arm("ensemble"): one Evaluation, no Run
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from softlabel_schemas.errors import InputError
from softlabel_schemas.strict import ModelT, parse
from student_trainer.config import TrainConfig
from student_trainer.evaluate import evaluation_name
from student_trainer.metric_names import COUNTS, Metric
from student_trainer.result_files import Evaluation, Run
from student_trainer.run_folder import RUN, RunFolder
from student_trainer.spread import Spread, spread_of


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
        values = [evaluation.value(metric) for evaluation in self.evaluations]
        known = [value for value in values if value is not None]
        return known if len(known) == len(values) else None

    def spread(self, metric: Metric) -> Spread | None:
        """Over seeds; None where the metric is not known."""
        values = self.values(metric)
        return None if values is None else spread_of(values)

    @property
    def leading(self) -> Metric:
        """Frame error rate or, of CTC, token error rate."""
        return self.evaluations[0].leading

    @property
    def error(self) -> Spread:
        """Of the leading metric, which is always known, percent."""
        spread = self.spread(self.leading)
        assert spread is not None
        return spread

    def errors_U(self, metric: Metric) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None:
        """Each utterance's errors, their mean over seeds, and its units (frames, words), both [U]; None where not known."""
        errors, units = (
            [[getattr(utterance, field) for utterance in e.utterances] for e in self.evaluations]
            for field in COUNTS[metric]
        )
        if any(None in of_seed for of_seed in (*errors, *units)):
            return None
        return np.asarray(np.mean(errors, axis=0), dtype=np.float64), np.asarray(units[0], dtype=np.float64)


def load_arms(
    runs: Sequence[str],
    evaluations: Sequence[str],
    splits: Sequence[str],
    configs: Mapping[str, TrainConfig] | None = None,
) -> list[Arm]:
    """Arms in the order given, evaluations without a run last.

    Args:
        configs: by run folder, in the place of those in ``run.json``, which name an arm and paths as they were when it was
            trained.

    Raises:
        InputError: a file is missing (says which command makes it), runs of one name differ in more than their seed, or
            results are not of the same splits, corpus, utterances and class inventory.
    """
    runs_by_name: dict[str, list[tuple[str, Run, Evaluation]]] = {}
    by_location: dict[str, Evaluation] = {}
    for location in dict.fromkeys(runs):
        run, evaluation = _load_run(Path(location), splits, (configs or {}).get(location))
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


def _load_run(path: Path, splits: Sequence[str], config: TrainConfig | None) -> tuple[Run, Evaluation]:
    run = _load(Run, path / RUN, "make a run with: student-trainer train TRAIN.toml")
    if config is not None:
        run = run.model_copy(update={"config": config})
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
    weights = RunFolder(path).weights_digest()
    # Who deleted the weights can still compare.
    if weights is not None and weights != evaluation.weights_digest:
        raise InputError(
            f"{path}: its evaluation is of other weights, from before its training went on; run: {made_by}"
        )
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
    for location, evaluation in evaluations.items():
        where = f"{first_location} and {location} cannot be compared"
        if evaluation.leading != first.leading:
            raise InputError(
                f"{where}: the one counts errors of {first.counted}, the other of {evaluation.counted}; compare students "
                "of CTC and of hard labels of frames apart, and evaluate CTC teachers with --ctc"
            )
        for name, what in (
            ("splits", "splits"),
            ("inventory_digest", "class inventories"),
            ("corpus_digest", "corpora"),
            ("units", "units of the transcripts"),
        ):
            expected, found = getattr(first, name), getattr(evaluation, name)
            if expected != found:
                raise InputError(f"{where}: {what} differ ({expected} and {found}); evaluate both on the same data")
    _check_where_known(evaluations, "transcripts_digest", "transcripts differ", "on the same data")
    _check_where_known(
        evaluations, "graph_digest", "their words were decoded with different graphs", "with the same graph"
    )
    _check_counts(evaluations)


def _check_where_known(evaluations: Mapping[str, Evaluation], name: str, differ: str, alike: str) -> None:
    """Raises InputError where those that have this digest have different ones."""
    known = [
        (location, digest) for location, each in evaluations.items() if (digest := getattr(each, name)) is not None
    ]
    for location, digest in known:
        first_location, expected = known[0]
        if digest != expected:
            raise InputError(
                f"{first_location} and {location} cannot be compared: {differ} ({expected} and {digest}); evaluate both {alike}"
            )


def _check_counts(evaluations: Mapping[str, Evaluation]) -> None:
    """Raises InputError unless all are of the same utterances, less those that a dataset has no labels for."""
    first_location, first = next(iter(evaluations.items()))
    counts = first.counts()
    for location, evaluation in evaluations.items():
        found_counts = evaluation.counts()
        left_out = {entry.utterance_id for entry in evaluation.left_out}
        wanted_counts = {name: number for name, number in counts.items() if name not in left_out}
        if list(found_counts.items()) != list(wanted_counts.items()):
            unlike = sorted(set(wanted_counts.items()) ^ set(found_counts.items()))
            raise InputError(
                f"{first_location} and {location} cannot be compared: {len(wanted_counts)} and {len(found_counts)} utterances, "
                f"not the same ones (or not of as many {first.counted}) or not in the same order"
                + (f" (utterance {unlike[0][0]})" if unlike else "")
                + "; evaluate both on the same data"
            )


def unlike_settings(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[str]:
    """``name: left value against right value`` for each setting that differs."""
    names = dict.fromkeys([*left, *right])
    return [
        f"{name}: {left.get(name)} against {right.get(name)}" for name in names if left.get(name) != right.get(name)
    ]
