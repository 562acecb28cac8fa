"""The Triton kernel: by Triton's interpreter against float64, and compiled for a GPU without one.

Both in processes of their own: the interpreter is chosen when the kernel's module is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import pytest
import torch

from softlabel_schemas.selection import NO_LABEL, Mass, Threshold, TopK
from tests.unit.teacher_service.test_capture import TEMPERATURES, check_against_float64
from tests.unit.teacher_service.test_ensemble import combine_exactly

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
Method = Literal["arithmetic", "log_linear"]
METHODS: tuple[Method, Method] = ("arithmetic", "log_linear")
SELECTIONS = (
    TopK(k=1),
    TopK(k=20),
    TopK(k=64, keep_hard_label=True),
    Mass(mass=0.9, max_entries=6, keep_hard_label=True),
    Threshold(min_prob=0.02, max_entries=40),
)


@pytest.mark.parametrize("check", ["definition", "ties", "not_finite", "compiles"])
def test_in_a_process_of_its_own(check: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0" if check == "compiles" else "1"}
    called = subprocess.run(
        [sys.executable, "-m", __spec__.name, check], env=environment, capture_output=True, text=True, timeout=500
    )
    assert called.returncode == 0, called.stderr[-4000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu() -> None:
    check_definition("cuda")
    check_ties("cuda")
    check_not_finite("cuda")


def check_definition(device: str) -> None:
    """Utterances of different lengths; teachers that pad differently; logits of every type, also not contiguous."""
    from teacher_service.capture_triton import capture_triton

    rng = np.random.default_rng(0)
    num_frames = [3, 0, 4]
    for number, selection in enumerate(SELECTIONS):
        for num_teachers, num_classes, method in ((1, 700, METHODS[0]), (3, 64, METHODS[0]), (2, 700, METHODS[1])):
            dtype = (torch.float32, torch.bfloat16, torch.float16)[(number + num_teachers) % 3]
            labels_N = rng.integers(NO_LABEL, num_classes, 7)
            weights = rng.dirichlet(np.ones(num_teachers)).tolist()
            logits, rows = [], []
            for index in range(num_teachers):
                values = torch.from_numpy(3 * rng.standard_normal((3, num_classes, 4 + index))).to(dtype)
                logits_BTV = values.transpose(1, 2)
                logits.append((logits_BTV if index % 2 else logits_BTV.contiguous()).to(device))
                rows.append(torch.cat([logits_BTV[b, :n] for b, n in enumerate(num_frames)]).double().numpy())
            labels = torch.from_numpy(labels_N)
            found = capture_triton(logits, num_frames, weights, method, selection, TEMPERATURES, labels).to_cpu()
            exact_NV = combine_exactly(rows, weights, method)
            check_against_float64(found, exact_NV, selection.keep_hard_label, labels_N)


def check_ties(device: str) -> None:
    """More of them at the cut than can be ranked, too."""
    from teacher_service.capture_triton import capture_triton

    rng = np.random.default_rng(0)
    for num_levels in (1, 2, 40):
        levels_NV = rng.integers(0, num_levels, (4, 1500))
        logits = [torch.from_numpy(levels_NV * factor)[None].float().to(device) for factor in (1.0, 0.7)]
        none_N = torch.full((4,), NO_LABEL)
        for method in METHODS:
            found = capture_triton(logits, [4], [0.5, 0.5], method, TopK(k=30), (1.0,), none_N)
            expected_NK = np.argsort(-levels_NV, axis=1, kind="stable")[:, :30]
            np.testing.assert_array_equal(found.ids_NK.cpu().numpy(), expected_NK)


def check_not_finite(device: str) -> None:
    from teacher_service.capture_triton import capture_triton

    logits_BTV = torch.randn(1, 4, 300, generator=torch.Generator().manual_seed(0))
    logits_BTV[0, 1, 7], logits_BTV[0, 2, 7], logits_BTV[0, 3, 5:] = torch.nan, torch.inf, -torch.inf
    none_N = torch.full((4,), NO_LABEL)
    found = capture_triton([logits_BTV.to(device)], [4], [1.0], "arithmetic", TopK(k=8), (1.0,), none_N).to_cpu()
    assert torch.isfinite(found.entropy_N).tolist() == [True, False, False, True]
    assert ((found.ids_NK >= 0) & (found.ids_NK < 300)).all()
    assert found.ids_NK[3, 5:].tolist() == [5, 6, 7]
    assert found.log_probs_NK[3, 5:].tolist() == [-100.0] * 3


def check_compiles() -> None:
    """To machine code for an H100, by Triton's own assembler."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from teacher_service.capture_triton import _capture_row

    pointers = dict.fromkeys(("log_probs_NK", "label_log_probs_N", "entropy_N", "outside_NM"), "*fp32")
    signature: dict[str, Any] = {
        "logits": ("*bf16",) * 3,
        "offsets": ("*i64",) * 3,
        "weights": ("fp32",) * 3,
        "inverse_temperatures": ("fp32",) * 2,
        "labels_N": "*i64",
        "scratch_N2C": "*i32",
        "ids_NK": "*i64",
        **pointers,
    }
    constants = {
        "NUM_CLASSES": 660,
        "ALIGN": 4,
        "WIDTH": 20,
        "LOG_LINEAR": False,
        "BLOCK": 1024,
        "CANDIDATES": 128,
    }
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=_capture_row, signature=signature, constexprs=constants)
    assert len(compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]) > 1000


if __name__ == "__main__":
    {
        "definition": lambda: check_definition("cpu"),
        "ties": lambda: check_ties("cpu"),
        "not_finite": lambda: check_not_finite("cpu"),
        "compiles": check_compiles,
    }[sys.argv[1]]()
