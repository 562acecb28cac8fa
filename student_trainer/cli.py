"""``student-trainer``: train, evaluate, export and compare. Needs no ray and no teacher."""

from __future__ import annotations

import json

import click

from softlabel_schemas.command_line import CommandGroup
from softlabel_schemas.errors import InputError


@click.group(cls=CommandGroup, extra="student", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="essence-distill")
def main() -> None:
    """Train students from stored soft labels and hard labels; no teacher, no teacher GPU.

    \b
    Examples:
      student-trainer train student.toml
      student-trainer evaluate runs/student --corpus corpus.parquet --split test
      student-trainer export runs/student bundles/student
      student-trainer compare runs/* --report report.html
    """


@main.command()
@click.argument("config", type=click.Path())
def train(config: str) -> None:
    """Train the model that CONFIG (TRAIN.toml) describes; run again to resume after an interruption.

    Without a [soft_labels] table it trains on hard labels alone, which is how teachers are made.

    \b
    Example:
      student-trainer train student.toml
    """
    from student_trainer.config import load_config
    from student_trainer.train import train as run_training

    settings = load_config(config)
    if run_training(settings):
        click.echo(f"{settings.output}: trained {settings.training.epochs} epochs")
    else:
        click.echo(f"{settings.output}: already complete ({settings.training.epochs} epochs); nothing to do")


@main.command()
@click.argument("run", type=click.Path(), required=False)
@click.option("--dataset", help="Evaluate the teacher ensemble from this dataset's targets, instead of a RUN.")
@click.option("--corpus", required=True, help="Corpus manifest with hard labels.")
@click.option("--split", "splits", multiple=True, required=True, help="May be given several times.")
@click.option("--output", help="JSON file for the result; default: evaluation-SPLIT.json in the run's folder.")
def evaluate(run: str | None, dataset: str | None, corpus: str, splits: tuple[str, ...], output: str | None) -> None:
    """Frame and phone error rate, cross-entropy and calibration error of RUN, or of a teacher ensemble.

    \b
    Examples:
      student-trainer evaluate runs/student --corpus corpus.parquet --split test
      student-trainer evaluate --dataset labels-test --corpus corpus.parquet --split test --output ensemble.json
    """
    from student_trainer.evaluate import evaluate_dataset, evaluate_run

    if (run is None) == (dataset is None):
        raise InputError("give a RUN or --dataset, one of the two")
    if run is not None:
        result = evaluate_run(run, corpus, splits, output)
    else:
        assert dataset is not None
        if output is None:
            raise InputError("--dataset needs --output: a dataset is never written to")
        result = evaluate_dataset(dataset, corpus, splits, output)
    for name in ("frame_error_rate", "phone_error_rate", "cross_entropy", "calibration_error"):
        value = "unknown (not every hard label was kept)" if result[name] is None else f"{result[name]:.3f}"
        click.echo(f"{name:<18} {value}")


@main.command()
@click.argument("run", type=click.Path())
@click.argument("bundle", type=click.Path())
@click.option("--name", help="Name of the teacher; default: the run's name.")
def export(run: str, bundle: str, name: str | None) -> None:
    """Write the model of RUN as a teacher bundle into the folder BUNDLE.

    \b
    Example:
      student-trainer export runs/tdnn bundles/tdnn
    """
    from student_trainer.export import export as export_run

    description = export_run(run, bundle, name=name)
    click.echo(f"{bundle}: {description.name}, {description.num_classes} classes, digest {description.digest()}")


@main.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path())
@click.option("--evaluation", "evaluations", multiple=True, help="Result without a run, e.g. the ensemble's JSON.")
@click.option("--dataset", "datasets", multiple=True, help="Published soft labels, for their size and histograms.")
@click.option("--split", "splits", multiple=True, required=True, help="As given to evaluate.")
@click.option("--report", required=True, type=click.Path(), help="HTML page to write.")
@click.option("--json", "json_path", type=click.Path(), help="JSON file for all numbers.")
def compare(
    runs: tuple[str, ...],
    evaluations: tuple[str, ...],
    datasets: tuple[str, ...],
    splits: tuple[str, ...],
    report: str,
    json_path: str | None,
) -> None:
    """Compare RUNS on one split: a table on stdout, and a self-contained page with figures.

    Runs of the same name are seeds of one arm. Each arm with soft labels is tested against the hard-only arms of the same
    model. Needs evaluation-SPLIT.json in every run (student-trainer evaluate).

    \b
    Example:
      student-trainer compare runs/* --evaluation ensemble.json --dataset labels-train --split test --report report.html
    """
    from student_trainer.compare import compare as compare_runs
    from student_trainer.compare import results, text
    from student_trainer.report import render, write

    comparison = compare_runs(runs, evaluations, datasets, splits)
    click.echo(text(comparison))
    write(report, render(comparison))
    if json_path is not None:
        write(json_path, json.dumps(results(comparison), indent=1) + "\n")
    click.echo(f"report: {report}")


if __name__ == "__main__":
    main()
