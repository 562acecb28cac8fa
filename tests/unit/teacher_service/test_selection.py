"""Selection, in torch and compiled for the CPU, against the documented rule in float64 and selection at read time."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softlabel_schemas import SoftTargets
from softlabel_schemas.selection import MIN_LOG_PROB, NO_LABEL, Mass, Threshold, TopK
from teacher_service.capture_cpu import select_cpu
from teacher_service.selection import Selected, select, to_soft_targets
from tests.support.targets import dense_posterior
from tests.support.teachers import select_densely

AnySelection = TopK | Mass | Threshold
TEMPERATURES = (1.0, 2.0, 0.5)
NUM_CLASSES = 30

caps = st.integers(1, NUM_CLASSES + 2)
# Fractions are what users write, and what sums of equal probabilities come out at.
probabilities = st.one_of(st.floats(1e-4, 1.0), st.sampled_from([1 / 30, 0.1, 0.2, 0.25, 0.5, 0.9, 1.0]))
selections = st.one_of(
    st.builds(TopK, k=caps, keep_hard_label=st.booleans()),
    st.builds(Mass, mass=probabilities, max_entries=caps, keep_hard_label=st.booleans()),
    st.builds(Threshold, min_prob=probabilities, max_entries=caps, keep_hard_label=st.booleans()),
)
# How many different logits a frame has: 1 makes it uniform, few make many exact ties.
levels = st.sampled_from([1, 2, 4, 1000])
seeds = st.integers(0, 2**32 - 1)


def log_posteriors(logits_TV: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """As torch makes them from logits, so that equal logits stay equal."""
    return torch.tensor(np.asarray(logits_TV), dtype=torch.float32).log_softmax(dim=-1).numpy()


def random_frames(seed: int, num_levels: int, num_frames: int = 8) -> tuple[Any, Any]:
    """Log-posterior float32 [T, V] of each frame with ``num_levels`` different values, hard labels [T]."""
    rng = np.random.default_rng(seed)
    logits_TV = rng.integers(0, num_levels, (num_frames, NUM_CLASSES)) * (8.0 / num_levels)
    return log_posteriors(logits_TV), rng.integers(NO_LABEL, NUM_CLASSES, num_frames)


def select_all(
    log_posterior_TV: npt.NDArray[np.float32], selection: AnySelection, labels_T: npt.NDArray[np.integer] | None = None
) -> tuple[Selected, SoftTargets]:
    labels_T = np.full(len(log_posterior_TV), NO_LABEL) if labels_T is None else labels_T
    labels_N = torch.from_numpy(labels_T.astype(np.int64))
    log_posterior_NV = torch.from_numpy(log_posterior_TV)
    selected = select_cpu(log_posterior_NV, selection, TEMPERATURES, labels_N)
    _check_same(select(log_posterior_NV, selection, TEMPERATURES, labels_N), selected)
    return selected, to_soft_targets(selected, log_posterior_TV.shape[1], TEMPERATURES).validate()


def _check_same(in_torch: Selected, compiled: Selected) -> None:
    assert torch.equal(in_torch.kept_NK, compiled.kept_NK)
    kept_NK = compiled.kept_NK
    for name in ("ids_NK", "log_probs_NK"):
        assert torch.equal(getattr(in_torch, name)[kept_NK], getattr(compiled, name)[kept_NK]), name
    assert torch.equal(in_torch.top1_N, compiled.top1_N)
    torch.testing.assert_close(in_torch.tail_NM, compiled.tail_NM, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(in_torch.entropy_N, compiled.entropy_N, rtol=1e-5, atol=1e-6)


def kept(targets: SoftTargets) -> list[list[int]]:
    return [targets.class_ids[a:b].tolist() for a, b in zip(targets.offsets[:-1], targets.offsets[1:], strict=True)]


@settings(max_examples=100)
@given(seed=seeds, num_levels=levels, selection=selections)
def test_the_rule(seed: int, num_levels: int, selection: AnySelection) -> None:
    log_posterior_TV, labels_T = random_frames(seed, num_levels)
    selected, found = select_all(log_posterior_TV, selection, labels_T)
    expected = select_densely(log_posterior_TV, selection, TEMPERATURES, labels_T)
    assert kept(found) == kept(expected)
    np.testing.assert_array_equal(found.log_probs, expected.log_probs)
    np.testing.assert_allclose(found.tail_mass, expected.tail_mass, rtol=1e-5, atol=1e-6)
    posterior_TV = dense_posterior(log_posterior_TV, 1.0)
    np.testing.assert_allclose(selected.entropy_N, -(posterior_TV * np.log(posterior_TV)).sum(axis=1), rtol=1e-5)
    np.testing.assert_array_equal(selected.top1_N, log_posterior_TV.argmax(axis=1))


def test_ties_go_by_class_id_and_so_does_the_cut_through_them() -> None:
    tied_TV = log_posteriors([[1, 3, 3, 1, 3, 1, 1], [0, 0, 0, 0, 0, 0, 0], [5, 1, 1, 1, 1, 1, 1]])
    assert kept(select_all(tied_TV, TopK(k=2))[1]) == [[1, 2], [0, 1], [0, 1]]
    assert kept(select_all(tied_TV, TopK(k=5))[1]) == [[1, 2, 4, 0, 3], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]


def test_the_cut_where_equal_probabilities_just_reach_the_mass() -> None:
    """Sums in float32 would go the other way in one case of eight."""
    for num_classes in range(2, 40):
        uniform_TV = log_posteriors(np.zeros((1, num_classes)))
        for count in range(1, num_classes + 1):
            selection = Mass(mass=count / num_classes, max_entries=num_classes)
            expected = select_densely(uniform_TV, selection, TEMPERATURES, np.array([NO_LABEL]))
            assert kept(select_all(uniform_TV, selection)[1]) == kept(expected), (num_classes, count)
        least = Threshold(min_prob=1 / num_classes, max_entries=num_classes)
        expected = select_densely(uniform_TV, least, TEMPERATURES, np.array([NO_LABEL]))
        assert kept(select_all(uniform_TV, least)[1]) == kept(expected), num_classes


def test_ties_in_a_posterior_of_many_classes() -> None:
    """Above some thousand classes top-k takes another way through them."""
    rng = np.random.default_rng(3)
    log_posterior_TV = log_posteriors(rng.integers(0, 4, (5, 6000)))
    expected = np.argsort(-log_posterior_TV, axis=1, kind="stable")[:, :40]
    assert kept(select_all(log_posterior_TV, TopK(k=40))[1]) == expected.tolist()


@pytest.mark.parametrize(
    "selection",
    [TopK(k=99), Mass(mass=1.0, max_entries=99), Threshold(min_prob=1e-9, max_entries=99)],
    ids=lambda selection: selection.policy,
)
def test_a_cap_above_the_number_of_classes_keeps_them_all(selection: AnySelection) -> None:
    log_posterior_TV = log_posteriors([[0.0, 2.0, 1.0]])
    selected, found = select_all(log_posterior_TV, selection, np.array([1]))
    assert kept(found) == [[1, 2, 0]]
    np.testing.assert_array_equal(selected.tail_NM, 0.0)


def test_the_likeliest_class_is_always_kept() -> None:
    uniform_TV = log_posteriors(np.zeros((1, NUM_CLASSES)))
    assert kept(select_all(uniform_TV, Threshold(min_prob=0.5, max_entries=4))[1]) == [[0]]
    assert kept(select_all(uniform_TV, Mass(mass=1e-6, max_entries=4))[1]) == [[0]]


def test_the_hard_label_is_added_once_and_not_for_a_frame_without_one() -> None:
    log_posterior_TV = log_posteriors([[4.0, 3.0, 2.0, 1.0]] * 4)
    labels_T = np.array([NO_LABEL, 0, 3, 2])
    _, found = select_all(log_posterior_TV, TopK(k=2, keep_hard_label=True), labels_T)
    assert kept(found) == [[0, 1], [0, 1], [0, 1, 3], [0, 1, 2]]
    third, fourth = np.exp(log_posterior_TV[0, 2:].astype(np.float64))
    np.testing.assert_allclose(found.tail_mass[:, 0], [third + fourth, third + fourth, third, fourth], rtol=1e-5)
    assert kept(select_all(log_posterior_TV, TopK(k=2), labels_T)[1]) == [[0, 1]] * 4


def test_probabilities_that_float32_cannot_hold_stay_finite() -> None:
    log_posterior_TV = log_posteriors([[0.0, -np.inf, -500.0, -90.0]])
    assert np.isneginf(log_posterior_TV[0, 1])
    selected, found = select_all(log_posterior_TV, TopK(k=4, keep_hard_label=True), np.array([1]))
    assert kept(found) == [[0, 3, 2, 1]]
    np.testing.assert_array_equal(found.log_probs, np.float32([0.0, -90.0, MIN_LOG_PROB, MIN_LOG_PROB]))
    assert torch.isfinite(selected.entropy_N).all()
    assert torch.isfinite(selected.tail_NM).all()


def test_a_small_tail_is_not_lost_in_rounding() -> None:
    """1 - kept mass would be 0 or 6e-8 in float32."""
    log_posterior_TV = log_posteriors([[0.0] + [-25.0] * 10])
    selected, _ = select_all(log_posterior_TV, TopK(k=1))
    exact = [dense_posterior(log_posterior_TV, temperature)[0, 1:].sum() for temperature in TEMPERATURES]
    assert 0 < exact[0] < 2e-10
    np.testing.assert_allclose(selected.tail_NM[0], exact, rtol=1e-4)


def test_a_frame_that_is_not_finite_does_not_touch_the_others() -> None:
    log_posterior_TV = log_posteriors([[1.0, 2.0, 0.0], [3.0, 1.0, 2.0]])
    broken_TV = log_posterior_TV.copy()
    broken_TV[0] = np.nan
    select_labels = torch.tensor([NO_LABEL, NO_LABEL])
    for select_them in (select, select_cpu):
        found = select_them(torch.from_numpy(broken_TV), TopK(k=2), TEMPERATURES, select_labels)
        expected = select_them(torch.from_numpy(log_posterior_TV), TopK(k=2), TEMPERATURES, select_labels)
        assert torch.isnan(found.entropy_N[0])
        _check_second_row(found, expected)


def _check_second_row(found: Selected, expected: Selected) -> None:
    for name in ("ids_NK", "log_probs_NK", "kept_NK", "tail_NM", "entropy_N", "top1_N"):
        assert torch.equal(getattr(found, name)[1], getattr(expected, name)[1]), name
