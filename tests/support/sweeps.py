"""A SWEEP.toml on the tones of ``speech.py``: a hard-only arm and one with the likeliest two classes, two seeds each.

:func:`write_words` makes the corpus and what decoding words needs, :func:`write_ctc` a corpus of transcripts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from student_trainer.graph_folder import make_graph
from tests.support.speech import INVENTORY, Speech, write_soft_labels, write_speech
from tests.support.transcripts import write_ctc_labels, write_transcribed
from tests.support.words import write_words_speech

_SWEEP = """
output = "{output}"
seeds = {seeds}

[base]
corpus = {{ manifest = "corpus.parquet", inventory = "inventory.json" }}
soft_labels = {{ url = "labels", temperature = 2.0 }}
front_end = {{ kind = "fbank", sample_rate = 8000, num_mel_bins = 8, stack = {stack} }}
{ctc}model = {{ architecture = "tdnn", arguments = {{ hidden = 16, num_layers = 2 }} }}
training = {{ epochs = {epochs}, batch_seconds = 0.3, learning_rate = 0.01 }}

[[arms]]
name = "hard"
soft_labels = false

[[arms]]
name = "top-2"
soft_labels = {{ selection = {{ policy = "top_k", k = 2, keep_hard_label = true }} }}
{arms}
[evaluate]
ensemble = "labels-test"
{words}
[compare]
pairs = [["top-2", "ensemble"]]
"""


_CTC = 'ctc = { units = "words" }\n'
_WORDS = 'graph = "graph"\ndev_ensemble = "labels-dev"\n'


def write_sweep(
    folder: Path,
    output: str,
    *,
    seeds: Sequence[int] = (0, 1),
    arms: str = "",
    epochs: int = 12,
    words: bool = False,
    ctc: bool = False,
) -> Path:
    """Beside the corpus and the datasets ``labels`` and ``labels-test``.

    Args:
        arms: further ones, as TOML.
        words: decoded too; then what :func:`write_words` makes is needed.
        ctc: on what :func:`write_ctc` makes.
    """
    path = folder / f"{output}.toml"
    of_kind = {"words": _WORDS if words else "", "ctc": _CTC if ctc else "", "stack": 2 if ctc else 3}
    toml = _SWEEP.format(output=output, seeds=list(seeds), arms=arms, epochs=epochs, **of_kind)
    path.write_text(toml, encoding="utf-8")
    return path


def write_words(folder: Path) -> Speech:
    """A corpus with transcripts, its ``graph``, and the datasets ``labels``, ``labels-dev`` and ``labels-test``."""
    speech = write_words_speech(folder, write_speech(folder / "speech", unlabelled_share=0.0, hashed=True))
    files = speech.manifest, ["train"], str(folder / "lexicon.txt")
    make_graph(*files, INVENTORY, str(folder / "graph"), ngram_order=2, min_phone_frames=1)
    for name, split in (("labels", "train"), ("labels-dev", "dev"), ("labels-test", "test")):
        write_soft_labels(folder / name, speech.split(split))
    return speech


def write_ctc(folder: Path) -> None:
    """A corpus with transcripts alone, and the datasets ``labels`` and ``labels-test``."""
    speech = write_transcribed(folder)
    for name, split in (("labels", "train"), ("labels-test", "test")):
        write_ctc_labels(folder / name, speech.split(split))
