"""The steps of a run, made by several processes: the same ones, in the same order, as ``TrainingData.steps`` gives in this one.

::

    process 0: steps 0, n, 2n, ...        each loads the utterances of its own steps alone
    process 1: steps 1, n + 1, ...   ->   the loop takes them in turn
    ...

They are spawned once for the whole run: they import what this process has imported, and map its corpus (``source.py``). Batches
come through pipes, as arrays. Of tensors, torch would send descriptors of shared memory: containers often have 64 MB of that,
and a batch that cannot be sent is waited for without end.
"""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import signal
import threading
import traceback
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from softlabel_schemas.errors import InputError, IntegrityError
from student_trainer.data import Step
from student_trainer.interrupts import interrupts_held
from student_trainer.order import Order, Share
from student_trainer.source import TrainingSource

# How a RuntimeError of DataLoader begins where one of its processes is gone, in whatever the main thread is doing then.
_LOST = "DataLoader worker (pid"


def steps_of_processes(
    source: TrainingSource,
    order: Order,
    *,
    num_processes: int,
    num_epochs: int,
    first_epoch: int,
    first_step: int,
    device: torch.device,
) -> Generator[Step, None, None]:
    """As ``TrainingData.steps``.

    Raises:
        InputError, IntegrityError, OSError, MemoryError: in a process, in the place of its step.
        RuntimeError: one has ended before its time; see :func:`is_lost_process`.
    """
    steps = _Steps(source, order, epochs=range(first_epoch, num_epochs), first_step=first_step)
    loader = DataLoader(
        steps, batch_size=None, num_workers=num_processes, multiprocessing_context="spawn", worker_init_fn=_begin
    )
    source.share()
    with interrupts_held(), _interrupts_blocked():
        found = iter(loader)
    try:
        for step in found:
            if isinstance(step, _Failure):
                raise step.error
            yield replace(step, batch=step.batch.map(torch.from_numpy).to(device))
    except BaseException as error:
        # The frames that it came through would keep the iterator, and so the processes.
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        # Ends them. An exception in there would only be printed.
        with interrupts_held():
            del found


def is_lost_process(error: Exception) -> bool:
    """Whether the error is that a process of :func:`steps_of_processes` has ended before its time."""
    return isinstance(error, RuntimeError) and str(error).startswith(_LOST)


def _begin(_: int) -> None:
    """In a process: it ends as a forked one does, and not after the run. Where an interpreter is taken down, a thread that some
    library still has at work may abort the process."""
    multiprocessing.util.Finalize(None, os._exit, args=(0,), exitpriority=-1_000)
    threading.Thread(target=_end_with_the_run, daemon=True).start()
    threading.Thread(target=_end_when_the_run_asks, daemon=True).start()


def _end_with_the_run() -> None:
    """Where the run was killed. torch's own watch has a process leave its loop then, and wait for its last batch to be sent,
    into a pipe that nobody reads."""
    run, worker = multiprocessing.parent_process(), get_worker_info()
    assert run is not None
    assert worker is not None
    assert isinstance(worker.dataset, _Steps)
    multiprocessing.connection.wait([run.sentinel])
    worker.dataset.remove_file()
    os._exit(1)


def _end_when_the_run_asks() -> None:
    """SIGTERM is blocked: a scheduler sends it to all processes, but the run ends this one, before it saves."""
    run = multiprocessing.parent_process()
    assert run is not None
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != run.pid:
        pass
    os._exit(0)


@dataclass(frozen=True, slots=True)
class _Failure:
    error: InputError | IntegrityError | OSError | MemoryError


class _Steps(IterableDataset["Step | _Failure"]):
    def __init__(self, source: TrainingSource, order: Order, *, epochs: range, first_step: int) -> None:
        self._source, self._order, self._epochs, self._first_step = source, order, epochs, first_step

    def __iter__(self) -> Iterator[Step | _Failure]:
        worker = get_worker_info()
        assert worker is not None
        try:
            steps = self._source.data.steps(
                self._order,
                temperature=self._source.temperature,
                num_epochs=self._epochs.stop,
                first_epoch=self._epochs.start,
                first_step=self._first_step,
                share=Share(worker=worker.id, num_workers=worker.num_workers),
            )
            for step in steps:
                yield replace(step, batch=step.batch.map(torch.Tensor.numpy))
        except (InputError, IntegrityError, OSError, MemoryError) as error:
            # DataLoader would put a traceback into the message. Other packages' own kinds cannot always be sent.
            kinds = (InputError, IntegrityError, PermissionError, FileNotFoundError, ConnectionError, TimeoutError)
            kind = next(each for each in (*kinds, OSError, MemoryError) if isinstance(error, each))
            yield _Failure(kind(str(error)))

    def remove_file(self) -> None:
        self._source.remove_file()


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Processes that are started within never see a Ctrl-C, which goes to all of a terminal's, nor a scheduler's SIGTERM: this
    one ends them. Here they may come within the block: another thread takes them."""
    # Python starts it with the first process otherwise, and unblocks signals then.
    multiprocessing.resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
