"""A question of the experiment as a sweep: arms that differ in what the question is about and in nothing else.

All arms of a question have the same model, budget, batches and front end, and settings that were chosen with equal effort
(``essence_settings.py``). Every selection is derived from the stored datasets of all classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from essence_settings import TRIALS, Kind, Settings, trial_name
from recipe import Model, inline
from speechocean762 import PARTS

Tables = dict[str, object]
# Out-of-fold labels of all training speech; an arm may name others.
LABELS_TRAIN = "labels-train"
# Of these, at another temperature than 1.
LABELS_TRAIN_EXACT = "labels-train-exact"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """
    Attributes:
        kind: whose settings it takes.
        soft: keys of its [soft_labels] beside those of its kind.
        settings: in the place of its kind's.
        num_epochs: times those of the question.
    """

    name: str
    kind: Kind
    soft: Mapping[str, object] = field(default_factory=dict)
    corpus: Mapping[str, object] | None = None
    augmented: bool = False
    num_epochs: int = 1
    settings: Settings | None = None

    def tables(self, settings: Mapping[Kind, Settings], epochs: int) -> Tables:
        own = self.settings or settings[self.kind]
        tables: Tables = {
            "soft_labels": False if own.soft is None else {**own.soft, **_dataset(own), **self.soft},
            "training": {**own.training, "epochs": epochs * self.num_epochs},
        }
        if self.corpus:
            tables["corpus"] = dict(self.corpus)
        if self.augmented:
            tables["augmentation"] = {}
        return tables


def _dataset(settings: Settings) -> Mapping[str, object]:
    """That of a temperature; for temperature 1 the sweep's own."""
    return {} if (settings.soft or {}).get("temperature", 1.0) == 1 else {"url": LABELS_TRAIN_EXACT}


@dataclass(frozen=True, kw_only=True)
class Question:
    """
    Attributes:
        num_epochs: times those of the whole experiment.
        pairs: tested beside each soft arm against the hard-only ones.
        gain: baseline and reference arm, of whose gain each other arm keeps a share.
        words: whether words are decoded too, which takes as long as training a small student.
        on_dev: evaluated on dev instead of test speech.
        trials: on dev speech, before; the best of them is what its arms of the kind "chosen" are.
    """

    name: str
    title: str
    model: Model
    arms: tuple[Arm, ...]
    seeds: int
    num_epochs: int = 1
    pairs: tuple[tuple[str, str], ...] = ()
    gain: tuple[str, str] | None = None
    words: bool = False
    on_dev: bool = False
    trials: Question | None = None

    def best(self, errors: Mapping[str, float], settings: Mapping[Kind, Settings]) -> Settings:
        """Of the arm with the lowest error."""
        arm = min(self.arms, key=lambda arm: errors[arm.name])
        own = settings[arm.kind]
        return Settings(training=own.training, soft={**(own.soft or {}), **arm.soft})

    def toml(self, settings: Mapping[Kind, Settings], *, epochs: int, seeds: int, precision: str) -> str:
        arms = dict(self._arms(settings, epochs * self.num_epochs))
        pairs = [pair for pair in self.pairs if {*pair} <= {*arms, "ensemble"}]
        corpus = {"manifest": "corpus.parquet", "inventory": "inventory.json", "train_splits": PARTS}
        lines = [
            f"title = {inline(self.title)}",
            f"output = {inline(self.name)}",
            f"seeds = {inline(list(range(min(self.seeds, seeds))))}",
            "",
            "[base]",
            f"corpus = {inline(corpus)}",
            f"soft_labels = {inline({'url': LABELS_TRAIN, 'tail': 'ghost'})}",
            f"front_end = {inline({'kind': 'fbank', 'num_mel_bins': 40, 'stack': 3})}",
            f"model = {inline({'architecture': self.model.architecture, 'arguments': self.model.arguments})}",
            f"training = {inline({'batch_seconds': 40.0, 'precision': precision})}",
            "",
            "[evaluate]",
            f"splits = {inline([self._evaluated.removeprefix('labels-')])}",
            f"ensemble = {inline(self._evaluated)}",
            *(['graph = "graph"', 'dev_ensemble = "labels-dev"'] if self.words else []),
            "",
            "[compare]",
            f"pairs = {inline(pairs)}",
            *([f"gain = {inline(self.gain)}"] if self.gain else []),
        ]
        for name, tables in arms.items():
            lines += ["", "[[arms]]", f"name = {inline(name)}"]
            lines += [f"{key} = {inline(value)}" for key, value in tables.items()]
        return "\n".join(lines) + "\n"

    def labels(self) -> set[str]:
        """The datasets that it and its trials need; what settings that are yet to be chosen need, their trials did."""
        of_arms = {
            str({**_dataset(arm.settings or Settings()), **arm.soft}.get("url", LABELS_TRAIN))
            for arm in self.arms
            if arm.kind != "hard"
        }
        of_trials = self.trials.labels() if self.trials else set()
        return of_arms | of_trials | {self._evaluated} | ({"labels-dev"} if self.words else set())

    @property
    def _evaluated(self) -> str:
        return "labels-dev" if self.on_dev else "labels-test"

    def _arms(self, settings: Mapping[Kind, Settings], epochs: int) -> Iterator[tuple[str, Tables]]:
        """Less those that the chosen settings make the same as one before."""
        seen: list[Tables] = []
        for arm in self.arms:
            tables = arm.tables(settings, epochs)
            if tables not in seen:
                yield arm.name, tables
            seen.append(tables)


def trials_of(name: str, model: Model, num_trials: int) -> Question:
    """The first ``num_trials`` of every kind of arm, judged on dev speech."""
    arms = tuple(
        Arm(name=trial_name(kind, trial), kind=kind, settings=trial)
        for kind, trials in TRIALS.items()
        for trial in trials[:num_trials]
    )
    return Question(
        name=f"tuning-{name}", title=f"Settings, chosen on dev speech: {name} student", model=model, arms=arms, seeds=1,
        on_dev=True,
    )  # fmt: skip
