"""SoftTargets: invariants, temperatures, and what is derived from stored targets."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from softlabel_schemas import InputError
from softlabel_schemas.targets import SoftTargets, concatenate, labels_digest, offsets_of, segment_sum
from tests.support.targets import (
    assert_same_targets,
    dense_posterior,
    random_log_posterior,
    random_targets,
    ranking,
    targets_from_dense,
)

TEMPERATURES = (1.0, 2.0, 0.5)
seeds = st.integers(0, 2**32)


def small_targets() -> SoftTargets:
    """Frames of 2, 0 and 3 entries."""
    return SoftTargets(
        num_classes=10,
        temperatures=(1.0, 2.0),
        offsets=np.array([0, 2, 2, 5]),
        class_ids=np.array([4, 0, 9, 3, 5], dtype=np.int32),
        log_probs=np.log([0.5, 0.25, 0.4, 0.4, 0.1]).astype(np.float32),
        tail_mass=np.array([[0.25, 0.3], [1.0, 1.0], [0.1, 0.2]], dtype=np.float32),
    ).validate()


def log_probs(*values: float) -> dict[str, Any]:
    return {"log_probs": np.array(values, dtype=np.float32)}


def class_ids(*values: int) -> dict[str, Any]:
    return {"class_ids": np.array(values, dtype=np.int32)}


def tails(frame: int, column: int, value: float) -> dict[str, Any]:
    tail_mass = small_targets().tail_mass.copy()
    tail_mass[frame, column] = value
    return {"tail_mass": tail_mass}


GOOD = small_targets().log_probs
VIOLATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "a tail too few": ({"tail_mass": np.ones((2, 2))}, "tail_mass has shape (2, 2), expected (3, 2)"),
    "a temperature without tails": (
        {"temperatures": (1.0, 2.0, 3.0)},
        "tail_mass has shape (3, 2), expected (3, 3)",
    ),
    "no temperature of 1": ({"temperatures": (2.0, 1.0)}, "the first temperature must be 1.0"),
    "a log_prob too few": (log_probs(*GOOD[:-1]), "4 log_probs for 5 class_ids"),
    "entries before the first frame": ({"offsets": np.array([1, 2, 2, 5])}, "offsets do not span the entries"),
    "entries after the last frame": ({"offsets": np.array([0, 2, 2, 4])}, "offsets do not span the entries"),
    "falling offsets": ({"offsets": np.array([0, 3, 2, 5])}, "offsets fall"),
    "a negative class id": (class_ids(4, -1, 9, 3, 5), "a class id is negative"),
    "a class id too high": (class_ids(4, 0, 10, 3, 5), "class id 10 found, but there are 10 classes"),
    "a class id twice": (class_ids(4, 0, 9, 3, 9), "frame 2: class id 9 is kept twice"),
    "a positive log_prob": (log_probs(0.5, *GOOD[1:]), "frame 0: log_prob 0.5, expected <= 0"),
    "a log_prob of NaN": (log_probs(*GOOD[:4], np.nan), "frame 2: log_prob nan, expected <= 0"),
    "a log_prob of -inf": (log_probs(*GOOD[:4], -np.inf), "frame 2: log_prob -inf, expected <= 0"),
    "rising log_probs": (
        log_probs(*np.log([0.25, 0.5]), *GOOD[2:]),
        "frame 0: log_prob -0.693147, expected not above the entry before it",
    ),
    "a negative tail": (tails(2, 0, -0.25), "frame 2: tail_mass -0.25, expected within [0, 1]"),
    "a tail above 1": (tails(1, 1, 1.5), "frame 1: tail_mass 1.5, expected within [0, 1]"),
    "a tail of NaN": (tails(0, 1, np.nan), "frame 0: tail_mass nan, expected within [0, 1]"),
    "too little mass": (tails(0, 0, 0.2), "frame 0: kept mass + tail mass 0.95, expected 1 within 0.001"),
    "too much mass": (tails(0, 0, 0.5), "frame 0: kept mass + tail mass 1.25, expected 1 within 0.001"),
}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_validate_rejects(name: str) -> None:
    changes, message = VIOLATIONS[name]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        replace(small_targets(), **changes).validate()


def test_validate_takes_the_mass_tolerance_of_a_codec() -> None:
    off = replace(small_targets(), **tails(0, 0, 0.28))
    assert off.validate(mass_tolerance=0.04) is off
    with pytest.raises(ValueError, match=r"1 within 0\.02"):
        off.validate(mass_tolerance=0.02)


@given(seeds, st.sampled_from([0.0, 1.0, 5.0, 30.0]))
def test_random_targets_are_valid(seed: int, scale: float) -> None:
    targets = random_targets(np.random.default_rng(seed), scale=scale)
    assert targets.validate() is targets


@given(seeds, st.sampled_from([0.3, 1.0, 5.0]), st.integers(1, 30))
def test_at_temperature_is_the_softmax_at_that_temperature(seed: int, scale: float, max_entries: int) -> None:
    rng = np.random.default_rng(seed)
    log_posterior_TV = random_log_posterior(rng, 8, 30, scale)
    kept_TV = rng.permuted(np.arange(30) < rng.integers(0, max_entries, (8, 1), endpoint=True), axis=1)
    # The likeliest class is always kept: with it in the tail, float32 tails of nearly 1 would hide the rest.
    kept_TV[np.arange(8), ranking(log_posterior_TV)[:, 0]] = True
    targets = targets_from_dense(log_posterior_TV, kept_TV, TEMPERATURES)
    frames_E = np.repeat(np.arange(8), targets.counts_T)
    for column, temperature in enumerate(TEMPERATURES):
        log_probs_E, tail_T = targets.at_temperature(temperature)
        expected_TV = dense_posterior(log_posterior_TV, temperature)
        np.testing.assert_allclose(np.exp(log_probs_E), expected_TV[frames_E, targets.class_ids], atol=1e-6, rtol=1e-5)
        np.testing.assert_array_equal(tail_T, targets.tail_mass[:, column])
        total_T = tail_T + segment_sum(np.exp(log_probs_E.astype(np.float64)), targets.offsets)
        np.testing.assert_allclose(total_T, 1, atol=1e-5)


def test_at_temperature_takes_frames_without_entries() -> None:
    targets = small_targets()
    log_probs_E, tail_T = targets.at_temperature(2.0)
    assert np.isfinite(log_probs_E).all()
    assert tail_T[1] == 1


def test_a_temperature_without_a_tail_raises() -> None:
    with pytest.raises(InputError, match=r"temperature 3 cannot be derived: tails are stored for 1, 2; label again"):
        small_targets().at_temperature(3.0)


@given(seeds, st.integers(0, 12))
def test_keep_moves_what_it_drops_to_the_tail(seed: int, max_entries: int) -> None:
    rng = np.random.default_rng(seed)
    targets = random_targets(rng, num_frames=10, max_entries=max_entries)
    kept_E = rng.random(targets.num_entries) < 0.5
    # The likeliest stays, as in every selection.
    kept_E[targets.offsets[:-1][targets.counts_T > 0]] = True
    found = targets.keep(kept_E).validate()
    np.testing.assert_array_equal(found.class_ids, targets.class_ids[kept_E])
    np.testing.assert_array_equal(found.log_probs, targets.log_probs[kept_E])
    for column, temperature in enumerate(targets.temperatures):
        probs_E = np.exp(targets.at_temperature(temperature)[0].astype(np.float64))
        dropped_T = segment_sum(probs_E * ~kept_E, targets.offsets)
        np.testing.assert_allclose(found.tail_mass[:, column], targets.tail_mass[:, column] + dropped_T, atol=1e-6)


@given(seeds, st.lists(st.integers(0, 6), min_size=1, max_size=5))
def test_frames_undo_concatenate(seed: int, lengths: list[int]) -> None:
    rng = np.random.default_rng(seed)
    parts = [random_targets(rng, num_frames=length) for length in lengths]
    joined = concatenate(parts).validate()
    starts = offsets_of(lengths)
    for part, start, stop in zip(parts, starts[:-1], starts[1:], strict=True):
        assert_same_targets(joined.frames(int(start), int(stop)), part)


def test_concatenate_refuses_other_classes_and_temperatures() -> None:
    targets = small_targets()
    with pytest.raises(ValueError, match=r"cannot join targets of 11 classes .* with 10 classes"):
        concatenate([targets, replace(targets, num_classes=11)])
    with pytest.raises(ValueError, match=r"temperatures \(1.0, 3.0\) with 10 classes at \(1.0, 2.0\)"):
        concatenate([targets, replace(targets, temperatures=(1.0, 3.0))])


def test_padded_and_top1() -> None:
    targets = small_targets()
    ids_TM, log_probs_TM = targets.padded()
    np.testing.assert_array_equal(ids_TM, [[4, 0, 0], [0, 0, 0], [9, 3, 5]])
    np.testing.assert_allclose(np.exp(log_probs_TM), [[0.5, 0.25, 0], [0, 0, 0], [0.4, 0.4, 0.1]], rtol=1e-6)
    np.testing.assert_array_equal(targets.top1_T(), [4, -1, 9])
    np.testing.assert_allclose(targets.kept_mass_T(), [0.75, 0, 0.9], rtol=1e-6)


@given(st.lists(st.lists(st.floats(-1e6, 1e6), max_size=5), max_size=8))
def test_segment_sum_is_the_sum_of_each_segment(segments: list[list[float]]) -> None:
    values_E = np.array([value for segment in segments for value in segment], dtype=np.float64)
    found = segment_sum(values_E, offsets_of([len(segment) for segment in segments]))
    np.testing.assert_allclose(found, [sum(segment) for segment in segments], atol=1e-9)


def test_labels_digest_depends_on_every_part() -> None:
    targets = small_targets()
    others = [
        targets.frames(0, 2),
        replace(targets, offsets=np.array([0, 2, 3, 5])),
        replace(targets, **class_ids(4, 0, 9, 3, 6)),
        replace(targets, **log_probs(*GOOD[:4], np.nextafter(GOOD[4], np.float32(-9)))),
        replace(targets, **tails(2, 1, 0.25)),
        replace(targets, temperatures=(1.0,), tail_mass=targets.tail_mass[:, :1]),
    ]
    digests = {labels_digest("a", each) for each in (targets, *others)} | {labels_digest("b", targets)}
    assert len(digests) == len(others) + 2
    assert labels_digest("a", targets) == labels_digest("a", small_targets())
