"""The essence on real speech: the questions of the paper as sweeps over stored datasets, and a page of answers.

    python deploy/local/essence.py CORPUS_FOLDER OUTPUT_FOLDER

CORPUS_FOLDER is that of ``speechocean762.py``, which says how the corpus is cut. Teachers are trained and run first
(``essence_teachers.py``); the students' settings are chosen on dev speech (``essence_settings.py``); each question
(``essence_questions.py``) is a SWEEP.toml that trains no teacher (``essence_arms.py``). Every step passes over what is done, so
the script can be interrupted and run again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import click
from essence_arms import Question, trials_of
from essence_questions import FURTHER_QUESTIONS, MODELS, QUESTIONS
from essence_settings import NUM_TRIALS, Kind, Settings, chosen, dev_errors
from essence_teachers import ARCHITECTURES, LABELS, Labels, label, train_teachers
from recipe import Workspace, stop_with_commands
from speechocean762 import PARTS, prepare

from softlabel_schemas import ClassInventory, InputError
from student_trainer.device import has_bfloat16, training_device

PAGE = "speechocean762.md"
# Every trial against every other: a long page, for those who ask how settings were chosen.
SETTINGS_PAGE = "speechocean762-settings.md"
# What all of an output folder was made with.
SIZE = "size.json"


def fastest_precision() -> str:
    """Of training here: bfloat16 where there are instructions for it."""
    return "bfloat16" if has_bfloat16(training_device("auto")) else "float32"


def check_size(output: Path, **size: int | str | None) -> None:
    """Raises UsageError where the folder holds the experiment at another size: what is done there would count as this one's."""
    path = output / SIZE
    found = json.loads(path.read_bytes()) if path.exists() else size
    different = {name: (found.get(name), value) for name, value in size.items() if found.get(name) != value}
    if different:
        listed = ", ".join(f"--{name} {before}, now {now}" for name, (before, now) in different.items())
        raise click.UsageError(
            f"{output} holds the experiment with {listed}; give what it has, or use another output folder"
        )
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(size), encoding="utf-8")
    unfinished.replace(path)


def make_graph(workspace: Workspace, lexicon: Path) -> None:
    """For words, of the training transcripts. Slow readers: a phone lasts two frames at least."""
    splits = [word for part in PARTS for word in ("--split", part)]
    files = ("--corpus", "corpus.parquet", "--lexicon", str(lexicon.resolve()), "--inventory", "inventory.json")
    # Written last.
    if not workspace.exists("graph/graph.json"):
        workspace.command("student-trainer", "graph", *files, *splits, "--min-phone-frames", "2", "--output", "graph")


def tuned(questions: Sequence[Question], trials: int) -> Iterator[tuple[Question, list[Question]]]:
    """The trials of each model in use, and the questions that take their settings from them."""
    for name, model in MODELS.items():
        of_model = [question for question in questions if question.model == model]
        if of_model:
            yield trials_of(name, model, trials), of_model


def labels_of(questions: Sequence[Question], trials: int) -> list[Labels]:
    """What these questions and their trials need."""
    sweeps = [each for tuning, of_model in tuned(questions, trials) for each in (tuning, *of_model)]
    urls = {url for each in sweeps for url in each.labels()}
    return [labels for labels in LABELS if labels.url in urls]


def run(
    workspace: Workspace, questions: Sequence[Question], *, epochs: int, seeds: int, trials: int, precision: str
) -> None:
    """On labels that are made; ends with a page of the questions and one of the trials."""

    def sweep(question: Question, settings: Mapping[Kind, Settings], seeds: int) -> Path:
        toml = question.toml(settings, epochs=epochs, seeds=seeds, precision=precision)
        workspace.write(f"{question.name}.toml", toml)
        workspace.command("student-trainer", "sweep", f"{question.name}.toml")
        return workspace.folder / question.name / "sweep.json"

    asked, tried = [], []
    for tuning, of_model in tuned(questions, trials):
        settings = chosen(sweep(tuning, {}, 1))
        tried.append(tuning)
        for question in of_model:
            if question.trials is not None:
                errors = dev_errors(sweep(question.trials, settings, seeds))
                settings["chosen"] = question.trials.best(errors, settings)
                tried.append(question.trials)
            sweep(question, settings, seeds)
            asked.append(question)
    for page, sweeps in ((PAGE, asked), (SETTINGS_PAGE, tried)):
        records = [f"{each.name}/sweep.json" for each in sweeps]
        workspace.command("student-trainer", "results", *records, "--output", page)


@click.command()
@click.argument("corpus", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--epochs", default=12, show_default=True, help="For every model: equal budgets.")
@click.option("--seeds", default=5, show_default=True, help="Students per arm, at most.")
@click.option("--utterances", type=int, help="Use only so many utterances of each split (for a quick try).")
@click.option(
    "--teachers",
    type=click.IntRange(1, len(ARCHITECTURES)),
    default=len(ARCHITECTURES),
    show_default=True,
    help="In each ensemble (fewer for a quick try).",
)
@click.option(
    "--trials",
    type=click.IntRange(1, NUM_TRIALS),
    default=NUM_TRIALS,
    show_default=True,
    help="Settings tried for each kind of arm (fewer for a quick try).",
)
@click.option(
    "--precision",
    type=click.Choice(["bfloat16", "float32"]),
    help="Of every training; if not given, bfloat16 where there are instructions for it.",
)
@click.option("--further", is_flag=True, help="Ask what was asked once the answers were known, too: longer budgets.")
@click.option(
    "--question",
    "names",
    multiple=True,
    type=click.Choice([question.name for question in (*QUESTIONS, *FURTHER_QUESTIONS)]),
    help="Ask these alone.",
)
def main(
    corpus: Path,
    output: Path,
    epochs: int,
    seeds: int,
    utterances: int | None,
    teachers: int,
    trials: int,
    precision: str | None,
    further: bool,
    names: tuple[str, ...],
) -> None:
    """Answer the questions, or those named, with the teachers that these need.

    On two cores that takes about four hours: under three on one machine, four and a half on a slower one; seven on one without
    instructions for bfloat16. The page in student_trainer/results is of --epochs 20 --further, which takes twice as long.
    """
    stop_with_commands()
    questions = [
        question
        for question in (*QUESTIONS, *FURTHER_QUESTIONS)
        if (question.name in names if names else further or question in QUESTIONS)
    ]
    lexicon, has_words = corpus / "lexicon.txt", any(question.words for question in questions)
    # Before the corpus is read: that takes a while.
    if has_words and not lexicon.exists():
        raise click.UsageError(f"{lexicon} does not exist; words are decoded with it: one a line, with its phones")
    output.mkdir(parents=True, exist_ok=True)
    if not (output / "corpus.parquet").exists():
        try:
            prepare(corpus, output, num_utterances=utterances)
        except InputError as error:
            raise click.UsageError(str(error)) from None
    precision = precision or fastest_precision()
    check_size(output, epochs=epochs, teachers=teachers, utterances=utterances, precision=precision)
    workspace = Workspace(output)
    if has_words:
        make_graph(workspace, lexicon)
    labels, architectures = labels_of(questions, trials), ARCHITECTURES[:teachers]
    train_teachers(workspace, labels, architectures, epochs=epochs, precision=precision)
    num_classes = ClassInventory.load(output / "inventory.json").num_classes
    label(workspace, labels, architectures, num_classes=num_classes)
    run(workspace, questions, epochs=epochs, seeds=seeds, trials=trials, precision=precision)


if __name__ == "__main__":
    main()
