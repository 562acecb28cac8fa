"""The training data of a TRAIN.toml as PyTorch datasets, for training loops of one's own.

::

    UtteranceDataset   map-style: one utterance by its place in the corpus
    StepDataset        iterable: the batches of ``student-trainer train``, in its order. Processes that train together share an
                       epoch's utterances, in batches of their own: each utterance is in one of them
    StepLoader         a DataLoader of a StepDataset, with workers, that knows how far the loop is

>>> dataset = StepDataset(load_config("student.toml"))                    # doctest: +SKIP
>>> loader = StepLoader(dataset, num_workers=2)                           # doctest: +SKIP
>>> while dataset.epoch < 15:                                             # doctest: +SKIP
...     for step in loader:
...         train_on(step.batch)
...     torch.save({"data": dataset.state_dict(), ...}, "checkpoint.pt")

Datasets are opened in the process that reads: they can be sent to workers, forked or spawned, and hold no connection. The
corpus is checked once, and workers share its memory, where the dataset was opened before they start (``open``; a StepLoader
does).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from softlabel_schemas.errors import InputError
from student_trainer.batch import Batch, Example, collate
from student_trainer.config import TrainConfig
from student_trainer.data import Step
from student_trainer.order import Order, Share
from student_trainer.source import TrainingSource

# Of one of many processes that train together. Smaller ones would mix few utterances, of lengths that differ too much.
_SMALLEST_POOL_SECONDS = 3_600.0


class UtteranceDataset(Dataset[Example]):
    """Utterances as they were recorded, in the corpus's order; ``collate`` makes a batch of some, as a DataLoader's
    ``collate_fn``. Raises InputError where teachers are switched per batch (``soft_labels.urls``)."""

    def __init__(self, config: TrainConfig) -> None:
        if config.soft_labels is not None and config.soft_labels.urls is not None:
            raise InputError(
                "soft_labels.urls: one of these datasets teaches each batch, by its place in an epoch, which an utterance has "
                "not; use StepDataset, or give soft_labels.url"
            )
        self._source = TrainingSource(config)

    def open(self) -> None:
        """Read and check the inputs now, for all workers. Raises InputError where they do not fit together."""
        self._source.open()

    def __len__(self) -> int:
        return len(self._source.data.corpus)

    def __getitem__(self, row: int) -> Example:
        """Raises IndexError where there is no such row."""
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[Example]:
        """Some at once, which DataLoader asks for: each block of soft targets that holds some is read once."""
        for row in rows:
            if not 0 <= row < len(self):
                raise IndexError(f"utterance {row} asked for, the training corpus has {len(self)}")
        examples = self._source.data.load(rows)
        return [examples[row] for row in rows]

    def collate(self, examples: Sequence[Example]) -> Batch:
        return collate(examples, temperature=self._source.temperature)


class StepDataset(IterableDataset[Step]):
    """The batches of one epoch, the first that is not done or the rest of it; then those of the next.

    Args:
        rank, world_size: of the processes that train together; by default those of ``torch.distributed``, where it has been
            initialised (torchrun, Ray Train), and otherwise one process alone. All have as many steps.
    """

    def __init__(self, config: TrainConfig, *, rank: int | None = None, world_size: int | None = None) -> None:
        if (rank is None) != (world_size is None):
            raise InputError("rank and world_size belong together: give both or neither")
        if rank is None or world_size is None:
            rank, world_size = _distributed()
        if not 0 <= rank < world_size:
            raise InputError(f"rank is {rank}, expected 0 to {world_size - 1}")
        self._source = TrainingSource(config)
        self._rank, self._world_size = rank, world_size
        pool_seconds = config.training.pool_seconds
        if world_size > 1:
            # Each process has pools of its own: up to ten together keep as much in memory as one process would.
            pool_seconds = max(pool_seconds / world_size, min(pool_seconds, _SMALLEST_POOL_SECONDS))
        self._order = Order(seed=config.seed, batch_seconds=config.training.batch_seconds, pool_seconds=pool_seconds)
        self.epoch = self._step = 0

    def __iter__(self) -> Iterator[Step]:
        """The state is that after the step that was yielded last, in this copy of the dataset."""
        worker, epoch = get_worker_info(), self.epoch
        share = Share(
            rank=self._rank,
            world_size=self._world_size,
            worker=0 if worker is None else worker.id,
            num_workers=1 if worker is None else worker.num_workers,
        )
        steps = self._source.data.steps(
            self._order,
            temperature=self._source.temperature,
            num_epochs=epoch + 1,
            first_epoch=epoch,
            first_step=self._step,
            share=share,
        )
        for step in steps:
            self.done(step)
            yield step
        # Of several workers, only one has the last step.
        self.epoch, self._step = epoch + 1, 0

    def open(self) -> None:
        """Read and check the inputs now. Raises InputError where they do not fit together."""
        self._source.open()

    def num_steps(self, epoch: int) -> int:
        """Of each process."""
        share = Share(rank=self._rank, world_size=self._world_size)
        return self._source.data.num_steps(self._order, epoch, share)

    def done(self, step: Step) -> None:
        """Go on after ``step``."""
        self.epoch, self._step = (step.epoch + 1, 0) if step.ends_epoch else (step.epoch, step.step + 1)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "step": self._step, "world_size": self._world_size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Raises InputError where the state is from within an epoch of other processes, which had other shares."""
        if state["step"] and state["world_size"] != self._world_size:
            raise InputError(
                f"the state is of {state['world_size']} processes, here are {self._world_size}; go on with as many to "
                "the end of the epoch"
            )
        self.epoch, self._step = state["epoch"], state["step"]


class StepLoader(DataLoader[Step]):
    """A DataLoader of a :class:`StepDataset`. ``dataset.state_dict()`` is that after the step that the loop got last, however
    far the workers are ahead.

    Args:
        options: further ones of DataLoader, such as ``multiprocessing_context``, which must be "spawn" for soft labels on S3.

    Raises:
        InputError: ``persistent_workers`` is set. Workers that outlive an epoch know neither which of their steps the loop took
            nor which state it loaded. Or ``in_order`` is False: how far the loop is, is said by its last step alone.
    """

    def __init__(self, dataset: StepDataset, *, num_workers: int = 0, **options: Any) -> None:
        if options.get("persistent_workers"):
            raise InputError(
                "persistent_workers would lose and repeat steps where a loop leaves an epoch or loads a state; leave it out, "
                "and new workers begin at each epoch"
            )
        if not options.get("in_order", True):
            raise InputError(
                "in_order = False would lose and repeat steps where a loop is resumed: it goes on behind the last step that it "
                "got, and earlier ones may come later; leave it out"
            )
        super().__init__(dataset, batch_size=None, num_workers=num_workers, **options)
        self._steps = dataset

    def __iter__(self) -> Any:
        if self.num_workers:
            # Before there are workers, so that not each of them reads and checks the corpus.
            self._steps.open()
        for step in super().__iter__():
            self._steps.done(step)
            yield step


def _distributed() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
