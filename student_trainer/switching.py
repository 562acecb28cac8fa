"""Which of several datasets teaches a batch, where teachers are switched.

Fukuda et al., "Efficient Knowledge Distillation from an Ensemble of Teachers" (2017), switch the teacher per mini-batch: over
many batches the student learns from all, and is never shown a mean that none of them said. The choice is a function of (seed,
epoch, step): a resumed run is taught by what it would have been taught by.

Memory. Of a corpus of one pool (``training.pool_seconds``) the targets of all datasets are kept; of a larger one those of the
batches to come, each by its own dataset, which is as much as one dataset takes.
"""

from __future__ import annotations

import numpy as np

# Keeps the draw apart from the seed of the step's dropout, which is made of the same three numbers.
_TAG = 0x73776974


def dataset_of_step(seed: int, epoch: int, step: int, num_datasets: int) -> int:
    """Index of the dataset that teaches this step, uniform over all."""
    return int(np.random.SeedSequence([seed, epoch, step, _TAG]).generate_state(1)[0]) % num_datasets
