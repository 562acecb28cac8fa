"""Token error rate of CTC models, by greedy decoding: of a student, or of teachers from their stored targets.

Shape suffixes: B utterances, T frames, V classes, L tokens of a transcript.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rapidfuzz.distance import Levenshtein

from softlabel_schemas.command_line import Advance
from softlabel_schemas.corpus import Corpus, load_corpus
from softlabel_schemas.dataset import SoftLabelDataset
from softlabel_schemas.errors import InputError
from softlabel_schemas.inventory import ClassInventory
from student_trainer.config import Units
from student_trainer.ctc import Spelling, transcripts_digest
from student_trainer.data import TrainingData
from student_trainer.metrics import check_finite
from student_trainer.models import AcousticModel


class TokenMetrics:
    """Token error rate of greedy decoding, and word error rate where tokens are characters; summed utterance by utterance."""

    def __init__(self, inventory: ClassInventory, spelling: Spelling) -> None:
        self.inventory, self.spelling = inventory, spelling
        self.utterances: list[dict[str, Any]] = []

    def add(self, utterance_id: str, tokens_L: npt.NDArray[np.integer], top1_T: npt.NDArray[np.integer]) -> None:
        found = greedy(top1_T, self.spelling.blank)
        record = {
            "utterance_id": utterance_id,
            "frames": len(top1_T),
            "tokens": len(tokens_L),
            "token_errors": Levenshtein.distance(tokens_L.tolist(), self.spelling.as_transcript(found)),
        }
        words, found_words = self.spelling.words(tokens_L), self.spelling.words(found)
        if words is not None and found_words is not None:
            record |= {"words": len(words), "word_errors": Levenshtein.distance(words, found_words)}
        self.utterances.append(record)

    def summary(self) -> dict[str, Any]:
        """Rates in percent."""
        found: dict[str, Any] = {"num_utterances": len(self.utterances)}
        for unit in ("frame", "token", "word"):
            if all(f"{unit}s" in record for record in self.utterances):
                found[f"num_{unit}s"] = sum(record[f"{unit}s"] for record in self.utterances)
        for unit in ("token", "word"):
            if f"num_{unit}s" in found:
                errors = sum(record[f"{unit}_errors"] for record in self.utterances)
                found[f"{unit}_error_rate"] = 100 * errors / max(found[f"num_{unit}s"], 1)
        return found


def token_metrics(
    model: AcousticModel, data: TrainingData, inventory: ClassInventory, advance: Advance = lambda done, note="": None
) -> TokenMetrics:
    """Errors of greedy CTC decoding by the decoding head, in the order of ``batches_to_evaluate``.

    Raises:
        InputError: logits are not finite.
    """
    assert data.spelling is not None
    metrics = TokenMetrics(inventory, data.spelling)
    device = next(model.parameters()).device
    for examples, batch in data.batches_to_evaluate(device):
        with torch.no_grad():
            logits_BTV, lengths_B = model(batch.features_BTD, batch.lengths_B)
            best_BT, top1_BT = (each.cpu().numpy() for each in logits_BTV.max(dim=-1))
        for example, length, best_T, top1_T in zip(examples, lengths_B.tolist(), best_BT, top1_BT, strict=True):
            assert example.tokens is not None
            check_finite(example.utterance_id, best_T[:length])
            metrics.add(example.utterance_id, example.tokens, top1_T[:length])
        advance(len(metrics.utterances))
    return metrics


def stored_token_metrics(dataset: SoftLabelDataset, corpus: Corpus, units: Units) -> TokenMetrics:
    """Errors of greedy CTC decoding of stored targets; a frame without entries is taken for a blank."""
    spelling = Spelling(dataset.inventory, units)
    metrics = TokenMetrics(dataset.inventory, spelling)
    for utterance in corpus:
        assert utterance.text is not None
        try:
            top1_T = dataset[utterance.utterance_id].targets.top1_T()
        except KeyError as error:
            raise InputError(f"no soft targets for utterance {error.args[0]}") from None
        tokens_L = spelling.tokens_L(utterance.text, utterance.utterance_id)
        metrics.add(utterance.utterance_id, tokens_L, np.where(top1_T < 0, spelling.blank, top1_T))
    return metrics


def against_transcripts(corpus: Corpus, units: Units) -> dict[str, str]:
    """What an evaluation says of its transcripts: results of others are not compared with it."""
    return {"units": units, "transcripts_digest": transcripts_digest(corpus)}


def greedy(top1_T: npt.NDArray[np.integer], blank: int) -> npt.NDArray[np.integer]:
    """Tokens of the likeliest path: runs joined, blanks left out."""
    starts_T = np.ones(len(top1_T), dtype=bool)
    starts_T[1:] = top1_T[1:] != top1_T[:-1]
    tokens: npt.NDArray[np.integer] = top1_T[starts_T & (top1_T != blank)]
    return tokens


def load_transcribed_corpus(manifest: str, splits: Sequence[str]) -> Corpus:
    """Raises InputError unless every utterance has a transcript."""
    corpus = load_corpus(manifest).select_splits(splits)
    check_transcribed(corpus, splits, where=manifest)
    return corpus


def check_transcribed(corpus: Corpus, splits: Sequence[str], *, where: str) -> None:
    """Raises InputError unless every utterance has a transcript, and some transcript a token."""
    texts = corpus.table["text"]
    if texts.null_count:
        raise InputError(f"{where}: {texts.null_count} utterances of {list(splits)} have no transcript")
    if not any(text.split() for text in texts.to_pylist()):
        raise InputError(
            f"{where}: the transcripts of {list(splits)} are all empty, and errors are counted among their tokens; transcribe "
            "this speech, or give other splits"
        )
