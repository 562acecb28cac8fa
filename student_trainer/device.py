"""Where a run computes: the processors, or a GPU."""

from __future__ import annotations

import click
import torch

from softlabel_schemas.errors import InputError
from student_trainer.config import TrainingConfig


def training_device(name: str) -> torch.device:
    """The device of ``training.device``: "auto" is the GPU where there is one.

    Raises:
        InputError: this machine does not have it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not _is_here(name):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise InputError(
            f'training.device is "{name}", torch {torch.__version__} finds {count} CUDA devices here; use "auto" or "cpu", '
            "or a machine and a build of torch that have it"
        )
    return torch.device(name)


def evaluation_device(name: str) -> torch.device:
    """The same to evaluate a run with, on a machine that may not be the one it was trained on: where that device is missing, as
    for "auto"."""
    return training_device(name if name == "auto" or _is_here(name) else "auto")


def has_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are made in hardware there. On processors without AVX-512 or Arm's BF16 torch makes them one
    by one: a student's step then takes ten times as long as in float32, a large product seventy times (2 cores with AVX2)."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # What torch itself asks before it takes oneDNN's kernels, the only fast ones.
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return has_onednn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def warn_of_slow_precision(training: TrainingConfig) -> None:
    """One line on stderr where the precision would take longer than float32. Raises InputError as :func:`training_device`."""
    device = training_device(training.device)
    if training.precision == "bfloat16" and not has_bfloat16(device):
        click.echo(
            f'warning: training.precision is "bfloat16", for which this machine ({device.type}) has no instructions: a step '
            'takes several times as long as in "float32"',
            err=True,
        )


def _is_here(name: str) -> bool:
    device = torch.device(name)
    if device.type == "cpu":
        return True
    return torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
