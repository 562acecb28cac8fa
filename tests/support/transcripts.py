"""Speech of tones with transcripts, for CTC: each run of a tone is a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from softlabel_schemas import ClassInventory, Utterance, write_corpus
from student_trainer.config import TrainConfig
from tests.support.speech import (
    FRONT_END,
    INVENTORY,
    SoftDataset,
    Speech,
    train_config,
    write_soft_labels,
    write_speech,
)

CTC_INVENTORY = ClassInventory(names=("<blank>", *INVENTORY.names), blank="<blank>")
# Frames of 20 ms, as no run is shorter than 60.
CTC_FRONT_END = FRONT_END.model_copy(update={"stack": 2})


def write_transcribed(folder: Path) -> Speech:
    """The corpus of ``write_speech`` with names of classes as words, in place of hard labels of frames."""
    speech = write_speech(folder / "tones", unlabelled_share=0.0)
    utterances = []
    for utterance in speech.located():
        labels_T = utterance.hard_labels
        assert labels_T is not None
        starts_T = np.diff(labels_T, prepend=-1) != 0
        text = " ".join(INVENTORY.names[label] for label in labels_T[starts_T])
        utterances.append(replace(utterance, hard_labels=None, text=text))
    (folder / "inventory.json").write_bytes(CTC_INVENTORY.to_json())
    write_corpus(folder / "corpus.parquet", utterances)
    return Speech(
        folder=folder,
        manifest=str(folder / "corpus.parquet"),
        inventory=str(folder / "inventory.json"),
        utterances=tuple(utterances),
    )


def write_ctc_labels(url: str | Path, utterances: Sequence[Utterance]) -> SoftDataset:
    """Random posteriors that favour each token in one frame, at equal distances, and the blank in all others."""
    with_paths = []
    for utterance in utterances:
        tokens = [CTC_INVENTORY.names.index(name) for name in (utterance.text or "").split()]
        path_T = np.zeros(CTC_FRONT_END.num_frames(utterance.num_samples), dtype=np.int32)
        path_T[(2 * np.arange(len(tokens)) + 1) * len(path_T) // (2 * len(tokens))] = tokens
        with_paths.append(replace(utterance, hard_labels=path_T))
    return write_soft_labels(url, with_paths, front_end=CTC_FRONT_END, inventory=CTC_INVENTORY)


def ctc_config(speech: Speech, output: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "ctc": {"units": "words"},
        "front_end": CTC_FRONT_END.model_dump(),
        "training__epochs": 45,
        "training__learning_rate": 0.01,
    }
    return train_config(speech, output, **settings | changes)
