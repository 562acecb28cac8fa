"""``teacher-service``: label a corpus with an ensemble, and see how far it is."""

from __future__ import annotations

import json
import signal
import sys
import time
from dataclasses import asdict

import click

from softlabel_schemas.command_line import CheckFailedError, CommandGroup, needs_extra
from softlabel_schemas.strict import printable
from teacher_service.audit_cli import audit_command

_ADDRESS = click.option(
    "--address",
    required=True,
    envvar="RAY_API_SERVER_ADDRESS",
    show_envvar=True,
    help="Ray's Jobs API, e.g. http://127.0.0.1:8265.",
)


@click.group(cls=CommandGroup, extra="teacher", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="essence-distill")
def main() -> None:
    """Run a teacher ensemble over a corpus once and publish its pruned posteriors as a dataset.

    \b
    Examples:
      teacher-service plan job.toml
      teacher-service run job.toml
      teacher-service run job.toml --address ray-head:6379
      teacher-service submit job.toml --address http://ray-head:8265
      teacher-service status s3://bucket/labels
    """


@main.command()
@click.argument("job", type=click.Path())
@click.option(
    "--address",
    envvar="RAY_ADDRESS",
    show_envvar=True,
    help="Ray cluster to run on; default: Ray on this machine, loopback only.",
)
def run(job: str, address: str | None) -> None:
    """Label the corpus that JOB (a TOML file) names and publish the dataset.

    Interrupted (Ctrl-C, a crash), it leaves a destination that the same command resumes; run again after completion, it says
    so and changes nothing.

    \b
    Example:
      teacher-service run job.toml
    """
    from softlabel_schemas.commit import committed_shards
    from teacher_service.config import load_job
    from teacher_service.job import prepare
    from teacher_service.ray_job import run_job

    # A cluster stops a job with SIGTERM; end as with Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    started = time.monotonic()
    prepared = prepare(load_job(job))
    url, num_shards = prepared.config.destination.url, len(prepared.plan)
    try:
        published, num_made = run_job(prepared, address=address)
    except KeyboardInterrupt:
        try:
            done = f"{len(committed_shards(prepared.store()))} of {num_shards}"
        except (OSError, ValueError):
            done = "some"
        click.echo(f"interrupted: {done} shards are committed; run again to resume", err=True)
        raise
    except RuntimeError as error:
        raise CheckFailedError(str(error)) from error
    if not num_made:
        click.echo(f"{url}: already complete ({num_shards} shards); nothing to do")
    else:
        click.echo(
            f"{url}: made {num_made} of {num_shards} shards in {time.monotonic() - started:,.0f} s and published"
        )
    if published.num_skipped:
        click.echo(
            f"{published.num_skipped} utterances were skipped, the first: {printable(published.first_reason or '')}"
        )
    click.echo(f"content digest {published.content_digest}")


@main.command()
@click.argument("folder")
@click.argument("bundle")
@click.option("--name", help="Of the teacher; default: the folder's name.")
def import_hf(folder: str, bundle: str, name: str | None) -> None:
    """Write a Hugging Face CTC model, a FOLDER or URL with its weights as safetensors, as the teacher bundle BUNDLE.

    For wav2vec 2.0 and HuBERT. Nothing is fetched by name: download the model first.

    \b
    Example:
      teacher-service import-hf wav2vec2-base-960h bundles/wav2vec2
    """
    with needs_extra("hf"):
        from teacher_service.hugging_face import import_folder

    made = import_folder(folder, bundle, name=name)
    click.echo(
        f"{bundle}: {made.name}, {made.num_classes} classes every {made.frame_shift_ms:g} ms, digest {made.digest()}"
    )


@main.command()
@click.argument("job", type=click.Path())
@click.option("--sample", type=click.IntRange(min=1), default=8, show_default=True, help="Batches to label for it.")
@click.option(
    "--prices", type=click.Path(), help="TOML file: actor_hour, per_1000_puts, per_1000_gets, gib_month, currency."
)
@click.option(
    "--save", is_flag=True, help="Put the plan at the destination; status will compare it with what came of it."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def plan(job: str, sample: int, prices: str | None, save: bool, as_json: bool) -> None:
    """Say what JOB (a TOML file) will make, take and cost, from a sample that is labelled here, in this process.

    It needs what an actor gets (resources in JOB), takes as long as the sample does, and writes nothing to the destination
    but the plan itself, with --save.

    \b
    Examples:
      teacher-service plan job.toml
      teacher-service plan job.toml --sample 32 --prices prices.toml --save
    """
    from softlabel_schemas.command_line import progress
    from softlabel_schemas.strict import load_toml
    from teacher_service.calibration import calibrate
    from teacher_service.config import load_job
    from teacher_service.job import prepare
    from teacher_service.job_plan import Prices, plan_lines
    from teacher_service.planning import make_plan
    from teacher_service.run_record import save_plan

    paid = None if prices is None else load_toml(Prices, prices)
    prepared = prepare(load_job(job))
    total = min(sum(prepared.seconds_of_shard), sample * prepared.config.resources.batch_seconds)
    try:
        with progress("calibrate", total, "s of speech") as advance:
            made = make_plan(prepared, calibrate(prepared, sample, advance), paid)
    except (MemoryError, RuntimeError) as error:
        raise CheckFailedError(f"the sample could not be labelled: {error}") from error
    if save:
        save_plan(prepared.store(), made)
    if as_json:
        click.echo(made.model_dump_json(indent=2))
        return
    click.echo(f"{prepared.config.destination.url}: fingerprint {made.fingerprint}")
    for line in plan_lines(made):
        click.echo(line)


@main.command()
@click.argument("job", type=click.Path())
@_ADDRESS
@click.option("--runtime-env", type=click.Path(), help="TOML file with a Ray runtime environment (pip, env_vars, ...).")
@click.option("--no-wait", is_flag=True, help="Do not follow the log.")
def submit(job: str, address: str, runtime_env: str | None, no_wait: bool) -> None:
    """Submit JOB (a TOML file) to a Ray cluster, follow its log, and exit as it does.

    Ctrl-C ends the following, not the job. Submitted again after a stop or a crash, it resumes.

    \b
    Examples:
      teacher-service submit job.toml --address http://ray-head:8265
      teacher-service stop job.toml --address http://ray-head:8265
    """
    from teacher_service.submit import Cluster

    cluster = Cluster(address)
    submission_id = cluster.submit(job, runtime_env)
    click.echo(f"submitted as {submission_id}", err=True)
    if no_wait:
        return
    try:
        code = cluster.follow(submission_id, lambda text: click.echo(text, nl=False))
    except KeyboardInterrupt:
        click.echo(f"{submission_id} goes on; end it with: teacher-service stop {job} --address {address}", err=True)
        raise
    click.echo(f"{submission_id} ended with exit code {code}", err=True)
    sys.exit(code)


@main.command()
@click.argument("job", type=click.Path())
@_ADDRESS
def stop(job: str, address: str) -> None:
    """Stop the submitted jobs that write to JOB's destination. Their committed shards stay; submit resumes them.

    Jobs of "ray job submit" are not seen: end them with "ray job stop".

    \b
    Example:
      teacher-service stop job.toml --address http://ray-head:8265
    """
    from teacher_service.submit import Cluster

    stopped = Cluster(address).stop(job)
    for submission_id in stopped:
        click.echo(f"stopped {submission_id}")
    if not stopped:
        click.echo(
            "no job submitted by teacher-service for this destination is running; jobs of 'ray job submit' are ended with "
            "'ray job stop'"
        )


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
        plan = None if found.plan is None else found.plan.model_dump(mode="json")
        click.echo(json.dumps({**asdict(found), "plan": plan, "minutes_left": found.minutes_left}, indent=2))
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
    if found.plan is not None and found.actual is not None:
        for line in found.actual.lines(found.plan):
            click.echo(line)


main.add_command(audit_command)


if __name__ == "__main__":
    main()
