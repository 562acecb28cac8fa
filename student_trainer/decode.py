"""Words from phone posteriors: a Viterbi beam search through a decoding graph, and its errors against transcripts.

Frames' scores are scaled likelihoods, as of hybrid systems (Bourlard and Morgan, "Connectionist speech recognition", 1994)::

    acoustic_scale * (log p(phone | frame) - prior_exponent * log p(phone))

Shape suffixes: T frames, C phones (the columns of a graph).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import kaldi_decoder
import kaldifst
import numpy as np
import numpy.typing as npt
from pydantic import Field
from rapidfuzz.distance import Levenshtein

from softlabel_schemas.strict import StrictModel
from student_trainer.graph import with_word_penalty
from student_trainer.graph_folder import DecodingGraph

# Nats of scaled score, and states. On speechocean762, 15 and 7,000 change the word error rate by less than half a point for
# four times the work.
_BEAM = 12.0
_MAX_ACTIVE = 2000


class DecoderSettings(StrictModel):
    """What is chosen on a dev split.

    Attributes:
        acoustic_scale: weight of the frames against the language model; frames of one phone are not independent.
        prior_exponent: 0 scores posteriors, 1 likelihoods.
        word_insertion_penalty: nats for each word; higher makes fewer words.
    """

    acoustic_scale: Annotated[float, Field(gt=0)]
    prior_exponent: Annotated[float, Field(ge=0)]
    word_insertion_penalty: float


@dataclass(frozen=True, slots=True)
class Decoded:
    """``finished``: whether the best path ends where a sentence may; otherwise it is the best path that was left."""

    words: tuple[str, ...]
    finished: bool


class Decoder:
    """Decodes utterances one by one."""

    def __init__(self, graph: DecodingGraph, settings: DecoderSettings) -> None:
        self.graph = graph
        self.settings = settings
        self._prior_C = settings.prior_exponent * np.log(np.array(graph.description.phone_priors))
        # Kept: the decoder refers to its graph, and does not own it. Constant: its arcs lie together, which takes a tenth to a
        # fifth of the time away.
        self._fst = kaldifst.StdConstFst(
            with_word_penalty(graph.fst, len(graph.words), settings.word_insertion_penalty)
        )
        options = kaldi_decoder.FasterDecoderOptions(beam=_BEAM, max_active=_MAX_ACTIVE)
        self._decoder = kaldi_decoder.FasterDecoder(self._fst, options)

    def decode(self, log_probs_TC: npt.NDArray[np.floating]) -> Decoded:
        """The likeliest words for the phones' log-probabilities [T, C] (``PhoneColumns``)."""
        if not len(log_probs_TC):
            return Decoded((), finished=False)
        scores_TC = (self.settings.acoustic_scale * (log_probs_TC - self._prior_C)).astype(np.float32)
        self._decoder.decode(kaldi_decoder.DecodableCtc(scores_TC))
        finished = self._decoder.reached_final()
        found, path = self._decoder.get_best_path(use_final_probs=finished)
        if not found:
            return Decoded((), finished=False)
        _, _, labels, _ = kaldifst.get_linear_symbol_sequence(path)
        return Decoded(tuple(self.graph.words[label - 1] for label in labels), finished)


class WordErrors:
    """Decodes utterances and counts errors against their transcripts.

    Args:
        texts: transcript of each utterance by id, words apart by white space.
    """

    def __init__(self, decoder: Decoder, texts: Mapping[str, str]) -> None:
        self._decoder = decoder
        self._texts = texts
        self._known = frozenset(decoder.graph.words)

    def record(self, utterance_id: str, log_probs_TC: npt.NDArray[np.floating]) -> dict[str, Any]:
        """Of one utterance: words of the transcript, those that the graph does not have, and errors."""
        reference = self._texts[utterance_id].split()
        decoded = self._decoder.decode(log_probs_TC)
        return {
            "words": len(reference),
            "word_errors": Levenshtein.distance(reference, decoded.words),
            "oov_words": sum(word not in self._known for word in reference),
            "decoded": " ".join(decoded.words),
            "decoding_finished": decoded.finished,
        }

    def setup(self) -> dict[str, Any]:
        """What decided the words, for the evaluation's file."""
        return {
            "graph_digest": self._decoder.graph.description.digest(),
            "decoder": self._decoder.settings.model_dump(mode="json"),
        }
