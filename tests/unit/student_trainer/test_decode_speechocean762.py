"""Real transcripts, a real lexicon and real alignments: the right phones of each frame give back nearly all the words."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest

from softlabel_schemas import ClassInventory, Utterance, write_corpus
from student_trainer.decode import Decoder, DecoderSettings, WordErrors
from student_trainer.graph_folder import make_graph
from student_trainer.ngram import train_ngram
from tests.support.perplexity import perplexity

REPOSITORY = Path(__file__).parents[3]
SPEECHOCEAN762 = Path(os.environ.get("SPEECHOCEAN762", REPOSITORY.parent / "shared" / "data" / "speechocean762"))
NUM_TRAIN, NUM_TEST = 300, 20

pytestmark = pytest.mark.skipif(
    not SPEECHOCEAN762.exists(), reason=f"speechocean762 is not at {SPEECHOCEAN762} (set SPEECHOCEAN762 to its folder)"
)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    with (SPEECHOCEAN762 / "utterances.tsv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@pytest.fixture(scope="module")
def phones() -> dict[str, npt.NDArray[np.str_]]:
    """The aligned phone of every third frame of 10 ms."""
    table = pq.read_table(SPEECHOCEAN762 / "alignments.parquet", columns=["utterance_id", "phone"])
    return {row["utterance_id"]: np.array(row["phone"])[1::3] for row in table.to_pylist()}


def of_split(rows: list[dict[str, str]], split: str, known: dict[str, npt.NDArray[np.str_]]) -> list[dict[str, str]]:
    return [row for row in rows if row["split"] == split and row["utt"] in known]


def test_bigrams_help_on_other_sentences(rows: list[dict[str, str]], phones: dict[str, npt.NDArray[np.str_]]) -> None:
    """Test sentences are nearly all others than the training sentences. 1,100 words: perplexities far below that."""
    train, test = ([row["text"].split() for row in of_split(rows, split, phones)] for split in ("train", "test"))
    unigram, bigram = (perplexity(train_ngram(train, order), test) for order in (1, 2))
    assert 50 < bigram < 0.7 * unigram
    assert unigram < 300


def test_the_right_phones_give_back_the_words(
    tmp_path: Path, rows: list[dict[str, str]], phones: dict[str, npt.NDArray[np.str_]]
) -> None:
    names = sorted({phone for frames in phones.values() for phone in np.unique(frames).tolist()})
    inventory = ClassInventory(
        names=tuple(names), phones=tuple(names), silence_phones=tuple(sorted({"SIL", "+NSN+"} & set(names)))
    )
    utterances = [
        Utterance(
            utterance_id=row["utt"],
            audio=f"{row['utt']}.flac",
            sample_rate=16_000,
            num_samples=480 * len(phones[row["utt"]]),
            split="train",
            text=row["text"],
            hard_labels=np.searchsorted(names, phones[row["utt"]]).astype(np.int32),
        )
        for row in of_split(rows, "train", phones)[:NUM_TRAIN]
    ]
    manifest = str(tmp_path / "corpus.parquet")
    write_corpus(manifest, utterances, inventory=inventory, hard_label_frame_shift_ms=30.0)
    lexicon = str(SPEECHOCEAN762 / "lexicon.txt")
    graph = make_graph(manifest, ["train"], lexicon, inventory, str(tmp_path / "graph"))
    known = set(graph.words)
    chosen = [row for row in of_split(rows, "test", phones) if known.issuperset(row["text"].split())][:NUM_TEST]
    settings = DecoderSettings(acoustic_scale=0.5, prior_exponent=0.5, word_insertion_penalty=0.0)
    errors = WordErrors(Decoder(graph, settings), {row["utt"]: row["text"] for row in chosen})
    columns = graph.columns.column_of_class_V[np.arange(len(names))]
    num_words = num_errors = 0
    for row in chosen:
        found = columns[np.searchsorted(names, phones[row["utt"]])]
        probs_TC = np.full((len(found), len(graph.columns.phones)), 0.001)
        probs_TC[np.arange(len(found)), found] = 0.95
        record = errors.record(row["utt"], np.log(probs_TC))
        num_words += record["words"]
        num_errors += record["word_errors"]
        assert record["decoding_finished"]
    assert len(chosen) == NUM_TEST

    # Not all: the aligner's lexicon was another one (SEVEN ends in V AH N there, in V N here).
    assert num_errors < 0.15 * num_words
