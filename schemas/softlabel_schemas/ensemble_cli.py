"""The commands of ``softlabels`` that make an ensemble of stored datasets."""

from __future__ import annotations

import dataclasses
import json
import shlex

import click

from softlabel_schemas.combined_dataset import CombinedDataset
from softlabel_schemas.command_line import progress
from softlabel_schemas.corpus import load_corpus
from softlabel_schemas.dataset import open_dataset
from softlabel_schemas.deprecation import warn_if_deprecated
from softlabel_schemas.errors import InputError
from softlabel_schemas.fit_weights import fit_weights
from softlabel_schemas.spec import Combination

# EM brings the weight of a teacher that adds nothing ever nearer to 0, and at last to 0 itself, which is no weight to combine
# with. Without a teacher of a weight below this one no probability of the ensemble is off by more than this.
_LEAST_WEIGHT = 1e-6


@click.command()
@click.argument("urls", nargs=-1, required=True)
@click.option("--weights", help="Of the datasets, in their order, relative: 1,2. Default: equal.")
@click.option("--method", type=click.Choice(["arithmetic", "log_linear"]), default="arithmetic", show_default=True)
@click.option("--top-k", type=click.IntRange(1, 65_534), required=True, help="Entries kept of each frame.")
@click.option("--output", required=True, help="Folder or URL of the new dataset.")
def combine(urls: tuple[str, ...], weights: str | None, method: Combination, top_k: int, output: str) -> None:
    """Make the dataset of an ensemble from those of its members at URLS, without running a teacher.

    They label the same corpus. Where they store every class it is exact, but for what their codecs rounded; of a class that
    one of them did not store its share of the tail is taken. For log_linear store them by packed-f32: it multiplies what lossy
    codecs do not tell from 0. Tail masses are made for the temperatures that all of them store and can tell. Run it again
    after a kill, and it goes on.

    \b
    Example:
      softlabels combine labels-tdnn labels-blstm --weights 1,2 --top-k 20 --output labels-both
    """
    inputs = [open_dataset(url) for url in urls]
    for dataset in inputs:
        warn_if_deprecated(dataset.store)
    made = CombinedDataset(inputs, [1.0] * len(urls) if weights is None else _numbers(weights), method, top_k, output)
    for temperature, reason in made.left_out_temperatures.items():
        click.echo(f"warning: temperature {temperature:g} is left out: {reason}", err=True)
    for url, count in made.narrow_inputs.items():
        click.echo(
            f"warning: {url} has frames of {_counted(count)}, fewer than --top-k: what students derive from the result is of "
            "the classes that its inputs kept; store inputs by a top_k that is at least as wide",
            err=True,
        )
    missing = made.begin()
    frames = made.num_frames_of_shard
    done = sum(frames) - sum(frames[index] for index in missing)
    with progress("combine", sum(frames), "frames") as advance:
        advance(done)
        for index in missing:
            made.make_shard(index)
            done += frames[index]
            advance(done)
    published = made.publish()
    skipped = f", {published.num_skipped:,} utterances skipped" if published.num_skipped else ""
    click.echo(f"{output}: {len(frames):,} shards{skipped}; content digest {published.content_digest}")


@click.command("fit-weights")
@click.argument("urls", nargs=-1, required=True)
@click.option("--corpus", required=True, help="Manifest of the corpus that was labelled, with hard labels.")
@click.option("--split", required=True, help="The split to fit on; no teacher was trained on it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def fit_weights_command(urls: tuple[str, ...], corpus: str, split: str, as_json: bool) -> None:
    """Find the weights with which the arithmetic mean of the datasets at URLS makes the hard labels of a split likeliest.

    \b
    Example:
      softlabels fit-weights dev-tdnn dev-blstm --corpus corpus.parquet --split dev
    """
    inputs, rows = [open_dataset(url) for url in urls], load_corpus(corpus).select_splits([split])
    with progress("fit-weights", len(rows), "utterances") as advance:
        found = fit_weights(inputs, rows, where=corpus, advance=advance)
    if as_json:
        click.echo(json.dumps({"urls": list(urls), "split": split, **dataclasses.asdict(found)}, indent=2))
        return
    click.echo(f"log-likelihood of {found.num_frames:,} hard labels of split {split}, nats per frame:")
    width = max(len(url) for url in (*urls, "equal weights"))
    for url, alone, weight in zip(urls, found.alone, found.weights, strict=True):
        click.echo(f"  {url:<{width}}  {alone:8.4f}  fitted weight {weight:.4g}")
    click.echo(f"  {'equal weights':<{width}}  {found.equal:8.4f}")
    click.echo(f"  {'fitted':<{width}}  {found.fitted:8.4f}")
    if found.num_skipped:
        click.echo(f"left out: {found.num_skipped:,} utterances that a dataset skipped")
    click.echo("to combine these datasets, or others of the same teachers in their place:")
    kept = dict[str, float]()
    for url, weight in zip(urls, found.weights, strict=True):
        if weight >= _LEAST_WEIGHT:
            kept[url] = weight
        else:
            click.echo(f"  without {url}, whose weight is below {_LEAST_WEIGHT:g}")
    weights = ",".join(f"{weight / sum(kept.values()):.4g}" for weight in kept.values())
    click.echo(f"softlabels combine {shlex.join(kept)} --weights {weights} --top-k K --output OUTPUT")


def _counted(entries: int) -> str:
    return "1 entry" if entries == 1 else f"{entries} entries"


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise InputError(f"--weights are numbers separated by commas, such as 1,2; found {text!r}") from None
