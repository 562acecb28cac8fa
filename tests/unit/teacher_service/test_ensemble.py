"""Combination of teachers against float64, and what happens where they do not fit together."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_service.ensemble import combine, disagreements

Method = Literal["arithmetic", "log_linear"]


def combine_exactly(
    logits: list[npt.NDArray[np.float64]], weights: list[float], method: Method
) -> npt.NDArray[np.float64]:
    """Log-posterior float64 [B, T, V], as defined."""
    posteriors = [np.exp(l_BTV - np.logaddexp.reduce(l_BTV, axis=-1, keepdims=True)) for l_BTV in logits]
    if method == "arithmetic":
        return np.log(sum(weight * p_BTV for weight, p_BTV in zip(weights, posteriors, strict=True)))
    product_BTV = np.prod([p_BTV**weight for weight, p_BTV in zip(weights, posteriors, strict=True)], axis=0)
    return np.log(product_BTV / product_BTV.sum(axis=-1, keepdims=True))


@settings(max_examples=100)
@given(
    seed=st.integers(0, 2**32 - 1),
    relative=st.lists(st.floats(0.05, 20.0), min_size=1, max_size=4),
    method=st.sampled_from(["arithmetic", "log_linear"]),
    scale=st.sampled_from([0.1, 2.0, 10.0]),
)
def test_combine(seed: int, relative: list[float], method: Method, scale: float) -> None:
    rng = np.random.default_rng(seed)
    weights = [weight / sum(relative) for weight in relative]
    # float32 values, so that the reference starts from the same logits.
    logits = [(scale * rng.standard_normal((2, 3, 7))).astype(np.float32) for _ in weights]
    found_BTV = combine([torch.from_numpy(l_BTV) for l_BTV in logits], weights, method)
    assert found_BTV.dtype == torch.float32
    expected_BTV = combine_exactly([l_BTV.astype(np.float64) for l_BTV in logits], weights, method)
    np.testing.assert_allclose(found_BTV.numpy(), expected_BTV, rtol=1e-6, atol=2e-6)


def test_the_two_methods_differ_where_teachers_do() -> None:
    """Either teacher can veto a class in the log-linear mean, neither in the arithmetic one."""
    logits = [torch.tensor([[[0.0, 0.0, -60.0]]]), torch.tensor([[[0.0, -60.0, 0.0]]])]
    arithmetic_V = combine(logits, [0.5, 0.5], "arithmetic").exp()[0, 0]
    torch.testing.assert_close(arithmetic_V, torch.tensor([0.5, 0.25, 0.25]))
    log_linear_V = combine(logits, [0.5, 0.5], "log_linear").exp()[0, 0]
    torch.testing.assert_close(log_linear_V, torch.tensor([1.0, 0.0, 0.0]))


@pytest.mark.parametrize("method", ["arithmetic", "log_linear"])
def test_a_class_that_every_teacher_excludes_is_not_a_nan(method: Method) -> None:
    logits_BTV = torch.tensor([[[0.0, 1.0, -torch.inf]]])
    log_probs_V = combine([logits_BTV, logits_BTV * 1], [0.3, 0.7], method)[0, 0]
    assert log_probs_V[2] == -torch.inf
    torch.testing.assert_close(log_probs_V[:2].exp().sum(), torch.tensor(1.0))


def test_logits_of_half_precision_are_combined_in_float32() -> None:
    logits_BTV = torch.randn(1, 4, 9, generator=torch.Generator().manual_seed(0)).bfloat16()
    found_BTV = combine([logits_BTV], [1.0], "arithmetic")
    torch.testing.assert_close(found_BTV, logits_BTV.float().log_softmax(dim=-1))


def test_disagreements() -> None:
    first, second = torch.tensor([5, 9, 3]), torch.tensor([5, 8, 2])
    assert disagreements([first, first.clone()], ["tdnn", "blstm"]) == {}
    assert disagreements([first, first, second, second - 1], ["tdnn", "blstm", "conformer", "last"]) == {
        0: "teachers disagree on its frames: 'tdnn' gives 5, 'last' 4",
        1: "teachers disagree on its frames: 'tdnn' gives 9, 'conformer' 8",
        2: "teachers disagree on its frames: 'tdnn' gives 3, 'conformer' 2",
    }
