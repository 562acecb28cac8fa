"""The essence on real speech: the questions of the paper as sweeps over one stored dataset, and a page of answers.

    python deploy/local/essence.py CORPUS_FOLDER OUTPUT_FOLDER

CORPUS_FOLDER is that of ``speechocean762.py``, which says how the corpus is cut. Teachers are trained and run once, and a
wide selection of their posteriors is stored; each question is a SWEEP.toml on it that trains no teacher. Every step passes
over what is done, so the script can be interrupted and run again.

Soft weight 0.8, the tail "ghost" and the budget were fixed beforehand, not tuned. All arms of a question have the same model,
budget, batches and learning rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from recipe import Model, Recipe
from speechocean762 import MEMBER, SMALL, prepare, recipe

from softlabel_schemas import InputError

# Of 638 classes: wide enough that its tail is small beside that of every selection compared.
WIDE = 200
_BASE = """\
[base]
corpus = {{ manifest = "corpus.parquet", inventory = "inventory.json" }}
soft_labels = {{ url = "labels-train", weight = 0.8, tail = "ghost" }}
front_end = {{ kind = "fbank", num_mel_bins = 40, stack = 3 }}
training = {{ epochs = {epochs}, batch_seconds = 40.0 }}

[base.{model}
[evaluate]
splits = ["test"]
ensemble = "labels-test"
"""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """``changes``: the lines of its ``[[arms]]`` after the name."""

    name: str
    changes: str = ""

    def toml(self) -> str:
        return f'\n[[arms]]\nname = "{self.name}"\n{self.changes}'


def soft(changes: str) -> str:
    return f"soft_labels = {{ {changes} }}\n"


def selected(policy: str) -> str:
    return soft(f"selection = {{ {policy}, keep_hard_label = true }}")


HARD = Arm(name="hard", changes="soft_labels = false\n")
ALL_SOFT = Arm(name="all-soft", changes=soft("weight = 1.0"))
TOP_20 = selected('policy = "top_k", k = 20')
AUGMENTED = "augmentation = {}\n"


@dataclass(frozen=True, kw_only=True)
class Question:
    """
    Attributes:
        epochs: times those of the whole experiment.
        pairs: tested beside each soft arm against the hard-only ones.
    """

    name: str
    title: str
    model: Model
    arms: tuple[Arm, ...]
    seeds: int
    epochs: int = 1
    pairs: tuple[tuple[str, str], ...] = ()

    def toml(self, *, epochs: int, seeds: int) -> str:
        pairs = ", ".join(f'["{left}", "{right}"]' for left, right in self.pairs)
        head = f'title = "{self.title}"\noutput = "{self.name}"\nseeds = {list(range(min(self.seeds, seeds)))}\n\n'
        base = _BASE.format(epochs=epochs * self.epochs, model=self.model.toml().lstrip("["))
        return f"{head}{base}\n[compare]\npairs = [{pairs}]\n{''.join(arm.toml() for arm in self.arms)}"


def _narrow(name: str, policy: str) -> Arm:
    return Arm(name=name, changes=selected(policy))


_MEMBER_ARMS = (HARD, ALL_SOFT, Arm(name="essence", changes=TOP_20))
QUESTIONS = (
    Question(
        name="does-it-help",
        title="Does the essence help?",
        model=SMALL,
        seeds=5,
        arms=(
            HARD,
            ALL_SOFT,
            Arm(name="all-soft-and-hard"),
            Arm(name="top-20-and-hard", changes=TOP_20),
            Arm(name="top-20-and-hard-two-heads", changes=TOP_20.replace("{ ", "{ num_heads = 2, ", 1)),
        ),
        pairs=(
            ("top-20-and-hard", "all-soft"),
            ("top-20-and-hard", "all-soft-and-hard"),
            ("top-20-and-hard-two-heads", "top-20-and-hard"),
            ("top-20-and-hard", "ensemble"),
        ),
    ),
    Question(
        name="how-much",
        title="How much is enough?",
        model=SMALL,
        seeds=3,
        arms=(
            HARD,
            Arm(name="all-soft-and-hard"),
            *(_narrow(f"top-{k}", f'policy = "top_k", k = {k}') for k in (1, 2, 5, 10, 50)),
            *(
                _narrow(f"mass-{mass}", f'policy = "mass", mass = {mass}, max_entries = {WIDE}')
                for mass in (0.8, 0.9, 0.95)
            ),
            Arm(name="agreeing-frames", changes=soft("frames = { disagreeing = 0.0 }")),
        ),
    ),
    Question(
        name="pass-the-teachers",
        title="Can a student pass its teachers?",
        model=MEMBER,
        seeds=5,
        arms=(
            *_MEMBER_ARMS,
            *(Arm(name=f"{arm.name}-augmented", changes=AUGMENTED + arm.changes) for arm in _MEMBER_ARMS),
        ),
        pairs=(("essence", "ensemble"), ("essence", "all-soft"), ("essence-augmented", "ensemble")),
    ),
    Question(
        name="longer",
        title="Can a student pass its teachers, with three times the budget?",
        model=MEMBER,
        seeds=5,
        epochs=3,
        arms=(*_MEMBER_ARMS, Arm(name="essence-augmented", changes=AUGMENTED + TOP_20)),
        pairs=(("essence", "ensemble"), ("essence", "all-soft"), ("essence-augmented", "ensemble")),
    ),
)


def wide_recipe(output: Path, *, epochs: int) -> Recipe:
    """That of ``speechocean762.py`` with more of each posterior stored, and no students."""
    narrow = recipe(output, epochs=epochs, seeds=())
    return Recipe(
        output=output,
        teachers=narrow.teachers,
        arms=(),
        seeds=(),
        selection=f'policy = "top_k"\nk = {WIDE}\nkeep_hard_label = true\n',
        teacher_training=narrow.teacher_training,
        student_training=narrow.student_training,
        shard_seconds=narrow.shard_seconds,
    )


def run(output: Path, *, epochs: int, seeds: int, questions: Sequence[Question] = QUESTIONS) -> None:
    """On the corpus that lies in ``output``; ends with ``results.md``."""
    made = wide_recipe(output, epochs=epochs)
    made.make_labels()
    for question in questions:
        (output / f"{question.name}.toml").write_text(question.toml(epochs=epochs, seeds=seeds), encoding="utf-8")
        made.command("student-trainer", "sweep", f"{question.name}.toml")
    records = [f"{question.name}/sweep.json" for question in questions]
    made.command("student-trainer", "results", *records, "--output", "speechocean762.md")


@click.command()
@click.argument("corpus", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--epochs", default=15, show_default=True, help="For every model: equal budgets.")
@click.option("--seeds", default=5, show_default=True, help="Students per arm, at most.")
@click.option("--utterances", type=int, help="Use only so many utterances of each split (for a quick try).")
@click.option("--question", "names", multiple=True, type=click.Choice([question.name for question in QUESTIONS]))
def main(corpus: Path, output: Path, epochs: int, seeds: int, utterances: int | None, names: tuple[str, ...]) -> None:
    """Answer the questions, or those named, on speechocean762."""
    output.mkdir(parents=True, exist_ok=True)
    if not (output / "corpus.parquet").exists():
        try:
            prepare(corpus, output, num_utterances=utterances)
        except InputError as error:
            raise click.UsageError(str(error)) from None
    chosen = [question for question in QUESTIONS if not names or question.name in names]
    run(output, epochs=epochs, seeds=seeds, questions=chosen)


if __name__ == "__main__":
    main()
