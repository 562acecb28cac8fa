"""Where a run computes: the processors, or a GPU."""

from __future__ import annotations

import torch

from softlabel_schemas.errors import InputError


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


def _is_here(name: str) -> bool:
    device = torch.device(name)
    if device.type == "cpu":
        return True
    return torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
