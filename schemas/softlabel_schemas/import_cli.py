"""``softlabels import``: corpora in other forms become corpus manifests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import click

from softlabel_schemas.command_line import FloatRange, needs_extra
from softlabel_schemas.corpus_output import write_and_summarise
from softlabel_schemas.errors import InputError
from softlabel_schemas.imported import Frames, ImportedRow, utterances_of
from softlabel_schemas.inventory import ClassInventory
from softlabel_schemas.kaldi_archives import read_alignments
from softlabel_schemas.kaldi_data import read_data_dir
from softlabel_schemas.lhotse_cuts import read_cuts
from softlabel_schemas.strict import printable
from softlabel_schemas.table_corpus import read_table
from softlabel_schemas.tar_corpus import read_tar

CorpusForm = Literal["kaldi", "lhotse", "table", "webdataset"]


@click.command("import")
@click.argument("form", type=click.Choice(["kaldi", "lhotse", "table", "webdataset"]))
@click.argument("sources", nargs=-1, required=True, metavar="[SPLIT=]SOURCE...")
@click.option("--output", required=True, help="The manifest to write, such as corpus.parquet; a path or a URL.")
@click.option(
    "--alignment",
    "alignments",
    multiple=True,
    help="Hard labels. kaldi: archives of integer vectors (.ark, .scp, .gz). lhotse: name of a custom field or of a kind of "
    "supervision alignments. The other forms have a place for them.",
)
@click.option(
    "--inventory", help="The classes of the alignments. Default: those that occur, written beside the manifest."
)
@click.option("--frame-shift-ms", type=FloatRange(1, 1000), default=10.0, show_default=True, help="Of the alignments.")
@click.option(
    "--stack",
    type=click.IntRange(1, 16),
    default=1,
    show_default=True,
    help="Of the front end: hard labels are those of the middle one of so many frames.",
)
def import_command(
    form: CorpusForm,
    sources: tuple[str, ...],
    output: str,
    alignments: tuple[str, ...],
    inventory: str | None,
    frame_shift_ms: float,
    stack: int,
) -> None:
    """Write the manifest of a corpus that lies in another FORM; the audio stays where it is.

    SOURCE is a Kaldi data directory; a Lhotse cut manifest (.jsonl, .jsonl.gz); a table (.tsv, .csv) with columns utterance_id,
    audio and perhaps text, speaker, split, start, duration, alignment; or a WebDataset shard (.tar).

    \b
    Examples:
      softlabels import kaldi train=data/train dev=data/dev --alignment exp/ali/pdf.scp --output corpus.parquet
      softlabels import lhotse train=cuts.jsonl.gz --alignment phone --stack 3 --output corpus.parquet
      softlabels import table utterances.tsv --output corpus.parquet
      softlabels import webdataset train=s3://bucket/shard-0000.tar train=s3://bucket/shard-0001.tar --output corpus.parquet
    """
    given = None if inventory is None else ClassInventory.load(inventory)
    frames = Frames(frame_shift_ms=frame_shift_ms, stack=stack)
    with needs_extra("kaldi" if form == "kaldi" and alignments else "audio"):
        rows = _read(form, sources, alignments, frame_shift_ms)
        utterances, found = utterances_of(rows, frames, given, output=output, where=", ".join(sources))
    write_and_summarise(output, utterances, found, frame_shift_ms * stack, is_new_inventory=given is None)


def _read(
    form: CorpusForm, sources: Sequence[str], alignments: Sequence[str], frame_shift_ms: float
) -> list[ImportedRow]:
    if alignments and (form in ("table", "webdataset") or (form == "lhotse" and len(alignments) > 1)):
        raise InputError(f"--alignment is given {len(alignments)} times; form '{form}' takes {int(form == 'lhotse')}")
    by_id = read_alignments(alignments) if form == "kaldi" and alignments else {}
    rows: list[ImportedRow] = []
    for source in sources:
        split, url = _split_and_url(source)
        if form == "kaldi":
            found = read_data_dir(url, by_id)
        elif form == "lhotse":
            found = read_cuts(url, alignments[0] if alignments else None, frame_shift_ms)
        else:
            found = read_table(url) if form == "table" else read_tar(url)
        if not found:
            raise InputError(f"{url} has no utterances")
        other = [row.utterance_id for row in found if row.split not in (None, split)] if split else []
        if other:
            click.echo(
                f"warning: {source}: of {len(other)} utterances, such as {printable(other[0])}, the split column says "
                f"otherwise; leave out '{split}=' to have it decide",
                err=True,
            )
        rows += found if split is None else [replace(row, split=split) for row in found]
    if by_id and all(row.class_ids is None for row in rows):
        raise InputError(
            f"{', '.join(alignments)}: the alignments are of other utterances, such as {next(iter(by_id))}"
        )
    return rows


def _split_and_url(source: str) -> tuple[str | None, str]:
    """Of ``SPLIT=URL``; an equals sign behind a slash is a part of the path."""
    split, equals, url = source.partition("=")
    return (split, url) if equals and "/" not in split else (None, source)
