"""A lexicon over the phones of ``tests.support.speech``, transcripts for its corpus, and graphs of a few words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from softlabel_schemas import Utterance, write_corpus
from student_trainer.graph_folder import DecodingGraph, make_graph
from tests.support.speech import FRAME_SHIFT_MS, INVENTORY, Speech, save_corpus

# ABBA begins as AB does; SEE and SEA sound alike.
LEXICON = "AH a\nAB a b\nABBA a b a\nBEE b\nSEE c\nSEA c\nCAB c a b\n"
# Columns of acoustic scores.
PHONES = ("a", "b", "c", "sil")
_WORD_OF_PHONE = {"a": "AH", "b": "BEE", "c": "SEE"}


def write_words_speech(folder: Path, speech: Speech) -> Speech:
    """The corpus with a transcript for each utterance: one word for each run of a phone in its hard labels."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "lexicon.txt").write_text(LEXICON)
    return save_corpus(folder, [replace(utterance, text=_text(utterance)) for utterance in speech.located()])


def _text(utterance: Utterance) -> str:
    assert utterance.hard_labels is not None
    phones = [INVENTORY.phones[label] for label in utterance.hard_labels if label >= 0]
    starts = [phone for phone, before in zip(phones, [None, *phones], strict=False) if phone != before]
    return " ".join(_WORD_OF_PHONE[phone] for phone in starts if phone in _WORD_OF_PHONE)


def write_graph(
    folder: Path, sentences: Sequence[str], *, lexicon: str = LEXICON, ngram_order: int = 2, min_phone_frames: int = 1
) -> DecodingGraph:
    """The graph of these training transcripts, each with one frame of every class as its hard labels."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "lexicon.txt").write_text(lexicon)
    labels = np.arange(INVENTORY.num_classes, dtype=np.int32)
    utterances = [
        Utterance(
            utterance_id=f"utt-{index}",
            audio=f"{index}.wav",
            sample_rate=8000,
            num_samples=1440,
            split="train",
            text=sentence,
            hard_labels=labels,
        )
        for index, sentence in enumerate(sentences)
    ]
    write_corpus(folder / "corpus.parquet", utterances, inventory=INVENTORY, hard_label_frame_shift_ms=FRAME_SHIFT_MS)
    return make_graph(
        str(folder / "corpus.parquet"),
        ["train"],
        str(folder / "lexicon.txt"),
        INVENTORY,
        str(folder / "graph"),
        ngram_order=ngram_order,
        min_phone_frames=min_phone_frames,
    )


def log_probs(phones: str, confidence: float = 0.91) -> npt.NDArray[np.float32]:
    """One frame for each letter, ``.`` for silence: that phone has ``confidence``, the others the rest evenly."""
    columns = [PHONES.index("sil" if phone == "." else phone) for phone in phones]
    probs_TC = np.full((len(columns), len(PHONES)), (1 - confidence) / (len(PHONES) - 1))
    probs_TC[np.arange(len(columns)), columns] = confidence
    return np.log(probs_TC).astype(np.float32)
