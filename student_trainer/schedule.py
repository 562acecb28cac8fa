"""What changes in the course of a run, each a function of how far it is: a resumed run needs no memory of it."""

from __future__ import annotations

import math

from student_trainer.config import SoftLabelConfig, TrainingConfig


def learning_rate(config: TrainingConfig, epochs_done: float) -> float:
    """Linear warm-up, then a cosine to zero."""
    done = epochs_done / config.epochs
    if done < config.warmup:
        return config.learning_rate * max(done / config.warmup, 0.01)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (done - config.warmup) / (1 - config.warmup)))


def soft_weight(config: SoftLabelConfig, done: float) -> float:
    """Weight of the soft loss when a share ``done`` of the run, 0 to 1, is over: linear from ``weight`` to ``final_weight``.

    Falling, it is the teacher annealing of Clark et al., "BAM! Born-Again Multi-Task Networks" (2019): first follow the
    ensemble, then the hard labels, which may know better.
    """
    if config.final_weight is None:
        return config.weight
    return config.weight + (config.final_weight - config.weight) * done
