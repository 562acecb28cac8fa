"""Capture against torch's softmax and topk on the same logits, in one thread; on a GPU against copying and torch eager.

    python -m tests.benchmarks.capture            # about two minutes
    python -m tests.benchmarks.capture --json

The baseline on the CPU is what a plain capture would call: softmax of each teacher's logits, their weighted mean, topk; with a
second temperature the softmax and the mean at that one too. Ours gives tails, entropy and the agreement's top class besides.
Logits are normal, of deviation 3.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from softlabel_schemas.selection import NO_LABEL, Mass, TopK
from teacher_service.capture import capture
from teacher_service.ensemble import combine
from teacher_service.selection import select
from tests.benchmarks.command_line import benchmark_parser, print_figures
from tests.benchmarks.figures import Figure, interleaved, median_and_spread

TOP_20 = TopK(k=20)
MASS = Mass(mass=0.95, max_entries=20)
_ELEMENTS = 3_000_000


def figures(*, elements: int = _ELEMENTS, repeats: int = 9) -> list[Figure]:
    """
    Args:
        elements: of one teacher's logits in a measurement on the CPU.
    """
    found = []
    with _one_thread():
        for num_classes in (660, 9000):
            for num_teachers in (1, 3):
                for temperatures in ((1.0,), (1.0, 2.0)):
                    for selection in (TOP_20, MASS):
                        found.append(
                            _on_cpu(
                                num_classes, num_teachers, temperatures, selection, elements // num_classes, repeats
                            )
                        )
    return found + (_on_gpu(repeats) if torch.cuda.is_available() else [_no_gpu()])


def _on_cpu(
    num_classes: int,
    num_teachers: int,
    temperatures: tuple[float, ...],
    selection: TopK | Mass,
    num_frames: int,
    repeats: int,
) -> Figure:
    generator = torch.Generator().manual_seed(0)
    logits = [3 * torch.randn(num_frames, num_classes, generator=generator) for _ in range(num_teachers)]
    weights = [1 / num_teachers] * num_teachers
    none_N = torch.full((num_frames,), NO_LABEL)

    def ours() -> object:
        batch = [each[None] for each in logits]
        return capture(batch, [num_frames], weights, "arithmetic", selection, temperatures, none_N)

    rates = interleaved(
        [_rate(ours, num_frames), _rate(lambda: _softmax_topk(logits, weights, temperatures), num_frames)], repeats
    )
    value, spread = median_and_spread(rates[0])
    baseline, _ = median_and_spread(rates[1])
    return Figure(
        name=f"capture CPU V={num_classes} M={num_teachers} {selection.policy} {len(temperatures)} temperature(s)",
        unit="frames/s",
        value=value,
        baseline=baseline,
        baseline_name="torch softmax of each teacher and temperature, mean, topk",
        target="ratio >= 1",
        met=value >= baseline,
        spread=spread,
    )


@torch.inference_mode()
def _softmax_topk(logits: Sequence[Tensor], weights: Sequence[float], temperatures: Sequence[float]) -> object:
    means = []
    for temperature in temperatures:
        mean_NV: Tensor | None = None
        for logits_NV, weight in zip(logits, weights, strict=True):
            scaled_NV = logits_NV if temperature == 1.0 else logits_NV / temperature
            probs_NV = scaled_NV.softmax(dim=-1)
            if len(logits) > 1:
                probs_NV *= weight
            mean_NV = probs_NV if mean_NV is None else mean_NV.add_(probs_NV)
        means.append(mean_NV)
    assert means[0] is not None
    return means[0].topk(20, dim=-1)


def _rate(function: Callable[[], object], count: int) -> Callable[[], float]:
    def measure() -> float:
        started = time.perf_counter()
        function()
        return count / (time.perf_counter() - started)

    return measure


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# On a GPU


def _no_gpu() -> Figure:
    return Figure(name="capture GPU V=9000 M=3 bfloat16", unit="GB/s", value=0.0, target="ratio >= 0.7", note="no GPU")


def _on_gpu(repeats: int, num_classes: int = 9000, num_frames: int = 8192) -> list[Figure]:
    """Bandwidth is of the logits' bytes, each counted once; a copy reads and writes, so its bytes count twice."""
    shape = (1, num_frames, num_classes)
    logits = [3 * torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    weights, none_N = [1 / 3] * 3, torch.full((num_frames,), NO_LABEL)
    num_bytes = sum(each.numel() * each.element_size() for each in logits)
    into = torch.empty_like(logits[0])

    def ours() -> None:
        capture(logits, [num_frames], weights, "arithmetic", TOP_20, (1.0, 2.0), none_N)

    def eager() -> None:
        select(combine(logits, weights, "arithmetic")[0], TOP_20, (1.0, 2.0), none_N.cuda())

    def copy() -> None:
        for each in logits:
            into.copy_(each)

    measured = interleaved(
        [_on_device(ours, num_bytes), _on_device(eager, num_bytes), _on_device(copy, 2 * num_bytes)], repeats
    )
    (value, spread), (in_torch, _), (of_copy, _) = (median_and_spread(rates) for rates in measured)
    name = f"capture GPU V={num_classes} M=3 bfloat16"
    note = torch.cuda.get_device_name()
    common = {"unit": "GB/s", "value": value, "spread": spread, "note": note}
    return [
        Figure(
            name=f"{name} bandwidth",
            baseline=of_copy,
            baseline_name="copy_ on the device",
            target="ratio >= 0.7",
            met=value >= 0.7 * of_copy,
            **common,  # type: ignore[arg-type]
        ),
        Figure(
            name=f"{name} against eager",
            baseline=in_torch,
            baseline_name="torch eager",
            target="ratio >= 3",
            met=value >= 3 * in_torch,
            **common,  # type: ignore[arg-type]
        ),
    ]


def _on_device(function: Callable[[], None], num_bytes: int) -> Callable[[], float]:
    """GB/s by the device's own clock."""

    def measure() -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        function()
        end.record()
        end.synchronize()
        return float(num_bytes / begin.elapsed_time(end) / 1e6)

    return measure


def main() -> None:
    options = benchmark_parser(__doc__, repeats=9).parse_args()
    print_figures(figures(repeats=options.repeats), as_json=options.json)


if __name__ == "__main__":
    main()
