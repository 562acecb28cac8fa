"""Capture: the teachers' logits of a batch -> the few classes that are kept. Only these leave the device.

What runs where, all to the same definition (float64 in the tests):

- CPU: ``capture_cpu``, compiled by numba;
- CUDA with Triton, up to 64 entries a frame and 16,384 classes: ``capture_triton``, one kernel, where it can be built;
- any other device or selection: ``ensemble.combine`` and ``selection.select``, in torch; a sample is drawn on the CPU from the
  log-posterior that ``ensemble.combine`` gives, since a device would add up the probabilities in another order, and draw
  another class now and then.

A byte budget is of whole utterances: captured are its candidates, see ``utterance_labels``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Literal, TypeGuard

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softlabel_schemas.selection import AnySelection, ByteBudget, PrefixSelection, SampledSelection, TopK
from teacher_service.capture_cpu import capture_cpu, select_cpu
from teacher_service.ensemble import combine
from teacher_service.selection import Selected, select
from teacher_service.teacher import is_device_fault, lacks_memory

_MAX_CLASSES, _MAX_WIDTH = 1 << 14, 64
_HAS_TRITON = find_spec("triton") is not None
# Their texts: a traceback would hold a batch's logits on the device.
_kernel_failures: list[str] = []
# Goes where the actor's own lines go.
_log = logging.getLogger("teacher_service.actor.capture")


def capture(
    logits: Sequence[Tensor],
    num_frames: Sequence[int],
    weights: Sequence[float],
    method: Literal["arithmetic", "log_linear"],
    selection: AnySelection,
    temperatures: tuple[float, ...],
    labels_N: Tensor,
    streams_NW: npt.NDArray[np.uint64] | None = None,
) -> Selected:
    """Combine, temper, select; on the device of the logits. Of a byte budget, the ``max_entries`` likeliest classes.

    Args:
        logits: of each teacher, [B, T, V]; T may differ, what follows an utterance's own frames is ignored.
        num_frames: of each utterance; N together.
        weights: positive, adding up to 1.
        labels_N: hard labels, int64, on the CPU; -1 where a frame has none.
        streams_NW: for a sample, see ``softlabel_schemas.sampling.frame_streams``.
    """
    device = logits[0].device
    if isinstance(selection, ByteBudget):
        selection = TopK(k=selection.max_entries)
    if _takes_kernel(device, selection, logits[0].shape[2]):
        selected = _by_kernel(logits, num_frames, weights, method, selection, temperatures, labels_N)
        if selected is not None:
            return selected
    if device.type == "cpu":
        rows = [_rows(num_frames, logits_BTV.shape[1]) for logits_BTV in logits]
        flat = [logits_BTV.reshape(-1, logits_BTV.shape[2]) for logits_BTV in logits]
        return capture_cpu(flat, rows, weights, method, selection, temperatures, labels_N.numpy(), streams_NW)
    longest = max(num_frames)
    log_probs_BTV = combine([logits_BTV[:, :longest] for logits_BTV in logits], weights, method)
    mask_BT = torch.arange(longest, device=device) < torch.tensor(num_frames, device=device)[:, None]
    log_probs_NV = log_probs_BTV[mask_BT]
    if isinstance(selection, SampledSelection):
        return select_cpu(log_probs_NV.cpu(), selection, temperatures, labels_N, streams_NW)
    return select(log_probs_NV, selection, temperatures, labels_N.to(device))


def _takes_kernel(
    device: torch.device, selection: PrefixSelection | SampledSelection, num_classes: int
) -> TypeGuard[PrefixSelection]:
    return _HAS_TRITON and device.type == "cuda" and not _kernel_failures and fits(selection, num_classes)


def _by_kernel(*arguments: Any) -> Selected | None:
    """None where the kernel cannot be built or run here, for want of a C compiler or of a folder to write to, say: torch gives
    the same, slower. That is logged, and the kernel is not tried again in this process."""
    try:
        from teacher_service.capture_triton import capture_triton

        return capture_triton(*arguments)
    except Exception as error:
        if is_device_fault(error) or lacks_memory(error):
            raise
        _kernel_failures.append(f"{type(error).__name__}: {error}")
        _log.warning("capture is by torch and not by its kernel, which failed: %s", _kernel_failures[-1])
        return None


def fits(selection: PrefixSelection | SampledSelection, num_classes: int) -> TypeGuard[PrefixSelection]:
    """Whether the kernel on CUDA takes it: a prefix of the ranking; a row and its best classes stay in registers."""
    return (
        isinstance(selection, PrefixSelection)
        and num_classes <= _MAX_CLASSES
        and min(selection.cap, num_classes) <= _MAX_WIDTH
    )


def _rows(num_frames: Sequence[int], longest: int) -> np.ndarray:
    """Where the frames are in logits [B * T, V], int64 [N]."""
    return np.concatenate([row * longest + np.arange(count) for row, count in enumerate(num_frames)])
