"""Learning rate, weight decay, soft weight and temperature of each kind of arm: chosen on dev speech, with equal effort.

Six trials for each kind and model, one seed each: the same three learning rates, with two values of what each kind has beside
them. The lowest dev frame error wins. Test speech has no part in it. A question may have trials of its own besides, for arms
of the kind "chosen".
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

# Of arms: hard labels alone, all soft outputs alone, soft targets and hard labels, what the trials of a question found.
Kind = Literal["hard", "soft", "both", "chosen"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """``soft``: keys of [soft_labels]; ``training``: keys of [training]."""

    training: Mapping[str, Any] = field(default_factory=dict)
    soft: Mapping[str, Any] | None = None

    def name(self) -> str:
        return "-".join(f"{key}-{value:g}" for key, value in {**(self.soft or {}), **self.training}.items())


_RATES = (1e-3, 2e-3, 4e-3)
TRIALS: Mapping[Kind, tuple[Settings, ...]] = {
    "hard": tuple(
        Settings(training={"learning_rate": rate, "weight_decay": decay})
        for rate, decay in itertools.product(_RATES, (0.01, 0.1))
    ),
    "soft": tuple(
        Settings(training={"learning_rate": rate}, soft={"weight": 1.0, "temperature": temperature})
        for rate, temperature in itertools.product(_RATES, (1.0, 2.0))
    ),
    "both": tuple(
        Settings(training={"learning_rate": rate}, soft={"weight": weight, "temperature": 1.0})
        for rate, weight in itertools.product(_RATES, (0.5, 0.8))
    ),
}
NUM_TRIALS = max(map(len, TRIALS.values()))


def trial_name(kind: Kind, settings: Settings) -> str:
    return f"{kind}-{settings.name()}"


def dev_errors(sweep: Path) -> dict[str, float]:
    """Mean dev frame error of each arm over its seeds, in percent; ``sweep``: the ``sweep.json`` of trials."""
    (found,) = json.loads(sweep.read_bytes())["sweeps"]
    errors: dict[str, list[float]] = {}
    for row in found["records"]:
        if row["metric"] == "frame_error_rate":
            errors.setdefault(row["arm"], []).append(row["value"])
    return {arm: fmean(values) for arm, values in errors.items()}


def chosen(sweep: Path) -> dict[Kind, Settings]:
    """Of each kind the settings with the lowest dev frame error."""
    errors, best = dev_errors(sweep), {}
    for kind, trials in TRIALS.items():
        made = [trial for trial in trials if trial_name(kind, trial) in errors]
        best[kind] = min(made, key=lambda trial: errors[trial_name(kind, trial)])
    return best
