"""Connectionist temporal classification (Graves et al., 2006): transcripts as hard labels, and their loss.

Shape suffixes: B utterances, T frames, N valid frames of all utterances, V classes, L tokens of all transcripts.

The loss is in nats per frame, like the other losses: beside the soft loss ``weight`` means the same as with hard labels of
frames. What a blank-dominated posterior is worth to a student is the choice of ``soft_labels.frames.blank``.
"""

from __future__ import annotations

import hashlib
from itertools import groupby

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import torch
from torch import Tensor, nn
from torch.nn import functional

from softlabel_schemas.corpus import Corpus, text_bytes, text_lengths
from softlabel_schemas.errors import InputError
from softlabel_schemas.front_end import Fbank
from softlabel_schemas.inventory import ClassInventory
from softlabel_schemas.strict import printable
from student_trainer.batch import Batch, TokenTargets, min_ctc_frames
from student_trainer.config import Units
from student_trainer.speed import num_samples_at

# Between words, where transcripts are spelled in characters (wav2vec 2.0's vocabularies).
WORD_DELIMITER = "|"


class Spelling:
    """Transcript -> tokens, which are classes of the inventory.

    Raises:
        InputError: the inventory has no blank.
    """

    def __init__(self, inventory: ClassInventory, units: Units) -> None:
        self.units, self.names, self.blank = units, inventory.names, inventory.blank_id
        self._ids = {name: number for number, name in enumerate(inventory.names)}
        # Of an inventory that has none, no class.
        self._delimiter = self._ids.get(WORD_DELIMITER, self._ids.get(" ", -1))

    def tokens_L(self, text: str, utterance_id: str) -> npt.NDArray[np.int64]:
        """int64 [L]; white space at the ends and repeated counts for nothing.

        Raises:
            InputError: a token is no class; names both.
        """
        words = text.split()
        pieces = words
        if self.units == "characters":
            pieces = list((WORD_DELIMITER if WORD_DELIMITER in self._ids else " ").join(words))
        unknown = next((piece for piece in pieces if self._ids.get(piece, self.blank) == self.blank), None)
        if unknown is not None:
            raise InputError(
                f"utterance {utterance_id}: its transcript has {printable(repr(unknown))}, which is no token of the class "
                f"inventory; normalise the text (case, punctuation), or set ctc.units (found {self.units!r})"
            )
        return np.array([self._ids[piece] for piece in pieces], dtype=np.int64)

    def as_transcript(self, tokens_L: npt.NDArray[np.integer]) -> list[int]:
        """Decoded tokens less the word delimiters that no transcript has: at the ends, and repeated ones.

        Teachers that were fine-tuned on transcripts with a final delimiter (wav2vec 2.0's, HuBERT's) decode one.
        """
        if self.units != "characters":
            return list(tokens_L.tolist())
        runs = groupby(tokens_L.tolist(), key=lambda token: token == self._delimiter)
        return [token for is_delimiter, word in runs if not is_delimiter for token in (self._delimiter, *word)][1:]

    def words(self, tokens: npt.NDArray[np.integer]) -> list[str] | None:
        """What the tokens spell; None where they are not characters."""
        if self.units != "characters":
            return None
        return "".join(self.names[token] for token in tokens).replace(WORD_DELIMITER, " ").split()


def transcripts_digest(corpus: Corpus) -> str:
    """sha256 of the texts in their order; the corpus digest is not over them."""
    texts = corpus.table["text"]
    digest = hashlib.sha256(text_lengths(texts))
    digest.update(text_bytes(texts))
    # An empty transcript is not a missing one.
    digest.update(pc.is_null(texts).to_numpy().tobytes())
    return digest.hexdigest()


def check_long_enough(batch: Batch, lengths_B: Tensor) -> None:
    """Raises InputError for an utterance with more tokens than its frames can hold."""
    assert batch.tokens is not None
    short = torch.nonzero(lengths_B < batch.tokens.min_frames_B)
    if len(short):
        row = int(short[0])
        needed, found = int(batch.tokens.min_frames_B[row]), int(lengths_B[row])
        raise InputError(_too_short(batch.utterance_ids[row], needed, found))


def check_transcripts(
    corpus: Corpus, spelling: Spelling, front_end: Fbank | None = None, speed: float | None = None
) -> None:
    """Before anything is trained, without reading audio (50 µs for 180 characters): a text that is mended once a run has a
    checkpoint makes it another run.

    Args:
        front_end: of a model that gives all its frames; None: how many it gives is not known yet.
        speed: the highest that speech is played at; None: it is heard as recorded.

    Raises:
        InputError: a token is no class; or a transcript has more tokens than its frames can hold.
    """
    rows = zip(*(corpus.table[name].to_pylist() for name in ("utterance_id", "text", "num_samples")), strict=True)
    for utterance_id, text, num_samples in rows:
        if text is None:
            continue
        needed = min_ctc_frames(spelling.tokens_L(text, utterance_id))
        if front_end is None:
            continue
        num_frames = front_end.num_frames(num_samples if speed is None else num_samples_at(num_samples, speed))
        if num_frames >= needed:
            continue
        if speed is None:
            raise InputError(_too_short(utterance_id, needed, num_frames))
        raise InputError(
            f"utterance {utterance_id}: its transcript needs {needed} frames, at speed {speed:g} there are {num_frames}; "
            "leave it out of the corpus, lower augmentation.speeds, or use shorter frames (front_end.stack)"
        )


def _too_short(utterance_id: str, needed: int, found: int) -> str:
    return (
        f"utterance {utterance_id}: its transcript needs {needed} frames, the model gives {found}; leave it out of the corpus, "
        "or use shorter frames (front_end.stack)"
    )


def ctc_loss(logits_NV: Tensor, lengths_B: Tensor, targets: TokenTargets, *, blank: int) -> Tensor:
    """Negative log-likelihood of the transcripts, nats per frame of the utterances that have one; 0 where none has."""
    has_B = targets.lengths_B >= 0
    if not bool(has_B.any()):
        return logits_NV.sum() * 0.0
    log_probs = torch.split(logits_NV.log_softmax(dim=-1), lengths_B.tolist())
    log_probs_TBV = nn.utils.rnn.pad_sequence([own for own, has in zip(log_probs, has_B.tolist(), strict=True) if has])
    loss = functional.ctc_loss(
        log_probs_TBV, targets.tokens_L, lengths_B[has_B], targets.lengths_B[has_B], blank=blank, reduction="sum"
    )
    return loss / lengths_B[has_B].sum()
