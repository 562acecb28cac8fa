"""How the student is fed: the wait for the loader, memory, and an epoch from stored targets against on-line distillation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch

from softlabel_schemas.corpus import Corpus
from softlabel_schemas.manifest import SpecDocument
from softlabel_schemas.shard import LabelledUtterance
from student_trainer.batch import Example, collate
from student_trainer.data import Step, TrainingData
from student_trainer.inputs import open_inputs
from student_trainer.order import Order
from student_trainer.processes import steps_of_processes
from student_trainer.shared_features import SharedFeatures
from student_trainer.source import TrainingSource
from student_trainer.train import _Trainer
from teacher_service.pipeline import label_shard
from tests.benchmarks.figures import Figure, interleaved, median_and_spread, ratio_of_rounds
from tests.benchmarks.student_online import OnlineDistillation, load_teachers
from tests.benchmarks.student_parts import (
    BATCH_SECONDS,
    FRONT_END,
    ToyCorpus,
    inventory,
    make_trainer,
    random_labels,
    write_toy_corpus,
)
from tests.support.processes import resident_bytes

NUM_CLASSES = 660


def feeding_figures(
    folder: Path, students: Sequence[str], corpus_seconds: float, pool_seconds: float, repeats: int
) -> list[Figure]:
    for name in ("teachers", "toy", "large"):
        (folder / name).mkdir()
    teachers, seconds_to_label = load_teachers(folder / "teachers", inventory(NUM_CLASSES)), [0.0]

    def label(corpus: Corpus, document: SpecDocument) -> list[LabelledUtterance]:
        started = time.perf_counter()
        labelled = label_shard(corpus, teachers, document.spec, document.storage).utterances
        seconds_to_label[0] = time.perf_counter() - started
        return labelled

    toy = write_toy_corpus(folder / "toy", seconds=corpus_seconds, num_classes=NUM_CLASSES, label=label)
    found = []
    for student in students:
        found += _waiting(toy, student, repeats)
    for student in students:
        online = OnlineDistillation(toy, teachers, student)
        found.append(_epochs(toy, student, online, seconds_to_label[0], repeats))
    found += [_shared_features(toy, folder / "features", repeats), _processes(toy, students[0], repeats)]
    large = write_toy_corpus(folder / "large", seconds=3 * pool_seconds, num_classes=NUM_CLASSES, label=random_labels)
    return [*found, _memory(large, students[0], pool_seconds)]


def _order(data: TrainingData, num_pools: int) -> Order:
    seconds = float(data.seconds_N.sum())
    return Order(seed=0, batch_seconds=BATCH_SECONDS, pool_seconds=seconds / num_pools + 1e-6)


def _run_epoch(steps: Generator[Step, None, None], trainer: _Trainer) -> tuple[float, float]:
    """Seconds of the next epoch, and how many of them the loop waited for a batch."""
    started, waited = time.perf_counter(), 0.0
    while True:
        asked = time.perf_counter()
        step = next(steps)
        # One that is there still takes some microseconds to hand over.
        waited += time.perf_counter() - asked
        trainer._step(step.batch, step.epoch + step.step / step.num_steps)
        if step.ends_epoch:
            return time.perf_counter() - started, waited


def _waiting(toy: ToyCorpus, student: str, repeats: int) -> list[Figure]:
    """Baseline: the same work in the step loop, as a share of the epoch that it would then take."""
    found = []
    for what, num_pools, stored in (
        ("corpus in memory", 1, False),
        ("pools of stored features", 4, True),
        ("pools of audio", 4, False),
    ):
        data = toy.data(stored_features=stored)
        order, trainer = _order(data, num_pools), make_trainer(student, NUM_CLASSES, tail="ghost")
        steps = data.steps(order, temperature=1.0, num_epochs=repeats + 2)
        # The first epoch loads a corpus that fits into one pool.
        epochs = [_run_epoch(steps, trainer) for _ in range(repeats + 1)][1:]
        steps.close()
        share, spread = median_and_spread([max(waited, 1e-9) / seconds for seconds, waited in epochs])
        stepping = median_and_spread([seconds - waited for seconds, waited in epochs])[0]
        feeding, stepping_alone = _seconds_to_feed(data, order, trainer, load=num_pools > 1)
        found.append(
            Figure(
                name=f"loop waits for the loader, {student} student, {what}",
                unit="share",
                value=share,
                baseline=feeding / (feeding + stepping_alone),
                baseline_name="without threads",
                target="<= 0.01",
                met=share <= 0.01,
                spread=spread,
                note=f"epoch's steps {stepping:.2f} s; processor time: steps {stepping_alone:.2f} s, feeding {feeding:.2f} s",
            )
        )
    return found


def _seconds_to_feed(data: TrainingData, order: Order, trainer: _Trainer, *, load: bool) -> tuple[float, float]:
    """Processor seconds of an epoch without the loader's threads: making its batches, and the steps."""
    pools, feeding, stepping = order.pools(data.seconds_N, 0), 0.0, 0.0
    loaded = None if load else data.load([row for batches in pools for rows in batches for row in rows])
    for batches in pools:
        started = time.thread_time()
        examples = loaded or data.load([row for rows in batches for row in rows])
        feeding += time.thread_time() - started
        for rows in batches:
            started = time.thread_time()
            batch = collate([examples[row] for row in rows])
            collated = time.thread_time()
            trainer._step(batch, 0.5)
            feeding, stepping = feeding + collated - started, stepping + time.thread_time() - collated
    return feeding, stepping


def _epochs(toy: ToyCorpus, student: str, online: OnlineDistillation, seconds_to_label: float, repeats: int) -> Figure:
    """Both with everything in memory, the teachers' features too: what differs is the teachers."""
    data, trainer = toy.data(), make_trainer(student, NUM_CLASSES, tail="ghost")
    order = _order(data, 1)
    steps = data.steps(order, temperature=1.0, num_epochs=repeats + 2)
    first, _ = _run_epoch(steps, trainer)
    hard_steps = toy.data(soft=False).steps(order, temperature=1.0, num_epochs=repeats + 2)
    stored, on_line = interleaved(
        [lambda: _run_epoch(steps, trainer)[0], lambda: online.run_epoch(hard_steps)], repeats
    )
    (seconds, spread), (baseline, _) = median_and_spread(stored), median_and_spread(on_line)
    return Figure(
        name=f"epoch from stored targets, {student} student",
        unit="s",
        value=seconds,
        baseline=baseline,
        baseline_name="on-line distillation, three teachers",
        spread=spread,
        note=f"{float(data.seconds_N.sum()):.0f} s of speech, V={NUM_CLASSES}; first epoch, which reads and computes "
        f"features, {first:.2f} s; labelling, once, {seconds_to_label:.2f} s",
    )


def _shared_features(toy: ToyCorpus, folder: Path, repeats: int) -> Figure:
    """Of a whole corpus, for a run of a sweep that is not the first; the check of their digest included."""
    corpus = toy.corpus
    seconds = float(corpus.seconds().sum())

    def load(shared: SharedFeatures | None) -> float:
        started = time.perf_counter()
        TrainingData(corpus, FRONT_END, shared=shared).load(range(len(corpus)))
        return time.perf_counter() - started

    found, computed = interleaved([lambda: load(SharedFeatures(folder, seconds)), lambda: load(None)], repeats)
    (value, spread), (baseline, _) = median_and_spread(found), median_and_spread(computed)
    return Figure(
        name="features that another run of the sweep left",
        unit="s",
        value=value,
        baseline=baseline,
        baseline_name="computed from the audio",
        spread=spread,
        ratio_of_rounds=ratio_of_rounds(found, computed),
        note=f"{seconds:.0f} s of speech",
    )


def _processes(toy: ToyCorpus, student: str, repeats: int) -> Figure:
    """Batches of audio that nothing else is done with, once they come: after the first epoch."""
    config = toy.config(student)
    source = TrainingSource(config, open_inputs(config))
    seconds = float(source.data.seconds_N.sum())
    order = _order(source.data, 4)
    epochs: dict[str, Any] = {"num_epochs": 4, "first_epoch": 0, "first_step": 0, "device": torch.device("cpu")}

    def rate(steps: Generator[Step, None, None]) -> float:
        started = 0.0
        for step in steps:
            if step.ends_epoch:
                started = started or time.perf_counter()
        return (epochs["num_epochs"] - 1) * seconds / (time.perf_counter() - started)

    by_two, by_thread = interleaved(
        [
            lambda: rate(steps_of_processes(source, order, num_processes=2, **epochs)),
            lambda: rate(source.data.steps(order, temperature=1.0, **epochs)),
        ],
        repeats,
    )
    (value, spread), (baseline, _) = median_and_spread(by_two), median_and_spread(by_thread)
    return Figure(
        name="batches of audio by two processes",
        unit="s of speech/s",
        value=value,
        baseline=baseline,
        baseline_name="by the thread",
        spread=spread,
        ratio_of_rounds=ratio_of_rounds(by_two, by_thread),
        note=f"{seconds:.0f} s of speech in pools of a quarter of it, on {os.cpu_count()} processors",
    )


def _memory(large: ToyCorpus, student: str, pool_seconds: float) -> Figure:
    """Of a process of its own that trains through three pools: one in use, one being loaded."""
    call = {"folder": str(large.folder), "student": student, "pool_seconds": pool_seconds}
    command = [sys.executable, "-m", __spec__.name, json.dumps(call)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    measured = json.loads(done.stdout.splitlines()[-1])
    return Figure(
        name=f"memory of a worker, {student} student, pools of {pool_seconds / 3600:.2g} h",
        unit="MB",
        value=measured["peak"] / 1e6,
        note=f"private, two pools included; {measured['idle'] / 1e6:.0f} before the first of them; "
        f"a pool is {measured['pool'] / 1e6:.0f}",
    )


def _measure_memory(folder: Path, student: str, pool_seconds: float) -> dict[str, int]:
    torch.set_num_threads(1)
    toy = ToyCorpus(folder=folder, num_classes=NUM_CLASSES)
    data, trainer = toy.data(), make_trainer(student, NUM_CLASSES, tail="ghost")
    order = Order(seed=0, batch_seconds=BATCH_SECONDS, pool_seconds=pool_seconds)
    assert len(order.pools(data.seconds_N, 0)) >= 2
    peak = idle = resident_bytes(os.getpid())
    for step in data.steps(order, temperature=1.0, num_epochs=1):
        trainer._step(step.batch, 0.0)
        peak = max(peak, resident_bytes(os.getpid()))
    examples = data.load([row for rows in order.pools(data.seconds_N, 0)[0] for row in rows])
    pool = sum(_num_bytes(example) for example in examples.values())
    return {"idle": idle, "peak": peak, "pool": pool}


def _num_bytes(example: Example) -> int:
    assert example.soft is not None
    assert example.hard_labels is not None
    soft = example.soft
    arrays = (soft.offsets, soft.class_ids, soft.log_probs, soft.tail_mass, example.features, example.hard_labels)
    return sum(array.nbytes for array in arrays)


if __name__ == "__main__":
    call = json.loads(sys.argv[1])
    print(json.dumps(_measure_memory(Path(call["folder"]), call["student"], call["pool_seconds"])))
