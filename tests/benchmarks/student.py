"""The student: what soft targets add to a step, the wait for the loader, memory, and an epoch against on-line distillation.

    python -m tests.benchmarks.student [--json] [--repeats 31]

One thread for the model, as in the recipes; the loader's threads have what is left.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from student_trainer.batch import Batch, collate
from student_trainer.train import _Trainer
from tests.benchmarks.command_line import benchmark_parser, print_figures
from tests.benchmarks.figures import Figure, interleaved, median_and_spread, ratio_of_rounds
from tests.benchmarks.student_feeding import feeding_figures
from tests.benchmarks.student_parts import BATCH_SECONDS, STUDENTS, TOP_K, make_trainer, random_examples

CLASSES = (660, 9_000)
# The default first.
VARIANTS: dict[str, dict[str, Any]] = {
    "ghost": {"tail": "ghost"},
    "renormalize": {"tail": "renormalize"},
    "to_hard_label": {"tail": "to_hard_label"},
    "uniform": {"tail": "uniform"},
    "ghost, temperature 2": {"tail": "ghost", "temperature": 2.0},
    "ghost, two heads": {"tail": "ghost", "num_heads": 2},
}
# What the hard-only step has not, and no way of computing these losses can do without.
_NEEDED = {
    "ghost, temperature 2": "a second normalisation over the classes",
    "ghost, two heads": "a second output layer, and a second normalisation",
}


def figures(
    *,
    classes: tuple[int, ...] = CLASSES,
    students: tuple[str, ...] = tuple(STUDENTS),
    batch_seconds: float = BATCH_SECONDS,
    repeats: int = 31,
    corpus_seconds: float = 480.0,
    pool_seconds: float = 3_600.0,
) -> list[Figure]:
    torch.set_num_threads(1)
    found = []
    for num_classes in classes:
        for student in students:
            found += step_figures(student, num_classes, batch_seconds, repeats)
    with tempfile.TemporaryDirectory(prefix="student-") as folder:
        found += feeding_figures(Path(folder), students, corpus_seconds, pool_seconds, max(2, repeats // 6))
    return found


def step_figures(student: str, num_classes: int, batch_seconds: float, repeats: int) -> list[Figure]:
    examples = random_examples(num_classes, batch_seconds)
    hard = collate([replace(example, soft=None) for example in examples])
    steps = [_timed(make_trainer(student, num_classes), hard)]
    for settings in VARIANTS.values():
        batch = collate(examples, temperature=settings.get("temperature", 1.0))
        steps.append(_timed(make_trainer(student, num_classes, **settings), batch))
    width = make_trainer(student, num_classes).model.encoder.output_dim
    needed = [_normalisation(len(hard.labels_N), num_classes), _second_head(len(hard.labels_N), num_classes, width)]
    hard_only, *measured = interleaved([*steps, *needed], repeats)
    with_soft, needed_alone = measured[: len(VARIANTS)], measured[len(VARIANTS) :]
    notes = {
        name: f"; {what} alone: {1e3 * statistics.median(values):.3g} ms, "
        f"{ratio_of_rounds(values, hard_only):.2f} of the hard-only step"
        for (name, what), values in zip(_NEEDED.items(), needed_alone, strict=True)
    }
    note = f"{len(hard.labels_N):,} frames, top {TOP_K}"
    found = []
    for name, values in zip(VARIANTS, with_soft, strict=True):
        (median, spread), ratio = median_and_spread(values), ratio_of_rounds(values, hard_only)
        found.append(
            Figure(
                name=f"step, {student} student, V={num_classes:,}, {name}",
                unit="ms",
                value=1e3 * median,
                baseline=1e3 * statistics.median(hard_only),
                baseline_name="hard-only step, one head",
                ratio_of_rounds=ratio,
                target="ratio <= 1.05",
                met=ratio <= 1.05,
                spread=spread,
                note=note + notes.get(name, ""),
            )
        )
    return found


def _timed(trainer: _Trainer, batch: Batch) -> Callable[[], float]:
    def step() -> float:
        # Of this thread, which does all of it: what other processes take does not count.
        started = time.thread_time()
        trainer._step(batch, 0.5)
        return time.thread_time() - started

    return step


def _normalisation(num_frames: int, num_classes: int) -> Callable[[], float]:
    """At temperature 2, forward and backward, by torch."""
    logits_NV = torch.randn(num_frames, num_classes, requires_grad=True)

    def run() -> float:
        logits_NV.grad = None
        started = time.thread_time()
        (logits_NV / 2).log_softmax(dim=1)[:, 0].sum().backward()  # type: ignore[no-untyped-call]
        return time.thread_time() - started

    return run


def _second_head(num_frames: int, num_classes: int, width: int) -> Callable[[], float]:
    """An output layer and its normalisation, forward and backward, by torch."""
    hidden_NH, head = torch.randn(num_frames, width, requires_grad=True), torch.nn.Linear(width, num_classes)

    def run() -> float:
        hidden_NH.grad = None
        head.zero_grad(set_to_none=True)
        started = time.thread_time()
        head(hidden_NH).log_softmax(dim=1)[:, 0].sum().backward()
        return time.thread_time() - started

    return run


def main() -> None:
    options = benchmark_parser(__doc__, repeats=31).parse_args()
    print_figures(figures(repeats=options.repeats), as_json=options.json)


if __name__ == "__main__":
    main()
