"""The questions of the experiment."""

from __future__ import annotations

from collections.abc import Mapping

from essence_arms import LABELS_TRAIN, Arm, Question
from essence_teachers import MEMBER, SHARES
from recipe import Model

SMALL = Model(architecture="conv_glu", arguments={"hidden": 64, "num_layers": 4, "kernel_size": 3})


def _selected(name: str, **selection: object) -> Arm:
    return Arm(name=name, kind="both", soft={"selection": selection})


HARD = Arm(name="hard", kind="hard")
ALL_SOFT = Arm(name="all-soft", kind="soft")
BOTH = Arm(name="all-soft-and-hard", kind="both")
TOP_20: Mapping[str, object] = {"selection": {"policy": "top_k", "k": 20}}
ESSENCE = Arm(name="essence", kind="both", soft=TOP_20)
HEARD = Arm(name="essence-heard", kind="both", soft={"url": "labels-heard", **TOP_20})
_WIDE = 200


def _sampled(draws: int) -> Mapping[str, object]:
    return {"policy": "random_sampling", "draws": draws}


def _augmented(arm: Arm) -> Arm:
    return Arm(name=f"{arm.name}-augmented", kind=arm.kind, soft=arm.soft, augmented=True)


def _of_share(share: int) -> tuple[Arm, Arm]:
    """Hard labels of a share of the speakers: alone, heard as often as all speech else; and with soft targets of all speech."""
    hard_splits = SHARES[share]
    url = LABELS_TRAIN if share == 100 else f"labels-{share}"
    return (
        Arm(name=f"hard-{share}", kind="hard", corpus={"train_splits": hard_splits}, num_epochs=100 // share),
        Arm(
            name=f"hard-{share}-soft-100",
            kind="both",
            soft={"url": url, **TOP_20},
            corpus={"hard_label_splits": hard_splits},
        ),
    )


_BUDGET: Mapping[str, object] = {"policy": "byte_budget", "bytes_per_frame": 8, "max_entries": _WIDE}
_NO_SILENCE: Mapping[str, object] = {"frames": {"silence": 0.0}}
EIGHT_BYTES = Question(
    name="eight-bytes",
    title="Eight bytes per frame, chosen on dev speech",
    model=SMALL,
    seeds=3,
    on_dev=True,
    arms=(
        _selected("budget-ghost", **_BUDGET),
        Arm(name="budget-uniform", kind="both", soft={"selection": _BUDGET, "tail": "uniform"}),
        Arm(name="budget-renormalize", kind="both", soft={"selection": _BUDGET, "tail": "renormalize"}),
        _selected("budget-without-silence", **_BUDGET, **_NO_SILENCE),
        _selected("sampled-13", **_sampled(13)),
        _selected("sampled-20-without-silence", **_sampled(20), **_NO_SILENCE),
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
            _selected("sampled-50", **_sampled(50)),
            HEARD,
        ),
        gain=_GAIN,
        pairs=(
            ("essence", "all-soft"),
            ("essence", "all-soft-and-hard"),
            ("essence-two-heads", "essence"),
            ("essence-two-heads-soft-decodes", "essence"),
            ("sampled-50", "essence"),
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
            Arm(name="8-bytes-chosen", kind="chosen"),
            Arm(name="agreeing-frames", kind="both", soft={"frames": {"disagreeing": 0.0}}),
            Arm(name="less-silence", kind="both", soft={"frames": {"silence": 0.2}}),
        ),
        gain=_GAIN,
        pairs=tuple(
            (arm, "all-soft-and-hard")
            for arm in ("4-bytes", "8-bytes", "8-bytes-chosen", "16-bytes", "agreeing-frames", "less-silence")
        ),
        trials=EIGHT_BYTES,
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
# What was asked once the answers were known.
FURTHER_QUESTIONS = (
    Question(
        name="much-longer",
        title="Can a student pass its teachers, with four times the budget?",
        model=MEMBER,
        seeds=3,
        num_epochs=4,
        arms=(_augmented(HARD), _augmented(ESSENCE)),
        pairs=(
            ("essence-augmented", "hard-augmented"),
            *((arm, "ensemble") for arm in ("hard-augmented", "essence-augmented")),
        ),
    ),
    Question(
        name="longer-small",
        title="Does the essence help a small student more, with three times the budget?",
        model=SMALL,
        seeds=3,
        num_epochs=3,
        arms=(HARD, ESSENCE),
    ),
)
# Settings of a question are those that were chosen for its model.
MODELS = {"small": SMALL, "member": MEMBER}
