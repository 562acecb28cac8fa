"""Losses of batches whose frames differ: weights, hard labels on some, targets that are samples. Against dense float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from student_trainer.config import TailMode
from student_trainer.loss import SparseTargets, hard_and_soft_loss, soft_loss
from tests.support.losses import (
    TAIL_MODES,
    TEMPERATURES,
    as_float64,
    dense_loss,
    dense_targets,
    random_case,
    seeds,
    sparse,
    value_and_gradient,
)

WEIGHT = 0.7


@pytest.mark.parametrize("num_heads", [1, 2])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("tail", TAIL_MODES)
@settings(max_examples=20)
@given(seed=seeds, labelled_share=st.sampled_from([0.0, 0.5, 1.0]), is_weighted=st.booleans())
def test_both_losses_against_dense(
    num_heads: int, temperature: float, tail: TailMode, seed: int, labelled_share: float, is_weighted: bool
) -> None:
    """Value and gradient of their sum, for each head; frames without labels, all of them at times; weights with 0 and 1."""
    rng = np.random.default_rng(seed)
    case = random_case(seed, num_classes=9, max_entries=6)
    labels_N = torch.where(torch.from_numpy(rng.random(6) < labelled_share), case["labels_N"], -1)
    heads = [case["logits_NV"]]
    if num_heads == 2:
        heads.append(torch.from_numpy(rng.standard_normal((6, 9))).requires_grad_())
    weights_N = torch.from_numpy(rng.choice([0.0, 0.3, 1.0], 6)) if is_weighted else None
    targets = replace(as_float64(sparse(case, temperature)), weights_N=weights_N)
    hard, soft = hard_and_soft_loss(heads[0], heads[-1], targets, temperature=temperature, tail=tail, labels_N=labels_N)
    is_labelled_N = labels_N >= 0
    log_posterior_NV = heads[0].log_softmax(dim=1)
    expected_hard = 0 * heads[0].sum()
    if is_labelled_N.any():
        expected_hard = functional.nll_loss(log_posterior_NV[is_labelled_N], labels_N[is_labelled_N])
    kept_NV = torch.from_numpy(case["kept_NV"])
    dense = (dense_targets(targets, kept_NV), kept_NV, targets.tail_N, labels_N, temperature, tail, weights_N)
    expected_soft = dense_loss(heads[-1], *dense)
    assert float(hard.detach()) == pytest.approx(float(expected_hard.detach()), abs=1e-9)
    assert float(soft.detach()) == pytest.approx(float(expected_soft.detach()), abs=1e-9)
    found = torch.autograd.grad((1 - WEIGHT) * hard + WEIGHT * soft, heads)
    expected = torch.autograd.grad((1 - WEIGHT) * expected_hard + WEIGHT * expected_soft, heads)
    for found_NV, expected_NV in zip(found, expected, strict=True):
        torch.testing.assert_close(found_NV, expected_NV, atol=1e-9, rtol=0)


class TestWeights:
    @pytest.mark.parametrize("tail", TAIL_MODES)
    def test_a_dropped_frame_is_one_stored_without_entries(self, tail: TailMode) -> None:
        case = random_case(5, num_classes=8, max_entries=4)
        case["kept_NV"][:, 0] = True
        options: dict[str, Any] = {"temperature": 2.0, "tail": tail, "labels_N": case["labels_N"]}
        dropped = replace(sparse(case, 2.0), weights_N=torch.tensor([1.0, 1, 0, 1, 0, 1]))
        case["kept_NV"][[2, 4]] = False
        found, expected = (
            value_and_gradient(soft_loss(case["logits_NV"], targets, **options), case["logits_NV"])
            for targets in (dropped, sparse(case, 2.0))
        )
        assert found[0] == pytest.approx(expected[0], rel=1e-12)
        torch.testing.assert_close(found[1], expected[1], atol=1e-15, rtol=0)

    @pytest.mark.parametrize("tail", TAIL_MODES)
    def test_what_a_frame_teaches_does_not_depend_on_which_are_dropped(self, tail: TailMode) -> None:
        case = random_case(5, num_classes=8, max_entries=4)
        targets, logits_NV = sparse(case, 1.0), case["logits_NV"]
        gradients = []
        for weights in ([0.5, 1.0, 1, 1, 1, 1], [0.5, 0.0, 0, 0.25, 0, 0]):
            weighted = replace(targets, weights_N=torch.tensor(weights))
            loss = soft_loss(logits_NV, weighted, temperature=1.0, tail=tail, labels_N=case["labels_N"])
            gradients.append(value_and_gradient(loss, logits_NV)[1])
        assert torch.equal(gradients[0][0], gradients[1][0])

    def test_the_hard_loss_knows_none(self) -> None:
        """Also where one posterior serves both."""
        case = random_case(1, num_classes=8, max_entries=4)
        options: dict[str, Any] = {"temperature": 1.0, "tail": "ghost", "labels_N": case["labels_N"]}
        logits_NV, targets = case["logits_NV"], sparse(case, 1.0)
        plain, _ = hard_and_soft_loss(logits_NV, logits_NV, targets, **options)
        weighted, soft = hard_and_soft_loss(logits_NV, logits_NV, replace(targets, weights_N=torch.zeros(6)), **options)
        assert torch.equal(plain, weighted)
        assert float(soft.detach()) == 0


class TestSampledTargets:
    """Shares of draws with replacement from the posterior: they sum to 1, and there is no tail."""

    @pytest.mark.parametrize("tail", TAIL_MODES)
    @settings(max_examples=25)
    @given(seed=seeds, num_draws=st.integers(1, 12))
    def test_against_dense(self, tail: TailMode, seed: int, num_draws: int) -> None:
        """Whatever the tail mode: with no tail they are the same."""
        case = random_case(seed, num_classes=9, max_entries=4)
        rng = np.random.default_rng(seed)
        posterior_NV = np.exp(case["log_posterior_NV"].astype(np.float64))
        shares_NV = torch.from_numpy(rng.multinomial(num_draws, posterior_NV / posterior_NV.sum(axis=1)[:, None]))
        shares_NV = shares_NV.double() / num_draws
        found = value_and_gradient(
            soft_loss(case["logits_NV"], sampled(shares_NV), temperature=1.0, tail=tail, labels_N=case["labels_N"]),
            case["logits_NV"],
        )
        expected = value_and_gradient(
            -(shares_NV * case["logits_NV"].log_softmax(dim=1)).sum(dim=1).mean(), case["logits_NV"]
        )
        assert found[0] == pytest.approx(expected[0], abs=1e-9)
        torch.testing.assert_close(found[1], expected[1], atol=1e-9, rtol=0)

    @pytest.mark.parametrize("tail", TAIL_MODES)
    def test_the_expected_gradient_is_that_of_the_whole_posterior(self, tail: TailMode) -> None:
        """Exactly, by the sum over all outcomes of one draw."""
        case = random_case(2, num_classes=9, max_entries=4)
        logits_NV, labels_N = case["logits_NV"], case["labels_N"]
        posterior_NV = torch.from_numpy(case["log_posterior_NV"].astype(np.float64)).exp()
        mean_NV = torch.zeros_like(posterior_NV)
        for drawn in range(9):
            one_NV = functional.one_hot(torch.full((6,), drawn), 9).double()
            loss = soft_loss(logits_NV, sampled(one_NV), temperature=1.0, tail=tail, labels_N=labels_N)
            mean_NV += posterior_NV[:, [drawn]] * value_and_gradient(loss, logits_NV)[1]
        expected_NV = (logits_NV.detach().softmax(dim=1) - posterior_NV) / 6
        torch.testing.assert_close(mean_NV, expected_NV, atol=1e-6, rtol=0)


def sampled(shares_NV: torch.Tensor) -> SparseTargets:
    """The drawn classes first, padding after them."""
    probs_NV, ids_NV = shares_NV.sort(dim=1, descending=True)
    width = int((shares_NV > 0).sum(dim=1).max())
    return SparseTargets(
        ids_NK=ids_NV[:, :width],
        probs_NK=probs_NV[:, :width],
        tail_N=torch.zeros(len(shares_NV), dtype=torch.float64),
    )
