"""Teachers that are not acoustic, with random weights, and corpora for them: a position of the output is a frame of 1 s.

An image is an utterance of one position, its pixels the features of that frame. A text is an utterance with a position for each
token, whose id is the only feature.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from softlabel_schemas import ClassInventory, Utterance, write_corpus
from softlabel_schemas.bundle import write_bundle
from softlabel_schemas.front_end import Precomputed
from tests.support.teachers import export

SECOND_MS = 1000.0
IMAGE_SHAPE = (3, 8, 8)
NUM_PIXELS = 3 * 8 * 8
IMAGE_CLASSES = ClassInventory(names=tuple(f"class-{index}" for index in range(10)))
# More than 16 bits can number.
NUM_TOKENS = 70_000
TOKENS = ClassInventory(names=tuple(f"token-{index}" for index in range(NUM_TOKENS)))


class ImageClassifier(nn.Module):
    """images_B1D -> logits [B, 1, V]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, kernel_size=3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, IMAGE_CLASSES.num_classes)
        )

    def forward(self, images_B1D: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        logits_BV = self.layers(images_B1D[:, 0].reshape(-1, *IMAGE_SHAPE))
        return 3 * logits_BV[:, None], torch.ones_like(lengths_B)


class CausalLanguageModel(nn.Module):
    """ids_BT1, as float32, which is exact up to 2^24 -> logits [B, T, V] of the token after each."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_TOKENS, 8)
        self.output = nn.Linear(8, NUM_TOKENS)

    def forward(self, ids_BT1: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        return self.output(self.embedding(ids_BT1[:, :, 0].long()).cumsum(dim=1)), lengths_B


class TokenEncoder(nn.Module):
    """A student's, of the same ids."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.output_dim = 4
        self.embedding = nn.Embedding(NUM_TOKENS, 4)

    def forward(self, ids_BT1: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        return self.embedding(ids_BT1[:, :, 0].long()), lengths_B


def token_encoder(num_features: int) -> TokenEncoder:
    return TokenEncoder(num_features)


def write_teacher(folder: Path, model: nn.Module, num_features: int, inventory: ClassInventory) -> None:
    write_bundle(
        folder,
        name=folder.name,
        model=export(model.eval(), num_features),
        factory=None,
        arguments={},
        front_end=Precomputed(num_features=num_features, frame_shift_ms=SECOND_MS),
        inventory=inventory,
        frame_shift_ms=SECOND_MS,
    )


def write_positions(
    folder: Path, features: list[np.ndarray], labels: list[np.ndarray], inventory: ClassInventory
) -> str:
    """A corpus of stored features float32 [T, D] with hard labels int32 [T]; one sample a second, so that T is the duration."""
    folder.mkdir(parents=True)
    utterances = []
    for index, (features_TD, labels_T) in enumerate(zip(features, labels, strict=True)):
        np.save(folder / f"{index}.npy", features_TD.astype(np.float32))
        utterances.append(
            Utterance(
                utterance_id=f"{index}",
                features=f"{index}.npy",
                sample_rate=1,
                num_samples=len(features_TD),
                split="train",
                hard_labels=labels_T.astype(np.int32),
            )
        )
    path = folder / "corpus.parquet"
    write_corpus(path, utterances, inventory=inventory, hard_label_frame_shift_ms=SECOND_MS)
    (folder / "inventory.json").write_bytes(inventory.to_json())
    return str(path)
