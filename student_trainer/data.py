"""What a student is fed: features, hard labels and soft targets, joined by utterance id, in a reproducible order.

::

    corpus rows -> Order.pools(epoch) -> pool -> batches of rows -> collate -> Step
                                    one thread: load    another: collate     the loop

The order is a function of durations, seed and epoch alone: the same with and without soft labels, and on every machine.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from softlabel_schemas.corpus import Corpus, Utterance
from softlabel_schemas.dataset import SoftLabelDataset
from softlabel_schemas.errors import InputError
from softlabel_schemas.frame_selection import frame_weights, silence_classes
from softlabel_schemas.front_end import Fbank, Precomputed, UtteranceReader
from softlabel_schemas.selection import NO_LABEL, check_derivable, narrow
from softlabel_schemas.targets import SoftTargets
from student_trainer.batch import Batch, Example, collate
from student_trainer.config import SoftLabelConfig
from student_trainer.order import Order
from student_trainer.prefetch import prefetched

# Collating 40 s of speech takes 0.3 ms, the step of a small student 30; some are ahead for when the processors are busy.
_BATCHES_AHEAD = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One batch and its place: step ``step`` of the ``num_steps`` of its epoch."""

    epoch: int
    step: int
    num_steps: int
    batch: Batch

    @property
    def ends_epoch(self) -> bool:
        return self.step + 1 == self.num_steps


class WeightedTargets(NamedTuple):
    """Soft targets of an utterance and the weight of each frame, float32 [T]; None: 1."""

    soft: SoftTargets
    weights_T: npt.NDArray[np.float32] | None


class SoftLabels:
    """The published targets of a corpus, at one temperature and selection.

    Raises:
        InputError: the dataset does not fit the corpus or cannot give what is asked; both values are named.
    """

    def __init__(
        self, dataset: SoftLabelDataset, config: SoftLabelConfig, corpus: Corpus, inventory_digest: str
    ) -> None:
        spec = dataset.manifest.spec
        if spec.inventory_digest != inventory_digest:
            raise InputError(
                f"{dataset.store.url}: labels are of class inventory {spec.inventory_digest[:12]} "
                f"({spec.num_classes} classes), the student's is {inventory_digest[:12]}"
            )
        shift = corpus.hard_label_frame_shift_ms
        if shift is not None and shift != spec.frame_shift_ms:
            raise InputError(
                f"{dataset.store.url}: frame shift of the soft targets is {spec.frame_shift_ms:g} ms, "
                f"of the hard labels {shift:g} ms"
            )
        if config.temperature not in spec.temperatures:
            raise InputError(
                f"{dataset.store.url}: temperature {config.temperature:g} is asked for, "
                f"tails are stored for {', '.join(f'{t:g}' for t in spec.temperatures)}"
            )
        if config.selection is not None:
            check_derivable(spec.selection, config.selection)
        # Of the dataset's inventory, which is the student's.
        self._silence_V = None if config.frames is None else silence_classes(dataset.inventory, config.frames)
        self.dataset, self.config = dataset, config

    def of(self, utterances: Sequence[Utterance]) -> list[WeightedTargets]:
        """Targets in the order of ``utterances``; each is joined by id, a missing one or another length raises."""
        try:
            stored = self.dataset.read_utterances([utterance.utterance_id for utterance in utterances])
        except KeyError as error:
            raise InputError(f"no soft targets for utterance {error.args[0]}") from None
        found = []
        for utterance, labelled in zip(utterances, stored, strict=True):
            targets, labels_T = labelled.targets, utterance.hard_labels
            if labels_T is None:
                labels_T = np.full(targets.num_frames, NO_LABEL, dtype=np.int32)
            if len(labels_T) != targets.num_frames:
                raise InputError(
                    f"utterance {utterance.utterance_id}: {targets.num_frames} frames of soft targets, "
                    f"{len(labels_T)} of hard labels"
                )
            weights_T = None
            if self.config.frames is not None and self._silence_V is not None:
                # From all that is stored: a narrower selection may be a sample.
                weights_T = frame_weights(targets, labels_T, self._silence_V, self.config.frames)
            if self.config.selection is not None:
                targets = narrow(targets, self.config.selection, labels_T)
            found.append(WeightedTargets(targets, weights_T))
        return found


class TrainingData:
    """Examples of a corpus, read on demand or kept in memory."""

    def __init__(self, corpus: Corpus, front_end: Fbank | Precomputed, soft_labels: SoftLabels | None) -> None:
        self.corpus, self.front_end, self.soft_labels = corpus, front_end, soft_labels
        self._reader = UtteranceReader(corpus)

    @cached_property
    def seconds_N(self) -> npt.NDArray[np.float64]:
        return self.corpus.seconds()

    def load(self, rows: Sequence[int], given_up: threading.Event | None = None) -> dict[int, Example]:
        """Examples by row. Rows are read in order, so that each shard of soft targets is decoded once.

        Args:
            given_up: once set, the rest is left out: nobody waits for it any more.
        """
        ordered = sorted(rows)
        utterances = [self.corpus[row] for row in ordered]
        soft = self.soft_labels.of(utterances) if self.soft_labels else [None] * len(utterances)
        examples = {}
        for row, utterance, targets in zip(ordered, utterances, soft, strict=True):
            if given_up is not None and given_up.is_set():
                break
            labels = utterance.hard_labels
            if labels is None and targets is None:
                raise InputError(f"utterance {utterance.utterance_id} has neither hard labels nor soft targets")
            examples[row] = Example(
                utterance_id=utterance.utterance_id,
                features=self._reader.features(utterance, [self.front_end])[0],
                hard_labels=None if labels is None else labels.astype(np.int64),
                soft=None if targets is None else targets.soft,
                frame_weights=None if targets is None else targets.weights_T,
            )
        return examples

    def num_steps(self, order: Order, epoch: int) -> int:
        return sum(map(len, order.pools(self.seconds_N, epoch)))

    def steps(
        self, order: Order, *, temperature: float, num_epochs: int, first_epoch: int = 0, first_step: int = 0
    ) -> Generator[Step, None, None]:
        """The steps of the epochs, in order; batches, and pools of examples, are made by threads ahead of the one in use.

        Args:
            temperature: of the soft targets.
            first_epoch, first_step: where to begin.
        """
        given_up = threading.Event()
        epochs = range(first_epoch, num_epochs)
        pools = prefetched(self._pools(order, epochs, first_step, given_up), depth=1)
        try:
            yield from prefetched(_steps(pools, temperature), depth=_BATCHES_AHEAD)
        finally:
            given_up.set()

    def _pools(self, order: Order, epochs: range, first_step: int, given_up: threading.Event) -> Iterator[_Pool]:
        """Those with something left to do; a corpus of one pool is loaded once."""
        everything = None
        for epoch in epochs:
            pools, done = order.pools(self.seconds_N, epoch), first_step if epoch == epochs.start else 0
            step, num_steps = 0, sum(map(len, pools))
            for batches in pools:
                todo = batches[max(done - step, 0) :]
                step += len(batches)
                if not todo:
                    continue
                examples = everything or self.load([row for rows in batches for row in rows], given_up)
                if given_up.is_set():
                    return
                if len(pools) == 1:
                    everything = examples
                yield _Pool(
                    epoch=epoch, batches=todo, first_step=step - len(todo), num_steps=num_steps, examples=examples
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pool:
    """Speech that is shuffled together.

    Attributes:
        batches: corpus rows of each batch.
        first_step: position of the first batch in its epoch, which has ``num_steps`` in all.
        examples: by corpus row.
    """

    epoch: int
    batches: list[list[int]]
    first_step: int
    num_steps: int
    examples: dict[int, Example]


def _steps(pools: Iterator[_Pool], temperature: float) -> Iterator[Step]:
    for pool in pools:
        for step, rows in enumerate(pool.batches, start=pool.first_step):
            batch = collate([pool.examples[row] for row in rows], temperature=temperature)
            yield Step(epoch=pool.epoch, step=step, num_steps=pool.num_steps, batch=batch)
