"""SWEEP.toml -> the training runs of all arms and seeds. Paths are relative to the file's folder.

An arm is the base (the tables of a TRAIN.toml, or the path of one) with some keys changed: its tables are merged into the
base's; ``urls`` takes the place of ``url``. ``false`` in the place of a table, or of a key of ``[soft_labels]``, removes it. A
table that names another ``policy``, ``kind`` or ``architecture`` than the base's replaces it: keys of the other kind would mean
nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, model_validator

from softlabel_schemas.digest import canonical_json, sha256_hex
from softlabel_schemas.errors import InputError
from softlabel_schemas.strict import StrictModel, load_toml, read_toml
from student_trainer.config import Seed, TrainConfig, Units, absolute_paths, parse_config

Seeds = Annotated[tuple[Seed, ...], Field(min_length=1)]
# What a sweep sets itself for each run.
_OWN_KEYS = ("name", "output", "seed")
_KINDS = ("policy", "kind", "architecture")
# For each run, unless its tables say otherwise: as many runs at a time as there are cores need the least time in all, and the
# number of threads decides the last bits of a result.
_ONE_THREAD = {"training": {"num_threads": 1}}
# One in the place of the other.
_EITHER = {"url": "urls", "urls": "url"}


class ArmConfig(StrictModel):
    """One ``[[arms]]``; further keys are those of a TRAIN.toml that it changes. ``seeds``: None takes the sweep's."""

    model_config = ConfigDict(extra="allow")

    name: str
    seeds: Seeds | None = None

    @property
    def changes(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_own_keys(self.changes)
        _check_different(self.seeds or ())
        return self


class EvaluateConfig(StrictModel):
    """Attributes:
    ensemble: dataset of the teacher ensemble's soft labels of ``splits``, to be evaluated beside the students.
    graph: decodes words (``student-trainer graph``); None counts no word errors. Settings of the decoder are chosen for each
        run on the base's ``dev_splits``.
    dev_ensemble: dataset of the ensemble's soft labels of ``dev_splits``, for its decoder's settings.
    """

    splits: Annotated[tuple[str, ...], Field(min_length=1)] = ("test",)
    ensemble: str | None = None
    graph: str | None = None
    dev_ensemble: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.dev_ensemble is not None) != (self.ensemble is not None and self.graph is not None):
            raise ValueError("dev_ensemble is needed where both ensemble and graph are given, and nowhere else")
        return self


class CompareConfig(StrictModel):
    """Attributes:
    pairs: of arms (``ensemble`` is one), to be tested beside each soft arm against the hard-only arms of its model.
    gain: a baseline and a reference arm, such as hard labels alone and all soft outputs with them: of every other arm it is
        said what share of the reference's gain in frame (of CTC, token) error it keeps.
    """

    pairs: tuple[tuple[str, str], ...] = ()
    gain: tuple[str, str] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.gain is not None and self.gain[0] == self.gain[1]:
            raise ValueError(f"gain needs two arms, a baseline and a reference; found '{self.gain[0]}' twice")
        return self


class SweepConfig(StrictModel):
    """``title``: of the page of results, such as the question that is asked; None takes the output folder's name."""

    title: str | None = None
    output: str
    seeds: Seeds
    base: str | dict[str, Any]
    arms: Annotated[tuple[ArmConfig, ...], Field(min_length=1)]
    evaluate: EvaluateConfig = EvaluateConfig()
    compare: CompareConfig = CompareConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_different(self.seeds)
        if not isinstance(self.base, str):
            _check_own_keys(self.base)
        twice = [name for name, number in Counter(arm.name for arm in self.arms).items() if number > 1]
        if twice:
            raise ValueError(f"arms need names of their own; more than one is named {', '.join(twice)}")
        arms = {arm.name for arm in self.arms}
        if ENSEMBLE in arms:
            raise ValueError(f"an arm is named {ENSEMBLE}, which means the teacher ensemble; give it another name")
        tested = arms | ({ENSEMBLE} if self.evaluate.ensemble else set())
        _check_known("pairs", {name for pair in self.compare.pairs for name in pair}, tested)
        _check_known("gain", set(self.compare.gain or ()), arms)
        return self


# Name of the teacher ensemble among the arms.
ENSEMBLE = "ensemble"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """
    Attributes:
        title: of the page of results.
        arms: their names, in the file's order.
        runs: one for each arm and seed; all arms of the first seed first, so that a table can be had early.
        manifest: corpus manifest of the base, which the ensemble is evaluated on.
        dev_splits: of the base.
        units: of CTC arms, what transcripts are spelled in; None of arms with hard labels of frames.
        pairs, gain: see :class:`CompareConfig`.
    """

    title: str
    output: Path
    arms: tuple[str, ...]
    runs: tuple[TrainConfig, ...]
    manifest: str
    dev_splits: tuple[str, ...]
    units: Units | None
    evaluate: EvaluateConfig
    pairs: tuple[tuple[str, str], ...]
    gain: tuple[str, str] | None


def load_sweep(path: str | Path) -> Sweep:
    """Read a SWEEP.toml and make every run's configuration.

    Raises:
        InputError: the file is not valid; or arms are not, with the problems of them all; or two arms are the same or
            cannot be compared.
    """
    config = load_toml(SweepConfig, path)
    folder = Path(path).resolve().parent
    output = folder / config.output
    base = _base(config.base, folder)
    arms: dict[str, TrainConfig] = {}
    problems = []
    for arm in config.arms:
        changed = _merged(_ONE_THREAD, _merged(base, absolute_paths(arm.changes, folder)))
        tables = changed | {"name": arm.name, "output": str(output)}
        try:
            arms[arm.name] = _on_any_gpu(parse_config(tables, where=f"{path}: arm '{arm.name}'"))
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
    _check_unlike(arms, path)
    _check_dev_splits(arms, config.evaluate, path)
    _check_not_trained_on(arms, config.evaluate, path)
    corpora = {arm.corpus.manifest for arm in arms.values()}
    if len(corpora) > 1:
        raise InputError(
            f"{path}: the arms have different corpora, {', '.join(sorted(corpora))}; results need one corpus"
        )
    seeds = {arm.name: arm.seeds or config.seeds for arm in config.arms}
    runs = [
        config_of.model_copy(update={"seed": seed, "output": str(output / "runs" / f"{name}-{seed}")})
        for seed in dict.fromkeys(seed for of_arm in seeds.values() for seed in of_arm)
        for name, config_of in arms.items()
        if seed in seeds[name]
    ]
    evaluate = config.evaluate
    located = {
        name: value if "://" in value else str(folder / value)
        for name in ("ensemble", "graph", "dev_ensemble")
        if (value := getattr(evaluate, name)) is not None
    }
    return Sweep(
        title=config.title or output.name,
        output=output,
        arms=tuple(arms),
        runs=tuple(runs),
        manifest=corpora.pop(),
        dev_splits=runs[0].corpus.dev_splits,
        units=_units(arms, config.evaluate, path),
        evaluate=evaluate.model_copy(update=located),
        pairs=config.compare.pairs,
        gain=config.compare.gain,
    )


def _base(base: str | Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Its tables with absolute paths; a whole TRAIN.toml's name, output and seed give way to those of each run."""
    if isinstance(base, str):
        tables = absolute_paths(read_toml(folder / base), (folder / base).resolve().parent)
    else:
        tables = absolute_paths(base, folder)
    return {key: value for key, value in tables.items() if key not in _OWN_KEYS}


def _on_any_gpu(config: TrainConfig) -> TrainConfig:
    """Ray shows each run the GPU that it gave it and no other, so that "cuda:1" would name one that is not there."""
    if not config.training.device.startswith("cuda:"):
        return config
    return config.model_copy(update={"training": config.training.model_copy(update={"device": "cuda"})})


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any], *, tables: bool = True) -> dict[str, Any]:
    """``tables``: whether the keys are TRAIN.toml's tables or those of ``[soft_labels]``, none of which can be false: ``false``
    removes one, there or not. Further in it may be a value, such as a model's argument."""
    merged = dict(base)
    for key, value in changes.items():
        before = merged.get(key)
        if value is False and (tables or isinstance(before, Mapping)):
            merged.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(before, Mapping) and not _other_kind(before, value):
            merged[key] = _merged(before, value, tables=tables and key == "soft_labels")
        else:
            merged.pop(_EITHER.get(key, ""), None)
            merged[key] = value
    return merged


def _other_kind(before: Mapping[str, Any], value: Mapping[str, Any]) -> bool:
    return any(name in value and value[name] != before.get(name) for name in _KINDS)


def _check_own_keys(tables: Mapping[str, Any]) -> None:
    own = [key for key in _OWN_KEYS if key in tables]
    if own:
        raise ValueError(f"{', '.join(own)}: the sweep sets this for each run; seeds are given as seeds = [0, 1]")


def _check_known(key: str, named: set[str], arms: set[str]) -> None:
    unknown = sorted(named - arms)
    if unknown:
        raise ValueError(f"compare.{key} names {', '.join(unknown)}; the arms are {', '.join(sorted(arms))}")


def _check_different(seeds: Sequence[int]) -> None:
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must differ, found {list(seeds)}")


def _check_unlike(arms: Mapping[str, TrainConfig], path: str | Path) -> None:
    """Raises InputError where two arms are one but for their name."""
    seen: dict[str, str] = {}
    for name, config in arms.items():
        soft, corpus = config.soft_labels, config.corpus
        data = [corpus.manifest, corpus.inventory, *(() if soft is None else soft.locations)]
        other = seen.setdefault(sha256_hex(canonical_json([config.result_settings(), data])), name)
        if other != name:
            raise InputError(f"{path}: the arms '{other}' and '{name}' are the same configuration; leave one out")


def _check_dev_splits(arms: Mapping[str, TrainConfig], evaluate: EvaluateConfig, path: str | Path) -> None:
    """Raises InputError where a decoder's settings would have no speech to be chosen on."""
    without = [name for name, config in arms.items() if not config.corpus.dev_splits]
    if evaluate.graph is not None and without:
        raise InputError(
            f"{path}: with evaluate.graph the decoder's settings are chosen on corpus.dev_splits, which the arms "
            f"{', '.join(without)} have none of; give them dev splits, or leave the graph out"
        )


def _check_not_trained_on(arms: Mapping[str, TrainConfig], evaluate: EvaluateConfig, path: str | Path) -> None:
    """Raises InputError where an arm would be evaluated on its training speech. Dev splits may be: of trials they are."""
    for name, config in arms.items():
        both = sorted(set(evaluate.splits) & set(config.corpus.train_splits))
        if both:
            raise InputError(
                f"{path}: evaluate.splits has {', '.join(both)}, which the arm '{name}' trains on (corpus.train_splits): its "
                "errors there say nothing about other speech; evaluate on other splits"
            )


def _units(arms: Mapping[str, TrainConfig], evaluate: EvaluateConfig, path: str | Path) -> Units | None:
    """See :class:`Sweep`. Raises InputError where the arms' errors are not of the same units, or cannot be counted as asked."""
    units = {name: None if config.ctc is None else config.ctc.units for name, config in arms.items()}
    first = next(iter(units))
    other = next((name for name in units if units[name] != units[first]), None)
    if other is not None:
        kinds = ["labels of frames" if units[name] is None else f"[ctc] in {units[name]}" for name in (first, other)]
        raise InputError(
            f"{path}: the arms '{first}' and '{other}' have hard labels of two kinds, {kinds[0]} and {kinds[1]}; their errors "
            "cannot be compared: give each kind a sweep of its own"
        )
    if units[first] is not None and evaluate.graph is not None:
        raise InputError(f"{path}: evaluate.graph decodes the phones of each frame, which [ctc] has not; leave it out")
    return units[first]
