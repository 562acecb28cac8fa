"""``softlabels``: look into, check, share and tidy up soft-label datasets. Needs neither torch nor ray."""

from __future__ import annotations

import json
from typing import Any

import click

from softlabel_schemas.about import read_about_or_warn
from softlabel_schemas.align_cli import align
from softlabel_schemas.catalog_cli import card_command, catalog_command
from softlabel_schemas.command_line import CheckFailedError, CommandGroup, progress
from softlabel_schemas.dataset import open_dataset
from softlabel_schemas.deprecation import warn_if_deprecated
from softlabel_schemas.describe import description
from softlabel_schemas.ensemble_cli import combine, fit_weights_command
from softlabel_schemas.export_cli import export
from softlabel_schemas.gc import Finding, delete_garbage, find_garbage
from softlabel_schemas.import_cli import import_command
from softlabel_schemas.labels_cli import diff_command, pull_command
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.share_cli import about_command, deprecate_command, resolve_command, tag_command
from softlabel_schemas.verification import verify


@click.group(cls=CommandGroup, extra="catalog", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="essence-distill")
def main() -> None:
    """Look into, check, share and tidy up soft-label datasets, on a folder or object storage.

    Where a dataset is read, its URL may be a name: PREFIX#NAME or PREFIX#NAME:VERSION (see "softlabels tag").

    \b
    Examples:
      softlabels describe s3://bucket/labels
      softlabels describe labels --json
      softlabels verify labels
      softlabels gc labels
    """


@main.command()
@click.argument("url")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def describe(url: str, as_json: bool) -> None:
    """Say what the dataset at URL holds, from its manifest and what its maker says of it.

    \b
    Example:
      softlabels describe labels --json
    """
    dataset = open_dataset(url)
    facts = description(dataset)
    about, deprecation = read_about_or_warn(dataset.store), warn_if_deprecated(dataset.store)
    if about is not None:
        facts |= {"software": about.software} | about.description.model_dump(mode="json", exclude_none=True)
    if deprecation is not None:
        facts["deprecated"] = deprecation.model_dump(mode="json", exclude_none=True)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else value
        # What a maker says may have many lines.
        shown = json.dumps(value) if isinstance(value, dict | list) or "\n" in str(value) else shown
        # A folder's name can be other bytes than UTF-8.
        click.echo(f"{name:<{width}}  {shown}".encode(errors="backslashreplace"))


@main.command("verify")
@click.argument("url")
def verify_command(url: str) -> None:
    """Check every byte and every invariant of the dataset at URL; name each bad shard; exit 1 if there is one.

    \b
    Example:
      softlabels verify s3://bucket/labels
    """
    dataset = open_dataset(url)
    warn_if_deprecated(dataset.store)
    problems: list[str] = []
    checked = 0
    with progress("verify", dataset.num_shards, "shards") as advance:
        for index, problem in verify(dataset):
            checked += index is not None
            advance(checked)
            if problem:
                problems.append(f"{'dataset' if index is None else f'shard {index}'}: {problem}")
    if problems:
        what = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise CheckFailedError(f"{what} in {url}:\n" + "\n".join(f"  {line}" for line in problems))
    manifest = dataset.manifest
    click.echo(
        f"{url}: {manifest.num_utterances:,} utterances, {manifest.num_frames:,} frames in {len(manifest.shards)} shards, "
        f"all as written; content digest {manifest.content_digest}"
    )


@main.command("gc")
@click.argument("url")
@click.option("--delete", is_flag=True, help="Delete what is listed; without it nothing is changed.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def gc_command(url: str, delete: bool, as_json: bool) -> None:
    """List, or delete, what attempts that died or lost have left at URL; safe beside running jobs.

    Garbage is a folder of a shard that was committed with another folder, a bucket of the utterance index that the manifest
    does not name, a temporary file more than an hour old, and on S3 an upload in parts more than a day old. Folders of shards
    that are not committed yet are kept: a job that is resumed makes use of them.

    \b
    Examples:
      softlabels gc s3://bucket/labels
      softlabels gc s3://bucket/labels --delete
    """
    store = ObjectStore(url)
    found = find_garbage(store)
    if delete:
        delete_garbage(store, found.garbage)
    if as_json:
        facts = {
            "url": store.url,
            "deleted": delete,
            "garbage": [_finding_json(finding) for finding in found.garbage],
            "kept": [_finding_json(finding) for finding in found.kept],
            "num_bytes": found.num_bytes,
        }
        click.echo(json.dumps(facts, indent=2))
        return
    for finding in found.kept:
        click.echo(f"kept: {_finding_line(finding)}")
    for finding in found.garbage:
        click.echo(f"{'deleted' if delete else 'garbage'}: {_finding_line(finding)}")
    total = f"{len(found.garbage):,} pieces of garbage with {found.num_bytes:,} bytes"
    hint = "; delete them with --delete" if found.garbage and not delete else ""
    click.echo(f"{url}: {total}{' deleted' if delete and found.garbage else ''}{hint}")


def _finding_line(finding: Finding) -> str:
    files = "1 file" if len(finding.keys) == 1 else f"{len(finding.keys):,} files"
    return f"{finding.path}, {files}, {finding.num_bytes:,} bytes: {finding.reason}"


def _finding_json(finding: Finding) -> dict[str, Any]:
    facts = {"path": finding.path, "reason": finding.reason, "num_files": len(finding.keys)}
    return {**facts, "num_bytes": finding.num_bytes}


main.add_command(align)
main.add_command(combine)
main.add_command(export)
main.add_command(fit_weights_command)
main.add_command(tag_command)
main.add_command(resolve_command)
main.add_command(about_command)
main.add_command(deprecate_command)
main.add_command(card_command)
main.add_command(catalog_command)
main.add_command(pull_command)
main.add_command(diff_command)
main.add_command(import_command)

if __name__ == "__main__":
    main()
