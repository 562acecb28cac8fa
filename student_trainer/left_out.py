"""Utterances that a dataset skipped when its labels were made: left out, with a clear account of it.

Only those. An utterance that is missing for any other reason is a mistake, and an error where it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import click
import pyarrow as pa
import pyarrow.compute as pc

from softlabel_schemas.corpus import Corpus
from softlabel_schemas.dataset import SoftLabelDataset
from softlabel_schemas.errors import InputError
from softlabel_schemas.manifest import SkippedUtterance
from softlabel_schemas.strict import printable

_NUM_SHOWN = 3


def leave_out_skipped(corpus: Corpus, dataset: SoftLabelDataset) -> tuple[Corpus, tuple[SkippedUtterance, ...]]:
    """The corpus without the utterances that the dataset skipped, and those, in the dataset's order.

    Raises:
        InputError: none is left.
    """
    own = set(corpus.table["utterance_id"].to_pylist())
    left_out = tuple(entry for entry in dataset.manifest.skipped if entry.utterance_id in own)
    if not left_out:
        return corpus, ()
    ids = pa.array([entry.utterance_id for entry in left_out], pa.string())
    table = corpus.table.filter(pc.invert(pc.is_in(corpus.table["utterance_id"], ids)))
    if not len(table):
        raise InputError(
            f"{dataset.store.url} has no labels for any of {len(corpus)} utterances, all were skipped: {_reasons(left_out)}"
        )
    return corpus.with_table(table), left_out


def say_what_is_left_out(left_out: Sequence[SkippedUtterance], num_utterances: int, *, where: str, url: str) -> None:
    """One line on stderr, if there is something to say.

    Args:
        num_utterances: of the corpus, with those that are left out.
        where: the file that lists them all.
    """
    if left_out:
        share = 100 * len(left_out) / num_utterances
        click.echo(
            f"left out {len(left_out):,} of {num_utterances:,} utterances ({share:.2g}%), for which {url} has no labels: "
            f"{_reasons(left_out)} (all of them: {where}, left_out)",
            err=True,
        )


def to_json(left_out: Sequence[SkippedUtterance]) -> list[dict[str, str]]:
    return [entry.model_dump(mode="json") for entry in left_out]


def _reasons(left_out: Sequence[SkippedUtterance]) -> str:
    shown = [f"{printable(entry.utterance_id)}: {printable(entry.reason)}" for entry in left_out[:_NUM_SHOWN]]
    return "; ".join(shown) + ("; ..." if len(left_out) > _NUM_SHOWN else "")
