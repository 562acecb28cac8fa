"""What a student is fed: features, hard labels and soft targets, joined by utterance id, in a reproducible order.

::

    corpus rows -> speeds -> Order.pools(epoch) -> pool -> batches of rows -> mask, collate -> Step
                                    one thread: load    another: mask, collate        the loop

The order is a function of durations (at the speeds of the epoch), seed and epoch alone: the same with and without soft
labels, and on every machine.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from softlabel_schemas.corpus import Corpus, Utterance
from softlabel_schemas.errors import InputError
from softlabel_schemas.front_end import AnyFrontEnd, Fbank
from softlabel_schemas.read_ahead import read_ahead
from softlabel_schemas.recordings import rows_by_recording
from softlabel_schemas.utterance_reader import UtteranceReader
from student_trainer.augmentation import Augmenter
from student_trainer.batch import Batch, Example, collate
from student_trainer.ctc import Spelling
from student_trainer.order import Order, Share
from student_trainer.prefetch import prefetched
from student_trainer.shared_features import CorpusFeatures, SharedFeatures
from student_trainer.soft_labels import SoftLabels, WeightedTargets
from student_trainer.speed import features_at_speed, retimed
from student_trainer.switching import dataset_of_step

# Collating 40 s of speech takes 0.3 ms, the step of a small student 30; some are ahead for when the processors are busy.
_BATCHES_AHEAD = 4
# Padded speech in a batch of an evaluation.
_EVALUATION_SECONDS = 120.0
_AS_RECORDED = (1.0,)
_CPU = torch.device("cpu")
_ALL = Share()
FeaturesT = TypeVar("FeaturesT")


class Variant(NamedTuple):
    """How an utterance is heard, and by which of the datasets it is taught (0 where there is none)."""

    speed: float = 1.0
    dataset: int = 0


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


class TrainingData:
    """Examples of a corpus, read on demand or kept in memory; of a corpus to evaluate on, without an ``augmenter``.

    Args:
        soft_labels: of each dataset; of several, one teaches each batch (``switching.py``).
        spelling: makes transcripts the hard labels; None: those of the frames are.
        keep_seconds: speech up to which a corpus that is evaluated on again and again is read once and kept in memory.
        shared: where other runs leave their features, and find those of this one.
    """

    def __init__(
        self,
        corpus: Corpus,
        front_end: AnyFrontEnd,
        soft_labels: Sequence[SoftLabels] = (),
        augmenter: Augmenter | None = None,
        spelling: Spelling | None = None,
        keep_seconds: float = 0.0,
        shared: SharedFeatures | None = None,
    ) -> None:
        self.corpus, self.front_end, self.soft_labels, self.augmenter = corpus, front_end, soft_labels, augmenter
        self.spelling, self.keep_seconds = spelling, keep_seconds
        self._reader = UtteranceReader(corpus)
        self._kept: dict[int, Example] = {}
        self._shared = shared
        # By speed.
        self._features_of: dict[float, CorpusFeatures | None] = {}

    @cached_property
    def seconds_N(self) -> npt.NDArray[np.float64]:
        return self.corpus.seconds()

    def load(self, rows: Sequence[int], given_up: threading.Event | None = None) -> dict[int, Example]:
        """Examples by row, as they were recorded; ``given_up``: as for :meth:`load_variants`."""
        examples = self.load_variants(dict.fromkeys(rows, (Variant(),)), given_up)
        return {row: example for (row, _), example in examples.items()}

    def load_variants(
        self, variants_of: Mapping[int, Sequence[Variant]], given_up: threading.Event | None = None
    ) -> dict[tuple[int, Variant], Example]:
        """Examples by row and variant. Rows are read in order, so that each shard of soft targets is decoded once.

        Args:
            variants_of: those that are wanted of each row.
            given_up: once set, the rest is left out: nobody waits for it any more.
        """
        utterances = {row: self.corpus[row] for row in sorted(variants_of)}
        targets = self._targets(utterances, variants_of)
        examples = {}

        def features(row: int) -> dict[float, npt.NDArray[np.float32]]:
            if given_up is not None and given_up.is_set():
                return {}
            speeds = tuple(dict.fromkeys(variant.speed for variant in variants_of[row]))
            found = self._found(row, speeds)
            missing = [speed for speed in speeds if speed not in found]
            return found | dict(zip(missing, self._features(utterances[row], missing), strict=True))

        self._find({variant.speed for variants in variants_of.values() for variant in variants}, given_up)
        with closing(self._of_each(utterances, features)) as features_of_rows:
            for (row, utterance), by_speed in zip(utterances.items(), features_of_rows, strict=True):
                if given_up is not None and given_up.is_set():
                    break
                labels = utterance.hard_labels if self.spelling is None else utterance.text
                if labels is None and not self.soft_labels:
                    raise InputError(f"utterance {utterance.utterance_id} has neither hard labels nor soft targets")
                for variant in variants_of[row]:
                    soft = targets.get((row, variant.dataset))
                    examples[row, variant] = self._example(utterance, soft, by_speed[variant.speed], variant.speed)
        return examples

    def _of_each(self, rows: Iterable[int], features: Callable[[int], FeaturesT]) -> Generator[FeaturesT, None, None]:
        """In order, as many at a time as the corpus's files are to be read."""
        num_at_once = self.corpus.num_at_once
        if num_at_once == 1:
            yield from map(features, rows)
            return
        with closing(read_ahead(features, rows, num_parallel=num_at_once)) as futures:
            for future in futures:
                yield future.result()

    def _targets(
        self, utterances: Mapping[int, Utterance], variants_of: Mapping[int, Sequence[Variant]]
    ) -> dict[tuple[int, int], WeightedTargets]:
        """By row and dataset, as far as they are wanted."""
        targets: dict[tuple[int, int], WeightedTargets] = {}
        for dataset, soft_labels in enumerate(self.soft_labels):
            rows = [row for row in utterances if any(variant.dataset == dataset for variant in variants_of[row])]
            found = soft_labels.of([utterances[row] for row in rows])
            targets |= {(row, dataset): of_row for row, of_row in zip(rows, found, strict=True)}
        return targets

    def _find(self, speeds: Set[float], given_up: threading.Event | None) -> None:
        """The features of the corpus at these speeds, where they are shared."""

        def compute(speed: float, row: int) -> npt.NDArray[np.float32]:
            return next(self._features(self.corpus[row], (speed,)))

        for speed in sorted(speeds - self._features_of.keys()):
            if self._shared is None:
                return
            found = self._shared.of(self.corpus, self.front_end, speed, partial(compute, speed), given_up)
            if given_up is not None and given_up.is_set():
                return
            self._features_of[speed] = found

    def _found(self, row: int, speeds: Sequence[float]) -> dict[float, npt.NDArray[np.float32]]:
        """Features by speed, as far as they are shared."""
        shared = {speed: self._features_of.get(speed) for speed in speeds}
        return {speed: of_speed[row] for speed, of_speed in shared.items() if of_speed is not None}

    def _features(self, utterance: Utterance, speeds: Sequence[float]) -> Iterator[npt.NDArray[np.float32]]:
        if not speeds:
            return
        if tuple(speeds) == _AS_RECORDED:
            yield from self._reader.features(utterance, [self.front_end])
            return
        assert isinstance(self.front_end, Fbank)
        samples = self._reader.samples(utterance, self.front_end)
        for speed in speeds:
            try:
                yield features_at_speed(samples, self.front_end, speed)
            except InputError as error:
                raise InputError(f"utterance {utterance.utterance_id}: {error}; leave it out of the corpus") from None

    def _example(
        self,
        utterance: Utterance,
        targets: WeightedTargets | None,
        features_TD: npt.NDArray[np.float32],
        speed: float,
    ) -> Example:
        labels_T, tokens_L = utterance.hard_labels, None
        if self.spelling is not None:
            labels_T = None
            if utterance.text is not None:
                tokens_L = self.spelling.tokens_L(utterance.text, utterance.utterance_id)
        example = Example(
            utterance_id=utterance.utterance_id,
            features=features_TD,
            hard_labels=None if labels_T is None else labels_T.astype(np.int64),
            soft=None if targets is None else targets.soft,
            frame_weights=None if targets is None else targets.weights_T,
            tokens=tokens_L,
        )
        if speed == 1 or (labels_T is None and targets is None):
            return example
        assert isinstance(self.front_end, Fbank)
        num_frames = self.front_end.num_frames(utterance.num_samples)
        if example.num_labels != num_frames:
            raise InputError(
                f"utterance {utterance.utterance_id}: {num_frames} frames of features, {example.num_labels} of labels; other "
                "speeds than 1 need one label for each frame of features: set augmentation.speeds to [1.0], or "
                "front_end.stack so that they agree"
            )
        return retimed(example, speed)

    def batches_to_evaluate(self, device: torch.device) -> Generator[tuple[list[Example], Batch], None, None]:
        """All utterances as they were recorded, in order of length (of each group of recordings, where they are parts of
        some); a thread makes the next batch meanwhile."""
        given_up = threading.Event()
        try:
            yield from prefetched(self._batches_to_evaluate(device, given_up), depth=1)
        finally:
            given_up.set()

    def _batches_to_evaluate(
        self, device: torch.device, given_up: threading.Event
    ) -> Iterator[tuple[list[Example], Batch]]:
        for group in rows_by_recording(self.corpus, _EVALUATION_SECONDS):
            order = group[np.argsort(self.seconds_N[group], kind="stable")]
            start = 0
            while start < len(order):
                stop = start + 1
                while stop < len(order) and self.seconds_N[order[stop]] * (stop + 1 - start) <= _EVALUATION_SECONDS:
                    stop += 1
                examples = self._examples_to_evaluate(order[start:stop].tolist(), given_up)
                if given_up.is_set():
                    return
                yield examples, collate(examples).to(device)
                start = stop

    def _examples_to_evaluate(self, rows: Sequence[int], given_up: threading.Event) -> list[Example]:
        """Some of them once ``given_up`` is set."""
        missing = [row for row in rows if row not in self._kept]
        found = self.load(missing, given_up)
        if self.seconds_N.sum() <= self.keep_seconds:
            self._kept |= found
        return [example for row in sorted(rows) if (example := found.get(row, self._kept.get(row))) is not None]

    def _speeds_N(self, epoch: int) -> npt.NDArray[np.float64]:
        num_utterances = len(self.corpus)
        return self.augmenter.speeds_N(num_utterances, epoch) if self.augmenter else np.ones(num_utterances)

    def num_steps(self, order: Order, epoch: int, share: Share = _ALL) -> int:
        return sum(map(len, share.pools(order.pools(self.seconds_N / self._speeds_N(epoch), epoch))))

    def steps(
        self,
        order: Order,
        *,
        temperature: float,
        num_epochs: int,
        first_epoch: int = 0,
        first_step: int = 0,
        device: torch.device = _CPU,
        share: Share = _ALL,
    ) -> Generator[Step, None, None]:
        """The steps of the epochs, in order; batches, and pools of examples, are made by threads ahead of the one in use.

        Args:
            temperature: of the soft targets.
            first_epoch, first_step: where to begin.
            device: that the batches are on.
            share: the part of every epoch that is wanted; steps are counted in that of its process.
        """
        given_up = threading.Event()
        epochs = range(first_epoch, num_epochs)
        pools = prefetched(self._pools(order, epochs, first_step, given_up, share), depth=1)
        try:
            yield from prefetched(_steps(pools, temperature, self.augmenter, device), depth=_BATCHES_AHEAD)
        finally:
            given_up.set()

    def _pools(
        self, order: Order, epochs: range, first_step: int, given_up: threading.Event, share: Share
    ) -> Iterator[_Pool]:
        """Those with something left to do. A corpus of one pool is loaded once, in all variants: each is made once, and neither
        audio nor targets are read again. A share of it is another one in every epoch, and is read again; and one epoch alone
        has no use for more than its own variants."""
        everything, num_before = None, 0
        for epoch in epochs:
            speeds_N = self._speeds_N(epoch)
            pools = share.pools(order.pools(self.seconds_N / speeds_N, epoch))
            done = first_step if epoch == epochs.start else 0
            step, num_steps = 0, sum(map(len, pools))
            for batches in pools:
                todo = {
                    at: rows
                    for at, rows in enumerate(batches, step)
                    if at >= done and share.makes(num_before + at - done)
                }
                step += len(batches)
                if not todo:
                    continue
                variants = {
                    row: Variant(speeds_N[row], self._dataset(order.seed, epoch, at))
                    for at, rows in todo.items()
                    for row in rows
                }
                if len(pools) == 1 and share.is_all and len(epochs) > 1:
                    everything = everything or self.load_variants(self._all_variants(), given_up)
                    examples = everything
                else:
                    examples = self.load_variants({row: (variant,) for row, variant in variants.items()}, given_up)
                if given_up.is_set():
                    return
                yield _Pool(
                    epoch=epoch,
                    batches=todo,
                    num_steps=num_steps,
                    variants=variants,
                    examples=examples,
                )
            num_before += num_steps - done

    def _dataset(self, seed: int, epoch: int, step: int) -> int:
        num_datasets = len(self.soft_labels)
        return dataset_of_step(seed, epoch, step, num_datasets) if num_datasets > 1 else 0

    def _all_variants(self) -> dict[int, list[Variant]]:
        speeds = self.augmenter.speeds if self.augmenter else _AS_RECORDED
        variants = [Variant(speed, dataset) for speed in speeds for dataset in range(max(len(self.soft_labels), 1))]
        return dict.fromkeys(range(len(self.corpus)), variants)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pool:
    """Speech that is shuffled together.

    Attributes:
        batches: corpus rows of each batch, by its position in the epoch, which has ``num_steps`` in all.
        variants: of each corpus row in these batches.
        examples: by corpus row and variant.
    """

    epoch: int
    batches: dict[int, list[int]]
    num_steps: int
    variants: dict[int, Variant]
    examples: dict[tuple[int, Variant], Example]


def _steps(
    pools: Iterator[_Pool], temperature: float, augmenter: Augmenter | None, device: torch.device
) -> Iterator[Step]:
    for pool in pools:
        for step, rows in pool.batches.items():
            examples = [pool.examples[row, pool.variants[row]] for row in rows]
            if augmenter is not None:
                examples = [
                    replace(example, features=augmenter.masked(example.features, row, pool.epoch))
                    for row, example in zip(rows, examples, strict=True)
                ]
            batch = collate(examples, temperature=temperature).to(device)
            yield Step(epoch=pool.epoch, step=step, num_steps=pool.num_steps, batch=batch)
