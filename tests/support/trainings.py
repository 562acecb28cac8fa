"""What a training leaves in its folder, and one as a file that the command takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from student_trainer.config import TrainConfig
from tests.support.speech import Speech


def history(config: TrainConfig) -> list[dict[str, Any]]:
    """Less the seconds, the only entry that may differ."""
    records = json.loads((Path(config.output) / "run.json").read_bytes())["history"]
    for record in records:
        assert record.pop("seconds") > 0
    return records


def model_bytes(config: TrainConfig) -> bytes:
    return (Path(config.output) / "model.safetensors").read_bytes()


def checkpoint(config: TrainConfig) -> dict[str, Any]:
    return torch.load(Path(config.output) / "checkpoint.pt", weights_only=True)


def write_toml(folder: Path, speech: Speech, url: str) -> Path:
    """The run of ``train_config``, with a checkpoint after every step."""
    path = folder / "train.toml"
    path.write_text(
        f"""
name = "student"
output = "run"
seed = 7
corpus = {{ manifest = "{speech.manifest}", inventory = "{speech.inventory}" }}
soft_labels = {{ url = "{url}", temperature = 2.0 }}
front_end = {{ kind = "fbank", sample_rate = 8000, num_mel_bins = 8, stack = 3 }}
model = {{ architecture = "tdnn", arguments = {{ hidden = 16, num_layers = 2 }} }}

[training]
epochs = 3
batch_seconds = 1.5
learning_rate = 0.01
checkpoint_minutes = 1e-9
num_threads = 1
"""
    )
    return path
