"""Selection at read time gives what selection from the whole posterior would have given."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from softlabel_schemas import InputError, SoftTargets
from softlabel_schemas.codec import build_codec
from softlabel_schemas.narrowing import check_derivable, narrow
from softlabel_schemas.selection import NO_LABEL, Mass, Threshold, TopK, max_entries_per_frame, prefix_lengths
from softlabel_schemas.spec import DatasetSpec
from softlabel_schemas.targets import offsets_of
from tests.support.datasets import SPEC
from tests.support.targets import random_log_posterior, ranking, targets_from_dense

NUM_CLASSES = 30
TEMPERATURES = SPEC.temperatures

AnySelection = TopK | Mass | Threshold

caps = st.integers(1, NUM_CLASSES + 2)
probabilities = st.floats(1e-4, 1.0)
selections = st.one_of(
    st.builds(TopK, k=caps, keep_hard_label=st.booleans()),
    st.builds(Mass, mass=probabilities, max_entries=caps, keep_hard_label=st.booleans()),
    st.builds(Threshold, min_prob=probabilities, max_entries=caps, keep_hard_label=st.booleans()),
)


def spec_of(stored: AnySelection) -> DatasetSpec:
    return SPEC.model_copy(update={"num_classes": NUM_CLASSES, "selection": stored, "codec": "packed-f32"})


def select_densely(
    selection: AnySelection, log_posterior_TV: npt.NDArray[np.float32], hard_labels_T: npt.NDArray[np.int64]
) -> SoftTargets:
    """The selection as defined, one frame and one class at a time."""
    kept_TV = np.zeros(log_posterior_TV.shape, dtype=bool)
    probs_TV = np.exp(log_posterior_TV.astype(np.float64))
    for frame, ranked in enumerate(ranking(log_posterior_TV)):
        mass = 0.0
        for count, class_id in enumerate(ranked):
            prob = probs_TV[frame, class_id]
            if isinstance(selection, TopK):
                enough = count == selection.k
            elif isinstance(selection, Mass):
                enough = count == selection.max_entries or mass >= selection.mass
            else:
                enough = count == selection.max_entries or prob < selection.min_prob
            if enough and count:
                break
            kept_TV[frame, class_id] = True
            mass += prob
        if selection.keep_hard_label and hard_labels_T[frame] != NO_LABEL:
            kept_TV[frame, hard_labels_T[frame]] = True
    return targets_from_dense(log_posterior_TV, kept_TV, TEMPERATURES)


@settings(max_examples=400)
@given(
    seed=st.integers(0, 2**32),
    scale=st.sampled_from([0.0, 0.5, 2.0, 6.0]),
    stored=selections,
    wanted=selections,
)
def test_narrow_equals_selecting_from_the_posterior(
    seed: int, scale: float, stored: AnySelection, wanted: AnySelection
) -> None:
    try:
        check_derivable(stored, wanted, num_classes=NUM_CLASSES)
    except InputError:
        assume(False)
    rng = np.random.default_rng(seed)
    log_posterior_TV = random_log_posterior(rng, 6, NUM_CLASSES, scale)
    hard_labels_T = rng.integers(NO_LABEL, NUM_CLASSES, 6)
    spec = spec_of(stored)
    codec = build_codec(spec)
    streams = codec.encode(select_densely(stored, log_posterior_TV, hard_labels_T), offsets_of([6]))
    decoded = codec.decode(streams, offsets_of([6]))
    found = narrow(decoded, spec, wanted, utterance_id="utt", hard_labels_T=hard_labels_T).validate()
    expected = select_densely(wanted, log_posterior_TV, hard_labels_T)
    np.testing.assert_array_equal(found.offsets, expected.offsets)
    np.testing.assert_array_equal(found.class_ids, expected.class_ids)
    np.testing.assert_array_equal(found.log_probs, expected.log_probs)
    np.testing.assert_allclose(found.tail_mass, expected.tail_mass, atol=1e-5, rtol=0)
    assert found.counts_T.max() <= max_entries_per_frame(wanted, NUM_CLASSES)


@pytest.mark.parametrize(
    ("selection", "length"),
    [
        (TopK(k=3), 3),
        (TopK(k=9), 4),
        (Mass(mass=0.5, max_entries=9), 1),
        (Mass(mass=0.75, max_entries=9), 2),
        (Mass(mass=0.76, max_entries=9), 3),
        (Mass(mass=1.0, max_entries=9), 4),
        (Mass(mass=1.0, max_entries=2), 2),
        (Threshold(min_prob=0.25, max_entries=9), 2),
        (Threshold(min_prob=0.125, max_entries=9), 4),
        (Threshold(min_prob=0.125, max_entries=3), 3),
        (Threshold(min_prob=1.0, max_entries=9), 1),
    ],
)
def test_prefix_lengths_at_the_boundaries(selection: AnySelection, length: int) -> None:
    probs_TM = np.array([[0.5, 0.25, 0.125, 0.125, 0.0]])
    assert prefix_lengths(selection, probs_TM).tolist() == [length]


@pytest.mark.parametrize(("hard_labels", "found"), [(None, "none"), ([1, 2], "2")])
def test_keeping_the_hard_label_needs_one_for_each_frame(hard_labels: list[int] | None, found: str) -> None:
    log_posterior_TV = random_log_posterior(np.random.default_rng(0), 3, NUM_CLASSES)
    targets = select_densely(TopK(k=2), log_posterior_TV, np.full(3, NO_LABEL))
    labels = None if hard_labels is None else np.array(hard_labels)
    with pytest.raises(ValueError, match=f"needs 3 hard labels, one per frame, found {found}"):
        narrow(targets, spec_of(TopK(k=2)), TopK(k=1, keep_hard_label=True), utterance_id="utt", hard_labels_T=labels)


def test_frames_without_entries_stay_empty() -> None:
    log_posterior_TV = random_log_posterior(np.random.default_rng(0), 3, NUM_CLASSES)
    empty = targets_from_dense(log_posterior_TV, np.zeros((3, NUM_CLASSES), dtype=bool), TEMPERATURES)
    found = narrow(empty, spec_of(TopK(k=2)), TopK(k=1), utterance_id="utt").validate()
    assert found.num_entries == 0
    np.testing.assert_allclose(found.tail_mass, 1, atol=1e-6)
