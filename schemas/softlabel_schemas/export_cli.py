"""``softlabels export``: labels in the forms that other tools read."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import click

from softlabel_schemas.command_line import Advance, needs_extra, progress
from softlabel_schemas.corpus import load_corpus
from softlabel_schemas.dataset import SoftLabelDataset, open_dataset
from softlabel_schemas.errors import InputError
from softlabel_schemas.kaldi_archives import write_posteriors
from softlabel_schemas.lhotse_cuts import write_cuts
from softlabel_schemas.local_files import TEMPORARY, sync_folder
from softlabel_schemas.plain_export import write_parquet, write_zarr
from softlabel_schemas.shard import Shard

ExportForm = Literal["kaldi", "lhotse", "parquet", "zarr"]


@click.command("export")
@click.argument("url")
@click.option("--to", "form", type=click.Choice(["kaldi", "lhotse", "parquet", "zarr"]), required=True)
@click.option("--output", required=True, help="A new folder; it appears when it is complete.")
@click.option("--corpus", help="lhotse: the manifest of the corpus that was labelled, for the recordings of the cuts.")
def export(url: str, form: ExportForm, output: str, corpus: str | None) -> None:
    """Write the labels of the dataset at URL in another form.

    \b
    kaldi    post.ark, post.scp: posteriors (class id, probability) renormalised over the kept classes, as nnet3 training reads
    lhotse   cuts.jsonl.gz with temporal arrays soft_label_ids, soft_label_log_probs and soft_label_tail_mass
    parquet  plain columns, a row for each utterance: Hugging Face datasets, DuckDB, Polars, pandas
    zarr     one Zarr v3 group of plain arrays

    \b
    Examples:
      softlabels export s3://bucket/labels --to kaldi --output post
      softlabels export labels --to lhotse --corpus corpus.parquet --output cuts
      softlabels export labels --to parquet --output plain
    """
    if form == "lhotse" and corpus is None:
        raise InputError(
            "--to lhotse needs --corpus, the manifest of the corpus that was labelled: cuts name its audio"
        )
    if form != "lhotse" and corpus is not None:
        raise InputError(f"--corpus belongs to --to lhotse; found --to {form}: leave it out")
    dataset, num_shortened = open_dataset(url), 0
    with _new_folder(output) as folder, progress("export", dataset.num_shards, "shards") as advance:
        shards = _counted(dataset, advance)
        if form == "kaldi":
            with needs_extra("kaldi"):
                write_posteriors((each for shard in shards for each in shard), folder, Path(output))
        elif form == "lhotse":
            assert corpus is not None
            labelled = (each for shard in shards for each in shard)
            with needs_extra("audio"):
                num_shortened = write_cuts(
                    labelled, load_corpus(corpus), dataset.manifest.spec.frame_shift_ms, folder, Path(output)
                )
        elif form == "parquet":
            write_parquet(dataset, shards, folder)
        else:
            write_zarr(dataset, shards, folder)
    manifest = dataset.manifest
    click.echo(f"{output}: {manifest.num_utterances:,} utterances, {manifest.num_frames:,} frames")
    if num_shortened:
        click.echo(
            f"{num_shortened:,} utterances end in the first half of their last frame: cut.load_soft_label_ids() and its like "
            "leave that frame out, cut.soft_label_ids.load() does not"
        )
    if manifest.skipped:
        click.echo(f"{len(manifest.skipped):,} utterances were skipped when the dataset was made, and are not in it")


def _counted(dataset: SoftLabelDataset, advance: Advance) -> Iterator[Shard]:
    for done, shard in enumerate(dataset.iter_shards(), start=1):
        yield shard
        advance(done)


@contextlib.contextmanager
def _new_folder(output: str) -> Iterator[Path]:
    """A temporary folder beside ``output`` that gets its name when all is written and flushed; gone if something fails.

    Raises:
        InputError: ``output`` is a URL, or there is something already.
    """
    if "://" in output:
        raise InputError(f"--output {output} is a URL; export into a folder and copy that, so that it arrives complete")
    final = Path(output)
    if final.exists():
        raise InputError(f"--output {output} exists already; give a new folder")
    temporary = final.with_name(f"{final.name}{TEMPORARY}{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                with Path(folder, name).open("rb") as file:
                    os.fsync(file.fileno())
            sync_folder(Path(folder))
        temporary.rename(final)
        sync_folder(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
