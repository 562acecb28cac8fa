"""``softlabels align``: hard labels for a transcribed corpus that has none.

Utterances are aligned by processes, each with a model of its own; an alignment depends on its utterance alone, so their number
and order change nothing.
"""

from __future__ import annotations

import csv
import importlib
import io
import multiprocessing
import os
import signal
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import click
import numpy as np

from softlabel_schemas.alignment import FRAME_SHIFT_MS, PHONES, SAMPLE_RATE, Aligner, Alignment, AlignmentError
from softlabel_schemas.command_line import CheckFailedError, needs_extra, progress
from softlabel_schemas.corpus import Utterance, check_splits, load_corpus, split_url
from softlabel_schemas.corpus_output import location_below, write_and_summarise
from softlabel_schemas.frame_labels import middle_of_stack
from softlabel_schemas.front_end import Fbank
from softlabel_schemas.lexicon import Pronunciation, load_lexicon
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.problems import Problems
from softlabel_schemas.senones import back_off
from softlabel_schemas.utterance_reader import UtteranceError, UtteranceReader

_FRONT_END = Fbank(sample_rate=SAMPLE_RATE, frame_shift_ms=FRAME_SHIFT_MS)
# An utterance takes about a tenth of its duration: larger chunks would leave processes idle at the end.
_CHUNK = 4
_Pronunciations = Mapping[str, tuple[Pronunciation, ...]]
# Manifest, pronunciations, stack.
_Settings = tuple[str, _Pronunciations, int]


@click.command("align")
@click.argument("corpus")
@click.option("--output", required=True, help="The manifest to write, such as aligned.parquet; a path or a URL.")
@click.option(
    "--lexicon", help="Pronunciations of words that the model's dictionary lacks; a word and its phones a line."
)
@click.option(
    "--stack",
    type=click.IntRange(1, 16),
    default=3,
    show_default=True,
    help="Of the front end: hard labels are those of the middle one of so many frames of 10 ms.",
)
@click.option(
    "--train-split",
    "train_splits",
    multiple=True,
    default=["train"],
    show_default=True,
    help="The splits that decide which senones are frequent enough to be classes.",
)
@click.option("--processes", type=click.IntRange(1), default=os.cpu_count(), help="Default: one for each processor.")
def align(
    corpus: str, output: str, lexicon: str | None, stack: int, train_splits: tuple[str, ...], processes: int
) -> None:
    """Give the English speech of the manifest CORPUS senones as hard labels, by PocketSphinx.

    Senones with fewer than 30 frames in the training splits become the most frequent senone of their phone. Utterances that
    cannot be aligned are left out and listed, with reasons, in OUTPUT.failed.tsv. Speech of 16 kHz; two passes with wide beams.

    \b
    Example:
      softlabels align corpus.parquet --lexicon lexicon.txt --output aligned.parquet
    """
    rows = load_corpus(corpus)
    check_splits(train_splits, set(rows.table["split"].to_pylist()))
    settings = (corpus, load_lexicon(lexicon, PHONES).pronunciations if lexicon else {}, stack)
    aligned: dict[str, Alignment] = {}
    failed: dict[str, str] = {}
    with needs_extra("align"):
        # Here, as processes of a pool cannot say why they do not begin.
        importlib.import_module("pocketsphinx")
    with progress("align", len(rows), "utterances") as advance:
        for utterance_id, found in _align_all(settings, len(rows), processes):
            if isinstance(found, str):
                failed[utterance_id] = found
            else:
                aligned[utterance_id] = found
            advance(len(aligned) + len(failed), f"{len(failed)} failed")
    training = [each for each in rows if each.split in train_splits and each.utterance_id in aligned]
    if not training:
        raise CheckFailedError(
            f"{corpus}: no utterance of {', '.join(train_splits)} could be aligned\n{_summary(failed)}"
        )
    classes = back_off((aligned[each.utterance_id].senones, aligned[each.utterance_id].phones) for each in training)
    utterances = [
        replace(
            each,
            audio=each.audio and location_below(rows.location(each.audio), output),
            features=each.features and location_below(rows.location(each.features), output),
            hard_labels=classes.labels_T(aligned[each.utterance_id].senones, aligned[each.utterance_id].phones),
        )
        for each in rows
        if each.utterance_id in aligned
    ]
    _write_failed(failed, output)
    write_and_summarise(output, utterances, classes.inventory, FRAME_SHIFT_MS * stack, is_new_inventory=True)
    if failed:
        click.echo(
            f"{len(failed):,} could not be aligned and are left out (see {output}.failed.tsv)\n{_summary(failed)}"
        )


def _align_all(settings: _Settings, num_rows: int, processes: int) -> Iterator[tuple[str, Alignment | str]]:
    """Utterance id, and the alignment or why there is none, of each row in order."""
    if processes == 1:
        worker = _Worker(*settings)
        yield from (worker.align(row) for row in range(num_rows))
        return
    # Forked processes would have the locks of threads that they lack.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(processes, num_rows), context, initializer=_begin, initargs=settings)
    try:
        yield from pool.map(_align_row, range(num_rows), chunksize=_CHUNK)
    finally:
        pool.shutdown(cancel_futures=True)


class _Worker:
    """Aligns rows of a manifest."""

    def __init__(self, corpus: str, pronunciations: _Pronunciations, stack: int) -> None:
        self._corpus, self._stack = load_corpus(corpus), stack
        self._reader = UtteranceReader(self._corpus)
        self._aligner = Aligner(pronunciations)

    def align(self, row: int) -> tuple[str, Alignment | str]:
        utterance = self._corpus[row]
        try:
            found = self._alignment(utterance)
        except (AlignmentError, UtteranceError) as error:
            return utterance.utterance_id, str(error)
        stacked = (middle_of_stack(found.senones, self._stack), middle_of_stack(found.phones, self._stack))
        return utterance.utterance_id, Alignment(*stacked)

    def _alignment(self, utterance: Utterance) -> Alignment:
        if utterance.text is None:
            raise AlignmentError("no text")
        samples = np.clip(self._reader.samples(utterance, _FRONT_END), -32768, 32767).astype(np.int16)
        return self._aligner.align(utterance.text, samples, _FRONT_END.num_frames(len(samples)))


# Of a process of the pool.
_worker: _Worker


def _begin(corpus: str, pronunciations: _Pronunciations, stack: int) -> None:
    global _worker
    # Ctrl-C goes to all processes of a terminal; the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _worker = _Worker(corpus, pronunciations, stack)


def _align_row(row: int) -> tuple[str, Alignment | str]:
    return _worker.align(row)


def _summary(failed: dict[str, str]) -> str:
    problems = Problems()
    for utterance_id, reason in failed.items():
        # The reason of an utterance that cannot be read begins with its name.
        problems.add(reason.removeprefix(f"utterance {utterance_id}: "), utterance_id)
    return "\n".join(f"  {line}" for line in problems.lines())


def _write_failed(failed: dict[str, str], output: str) -> None:
    if failed:
        text = io.StringIO(newline="")
        table = csv.writer(text, delimiter="\t", lineterminator="\n")
        table.writerows([("utterance_id", "reason"), *failed.items()])
        folder, name = split_url(output)
        ObjectStore(folder).put(f"{name}.failed.tsv", text.getvalue().encode())
