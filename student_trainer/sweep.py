"""A sweep: arms x seeds, trained and evaluated on Ray, compared in one report.

::

    SWEEP.toml --> runs (arm x seed) --> Ray tasks: train, evaluate --> compare --> report.html
                                         the ensemble's evaluation --^         +--> sweep.json

Everything resumes: a run that is finished is passed over, one that was interrupted goes on from its checkpoint, and one
that fails stops no other. The folder of a sweep::

    sweep/
      runs/ARM-SEED/   as student-trainer train and evaluate leave them, and log.txt
      ensemble.json    evaluation of the teacher ensemble
      report.html      as student-trainer compare makes it
      sweep.json       the same numbers as flat records, see ``sweep_records.py``
      shared-features/ of the speech, for all runs; gone once none has failed
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import click

from softlabel_schemas.command_line import CheckFailedError
from softlabel_schemas.errors import InputError, IntegrityError
from student_trainer.compare import Comparison, compare, text
from student_trainer.report import render, write
from student_trainer.shared_features import SharedFeatures
from student_trainer.sweep_checks import check_evaluation
from student_trainer.sweep_config import Sweep, load_sweep
from student_trainer.sweep_ray import run_on_ray
from student_trainer.sweep_records import not_compared, records_json, sweep_records
from student_trainer.sweep_task import LOG, evaluate_ensemble

REPORT, RECORDS, FEATURES = "report.html", "sweep.json", "shared-features"


def run_sweep(path: str | Path, *, address: str | None = None) -> None:
    """Run the sweep that a SWEEP.toml describes, or what is left of it, and write its report.

    Args:
        address: of a Ray cluster; None starts Ray on this machine.

    Raises:
        InputError: before a run starts, the file is not valid, or what it evaluates with is missing or does not fit; later,
            what was trained cannot be compared.
        CheckFailedError: runs failed; the others are in the report, or it is said why they are not.
    """
    sweep = load_sweep(path)
    check_evaluation(sweep)
    features = SharedFeatures(sweep.output / FEATURES, 0.0)
    failures = run_on_ray(sweep.runs, sweep.evaluate, features=features.folder, address=address)
    lines = [f"  {Path(run).name}: {error} (see {Path(run) / LOG})" for run, error in failures.items()]
    failed = "\n".join([f"{len(failures)} of {len(sweep.runs)} runs failed; run again to try them again:", *lines])
    if len(failures) < len(sweep.runs):
        try:
            _report(sweep, failures.keys())
        except (InputError, IntegrityError, OSError) as error:
            if not failures:
                raise
            raise CheckFailedError(f"{failed}\nwhat did not fail cannot be compared: {error}") from error
    if failures:
        raise CheckFailedError(failed)
    features.remove()


def _report(sweep: Sweep, failed: Collection[str]) -> None:
    comparison = _compare(sweep, failed)
    click.echo(text(comparison))
    for line in not_compared(comparison, sweep):
        click.echo(f"warning: {line}")
    write(str(sweep.output / REPORT), render(comparison))
    write(str(sweep.output / RECORDS), records_json([sweep_records(comparison, sweep)]))
    click.echo(f"report: {sweep.output / REPORT}")


def _compare(sweep: Sweep, failed: Collection[str]) -> Comparison:
    """Of what did not fail, arms in the file's order."""
    finished = sorted(
        (run for run in sweep.runs if run.output not in failed), key=lambda run: sweep.arms.index(run.name)
    )
    datasets = dict.fromkeys(url for run in finished if run.soft_labels for url in run.soft_labels.locations)
    ensemble = evaluate_ensemble(sweep)
    evaluations = [] if ensemble is None else [ensemble]
    # With their own configurations: folders and arms may be called otherwise than when they were trained.
    configs = {run.output: run for run in finished}
    return compare(list(configs), evaluations, list(datasets), sweep.evaluate.splits, configs)
