"""Synthesise a small multi-voice English corpus with exact phone boundaries, for the local demo.

The speech comes from eSpeak NG as bundled in the ``espeakng-loader`` wheel, and the hard labels from the phoneme events
that it emits while it renders, so that no forced aligner is needed. A plosive's event marks its release: the silent
closure before it counts as the end of the preceding phone.

Reproducibility: eSpeak keeps state between utterances, even across ``espeak_Terminate``, so that the samples and the
boundaries of a sentence depend on everything spoken before it. Each `Synthesizer` therefore loads a private copy of the
library, whose static state is new, and `synthesize_corpus` speaks its whole corpus through one of them in fixed order;
changing a number of sentences changes the audio of the later ones. eSpeak also seeds its noise source with the time of
day, which makes breathy voices differ from run to run: the seed is fixed here, and those voices are not used.
"""

import ctypes
import importlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.int16]

SAMPLE_RATE = 16000
SILENCE = "SIL"

# The voice of each speaker, an accent and a variant. No variant occurs in two splits, so that dev and test measure
# generalisation. Both accents are in train, as each has sounds that the other lacks.
VOICES = {
    "train": ["en+m1", "en-us+f4", "en+f1", "en-us+m3", "en+Annie", "en-us+m7"],
    "dev": ["en+linda", "en-us+m2"],
    "test": ["en+m4", "en-us+steph", "en+m8"],
}
_RATES_WPM, _PITCHES = (165, 175, 155, 185), (45, 50, 55)  # of the speakers of a split, in turn

# eSpeak's mnemonics, freed of stress marks, that are variants of another phone: reduced vowels, vowels that only one of
# the accents distinguishes, and allophones of consonants. Every other mnemonic is a phone of its own (48 with SIL).
_FOLD = {"I2": "I", "I#": "I", "i": "i:", "a#": "@", "@2": "@", "O@": "O:", "o@": "O:", "O2": "O:", "A@": "A:"}
_FOLD |= {"i@3": "i@", "aI3": "aI@", "@L": "l", "r-": "r", "t#": "t", "t2": "t", ";": "j"}

_TEMPLATES = (
    "DET ADJECTIVE NOUN ACTED DET NOUN / DET NOUN ACTED NUMBER ADJECTIVE PLURAL / WHEN, DET NOUN MOVED ADVERB"
    " / NAME ADVERB ACTED DET NOUN WHERE DET NOUN / DET ADJECTIVE NOUN MOVED WHERE DET NOUN"
    " / WHEN, NAME ACTED DET ADJECTIVE NOUN / NAME and NAME MOVED ADVERB WHERE DET NOUN"
    " / NUMBER ADJECTIVE PLURAL MOVED ADVERB / PLURAL and PLURAL MOVED WHERE DET ADJECTIVE NOUN"
)
_WORDS = {
    "DET": "the this that every another my our her his your their",
    "NUMBER": "two three four five six seven eight nine ten eleven twelve thirty forty many several",
    "WHEN": "yesterday tonight today sometimes usually finally meanwhile afterwards",
    "WHERE": "near behind beside under above around through across beyond inside along towards",
    "NAME": "George Alice Henry Julia Victor Ruth Boyd Sheila Charles Yvonne Zachary Hugh Naomi Douglas Joyce Matthew",
    "ADVERB": "quietly slowly gladly often never always suddenly carefully proudly bravely calmly shyly loudly roughly",
    "ADJECTIVE": "happy quiet yellow tiny golden broken gentle heavy narrow young ancient clever purple frozen noisy"
    " shiny rough smooth bright dusty curious famous wooden silver orange thirsty lazy brave cheap thick royal giant"
    " foggy humble usual pure casual spoiled moist strange loud good full cruel fresh rare sharp warm dark bare weird",
    "NOUN": "farmer teacher village river garden engine mountain kitchen treasure vision garage boy coin voice oyster"
    " book wood cook foot mouse tower house thunder path tooth feather father singer king yard yacht chicken judge"
    " horse bird nurse church bear chair ear beard fire flower tour window doctor zebra jungle sugar bush wolf goose"
    " shoe music value queen engineer sheep machine leisure thief language orchard castle guitar poet lion museum",
    "PLURAL": "children horses boxes apples boys voices clouds teeth brothers kings judges oranges chairs ships bells"
    " drums stones leaves thieves garages measures toys cowboys watches bushes wheels jars guards soldiers visitors",
    "ACTED": "found followed admired measured destroyed enjoyed pushed pulled carried watched borrowed noticed heard"
    " chased visited avoided covered questioned shook threw caught chose forgot joined guarded served judged loved hid",
    "MOVED": "walked jumped shouted stood slept danced whistled laughed wandered hurried sang turned flew rejoiced",
}

# Constants and the event structure of espeak-ng/speak_lib.h.
_SYNCHRONOUS, _PHONEME_EVENTS, _DONT_EXIT = 2, 0x0001, 0x8000
_POS_CHARACTER, _CHARS_UTF8, _END_PAUSE = 1, 0x0001, 0x1000
_RATE, _PITCH = 1, 3
_EVENT_LIST_END, _EVENT_PHONEME = 0, 7
_FIELDS = ("type", "unique_identifier", "text_position", "length", "audio_position", "sample")


class _Event(ctypes.Structure):
    # In C the last field is a union, of which phoneme events use the string.
    _fields_ = [*((name, ctypes.c_int) for name in _FIELDS), ("user_data", ctypes.c_void_p), ("id", ctypes.c_char * 8)]


_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(_Event))


@dataclass(frozen=True, kw_only=True, slots=True)
class PhoneSegment:
    """One phone and its half-open extent ``[start, end)`` in samples at `SAMPLE_RATE`."""

    phone: str
    start: int
    end: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SynthesizedUtterance:
    """One utterance: mono ``samples`` (int16, [num_samples]) and the ``segments`` that cover them without a gap."""

    utterance_id: str
    speaker: str
    split: str
    text: str
    samples: Samples
    segments: tuple[PhoneSegment, ...]


class Synthesizer:
    """Context manager around a private, fresh instance of eSpeak NG; entering raises RuntimeError if it cannot load."""

    def __init__(self) -> None:
        self._library: ctypes.CDLL | None = None
        self._callback = _CALLBACK(self._collect)  # kept: the library holds only a bare pointer to it
        self._native_rate = 0
        self._data_path = Path()
        self._pcm = bytearray()
        self._events: list[tuple[int, str]] = []

    def __enter__(self) -> Self:
        loader = _optional_module("espeakng_loader")
        self._data_path = Path(loader.get_data_path())
        # All who load the same file share its static state, hence the copy. It can be deleted once it is loaded, except
        # on Windows, where it stays in the temporary folder.
        try:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                library = ctypes.CDLL(shutil.copy(loader.get_library_path(), folder))
        except OSError as error:
            raise RuntimeError(f"cannot load the eSpeak NG library {loader.get_library_path()}: {error}") from error
        # The return value is no proof of success: with a data folder that is missing, or whose path exceeds its fixed
        # buffer, the library goes on without data. So it is asked which folder it took.
        data_path, taken = os.fsencode(self._data_path), ctypes.c_char_p()
        rate = library.espeak_Initialize(_SYNCHRONOUS, 0, data_path, _PHONEME_EVENTS | _DONT_EXIT)
        library.espeak_Info.restype = ctypes.c_char_p
        library.espeak_Info(ctypes.byref(taken))
        if rate <= 0 or taken.value != data_path or not (self._data_path / "phontab").is_file():
            raise RuntimeError(f"eSpeak NG cannot use its data in {self._data_path}: missing, or too long a path")
        library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        library.espeak_SetSynthCallback(self._callback)
        self._library, self._native_rate = library, rate
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._library is not None:
            self._library.espeak_Terminate()
        self._library = None

    def say(self, text: str, voice: str, *, rate_wpm: int, pitch: int) -> tuple[Samples, tuple[PhoneSegment, ...]]:
        """Speak ``text``; return the samples (int16, [num_samples]) and the segments that cover them without a gap.

        ``rate_wpm`` is in words per minute (80 to 450), ``pitch`` on eSpeak's scale (0 to 99, 50 is neutral).

        Raises:
            ValueError: if ``rate_wpm`` or ``pitch`` is out of range.
            RuntimeError: if the synthesizer is not open, the voice is unknown, or nothing could be synthesised.
        """
        library = self._library
        if library is None:
            raise RuntimeError("the synthesizer is not open: use it as a context manager")
        if not (80 <= rate_wpm <= 450 and 0 <= pitch <= 99):
            raise ValueError(f"rate_wpm must be in 80..450 and pitch in 0..99, not {rate_wpm} and {pitch}")
        # The library ignores an unknown variant without an error, hence the look into the data folder.
        _, plus, variant = voice.partition("+")
        variants = sorted(path.name for path in (self._data_path / "voices" / "!v").iterdir())
        if (plus and variant not in variants) or library.espeak_SetVoiceByName(voice.encode()) != 0:
            bases = sorted(path.name.lower() for path in (self._data_path / "lang").rglob("en*") if path.is_file())
            raise RuntimeError(f"unknown eSpeak voice {voice!r}; English: {bases}; variants, after a +: {variants}")
        library.espeak_SetParameter(_RATE, rate_wpm, 0)  # after the voice, which resets the parameters
        library.espeak_SetParameter(_PITCH, pitch, 0)
        self._pcm.clear()
        self._events.clear()
        data = text.encode()
        size = ctypes.c_size_t(len(data) + 1)
        status = library.espeak_Synth(data, size, 0, _POS_CHARACTER, 0, _CHARS_UTF8 | _END_PAUSE, None, None)
        if status != 0 or not self._pcm:
            raise RuntimeError(f"eSpeak NG could not speak {text!r} with the voice {voice!r} (status {status})")
        native = np.frombuffer(bytes(self._pcm), dtype=np.int16).astype(np.float64)
        samples = _to_int16(_optional_module("soxr").resample(native, self._native_rate, SAMPLE_RATE))
        return samples, self._segments(len(samples))

    def _collect(self, pcm: int | None, num_samples: int, events: Any) -> int:
        if pcm and num_samples > 0:
            self._pcm += ctypes.string_at(pcm, 2 * num_samples)
        for event in events:
            if event.type == _EVENT_LIST_END:
                break
            if event.type == _EVENT_PHONEME:
                self._events.append((event.sample, event.id.decode()))
        return 0

    def _segments(self, num_samples: int) -> tuple[PhoneSegment, ...]:
        scale = SAMPLE_RATE / self._native_rate
        marks = [(_fold_phone(name), min(round(sample * scale), num_samples)) for sample, name in self._events]
        segments: list[PhoneSegment] = []
        for (phone, start), (_, end) in pairwise([(SILENCE, 0), *marks, (SILENCE, num_samples)]):
            if end > start:
                joins = segments and phone == segments[-1].phone == SILENCE
                segments.append(PhoneSegment(phone=phone, start=segments.pop().start if joins else start, end=end))
        return tuple(segments)


def synthesize_corpus(
    *, num_train_sentences: int, num_dev_sentences: int, num_test_sentences: int, seed: int = 0
) -> Iterator[SynthesizedUtterance]:
    """Synthesise the splits train, dev and test in turn; the same arguments give the same bytes in any process.

    No sentence occurs twice, and the voices of a split (`VOICES`), which no other split has, take its sentences by
    turns. The channel is seeded from ``(seed, speaker)``, the noise from ``(seed, utterance index)``.

    Raises:
        ValueError: if a number of sentences is negative.
        RuntimeError: if the synthesiser cannot be loaded (see `Synthesizer`).
    """
    counts = {"train": num_train_sentences, "dev": num_dev_sentences, "test": num_test_sentences}
    if min(counts.values()) < 0:
        raise ValueError(f"the numbers of sentences must not be negative: {counts}")
    text_rng = np.random.default_rng([seed, 0])
    texts: dict[str, None] = {}
    while len(texts) < sum(counts.values()):
        texts[_sentence(text_rng)] = None
    numbered = enumerate(texts)
    with Synthesizer() as synthesizer:
        for split_index, (split, count) in enumerate(counts.items()):
            for number, (index, text) in enumerate(islice(numbered, count)):
                speaker_index = number % len(VOICES[split])
                voice = VOICES[split][speaker_index]
                rate_wpm, pitch = _RATES_WPM[speaker_index % 4], _PITCHES[speaker_index % 3]
                clean, segments = synthesizer.say(text, voice, rate_wpm=rate_wpm, pitch=pitch)
                channel_rng = np.random.default_rng([seed, 1, split_index, speaker_index])
                yield SynthesizedUtterance(
                    utterance_id=f"{split}-{number:05d}",
                    speaker=f"{voice.replace('+', '_')}_r{rate_wpm}_p{pitch}",
                    split=split,
                    text=text,
                    samples=_degrade(clean, channel_rng, np.random.default_rng([seed, 2, index])),
                    segments=segments,
                )


def frame_labels(
    segments: Sequence[PhoneSegment], *, num_frames: int, frame_shift: int, states_per_phone: int = 3
) -> tuple[list[str], list[int]]:
    """Label each frame with the phone at its centre sample and with the state, 0 to ``states_per_phone - 1``.

    Frame ``t`` covers the samples ``[t * frame_shift, (t + 1) * frame_shift)``, with its centre ``frame_shift // 2``
    after its start. The states divide a segment equally. Frames centred after the last segment get its last state.

    Raises:
        ValueError: if there is no segment, ``num_frames`` is negative, or another number is not positive.
    """
    if not segments or num_frames < 0 or frame_shift < 1 or states_per_phone < 1:
        raise ValueError("frame labels need segments, num_frames >= 0, frame_shift >= 1 and states_per_phone >= 1")
    phones: list[str] = []
    states: list[int] = []
    remaining = iter(segments)
    segment, last = next(remaining), segments[-1]
    for centre in range(frame_shift // 2, num_frames * frame_shift, frame_shift):
        while centre >= segment.end and segment is not last:
            segment = next(remaining)
        state = (centre - segment.start) * states_per_phone // (segment.end - segment.start)
        phones.append(segment.phone)
        states.append(min(state, states_per_phone - 1))
    return phones, states


def _optional_module(name: str) -> Any:
    """Import a package that only the demo needs; it may be absent where this file is merely checked."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RuntimeError(f"the demo corpus needs the package {name.replace('_', '-')}: {error}") from error


def _fold_phone(mnemonic: str) -> str:
    phone = mnemonic.lstrip("',")
    return SILENCE if not phone or phone.startswith("_") else _FOLD.get(phone, phone)


def _sentence(rng: np.random.Generator) -> str:
    """Fill the slots of a random template; no word occurs twice in a sentence."""
    words: list[str] = []
    for slot in str(rng.choice(_TEMPLATES.split(" / "))).split():
        key = slot.rstrip(",")
        choices = [word for word in _WORDS.get(key, key).split() if word not in words]
        words.append(str(rng.choice(choices)) + slot[len(key) :])
    return " ".join(words)


def _degrade(clean: Samples, channel_rng: np.random.Generator, rng: np.random.Generator) -> Samples:
    """Apply the speaker's channel, a one-pole filter and a gain, and add white noise at an SNR of 5 to 20 dB."""
    pole, gain_db = channel_rng.uniform(-0.4, 0.6), channel_rng.uniform(-9.0, -3.0)
    # The impulse response of the filter, cut where it is far below one quantisation step.
    response = (1.0 - abs(pole)) * pole ** np.arange(48)
    signal = 10.0 ** (gain_db / 20.0) * np.convolve(clean.astype(np.float64), response)[: len(clean)]
    noise_rms = np.sqrt(np.mean(signal**2)) * 10.0 ** (-rng.uniform(5.0, 20.0) / 20.0)
    return _to_int16(signal + noise_rms * rng.standard_normal(len(clean)))


def _to_int16(signal: npt.NDArray[np.float64]) -> Samples:
    return np.clip(np.rint(signal), -32768, 32767).astype(np.int16)
