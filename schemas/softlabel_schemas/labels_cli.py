"""The commands of ``softlabels`` that take labels from a dataset, or compare those of two."""

from __future__ import annotations

import json
from typing import Any

import click

from softlabel_schemas.command_line import FloatRange, progress
from softlabel_schemas.corpus import Corpus, load_corpus
from softlabel_schemas.dataset import SoftLabelDataset, open_dataset
from softlabel_schemas.deprecation import warn_if_deprecated
from softlabel_schemas.diff import compare_labels, shards_to_compare, spec_differences
from softlabel_schemas.errors import InputError
from softlabel_schemas.imported import read_text
from softlabel_schemas.subset import Subset, check_output
from softlabel_schemas.subset_choice import Choice, choose_hours, choose_shards, choose_speakers, choose_utterances
from softlabel_schemas.subset_corpus import check_no_other_corpus, write_corpus_of


@click.command("pull")
@click.argument("url")
@click.argument("output")
@click.option("--hours", type=float, help="So many hours, from shards spread over the dataset.")
@click.option("--speakers", type=click.Path(), help="File with a speaker on each line; needs --corpus.")
@click.option("--utterances", type=click.Path(), help="File with an utterance id on each line.")
@click.option("--shards", help="Whole shards: 0-3,7.")
@click.option(
    "--corpus",
    help="Manifest of the corpus that was labelled; its rows of the subset, and of splits without labels such as dev and "
    "test, are written to OUTPUT too.",
)
def pull_command(
    url: str,
    output: str,
    hours: float | None,
    speakers: str | None,
    utterances: str | None,
    shards: str | None,
    corpus: str | None,
) -> None:
    """Make OUTPUT, a folder or URL, a dataset of its own with some of the utterances of the dataset at URL.

    Every byte is checked on the way. The labels stay as they are; the new dataset names the one it was taken from. With
    --corpus, OUTPUT/corpus.parquet lists its utterances, for training on them, and those of the splits of which URL has none,
    for stopping by dev and evaluating on test. Run it again after a kill, and it goes on.

    \b
    Examples:
      softlabels pull s3://bucket/labels labels-10h --hours 10
      softlabels pull s3://bucket/labels some --speakers speakers.txt --corpus corpus.parquet
    """
    dataset = open_dataset(url)
    warn_if_deprecated(dataset.store)
    check_output(dataset, output)
    rows = None if corpus is None else load_corpus(corpus)
    choice = _choice(dataset, hours, speakers, utterances, shards, rows, corpus)
    made = Subset(dataset, choice, output, keep_ids=rows is not None)
    if rows is not None:
        check_no_other_corpus(made.store)
    missing = made.begin()
    done = made.num_shards - len(missing)
    with progress("pull", made.num_shards, "shards") as advance:
        advance(done)
        for index in missing:
            made.make_shard(index)
            done += 1
            advance(done)
    if rows is not None:
        write_corpus_of(made.store, made.utterance_ids(), rows, dataset, where=str(corpus))
    published = made.publish()
    click.echo(
        f"{output}: {made.num_shards:,} shards, {published.content_digest} from {dataset.manifest.content_digest}"
    )


def _choice(
    dataset: SoftLabelDataset,
    hours: float | None,
    speakers: str | None,
    utterances: str | None,
    shards: str | None,
    rows: Corpus | None,
    corpus: str | None,
) -> Choice:
    if sum(each is not None for each in (hours, speakers, utterances, shards)) != 1:
        raise InputError("give one of --hours, --speakers, --utterances and --shards")
    if hours is not None:
        return choose_hours(dataset, hours)
    if shards is not None:
        return choose_shards(dataset, shards)
    if utterances is not None:
        return choose_utterances(dataset, _lines(utterances))
    assert speakers is not None
    if rows is None:
        raise InputError("--speakers needs --corpus: who speaks stands in the corpus, not in the dataset")
    return choose_speakers(dataset, _lines(speakers), rows, where=str(corpus))


def _lines(path: str) -> list[str]:
    lines = [line for line in read_text(path).split("\n") if line.strip()]
    if not lines:
        raise InputError(f"{path} is empty; give one name on each line")
    return [line.removesuffix("\r") for line in lines]


@click.command("diff")
@click.argument("a")
@click.argument("b")
@click.option(
    "--fraction",
    type=FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Of A's shards, spread evenly over it; at least one.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def diff_command(a: str, b: str, fraction: float, as_json: bool) -> None:
    """Say in which settings the datasets at A and B differ, and how far the labels of the utterances are that both have.

    The divergence is over the classes that both kept, with all others as one class: what is stored tells no more, and that of
    the whole posteriors is at least as large. What a codec does not tell from 0 is no difference.

    \b
    Example:
      softlabels diff labels-1 labels-2 --fraction 0.1
    """
    first, second = open_dataset(a), open_dataset(b)
    differences = spec_differences(first, second)
    facts: dict[str, Any] = {}
    shards = shards_to_compare(first, fraction)
    with progress("diff", len(shards), "shards") as advance:
        for done, found in enumerate(compare_labels(first, second, shards), start=1):
            facts = found.facts()
            advance(done)
    if as_json:
        settings = {name: {"a": of_a, "b": of_b} for name, (of_a, of_b) in differences.items()}
        click.echo(json.dumps({"a": a, "b": b, "settings": settings, "labels": facts}, indent=2))
        return
    for name, (of_a, of_b) in differences.items():
        click.echo(f"{name}:\n  a  {json.dumps(of_a)}\n  b  {json.dumps(of_b)}")
    if not differences:
        click.echo("the settings are the same")
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        shown = "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
        click.echo(f"{name:<{width}}  {shown}")
