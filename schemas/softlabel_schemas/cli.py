"""``softlabels``: look into and check soft-label datasets. Needs neither torch nor ray."""

from __future__ import annotations

import json
from typing import Any

import click

from softlabel_schemas.command_line import CheckFailedError, CommandGroup, progress
from softlabel_schemas.dataset import SoftLabelDataset, open_dataset, verify


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="essence-distill")
def main() -> None:
    """Look into and check soft-label datasets, on a folder or any fsspec URL.

    \b
    Examples:
      softlabels describe s3://bucket/labels
      softlabels describe labels --json
      softlabels verify labels
    """


@main.command()
@click.argument("url")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def describe(url: str, as_json: bool) -> None:
    """Say what the dataset at URL holds, from its manifest alone.

    \b
    Example:
      softlabels describe labels --json
    """
    facts = description(open_dataset(url))
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else value
        shown = json.dumps(value) if isinstance(value, dict | list) else shown
        click.echo(f"{name:<{width}}  {shown}")


def description(dataset: SoftLabelDataset) -> dict[str, Any]:
    """What ``softlabels describe`` prints, by name."""
    manifest, spec = dataset.manifest, dataset.manifest.spec
    frames = max(manifest.num_frames, 1)
    labelled = sum(shard.sums.num_labelled_frames for shard in manifest.shards)
    agreement = sum(shard.sums.agreement for shard in manifest.shards)
    return {
        "url": dataset.store.url,
        "format_version": spec.format_version,
        "fingerprint": manifest.fingerprint,
        "content_digest": manifest.content_digest,
        "utterances": manifest.num_utterances,
        "skipped": len(manifest.skipped),
        "frames": manifest.num_frames,
        "hours": manifest.num_frames * spec.frame_shift_ms / 3_600_000,
        "entries": manifest.num_entries,
        "bytes": manifest.num_bytes,
        "shards": len(manifest.shards),
        "entries_per_frame": manifest.num_entries / frames,
        "bytes_per_frame": manifest.num_bytes / frames,
        "kept_mass": sum(shard.sums.kept_mass for shard in manifest.shards) / frames,
        "entropy_nats": sum(shard.sums.entropy for shard in manifest.shards) / frames,
        "hard_label_agreement": agreement / labelled if labelled else None,
        "num_classes": spec.num_classes,
        "frame_shift_ms": spec.frame_shift_ms,
        "combination": spec.combination,
        "teachers": [f"{teacher.name} ({teacher.weight:.3g}, {teacher.digest[:12]})" for teacher in spec.teachers],
        "temperatures": list(spec.temperatures),
        "selection": spec.selection.model_dump(mode="json"),
        "codec": spec.codec,
        "shard_format": manifest.storage.shard_format,
        "corpus_digest": spec.corpus_digest,
        "inventory_digest": spec.inventory_digest,
    }


@main.command("verify")
@click.argument("url")
def verify_command(url: str) -> None:
    """Check every byte and every invariant of the dataset at URL; name each bad shard; exit 1 if there is one.

    \b
    Example:
      softlabels verify s3://bucket/labels
    """
    dataset = open_dataset(url)
    problems: list[str] = []
    checked = 0
    with progress("verify", dataset.num_shards, "shards") as advance:
        for index, problem in verify(dataset):
            checked += index is not None
            advance(checked)
            if problem:
                problems.append(f"{'dataset' if index is None else f'shard {index}'}: {problem}")
    if problems:
        raise CheckFailedError(f"{len(problems)} problems in {url}:\n" + "\n".join(f"  {line}" for line in problems))
    manifest = dataset.manifest
    click.echo(
        f"{url}: {manifest.num_utterances:,} utterances, {manifest.num_frames:,} frames in {len(manifest.shards)} shards, "
        f"all as written; content digest {manifest.content_digest}"
    )


if __name__ == "__main__":
    main()
