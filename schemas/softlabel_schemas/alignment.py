"""Aligner: the senone of each frame of a transcribed utterance, by PocketSphinx and its English model.

Two passes over the audio: the words, with the dictionary's variants and silences between them, then the states of the phones
that the first pass chose. The model is tied to 16 kHz; its frames begin every 10 ms and are 25.6 ms long.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from softlabel_schemas.frame_labels import nearest_frames
from softlabel_schemas.lexicon import Pronunciation
from softlabel_schemas.senones import Phones, Senones

SAMPLE_RATE = 16_000
FRAME_SHIFT_MS = 10.0
# The model's, silences apart: those of the CMU Pronouncing Dictionary without stress.
PHONES = (
    *(
        "AA",
        "AE",
        "AH",
        "AO",
        "AW",
        "AY",
        "B",
        "CH",
        "D",
        "DH",
        "EH",
        "ER",
        "EY",
        "F",
        "G",
        "HH",
        "IH",
        "IY",
        "JH",
        "K",
    ),
    *("L", "M", "N", "NG", "OW", "OY", "P", "R", "S", "SH", "T", "TH", "UH", "UW", "V", "W", "Y", "Z", "ZH"),
)
# What is said is known, so nothing is gained by pruning, and the true path may look bad for seconds.
_BEAM = 1e-100
_WINDOW_MS = 25.6
_PUNCTUATION = '.,;:!?"()'


class AlignmentError(ValueError):
    """Why an utterance cannot be aligned; the same words for the same reason, so that they can be counted."""


@dataclass(frozen=True, slots=True, eq=False)
class Alignment:
    """Of each frame of 10 ms: senones int [T], and the phone that each is a state of, str [T]."""

    senones: Senones
    phones: Phones


class Aligner:
    """Loads the model, in half a second.

    Args:
        pronunciations: of words, in any case, that the dictionary lacks; those that it has stay as they are.
    """

    def __init__(self, pronunciations: Mapping[str, tuple[Pronunciation, ...]]) -> None:
        from pocketsphinx import Decoder

        self._decoder = Decoder(
            lm=None, loglevel="FATAL", bestpath=False, beam=_BEAM, wbeam=_BEAM, pbeam=_BEAM, samprate=float(SAMPLE_RATE)
        )
        for word, variants in pronunciations.items():
            if self._decoder.lookup_word(word.lower()) is None:
                for number, phones in enumerate(variants, start=1):
                    name = word.lower() if number == 1 else f"{word.lower()}({number})"
                    self._decoder.add_word(name, " ".join(phones), number == len(variants))

    def align(self, text: str, samples: npt.NDArray[np.int16], num_frames: int) -> Alignment:
        """The alignment of ``num_frames`` frames of 10 ms, of samples int16 [N] at 16 kHz.

        Raises:
            AlignmentError: a word has no pronunciation, or no path through the words fits the audio.
        """
        words = [self._word(word) for word in text.lower().split()]
        if not words:
            raise AlignmentError("no words")
        self._decoder.set_align_text(" ".join(words))
        # Forgets the noise of the utterance before; that of the first pass serves the second.
        self._decoder.reinit_feat()
        self._decode(samples)
        if self._decoder.hyp() is None:
            raise AlignmentError("no path through the words fits the audio")
        self._decoder.set_alignment()
        self._decode(samples)
        found = self._decoder.get_alignment()
        states = [] if found is None else [(state, phone.name) for phone in found.phones() for state in phone]
        if not states:
            raise AlignmentError("no path through the states fits the audio")
        durations = [state.duration for state, _ in states]
        senones_U = np.repeat([int(state.name) for state, _ in states], durations)
        nearest_T = nearest_frames(len(senones_U), num_frames, _WINDOW_MS / FRAME_SHIFT_MS)
        return Alignment(senones_U[nearest_T], np.repeat([phone for _, phone in states], durations)[nearest_T])

    def _word(self, word: str) -> str:
        """As the dictionary has it."""
        for name in (word, word.strip(_PUNCTUATION)):
            if name and self._decoder.lookup_word(name) is not None:
                return name
        raise AlignmentError(f"no pronunciation of '{word}'")

    def _decode(self, samples: npt.NDArray[np.int16]) -> None:
        self._decoder.start_utt()
        self._decoder.process_raw(samples.tobytes(), full_utt=True)
        self._decoder.end_utt()
