"""Curve: a cost at several sizes, and how it grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tests.benchmarks.figures import Figure

# Linear, and what the logarithm of a sort and the noise of the machine add.
MAX_EXPONENT = 1.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """``values``, in ``unit``, at ``sizes`` of ``size_name`` (shards, utterances, workers)."""

    name: str
    size_name: str
    unit: str
    sizes: Sequence[int]
    values: Sequence[float]

    @property
    def exponent(self) -> float:
        """b of the least-squares fit of a * size^b, on logarithms: 1 is linear."""
        return float(np.polyfit(np.log(self.sizes), np.log(self.values), 1)[0])

    def at(self, size: float) -> float:
        """Extrapolated from the largest size by the last two points' exponent, at least linearly."""
        (before, last), (low, high) = self.sizes[-2:], self.values[-2:]
        exponent = max(1.0, float(np.log(high / low) / np.log(last / before)))
        return float(high * (size / last) ** exponent)

    def figure(self, note: str = "", max_exponent: float = MAX_EXPONENT) -> Figure:
        points = "; ".join(
            f"{size:,}: {value:.3g} {self.unit}" for size, value in zip(self.sizes, self.values, strict=True)
        )
        return Figure(
            name=f"{self.name}: growth with {self.size_name}",
            unit="exponent",
            value=self.exponent,
            target=f"exponent <= {max_exponent:g}",
            met=self.exponent <= max_exponent,
            note=f"{points}{'; ' if note else ''}{note}",
        )
