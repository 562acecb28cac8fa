"""The command of ``teacher-service`` that proves a dataset to be what its teachers say."""

from __future__ import annotations

import json
import secrets

import click

from softlabel_schemas.command_line import CheckFailedError, FloatRange, progress


@click.command("audit")
@click.argument("url")
@click.option("--job", required=True, type=click.Path(), help="The job file (TOML) that the dataset was made with.")
@click.option(
    "--fraction",
    type=FloatRange(0, 1, min_open=True),
    default=0.01,
    show_default=True,
    help="Of the shards, drawn at random; at least one.",
)
@click.option(
    "--tolerance",
    type=FloatRange(0),
    default=1e-3,
    show_default=True,
    help="Largest mean KL of an utterance, nats per frame; the default codec adds some 1e-4 by itself.",
)
@click.option("--seed", type=click.IntRange(0), help="Of the draw; default: another one each time, which is printed.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def audit_command(url: str, job: str, fraction: float, tolerance: float, seed: int | None, as_json: bool) -> None:
    """Label random shards of the dataset at URL once more with its teachers, and compare; exit 1 if they are not the same.

    They are where no utterance is beyond the tolerance, and 99% of the likeliest classes, of the entries and of the tail masses
    (at every temperature) agree. It runs in this process, with the [resources] of the job, and writes nothing.

    \b
    Example:
      teacher-service audit s3://bucket/labels --job job.toml --fraction 0.01
    """
    from softlabel_schemas.dataset import open_dataset
    from teacher_service.audit import audit, check_job, shards_to_audit
    from teacher_service.config import load_job
    from teacher_service.job import prepare

    dataset, prepared = open_dataset(url), prepare(load_job(job))
    check_job(dataset, prepared)
    seed = secrets.randbits(32) if seed is None else seed
    shards = shards_to_audit(dataset, fraction, seed)
    done = 0.0
    try:
        with progress("audit", sum(prepared.seconds_of_shard[index] for index in shards), "s of speech") as advance:

            def on_seconds(seconds: float) -> None:
                nonlocal done
                done += seconds
                advance(done)

            found = audit(dataset, prepared, shards, tolerance=tolerance, on_seconds=on_seconds)
    except (MemoryError, RuntimeError) as error:
        raise CheckFailedError(f"the shards could not be labelled once more: {error}") from error
    facts = {"url": dataset.store.url, "seed": seed, "shards": shards, **found.facts()}
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        click.echo(
            f"{dataset.store.url}: {len(shards)} of {dataset.num_shards} shards labelled once more (seed {seed}); "
            f"{found.num_identical:,} of {found.num_utterances:,} utterances are equal to the bit, the largest KL of one is "
            f"{found.worst_kl:.3g} nats per frame"
        )
    if findings := found.findings():
        raise CheckFailedError(
            f"{dataset.store.url} is not what the teachers say:\n" + "\n".join(f"  {x}" for x in findings)
        )
