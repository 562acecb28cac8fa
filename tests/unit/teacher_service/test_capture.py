"""Capture from the teachers' logits against its definition in float64; the exponentials that it is made of."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softlabel_schemas.compiled import compiled
from softlabel_schemas.selection import MIN_LOG_PROB, NO_LABEL, Mass, Threshold, TopK
from teacher_service import capture as module
from teacher_service.capture import capture
from teacher_service.float32 import exp_of_negative, log1p_of_fraction
from teacher_service.selection import Selected
from tests.support.targets import dense_posterior
from tests.unit.teacher_service.test_ensemble import combine_exactly

Method = Literal["arithmetic", "log_linear"]
TEMPERATURES = (1.0, 2.0, 0.5)
NUM_CLASSES = 70
methods = st.sampled_from(["arithmetic", "log_linear"])
selections = st.one_of(
    st.builds(TopK, k=st.integers(1, NUM_CLASSES + 2), keep_hard_label=st.booleans()),
    st.builds(Mass, mass=st.floats(0.01, 1.0), max_entries=st.integers(1, 30), keep_hard_label=st.booleans()),
    st.builds(Threshold, min_prob=st.floats(1e-4, 1.0), max_entries=st.integers(1, 30), keep_hard_label=st.booleans()),
)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def check_against_float64(
    found: Selected, log_posterior_NV: npt.NDArray[np.float64], keeps_labels: bool, labels_N: npt.NDArray[np.int64]
) -> None:
    """Log-probabilities within 3e-6 (relative below -1), tails and entropy within 2e-6 and relative 2e-5; the ranking may
    differ only where rounding makes it."""
    kept_NK = found.kept_NK.numpy()
    ids_NK, log_probs_NK = found.ids_NK.numpy(), found.log_probs_NK.numpy()
    exact_NK = np.take_along_axis(log_posterior_NV, ids_NK, axis=1).clip(MIN_LOG_PROB, 0)
    np.testing.assert_allclose(log_probs_NK[kept_NK], exact_NK[kept_NK], rtol=3e-6, atol=3e-6)
    kept_NV = np.zeros(log_posterior_NV.shape, dtype=bool)
    for row, (kept_K, ids_K) in enumerate(zip(kept_NK, ids_NK, strict=True)):
        kept_NV[row, ids_K[kept_K]] = True
        assert kept_NV[row].sum() == kept_K.sum()
        prefix = kept_K[:-1] if keeps_labels else kept_K
        best = np.sort(log_posterior_NV[row])[::-1][: prefix.sum()].clip(MIN_LOG_PROB, 0)
        np.testing.assert_allclose(log_probs_NK[row, : len(prefix)][prefix], best, rtol=3e-6, atol=3e-6)
        assert not keeps_labels or labels_N[row] == NO_LABEL or kept_NV[row, labels_N[row]]
    for column, temperature in enumerate(TEMPERATURES):
        tail_N = (dense_posterior(log_posterior_NV, temperature) * ~kept_NV).sum(axis=1)
        np.testing.assert_allclose(found.tail_NM.numpy()[:, column], tail_N, rtol=2e-5, atol=2e-6)
    entropy_N = -(np.exp(log_posterior_NV) * log_posterior_NV.clip(min=MIN_LOG_PROB)).sum(axis=1)
    np.testing.assert_allclose(found.entropy_N.numpy(), entropy_N, rtol=2e-5, atol=2e-6)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    relative=st.lists(st.floats(0.05, 20.0), min_size=1, max_size=4),
    method=methods,
    scale=st.sampled_from([0.0, 0.1, 3.0, 30.0]),
    selection=selections,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_equals_its_definition(
    seed: int, relative: list[float], method: Method, scale: float, selection: Any, dtype: torch.dtype
) -> None:
    """Utterances of different lengths, teachers that pad differently, and logits that are not contiguous."""
    rng = np.random.default_rng(seed)
    weights, num_frames = [weight / sum(relative) for weight in relative], [3, 0, 5]
    labels_N = rng.integers(NO_LABEL, NUM_CLASSES, 8)
    logits, rows = [], []
    for index in range(len(weights)):
        logits_BVT = torch.from_numpy(scale * rng.standard_normal((3, NUM_CLASSES, 5 + index))).to(dtype)
        logits.append(logits_BVT.transpose(1, 2))
        rows.append(torch.cat([logits[-1][b, :n] for b, n in enumerate(num_frames)]).double().numpy())
    found = capture(logits, num_frames, weights, method, selection, TEMPERATURES, torch.from_numpy(labels_N))
    with np.errstate(divide="ignore"):
        log_posterior_NV = combine_exactly(rows, weights, method)
    check_against_float64(found, log_posterior_NV, selection.keep_hard_label, labels_N)


@pytest.mark.parametrize("method", ["arithmetic", "log_linear"])
@pytest.mark.parametrize("num_classes", [6, 300, 9000])
def test_classes_that_all_teachers_hold_equal_are_ranked_by_id(method: Method, num_classes: int) -> None:
    rng = np.random.default_rng(0)
    levels_NV = rng.integers(0, 4, (20, num_classes))
    logits = [torch.from_numpy(levels_NV * factor)[None].float() for factor in (1.0, 0.7, 2.1)]
    width = min(num_classes, 40)
    none_N = torch.full((20,), NO_LABEL)
    found = capture(logits, [20], [0.5, 0.3, 0.2], method, TopK(k=width), TEMPERATURES, none_N)
    expected_NK = np.argsort(-levels_NV, axis=1, kind="stable")[:, :width]
    np.testing.assert_array_equal(found.ids_NK.numpy(), expected_NK)


@pytest.mark.parametrize("method", ["arithmetic", "log_linear"])
def test_a_class_that_every_teacher_excludes_can_still_be_kept(method: Method) -> None:
    logits_BTV = torch.tensor([[[0.0, -torch.inf, 1.0, -torch.inf, -95.0]]])
    none_N = torch.full((1,), NO_LABEL)
    found = capture([logits_BTV, logits_BTV * 1], [1], [0.3, 0.7], method, TopK(k=5), (1.0,), none_N)
    assert found.ids_NK.tolist() == [[2, 0, 4, 1, 3]]
    np.testing.assert_allclose(found.log_probs_NK[0], [-0.3132617, -1.3132617, -96.31326, -100, -100], rtol=1e-6)
    assert torch.isfinite(found.entropy_N).all()
    assert found.tail_NM.tolist() == [[0.0]]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("method", ["arithmetic", "log_linear"])
@pytest.mark.parametrize("k", [3, 200])
def test_a_frame_that_is_not_finite_is_found_and_does_not_touch_the_others(bad: float, method: Method, k: int) -> None:
    torch.manual_seed(0)
    logits = [torch.randn(1, 4, 300) for _ in range(2)]
    broken = [logits[0].clone(), logits[1]]
    broken[0][0, 1] = bad
    if bad != -torch.inf:
        broken[0][0, 1, 1:] = 0.0
    none_N = torch.full((4,), NO_LABEL)
    expected, found = (capture(each, [4], [0.5, 0.5], method, TopK(k=k), (1.0,), none_N) for each in (logits, broken))
    assert torch.isfinite(found.entropy_N).tolist() == [True, False, True, True]
    for row in (0, 2, 3):
        for name in ("ids_NK", "log_probs_NK", "tail_NM", "entropy_N"):
            assert torch.equal(getattr(found, name)[row], getattr(expected, name)[row]), name


def test_threads_and_blocks_do_not_change_a_bit() -> None:
    torch.manual_seed(0)
    logits = [torch.randn(1, 50, 9000) * 3 for _ in range(2)]
    none_N = torch.full((50,), NO_LABEL)
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(capture(logits, [50], [0.5, 0.5], "arithmetic", TopK(k=20), TEMPERATURES, none_N))
    alone = capture(
        [each[:, 13:14] for each in logits], [1], [0.5, 0.5], "arithmetic", TopK(k=20), TEMPERATURES, none_N[:1]
    )
    for name in ("ids_NK", "log_probs_NK", "kept_NK", "tail_NM", "entropy_N"):
        first, second = (getattr(each, name) for each in found)
        assert torch.equal(first, second), name
        assert torch.equal(first[13], getattr(alone, name)[0]), name


# Compiled functions


def test_the_exponential_and_the_logarithm() -> None:
    @compiled()
    def both(x_N: npt.NDArray[np.float32], exp_N: npt.NDArray[np.float32], log1p_N: npt.NDArray[np.float32]) -> None:
        for n in range(len(x_N)):
            exp_N[n] = exp_of_negative(-x_N[n])
            log1p_N[n] = log1p_of_fraction(exp_N[n])

    x_N = np.concatenate([np.linspace(0, 87.2, 200_001), np.geomspace(1e-30, 1, 100_001)]).astype(np.float32)
    exp_N, log1p_N = np.empty_like(x_N), np.empty_like(x_N)
    both(x_N, exp_N, log1p_N)
    exact_N = np.exp(-x_N.astype(np.float64))
    assert np.abs(exp_N / exact_N - 1).max() < 2e-7
    assert np.abs(log1p_N - np.log1p(exp_N.astype(np.float64))).max() < 1e-7
    assert exp_N[0] == 1.0
    x_N = np.array([100.0, np.inf, np.nan], dtype=np.float32)
    both(x_N, exp_N[:3], log1p_N[:3])
    np.testing.assert_array_equal(exp_N[:3], [0.0, 0.0, np.nan])
    np.testing.assert_array_equal(log1p_N[:3], [0.0, 0.0, np.nan])


def test_what_has_no_place_for_a_cache_is_compiled_nevertheless() -> None:
    scope: dict[str, Callable[[int], int]] = {}
    exec("def double(x):\n    return 2 * x\n", scope)
    assert compiled()(scope["double"])(21) == 42


def test_a_kernel_that_cannot_be_built_is_done_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As without a C compiler for Triton's launcher: the same from torch, and one line. A device that has failed is no such
    case."""
    failures: list[Exception] = [RuntimeError("Failed to find C compiler"), RuntimeError("CUDA error: unspecified")]
    tried = []

    def kernel(*_: Any) -> Selected:
        tried.append(failures[0])
        raise failures[0]

    monkeypatch.setitem(sys.modules, "teacher_service.capture_triton", SimpleNamespace(capture_triton=kernel))
    arguments: Any = (
        [torch.randn(2, 5, 9)],
        [5, 3],
        [1.0],
        "arithmetic",
        TopK(k=3),
        (1.0,),
        torch.full((8,), NO_LABEL),
    )
    expected = capture(*arguments)
    assert tried == []
    monkeypatch.setattr(module, "_takes_kernel", lambda *_: not module._kernel_failures)
    monkeypatch.setattr(module, "_kernel_failures", [])
    for _ in range(2):
        found = capture(*arguments)
        assert torch.equal(found.log_probs_NK, expected.log_probs_NK)
        assert torch.equal(found.tail_NM, expected.tail_NM)
    assert tried == failures[:1]
    assert [record.getMessage() for record in caplog.records] == [
        "capture is by torch and not by its kernel, which failed: RuntimeError: Failed to find C compiler"
    ]
    module._kernel_failures.clear()
    failures.pop(0)
    with pytest.raises(RuntimeError, match="CUDA error"):
        capture(*arguments)
    assert module._kernel_failures == []
