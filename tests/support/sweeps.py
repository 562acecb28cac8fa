"""A SWEEP.toml on the tones of ``speech.py``: a hard-only arm and one with the likeliest two classes, two seeds each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_SWEEP = """
output = "{output}"
seeds = {seeds}

[base]
corpus = {{ manifest = "corpus.parquet", inventory = "inventory.json" }}
soft_labels = {{ url = "labels", temperature = 2.0 }}
front_end = {{ kind = "fbank", sample_rate = 8000, num_mel_bins = 8, stack = 3 }}
model = {{ architecture = "tdnn", arguments = {{ hidden = 16, num_layers = 2 }} }}
training = {{ epochs = 30, batch_seconds = 0.3, learning_rate = 0.01 }}

[[arms]]
name = "hard"
soft_labels = false

[[arms]]
name = "top-2"
soft_labels = {{ selection = {{ policy = "top_k", k = 2, keep_hard_label = true }} }}
{arms}
[evaluate]
ensemble = "labels-test"

[compare]
pairs = [["top-2", "ensemble"]]
"""


def write_sweep(folder: Path, output: str, *, seeds: Sequence[int] = (0, 1), arms: str = "") -> Path:
    """Beside the corpus and the datasets ``labels`` and ``labels-test``; ``arms``: further ones, as TOML."""
    path = folder / f"{output}.toml"
    path.write_text(_SWEEP.format(output=output, seeds=list(seeds), arms=arms), encoding="utf-8")
    return path
