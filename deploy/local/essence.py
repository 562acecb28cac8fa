"""The essence on real speech: the questions of the paper as sweeps over stored datasets, and a page of answers.

    python deploy/local/essence.py CORPUS_FOLDER OUTPUT_FOLDER

CORPUS_FOLDER is that of ``speechocean762.py``, which says how the corpus is cut. Teachers are trained and run once
(``essence_teachers.py``); the students' settings are chosen on dev speech (``essence_settings.py``); each question is a
SWEEP.toml that trains no teacher (``essence_questions.py``). Every step passes over what is done, so the script can be
interrupted and run again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import click
from essence_questions import QUESTIONS, TUNINGS, Question
from essence_settings import chosen
from essence_teachers import ARCHITECTURES, LABELS, Labels, label, train_teachers
from recipe import Workspace
from speechocean762 import PARTS, prepare

from softlabel_schemas import ClassInventory, InputError

PAGE = "speechocean762.md"
# Every trial against every other: a long page, for those who ask how settings were chosen.
SETTINGS_PAGE = "speechocean762-settings.md"


def make_graph(workspace: Workspace, lexicon: Path) -> None:
    """For words, of the training transcripts. Slow readers: a phone lasts two frames at least."""
    splits = [word for part in PARTS for word in ("--split", part)]
    files = ("--corpus", "corpus.parquet", "--lexicon", str(lexicon.resolve()), "--inventory", "inventory.json")
    if not workspace.exists("graph"):
        workspace.command("student-trainer", "graph", *files, *splits, "--min-phone-frames", "2", "--output", "graph")


def tuned(questions: Sequence[Question]) -> Iterator[tuple[Question, list[Question]]]:
    """The trials of each model in use, and the questions that take their settings from them."""
    for tuning in TUNINGS:
        of_model = [question for question in questions if question.model == tuning.model]
        if of_model:
            yield tuning, of_model


def labels_of(questions: Sequence[Question]) -> list[Labels]:
    """What these questions and their trials need."""
    urls = {url for tuning, of_model in tuned(questions) for each in (tuning, *of_model) for url in each.labels()}
    return [labels for labels in LABELS if labels.url in urls]


def run(workspace: Workspace, questions: Sequence[Question], *, epochs: int, seeds: int) -> None:
    """On labels that are made; ends with a page of the questions and one of the trials."""
    asked, trials = [], []
    for tuning, of_model in tuned(questions):
        _sweep(workspace, tuning.name, tuning.toml({}, epochs=epochs, seeds=1))
        settings = chosen(workspace.folder / tuning.name / "sweep.json")
        for question in of_model:
            _sweep(workspace, question.name, question.toml(settings, epochs=epochs, seeds=seeds))
        asked += [question.name for question in of_model]
        trials.append(tuning.name)
    for page, sweeps in ((PAGE, asked), (SETTINGS_PAGE, trials)):
        records = [f"{name}/sweep.json" for name in sweeps]
        workspace.command("student-trainer", "results", *records, "--output", page)


def _sweep(workspace: Workspace, name: str, text: str) -> None:
    workspace.write(f"{name}.toml", text)
    workspace.command("student-trainer", "sweep", f"{name}.toml")


@click.command()
@click.argument("corpus", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--epochs", default=20, show_default=True, help="For every model: equal budgets.")
@click.option("--seeds", default=5, show_default=True, help="Students per arm, at most.")
@click.option("--utterances", type=int, help="Use only so many utterances of each split (for a quick try).")
@click.option(
    "--teachers",
    type=click.IntRange(1, len(ARCHITECTURES)),
    default=len(ARCHITECTURES),
    show_default=True,
    help="In each ensemble (fewer for a quick try).",
)
@click.option("--question", "names", multiple=True, type=click.Choice([question.name for question in QUESTIONS]))
def main(
    corpus: Path,
    output: Path,
    epochs: int,
    seeds: int,
    utterances: int | None,
    teachers: int,
    names: tuple[str, ...],
) -> None:
    """Answer the questions, or those named, with the teachers that these need; all take some six hours on two cores."""
    output.mkdir(parents=True, exist_ok=True)
    if not (output / "corpus.parquet").exists():
        try:
            prepare(corpus, output, num_utterances=utterances, parts=PARTS)
        except InputError as error:
            raise click.UsageError(str(error)) from None
    workspace = Workspace(output)
    questions = [question for question in QUESTIONS if not names or question.name in names]
    if any(question.words for question in questions):
        make_graph(workspace, corpus / "lexicon.txt")
    labels, architectures = labels_of(questions), ARCHITECTURES[:teachers]
    train_teachers(workspace, labels, architectures, epochs=epochs)
    num_classes = ClassInventory.load(output / "inventory.json").num_classes
    label(workspace, labels, architectures, num_classes=num_classes)
    run(workspace, questions, epochs=epochs, seeds=seeds)


if __name__ == "__main__":
    main()
