"""The sparse losses against dense float64 implementations: value and gradient, every tail mode."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from softlabel_schemas.targets import SoftTargets
from student_trainer.batch import sparse_targets
from student_trainer.config import TailMode
from student_trainer.loss import SparseTargets, hard_and_soft_loss, hard_loss, soft_loss
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
from tests.support.targets import dense_posterior, random_log_posterior, targets_from_dense


class TestAgainstDense:
    @pytest.mark.parametrize("tail", TAIL_MODES)
    @pytest.mark.parametrize("temperature", TEMPERATURES)
    @settings(max_examples=40)
    @given(seed=seeds, num_classes=st.integers(2, 12), max_entries=st.integers(1, 12))
    def test_value_and_gradient_in_float64(
        self, tail: TailMode, temperature: float, seed: int, num_classes: int, max_entries: int
    ) -> None:
        case = random_case(seed, num_classes=num_classes, max_entries=max_entries)
        logits_NV, labels_N = case["logits_NV"], case["labels_N"]
        targets, kept_NV = as_float64(sparse(case, temperature)), torch.from_numpy(case["kept_NV"])
        found = value_and_gradient(
            soft_loss(logits_NV, targets, temperature=temperature, tail=tail, labels_N=labels_N), logits_NV
        )
        dense = (dense_targets(targets, kept_NV), kept_NV, targets.tail_N, labels_N, temperature, tail)
        expected = value_and_gradient(dense_loss(logits_NV, *dense), logits_NV)
        assert found[0] == pytest.approx(expected[0], abs=1e-9)
        assert found[1].dtype == torch.float64
        torch.testing.assert_close(found[1], expected[1], atol=1e-9, rtol=0)

    @pytest.mark.parametrize("tail", TAIL_MODES)
    @pytest.mark.parametrize("temperature", TEMPERATURES)
    @settings(max_examples=25)
    @given(seed=seeds)
    def test_in_float32_from_the_whole_posterior_at_that_temperature(
        self, tail: TailMode, temperature: float, seed: int
    ) -> None:
        """Storing, deriving another temperature and padding together keep within 1e-5 of the true posterior."""
        case = random_case(seed, num_classes=9, max_entries=5)
        labels_N, kept_NV = case["labels_N"], torch.from_numpy(case["kept_NV"])
        posterior_NV = torch.from_numpy(dense_posterior(case["log_posterior_NV"], temperature))
        tail_N = (posterior_NV * ~kept_NV).sum(dim=-1)
        logits_NV = case["logits_NV"]
        expected = value_and_gradient(
            dense_loss(logits_NV, posterior_NV * kept_NV, kept_NV, tail_N, labels_N, temperature, tail), logits_NV
        )
        logits32_NV = logits_NV.detach().float().requires_grad_()
        targets = sparse(case, temperature)
        assert (targets.probs_NK.dtype, targets.tail_N.dtype) == (torch.float32, torch.float32)
        found = value_and_gradient(
            soft_loss(logits32_NV, targets, temperature=temperature, tail=tail, labels_N=labels_N), logits32_NV
        )
        assert found[0] == pytest.approx(expected[0], abs=1e-5)
        torch.testing.assert_close(found[1].double(), expected[1], atol=1e-5, rtol=0)

    @pytest.mark.parametrize("tail", TAIL_MODES)
    @pytest.mark.parametrize("temperature", TEMPERATURES)
    def test_keeping_everything_gives_the_gradient_of_the_dense_kl(self, tail: TailMode, temperature: float) -> None:
        case = random_case(3, num_classes=7, max_entries=7)
        case["kept_NV"][:] = True
        logits_NV, targets = case["logits_NV"], as_float64(sparse(case, temperature))
        assert targets.tail_N.tolist() == [0] * 6
        loss = soft_loss(logits_NV, targets, temperature=temperature, tail=tail, labels_N=case["labels_N"])
        _, gradient_NV = value_and_gradient(loss, logits_NV)
        posterior_NV = torch.from_numpy(dense_posterior(case["log_posterior_NV"], temperature))
        student_NV = (logits_NV.detach() / temperature).softmax(dim=-1)
        expected_NV = temperature * (student_NV - posterior_NV) / len(logits_NV)
        torch.testing.assert_close(gradient_NV, expected_NV, atol=1e-6, rtol=0)


class TestTail:
    @given(seed=seeds, num_classes=st.integers(3, 12))
    def test_ghost_is_at_rest_where_student_and_teacher_agree(self, seed: int, num_classes: int) -> None:
        """And renormalising is not: it pulls towards a student that is too sharp."""
        case = random_case(seed, num_classes=num_classes, max_entries=num_classes - 1)
        case["kept_NV"][np.arange(6), case["log_posterior_NV"].argmax(axis=1)] = True
        logits_NV = torch.from_numpy(case["log_posterior_NV"].astype(np.float64)).requires_grad_()
        gradients = {}
        for tail in ("ghost", "renormalize"):
            loss = soft_loss(
                logits_NV, as_float64(sparse(case, 1.0)), temperature=1.0, tail=tail, labels_N=case["labels_N"]
            )
            gradients[tail] = value_and_gradient(loss, logits_NV)[1].abs().max()
        assert gradients["ghost"] < 1e-6
        if (sparse(case, 1.0).tail_N > 0.01).any():
            assert gradients["renormalize"] > 1e-4

    @pytest.mark.parametrize("tail", TAIL_MODES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @settings(max_examples=40)
    @given(seed=seeds, scale=st.sampled_from([1.0, 30.0, 1e4]))
    def test_gradients_are_finite_and_sum_to_zero_in_each_frame(
        self, tail: TailMode, dtype: torch.dtype, seed: int, scale: float
    ) -> None:
        """They sum to zero because adding a constant to a frame's logits changes nothing."""
        case = random_case(seed, num_classes=8, max_entries=8)
        logits_NV = (scale * case["logits_NV"].detach()).to(dtype).requires_grad_()
        loss = soft_loss(logits_NV, sparse(case, 2.0), temperature=2.0, tail=tail, labels_N=case["labels_N"])
        value, gradient_NV = value_and_gradient(loss, logits_NV)
        assert math.isfinite(value)
        assert gradient_NV.isfinite().all()
        if dtype == torch.float64:
            assert gradient_NV.sum(dim=-1).abs().max() < 1e-8

    @pytest.mark.parametrize("tail", TAIL_MODES)
    def test_a_frame_without_entries_counts_but_adds_nothing(self, tail: TailMode) -> None:
        case = random_case(5, num_classes=8, max_entries=4)
        case["kept_NV"][:, 0] = True
        case["kept_NV"][2] = False
        logits_NV, labels_N = case["logits_NV"], torch.zeros(6, dtype=torch.int64)
        targets = as_float64(sparse(case, 2.0))
        value, gradient_NV = value_and_gradient(
            soft_loss(logits_NV, targets, temperature=2.0, tail=tail, labels_N=labels_N), logits_NV
        )
        assert gradient_NV[2].abs().max() == 0
        others = torch.tensor([0, 1, 3, 4, 5])
        alone = soft_loss(
            logits_NV[others],
            SparseTargets(
                ids_NK=targets.ids_NK[others], probs_NK=targets.probs_NK[others], tail_N=targets.tail_N[others]
            ),
            temperature=2.0,
            tail=tail,
            labels_N=labels_N[others],
        )
        assert value == pytest.approx(float(alone.detach()) * 5 / 6, rel=1e-12)

    @pytest.mark.parametrize("tail", TAIL_MODES)
    def test_no_frame_with_entries(self, tail: TailMode) -> None:
        case = random_case(0, num_classes=4, max_entries=4)
        case["kept_NV"][:] = False
        loss = soft_loss(case["logits_NV"], sparse(case, 2.0), temperature=2.0, tail=tail, labels_N=case["labels_N"])
        value, gradient_NV = value_and_gradient(loss, case["logits_NV"])
        assert value == 0
        assert gradient_NV.abs().max() == 0

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_ghost_pulls_a_student_that_left_next_to_nothing_outside(self, dtype: torch.dtype) -> None:
        """By hand: two classes outside, at exp(-60) each; in float32 one minus the kept posterior is 0."""
        logits_NV = torch.tensor([[60.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)
        targets = SparseTargets(
            ids_NK=torch.tensor([[0]]), probs_NK=torch.tensor([[0.75]]), tail_N=torch.tensor([0.25])
        )
        loss = soft_loss(logits_NV, targets, temperature=1.0, tail="ghost", labels_N=torch.tensor([-1]))
        value, gradient_NV = value_and_gradient(loss, logits_NV)
        assert value == pytest.approx(0.25 * (60 - math.log(2)), rel=1e-6)
        assert gradient_NV[0].tolist() == pytest.approx([0.25, -0.125, -0.125], rel=1e-6)

    @pytest.mark.parametrize("tail", TAIL_MODES)
    @settings(max_examples=40)
    @given(seed=seeds, scale=st.sampled_from([10.0, 60.0]))
    def test_over_confident_students_in_float32(self, tail: TailMode, seed: int, scale: float) -> None:
        case = random_case(seed, num_classes=9, max_entries=8)
        kept_NV, labels_N = torch.from_numpy(case["kept_NV"]), case["labels_N"]
        # The likeliest class is one of the kept, where there are any.
        logits_NV = (scale * (kept_NV + 0.1 * case["logits_NV"].detach())).float().requires_grad_()
        targets = sparse(case, 1.0)
        found = value_and_gradient(
            soft_loss(logits_NV, targets, temperature=1.0, tail=tail, labels_N=labels_N), logits_NV
        )
        logits64_NV = logits_NV.detach().double().requires_grad_()
        dense = (dense_targets(targets, kept_NV), kept_NV, targets.tail_N.double(), labels_N, 1.0, tail)
        expected = value_and_gradient(dense_loss(logits64_NV, *dense), logits64_NV)
        assert found[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-5)
        torch.testing.assert_close(found[1].double(), expected[1], atol=1e-5, rtol=0)

    def test_the_tail_goes_where_the_mode_says(self) -> None:
        """By hand: p = 0.6 and 0.1 of four classes, the student is uniform but for one class."""
        student = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
        targets = SparseTargets(
            ids_NK=torch.tensor([[0, 1]]), probs_NK=torch.tensor([[0.6, 0.1]]), tail_N=torch.tensor([0.3])
        )
        kept = -(0.6 * math.log(0.4) + 0.1 * math.log(0.3))
        expected = {
            "renormalize": kept / 0.7,
            "ghost": kept - 0.3 * math.log(0.3),
            "to_hard_label": kept - 0.3 * math.log(0.1),
            "uniform": kept - 0.15 * math.log(0.2) - 0.15 * math.log(0.1),
        }
        for tail in TAIL_MODES:
            loss = soft_loss(student.log()[None], targets, temperature=1.0, tail=tail, labels_N=torch.tensor([3]))
            assert float(loss) == pytest.approx(expected[tail], abs=1e-6), tail


class TestHardLoss:
    def test_mean_over_the_labelled_frames(self) -> None:
        probs_NV = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
        logits_NV = probs_NV.log().requires_grad_()
        loss = hard_loss(logits_NV, torch.tensor([1, -1, 0]))
        value, gradient_NV = value_and_gradient(loss, logits_NV)
        assert value == pytest.approx(-(math.log(0.5) + math.log(0.2)) / 2, rel=1e-12)
        assert gradient_NV[1].tolist() == [0, 0]

    def test_without_any_label_it_is_zero(self) -> None:
        logits_NV = torch.randn(3, 4, requires_grad=True)
        value, gradient_NV = value_and_gradient(hard_loss(logits_NV, torch.full((3,), -1)), logits_NV)
        assert value == 0
        assert gradient_NV.abs().max() == 0


class TestBothLosses:
    @pytest.mark.parametrize("tail", TAIL_MODES)
    @pytest.mark.parametrize("temperature", TEMPERATURES)
    @settings(max_examples=40)
    @given(seed=seeds, max_entries=st.integers(1, 9), weight=st.sampled_from([0.0, 0.3, 1.0]))
    def test_of_shared_logits_are_those_of_each_alone(
        self, tail: TailMode, temperature: float, seed: int, max_entries: int, weight: float
    ) -> None:
        """Against the library's cross-entropy, with frames that have no entry, or no label, or neither."""
        case = random_case(seed, num_classes=9, max_entries=max_entries)
        logits_NV, labels_N = case["logits_NV"], case["labels_N"]
        targets = as_float64(sparse(case, temperature))
        options: dict[str, Any] = {"temperature": temperature, "tail": tail, "labels_N": labels_N}
        hard, soft = hard_and_soft_loss(logits_NV, logits_NV, targets, **options)
        hard_alone, soft_alone = hard_loss(logits_NV, labels_N), soft_loss(logits_NV, targets, **options)
        assert float(hard.detach()) == pytest.approx(float(hard_alone.detach()), abs=1e-12)
        assert float(soft.detach()) == pytest.approx(float(soft_alone.detach()), abs=1e-12)
        _, found_NV = value_and_gradient((1 - weight) * hard + weight * soft, logits_NV)
        _, expected_NV = value_and_gradient((1 - weight) * hard_alone + weight * soft_alone, logits_NV)
        torch.testing.assert_close(found_NV, expected_NV, atol=1e-12, rtol=0)

    def test_of_two_heads(self) -> None:
        case = random_case(1, num_classes=9, max_entries=4)
        hard_NV, soft_NV, labels_N = case["logits_NV"], 2 * case["logits_NV"].detach(), case["labels_N"]
        options: dict[str, Any] = {"temperature": 1.0, "tail": "ghost", "labels_N": labels_N}
        hard, soft = hard_and_soft_loss(hard_NV, soft_NV, sparse(case, 1.0), **options)
        assert torch.equal(hard, hard_loss(hard_NV, labels_N))
        assert torch.equal(soft, soft_loss(soft_NV, sparse(case, 1.0), **options))

    def test_a_second_backward_pass_is_refused(self) -> None:
        """The gradient was made where the softmax stood."""
        case = random_case(1, num_classes=9, max_entries=4)
        loss = soft_loss(case["logits_NV"], sparse(case, 1.0), temperature=1.0, tail="ghost", labels_N=case["labels_N"])
        torch.autograd.grad(loss, case["logits_NV"], retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, case["logits_NV"])


class TestHalfPrecision:
    @pytest.fixture(autouse=True)
    def autocast(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As on a GPU, where a softmax is float32 whatever it is of; on processors autocast leaves it as it is."""
        monkeypatch.setattr(Tensor, "softmax", lambda self, dim: torch.softmax(self, dim, dtype=torch.float32))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("tail", TAIL_MODES)
    @pytest.mark.parametrize("temperature", TEMPERATURES)
    def test_is_single_precision_but_for_the_logits(
        self, tail: TailMode, temperature: float, dtype: torch.dtype
    ) -> None:
        """As in a loop of one's own that takes its losses under autocast."""
        case = random_case(1, num_classes=9, max_entries=4)
        targets, half_NV = sparse(case, temperature), case["logits_NV"].detach().to(dtype)
        options: dict[str, Any] = {"temperature": temperature, "tail": tail, "labels_N": case["labels_N"]}
        results = []
        for logits_NV in (half_NV.requires_grad_(), half_NV.detach().float().requires_grad_()):
            # The gradient is made where the softmax stood: one backward pass each.
            hard, soft = hard_and_soft_loss(logits_NV, logits_NV, targets, **options)
            alone = hard_loss(logits_NV, case["labels_N"]), soft_loss(logits_NV, targets, **options)
            results.append([value_and_gradient(loss, logits_NV) for loss in (hard + soft, *alone)])
        for (value, gradient_NV), (expected, expected_NV) in zip(*results, strict=True):
            assert value == expected
            assert torch.equal(gradient_NV, expected_NV.to(dtype))


class _LargeOutputs(TorchDispatchMode):
    """Names of the operators whose result has ``num_elements`` or more."""

    def __init__(self, num_elements: int) -> None:
        super().__init__()
        self.num_elements = num_elements
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() >= self.num_elements:
            self.found.append(func.overloadpacket.__name__)
        return result


@pytest.mark.parametrize("tail", TAIL_MODES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_no_target_over_all_classes_is_made(tail: TailMode, temperature: float) -> None:
    num_frames, num_classes = 16, 1_000
    rng = np.random.default_rng(0)
    log_posterior_NV = random_log_posterior(rng, num_frames, num_classes)
    kept_NV = log_posterior_NV >= np.sort(log_posterior_NV)[:, [-5]]
    targets = sparse_targets(targets_from_dense(log_posterior_NV, kept_NV, TEMPERATURES), temperature)
    logits_NV = torch.zeros(num_frames, num_classes, requires_grad=True)
    labels_N = torch.zeros(num_frames, dtype=torch.int64)
    with _LargeOutputs(num_frames * num_classes) as large:
        loss = soft_loss(logits_NV, targets, temperature=temperature, tail=tail, labels_N=labels_N)
    # A copy of the student's own logits, without the kept classes, and its softmax.
    assert large.found == ["clone" if temperature == 1 else "div", "scatter_", "_softmax"]
    with _LargeOutputs(num_frames * num_classes) as large:
        loss.backward()
    # In place of the softmax.
    in_place = ["mul_", "add_", "scatter_add_"] if tail == "uniform" else ["mul_", "scatter_add_"]
    assert [name for name in large.found if name != "detach"] == in_place
    assert not logits_NV.grad.isnan().any()


def test_sparse_targets_pads_ragged_frames() -> None:
    targets = SoftTargets(
        num_classes=9,
        temperatures=(1.0,),
        offsets=np.array([0, 2, 2, 3]),
        class_ids=np.array([4, 8, 2], dtype=np.int32),
        log_probs=np.log(np.array([0.5, 0.25, 0.75], dtype=np.float32)),
        tail_mass=np.array([[0.25], [1.0], [0.25]], dtype=np.float32),
    )
    found = sparse_targets(targets, 1.0)
    assert found.ids_NK.tolist() == [[4, 8], [0, 0], [2, 0]]
    assert found.probs_NK.tolist() == [[0.5, 0.25], [0, 0], [0.75, 0]]
    assert found.tail_N.tolist() == [0.25, 1.0, 0.25]
