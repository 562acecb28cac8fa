"""Combining stored targets, against combining the whole posteriors in float64, and the bounds of the error."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softlabel_schemas import InputError
from softlabel_schemas.combine import Estimate, combine_targets
from softlabel_schemas.selection import NO_LABEL
from softlabel_schemas.spec import Combination
from softlabel_schemas.targets import SoftTargets
from tests.support.targets import dense_posterior, random_log_posterior, ranking, targets_from_dense

Float64 = npt.NDArray[np.float64]

NUM_CLASSES, NUM_FRAMES = 24, 9
TEMPERATURES = (1.0, 2.0, 0.5)
METHODS: tuple[Combination, ...] = ("arithmetic", "log_linear")


def stored(log_posterior_TV: npt.NDArray[np.float32], k: int, temperatures: tuple[float, ...]) -> SoftTargets:
    kept_TV = np.zeros(log_posterior_TV.shape, dtype=bool)
    np.put_along_axis(kept_TV, ranking(log_posterior_TV)[:, :k], True, axis=1)
    return targets_from_dense(log_posterior_TV, kept_TV, temperatures)


def posteriors(seed: int, num_inputs: int, *, scale: float = 2.0) -> list[npt.NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    return [random_log_posterior(rng, NUM_FRAMES, NUM_CLASSES, scale) for _ in range(num_inputs)]


def dense(log_posteriors: list[npt.NDArray[np.float32]], weights: list[float], method: Combination) -> Float64:
    """The ensemble's log-posterior float64 [T, V]."""
    each = [np.log(dense_posterior(log_TV, 1.0)) for log_TV in log_posteriors]
    if method == "arithmetic":
        return np.asarray(np.log(sum(w * np.exp(log_TV) for w, log_TV in zip(weights, each, strict=True))))
    pooled_TV = np.asarray(sum(w * log_TV for w, log_TV in zip(weights, each, strict=True)))
    return np.log(dense_posterior(pooled_TV, 1.0))


def filled(targets: SoftTargets) -> tuple[Float64, npt.NDArray[np.bool_]]:
    """Probabilities float64 [T, V], 0 where a class was not kept, and where it was."""
    probs_TV = np.zeros((targets.num_frames, targets.num_classes))
    frames_E = np.repeat(np.arange(targets.num_frames), targets.counts_T)
    probs_TV[frames_E, targets.class_ids] = np.exp(targets.log_probs.astype(np.float64))
    kept_TV = np.zeros(probs_TV.shape, dtype=bool)
    kept_TV[frames_E, targets.class_ids] = True
    return probs_TV, kept_TV


def spread(targets: SoftTargets) -> Float64:
    """The estimate float64 [T, V]: the tail spread evenly over the classes that were not kept."""
    probs_TV, kept_TV = filled(targets)
    num_outside_T1 = np.maximum((~kept_TV).sum(axis=1, keepdims=True), 1)
    return np.where(kept_TV, probs_TV, targets.tail_mass[:, :1] / num_outside_T1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("top_k", [1, 5, NUM_CLASSES])
def test_exact_where_every_class_was_stored(method: Combination, top_k: int) -> None:
    """What a job would have stored of the whole posteriors, tails at every temperature included."""
    log_posteriors, weights = posteriors(1, 3), [0.5, 0.2, 0.3]
    inputs = [stored(each, NUM_CLASSES, TEMPERATURES) for each in log_posteriors]
    found = combine_targets(inputs, weights, method, TEMPERATURES, top_k=top_k)
    whole_TV = dense(log_posteriors, weights, method)
    expected = stored(whole_TV.astype(np.float32), top_k, TEMPERATURES)
    found.targets.validate()
    np.testing.assert_array_equal(found.targets.class_ids, expected.class_ids)
    np.testing.assert_allclose(found.targets.log_probs, expected.log_probs, atol=1e-5)
    np.testing.assert_allclose(found.targets.tail_mass, expected.tail_mass, atol=1e-6)
    np.testing.assert_allclose(found.entropy_T, -(np.exp(whole_TV) * whole_TV).sum(axis=1), atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_one_input_is_narrowed(method: Combination) -> None:
    """Exactly, at every temperature, whatever was not kept."""
    targets = stored(posteriors(2, 1)[0], 8, TEMPERATURES)
    found = combine_targets([targets], [1.0], method, TEMPERATURES, top_k=3).targets
    ranks_E = np.arange(targets.num_entries) - np.repeat(targets.offsets[:-1], targets.counts_T)
    expected = targets.keep(ranks_E < 3)
    np.testing.assert_array_equal(found.class_ids, expected.class_ids)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=1e-5)
    np.testing.assert_allclose(found.tail_mass, expected.tail_mass, atol=1e-5)


@given(
    seed=st.integers(0, 10_000),
    widths=st.lists(st.integers(1, NUM_CLASSES), min_size=2, max_size=3),
    scale=st.sampled_from([0.0, 1.0, 4.0]),
    method=st.sampled_from(METHODS),
)
@settings(max_examples=60, deadline=None)
def test_equals_the_estimates_combined(seed: int, widths: list[int], scale: float, method: Combination) -> None:
    log_posteriors = posteriors(seed, len(widths), scale=scale)
    weights = np.random.default_rng(seed).dirichlet([2.0] * len(widths)).tolist()
    inputs = [stored(each, k, (1.0,)) for each, k in zip(log_posteriors, widths, strict=True)]
    found = combine_targets(inputs, weights, method, inputs[0].temperatures, top_k=NUM_CLASSES).targets
    found.validate(mass_tolerance=1e-5)
    estimates = [np.log(np.maximum(spread(each), np.exp(-100))).astype(np.float32) for each in inputs]
    expected_TV = np.exp(dense(estimates, weights, method))
    probs_TV, kept_TV = filled(found)
    np.testing.assert_array_equal(kept_TV, np.any([filled(each)[1] for each in inputs], axis=0))
    np.testing.assert_allclose(probs_TV[kept_TV], expected_TV[kept_TV], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found.tail_mass[:, 0], (expected_TV * ~kept_TV).sum(axis=1), atol=1e-5)


@given(seed=st.integers(0, 10_000), widths=st.lists(st.integers(1, NUM_CLASSES), min_size=2, max_size=3))
@settings(max_examples=60, deadline=None)
def test_the_error_is_within_its_bound(seed: int, widths: list[int]) -> None:
    log_posteriors = posteriors(seed, len(widths))
    weights = np.random.default_rng(seed).dirichlet([2.0] * len(widths)).tolist()
    inputs = [stored(each, k, (1.0,)) for each, k in zip(log_posteriors, widths, strict=True)]
    true_TV = np.exp(dense(log_posteriors, weights, "arithmetic"))
    found = combine_targets(inputs, weights, "arithmetic", inputs[0].temperatures, top_k=NUM_CLASSES).targets
    probs_TV, kept_TV = filled(found)
    missing_TV = [~filled(each)[1] for each in inputs]
    tails_T1 = [each.tail_mass[:, :1].astype(np.float64) for each in inputs]
    bound_TV = sum(w * t * missing for w, t, missing in zip(weights, tails_T1, missing_TV, strict=True))
    assert (np.abs(probs_TV - true_TV) <= bound_TV + 1e-5)[kept_TV].all()
    whole_TV = spread(found)
    num_missing = [np.maximum(missing.sum(axis=1), 1) for missing in missing_TV]
    variation_T = sum(w * t[:, 0] * (1 - 1 / n) for w, t, n in zip(weights, tails_T1, num_missing, strict=True))
    assert (np.abs(whole_TV - true_TV).sum(axis=1) / 2 <= variation_T + 1e-5).all()


def test_tails_at_another_temperature_are_near() -> None:
    """Nearer than those of the tail spread evenly, which are too large. The teachers are alike, as real ones are."""
    rng, weights = np.random.default_rng(5), [1 / 3] * 3
    shared_TV = 3 * rng.standard_normal((50, 300))
    log_posteriors = [
        np.log(dense_posterior(shared_TV + rng.standard_normal(shared_TV.shape), 1.0)).astype(np.float32)
        for _ in weights
    ]
    inputs = [stored(each, 10, (1.0, 2.0)) for each in log_posteriors]
    for method in METHODS:
        found = combine_targets(inputs, weights, method, (1.0, 2.0), top_k=10).targets
        kept_TV = filled(found)[1]
        true_T = (dense_posterior(dense(log_posteriors, weights, method), 2.0) * ~kept_TV).sum(axis=1)
        even_TV = dense([np.log(spread(each)).astype(np.float32) for each in inputs], weights, method)
        even_T = (dense_posterior(even_TV, 2.0) * ~kept_TV).sum(axis=1)
        ours, evenly = np.abs(found.tail_mass[:, 1] - true_T).mean(), np.abs(even_T - true_T).mean()
        assert ours < 0.5 * evenly, method


def test_frames_that_differ() -> None:
    first, second = (stored(each, 4, (1.0,)) for each in posteriors(3, 2))
    with pytest.raises(InputError, match=r"input 2 has \(frames, classes\) \(8, 24\), the first has \(9, 24\)"):
        combine_targets([first, second.frames(0, 8)], [0.5, 0.5], "arithmetic", (1.0,), top_k=4)


@pytest.mark.parametrize("method", METHODS)
def test_frames_without_entries_and_without_tail(method: Combination) -> None:
    """A frame that one input knows nothing of is all tail; one with all its mass in one class has none."""
    nothing = SoftTargets(
        num_classes=4,
        temperatures=(1.0, 2.0),
        offsets=np.array([0, 0, 1]),
        class_ids=np.array([2], np.int32),
        log_probs=np.zeros(1, np.float32),
        tail_mass=np.array([[1, 1], [0, 0]], np.float32),
    )
    something = replace(
        nothing,
        offsets=np.array([0, 1, 2]),
        class_ids=np.array([3, 2], np.int32),
        log_probs=np.zeros(2, np.float32),
        tail_mass=np.zeros((2, 2), np.float32),
    )
    for other in (nothing, something):
        found = combine_targets([nothing, other], [0.5, 0.5], method, (1.0, 2.0), top_k=2).targets
        np.testing.assert_array_equal(found.counts_T, [0, 1])
        np.testing.assert_allclose(found.tail_mass, [[1, 1], [0, 0]], atol=1e-6)
        found.validate()


def test_probability_of_a_class_in_each_frame() -> None:
    targets = stored(posteriors(4, 1)[0], 5, (1.0,))
    classes_T = np.arange(NUM_FRAMES) * 2
    found_T = Estimate(targets).log_prob_T(classes_T)
    np.testing.assert_allclose(np.exp(found_T), spread(targets)[np.arange(NUM_FRAMES), classes_T], rtol=1e-5)


@pytest.mark.parametrize("k", [5, NUM_CLASSES])
def test_a_frame_without_a_label_is_not_taken_for_the_last_class_of_the_frame_before(k: int) -> None:
    targets = stored(posteriors(4, 1)[0], k, (1.0,))
    labels_T = np.where(np.arange(NUM_FRAMES) % 2 == 0, NUM_CLASSES - 1, NO_LABEL)
    found_T = Estimate(targets).log_prob_T(labels_T)
    np.testing.assert_allclose(np.exp(found_T[::2]), spread(targets)[::2, NUM_CLASSES - 1], rtol=1e-5)
    assert np.isnan(found_T[1::2]).all()
