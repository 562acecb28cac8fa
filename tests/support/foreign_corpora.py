"""A corpus of three short recordings in the forms that other tools write, by their own libraries where they have some."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile

from softlabel_schemas import Corpus, load_corpus
from softlabel_schemas.front_end import Fbank
from softlabel_schemas.utterance_reader import UtteranceReader

RATE = 16_000
TEXTS = {"anna-1": "one two", "anna-2": "three", "bert-1": "four"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recordings:
    """Noise in ``audio/``; a class id for each frame of 10 ms.

    Attributes:
        samples: int16 [num_samples], by utterance id.
        class_ids: int32 [frames], by utterance id; 0 to 4.
    """

    folder: Path
    samples: dict[str, npt.NDArray[np.int16]]
    class_ids: dict[str, npt.NDArray[np.int32]]

    def audio(self, utterance_id: str) -> Path:
        return self.folder / "audio" / f"{utterance_id}.flac"

    def check_audio(self, corpus: Corpus) -> None:
        """That the reader of the labelling and the training finds the samples of each utterance."""
        reader = UtteranceReader(corpus)
        for utterance in corpus:
            np.testing.assert_array_equal(reader.samples(utterance, Fbank()), self.samples[utterance.utterance_id])


def make_recordings(folder: Path) -> Recordings:
    rng = np.random.default_rng(5)
    (folder / "audio").mkdir(parents=True)
    samples = {each: rng.integers(-999, 999, 4_000 + 815 * index, dtype=np.int16) for index, each in enumerate(TEXTS)}
    found = Recordings(
        folder=folder,
        samples=samples,
        class_ids={
            each: rng.integers(0, 5, Fbank().num_frames(len(values))).astype(np.int32)
            for each, values in samples.items()
        },
    )
    for each, values in samples.items():
        soundfile.write(found.audio(each), values, RATE)
    return found


def write_kaldi(recordings: Recordings, folder: Path) -> None:
    """wav.scp, text and utt2spk."""
    folder.mkdir()
    for name, value in (
        ("wav.scp", lambda each: str(recordings.audio(each))),
        ("text", lambda each: TEXTS[each]),
        ("utt2spk", lambda each: each.split("-")[0]),
    ):
        (folder / name).write_text("".join(f"{each} {value(each)}\n" for each in recordings.samples))


def rows_of(path: Path) -> dict[str, dict[str, object]]:
    """The columns of a manifest that do not depend on the audio's bytes, by utterance id."""
    return {
        each.utterance_id: {"text": each.text, "speaker": each.speaker, "split": each.split}
        for each in load_corpus(path)
    }
