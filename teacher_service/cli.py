"""``teacher-service``: label a corpus with an ensemble, and see how far it is."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import asdict
from typing import Any

import click

from softlabel_schemas.command_line import CheckFailedError, CommandGroup


@click.group(cls=CommandGroup, extra="teacher", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="essence-distill")
def main() -> None:
    """Run a teacher ensemble over a corpus once and publish its pruned posteriors as a dataset.

    \b
    Examples:
      teacher-service run job.toml
      teacher-service run job.toml --address ray-head:6379
      teacher-service status s3://bucket/labels
    """


@main.command()
@click.argument("job", type=click.Path())
@click.option("--address", help="Ray cluster to run on; default: Ray on this machine, loopback only.")
def run(job: str, address: str | None) -> None:
    """Label the corpus that JOB (a TOML file) names and publish the dataset.

    Interrupted (Ctrl-C, a crash), it leaves a destination that the same command resumes; run again after completion, it says
    so and changes nothing.

    \b
    Example:
      teacher-service run job.toml
    """
    from teacher_service.config import load_job
    from teacher_service.job import missing_shards, prepare
    from teacher_service.ray_job import run_job

    signal.signal(signal.SIGTERM, _interrupt)
    started = time.monotonic()
    prepared = prepare(load_job(job))
    url, num_shards = prepared.config.destination.url, len(prepared.plan)
    try:
        manifest, num_made = run_job(prepared, address=address)
    except KeyboardInterrupt:
        left = len(missing_shards(prepared))
        click.echo(
            f"interrupted: {num_shards - left} of {num_shards} shards are committed; run again to resume", err=True
        )
        raise
    except RuntimeError as error:
        raise CheckFailedError(str(error)) from error
    if not num_made:
        click.echo(f"{url}: already complete ({num_shards} shards); nothing to do")
    else:
        click.echo(
            f"{url}: made {num_made} of {num_shards} shards in {time.monotonic() - started:,.0f} s and published"
        )
    if manifest.skipped:
        click.echo(f"{len(manifest.skipped)} utterances were skipped, the first: {manifest.skipped[0].reason}")
    click.echo(f"content digest {manifest.content_digest}")


@main.command()
@click.argument("url")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def status(url: str, as_json: bool) -> None:
    """Say how far the run at URL is: shards done, running rate, what is missing.

    \b
    Example:
      teacher-service status s3://bucket/labels
    """
    from teacher_service.status import ranges, read_status

    found = read_status(url)
    if as_json:
        click.echo(json.dumps({**asdict(found), "minutes_left": found.minutes_left}, indent=2))
        return
    done = found.num_shards - len(found.missing)
    state = "published" if found.published else "not published yet"
    click.echo(f"{found.url}: {done} of {found.num_shards} shards committed, {state}; fingerprint {found.fingerprint}")
    if found.shards_per_minute and found.missing:
        click.echo(
            f"rate of the last commits: {found.shards_per_minute:.2f} shards/min, {found.minutes_left:.0f} min left"
        )
    if found.seconds_since_last_commit is not None and found.missing:
        click.echo(f"last commit {found.seconds_since_last_commit:,.0f} s ago")
    if found.missing:
        click.echo(f"missing: shards {ranges(found.missing)}")


def _interrupt(_signal: int, _frame: Any) -> None:
    """A cluster stops a job with SIGTERM; end as with Ctrl-C."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
