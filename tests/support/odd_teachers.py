"""Teachers that misbehave: factories for the failure tests."""

from __future__ import annotations

import os
import time
from pathlib import Path

from torch import Tensor

from tests.support.teachers import LinearModel


class UnmaskedModel(LinearModel):
    """Takes the mean of all frames of the batch from each, those behind the utterance too."""

    def forward(self, features_BTD: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        # Features have the mean 0 themselves.
        level_BD = features_BTD.abs().mean(dim=1, keepdim=True)
        return super().forward(3 * (features_BTD.abs() - level_BD), lengths_B)


def unmasked_model(num_features: int, num_classes: int) -> UnmaskedModel:
    return UnmaskedModel(num_features, num_classes, nan_above=1e9, delay_seconds=0.0, rank=3)


class OddOnce(LinearModel):
    """The first batch of all that any process labels goes wrong; the file ``marker`` remembers it. Another try goes well."""

    marker: Path
    what: str

    def forward(self, features_BTD: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        try:
            self.marker.touch(exist_ok=False)
        except FileExistsError:
            return super().forward(features_BTD, lengths_B)
        if self.what == "die":
            os._exit(3)
        if self.what == "raise":
            raise RuntimeError("the device fell over")
        # Longer than any test: what waits for it must give it up.
        time.sleep(3600)
        raise AssertionError("nobody gave it up")


def odd_once_model(num_features: int, num_classes: int, marker: str, what: str, delay_seconds: float = 0.0) -> OddOnce:
    """
    Args:
        what: "hang", "die" or "raise".
    """
    model = OddOnce(num_features, num_classes, nan_above=1e9, delay_seconds=delay_seconds, rank=3)
    model.marker, model.what = Path(marker), what
    return model
