"""The questions of the experiment as sweeps: arms that differ in what the question is about and in nothing else.

All arms of a question have the same model, budget, batches and front end, and settings that were chosen with equal effort
(``essence_settings.py``). Every selection is derived from the stored datasets of all classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from essence_settings import TRIALS, Kind, Settings, trial_name
from essence_teachers import SHARES
from recipe import Model, inline
from speechocean762 import MEMBER, PARTS, SMALL

Tables = dict[str, object]
# Out-of-fold labels of all training speech; an arm may name others.
_LABELS = "labels-train"


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
            "soft_labels": {**own.soft, **self.soft} if own.soft else False,
            "training": {**own.training, "epochs": epochs * self.num_epochs},
        }
        if self.corpus:
            tables["corpus"] = dict(self.corpus)
        if self.augmented:
            tables["augmentation"] = {}
        return tables


@dataclass(frozen=True, kw_only=True)
class Question:
    """
    Attributes:
        num_epochs: times those of the whole experiment.
        pairs: tested beside each soft arm against the hard-only ones.
        gain: baseline and reference arm, of whose gain each other arm keeps a share.
        words: whether words are decoded too, which takes as long as training a small student.
        on_dev: evaluated on dev instead of test speech.
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

    def toml(self, settings: Mapping[Kind, Settings], *, epochs: int, seeds: int) -> str:
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
            f"soft_labels = {inline({'url': _LABELS, 'tail': 'ghost'})}",
            f"front_end = {inline({'kind': 'fbank', 'num_mel_bins': 40, 'stack': 3})}",
            f"model = {inline({'architecture': self.model.architecture, 'arguments': self.model.arguments})}",
            f"training = {inline({'batch_seconds': 40.0, 'precision': 'bfloat16'})}",
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
        """The datasets that it needs."""
        of_arms = {str(arm.soft.get("url", _LABELS)) for arm in self.arms if arm.kind != "hard"}
        return of_arms | {self._evaluated} | ({"labels-dev"} if self.words else set())

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


def tuning(name: str, model: Model, num_trials: int) -> Question:
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


def _selected(name: str, **selection: object) -> Arm:
    return Arm(name=name, kind="both", soft={"selection": selection})


HARD = Arm(name="hard", kind="hard")
ALL_SOFT = Arm(name="all-soft", kind="soft")
BOTH = Arm(name="all-soft-and-hard", kind="both")
TOP_20: Mapping[str, object] = {"selection": {"policy": "top_k", "k": 20}}
ESSENCE = Arm(name="essence", kind="both", soft=TOP_20)
HEARD = Arm(name="essence-heard", kind="both", soft={"url": "labels-heard", **TOP_20})
# A sampled store has one temperature, so that arm and what it is compared with have it too.
_AT_1: Mapping[str, object] = {"temperature": 1.0}
_WIDE = 200


def _augmented(arm: Arm) -> Arm:
    return Arm(name=f"{arm.name}-augmented", kind=arm.kind, soft=arm.soft, augmented=True)


def _of_share(share: int) -> tuple[Arm, Arm]:
    """Hard labels of a share of the speakers: alone, heard as often as all speech else; and with soft targets of all speech."""
    hard_splits = SHARES[share]
    url = _LABELS if share == 100 else f"labels-{share}"
    return (
        Arm(name=f"hard-{share}", kind="hard", corpus={"train_splits": hard_splits}, num_epochs=100 // share),
        Arm(
            name=f"hard-{share}-soft-100",
            kind="both",
            soft={"url": url, **TOP_20},
            corpus={"hard_label_splits": hard_splits},
        ),
    )


_ARMS = (HARD, ALL_SOFT, ESSENCE)
_GAIN = (HARD.name, BOTH.name)
QUESTIONS = (
    Question(
        name="does-it-help",
        title="Does the essence help?",
        model=SMALL,
        seeds=5,
        words=True,
        arms=(
            HARD,
            ALL_SOFT,
            BOTH,
            ESSENCE,
            Arm(name="essence-two-heads", kind="both", soft={"num_heads": 2, **TOP_20}),
            Arm(
                name="essence-two-heads-soft-decodes",
                kind="both",
                soft={"num_heads": 2, "decoding_head": "soft", **TOP_20},
            ),
            Arm(name="essence-at-1", kind="both", soft={**_AT_1, **TOP_20}),
            Arm(
                name="sampled-50", kind="both", soft={**_AT_1, "selection": {"policy": "random_sampling", "draws": 50}}
            ),
            HEARD,
        ),
        gain=_GAIN,
        pairs=(
            ("essence", "all-soft"),
            ("essence", "all-soft-and-hard"),
            ("essence-two-heads", "essence"),
            ("essence-two-heads-soft-decodes", "essence"),
            ("sampled-50", "essence"),
            ("sampled-50", "essence-at-1"),
            ("essence", "essence-heard"),
            ("essence", "ensemble"),
        ),
    ),
    Question(
        name="how-much",
        title="How much is enough?",
        model=SMALL,
        seeds=3,
        arms=(
            HARD,
            BOTH,
            *(_selected(f"top-{k}", policy="top_k", k=k) for k in (1, 2, 5, 10, 50)),
            *(_selected(f"mass-{mass}", policy="mass", mass=mass, max_entries=_WIDE) for mass in (0.8, 0.9, 0.95)),
            *(
                _selected(f"{size}-bytes", policy="byte_budget", bytes_per_frame=size, max_entries=_WIDE)
                for size in (4, 8, 16, 32)
            ),
            Arm(name="agreeing-frames", kind="both", soft={"frames": {"disagreeing": 0.0}}),
            Arm(name="less-silence", kind="both", soft={"frames": {"silence": 0.2}}),
        ),
        gain=_GAIN,
        pairs=tuple(
            (arm, "all-soft-and-hard") for arm in ("4-bytes", "8-bytes", "16-bytes", "agreeing-frames", "less-silence")
        ),
    ),
    Question(
        name="pass-the-teachers",
        title="Can a student pass its teachers?",
        model=MEMBER,
        seeds=5,
        words=True,
        arms=(*_ARMS, *map(_augmented, _ARMS)),
        pairs=(
            ("essence", "all-soft"),
            ("essence-augmented", "all-soft-augmented"),
            *((arm, "ensemble") for arm in ("hard", "essence", "hard-augmented", "essence-augmented")),
        ),
    ),
    Question(
        name="longer",
        title="Can a student pass its teachers, with twice the budget?",
        model=MEMBER,
        seeds=5,
        num_epochs=2,
        arms=(*_ARMS, _augmented(HARD), _augmented(ESSENCE)),
        pairs=(
            ("essence", "all-soft"),
            ("essence-augmented", "hard-augmented"),
            *((arm, "ensemble") for arm in ("hard", "essence", "hard-augmented", "essence-augmented")),
        ),
    ),
    Question(
        name="unlabelled",
        title="What is unlabelled speech worth?",
        model=SMALL,
        seeds=3,
        arms=tuple(arm for share in SHARES for arm in _of_share(share)),
        pairs=(("hard-25-soft-100", "hard-50"), ("hard-50-soft-100", "hard-100")),
    ),
)
# Settings of a question are those that were chosen for its model.
MODELS = {"small": SMALL, "member": MEMBER}
