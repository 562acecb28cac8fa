"""Which selection can be derived from which, and samples at other temperatures."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from softlabel_schemas import InputError
from softlabel_schemas.frame_selection import FrameSelection
from softlabel_schemas.narrowing import check_derivable, narrow
from softlabel_schemas.selection import (
    AnySelection,
    ByteBudget,
    HeadAndSample,
    Mass,
    RandomSampling,
    Threshold,
    TopK,
)
from softlabel_schemas.strict import parse
from tests.support.datasets import SPEC
from tests.support.targets import assert_same_targets, random_targets

NUM_CLASSES = 12
ALL = TopK(k=NUM_CLASSES)
SAMPLE = RandomSampling(draws=5)
HEAD_AND_SAMPLE = HeadAndSample(k=3, draws=5)
BUDGET = ByteBudget(bytes_per_frame=8, max_entries=8)
RIGHT = FrameSelection(disagreeing=0)
RIGHT_AND_SPEECH = FrameSelection(disagreeing=0, silence=0)
SURE = FrameSelection(uncertain=0, min_top1=0.3)
SURER = FrameSelection(uncertain=0, min_top1=0.4)
BUDGET_OF_RIGHT = ByteBudget(bytes_per_frame=8, max_entries=8, frames=RIGHT)
OTHER_THAN_SAMPLE: list[AnySelection] = [
    TopK(k=1),
    Mass(mass=0.1, max_entries=1),
    Threshold(min_prob=0.5, max_entries=1),
    BUDGET,
    HEAD_AND_SAMPLE,
    RandomSampling(draws=4),
    RandomSampling(draws=5, seed=1),
    RandomSampling(draws=5, frames=RIGHT),
]

DERIVABLE = [
    (TopK(k=8), TopK(k=8)),
    (TopK(k=8), Mass(mass=1.0, max_entries=8)),
    (TopK(k=8), Threshold(min_prob=0.001, max_entries=8)),
    (TopK(k=8, keep_hard_label=True), TopK(k=3)),
    (TopK(k=8, keep_hard_label=True), Mass(mass=0.5, max_entries=3, keep_hard_label=True)),
    (Mass(mass=0.9, max_entries=8), Mass(mass=0.9, max_entries=4)),
    (Threshold(min_prob=0.01, max_entries=8), Threshold(min_prob=0.1, max_entries=8)),
    # Every policy keeps the likeliest class.
    (Mass(mass=0.1, max_entries=8), TopK(k=1)),
    (Threshold(min_prob=0.9, max_entries=8), Mass(mass=1.0, max_entries=1)),
    (BUDGET, TopK(k=1)),
    # Samples are themselves, or are drawn from all classes.
    (SAMPLE, SAMPLE),
    (HEAD_AND_SAMPLE, HEAD_AND_SAMPLE),
    (ALL, SAMPLE),
    (TopK(k=NUM_CLASSES + 1), HEAD_AND_SAMPLE),
    # Budgets within what is kept.
    (TopK(k=8), BUDGET),
    (TopK(k=8, keep_hard_label=True), BUDGET),
    (ByteBudget(bytes_per_frame=9, max_entries=8), BUDGET),
    # Frames: what is dropped stays dropped.
    (TopK(k=8), TopK(k=3, frames=RIGHT)),
    (TopK(k=8, frames=RIGHT), TopK(k=3, frames=RIGHT)),
    (TopK(k=8, frames=RIGHT), TopK(k=3, frames=RIGHT_AND_SPEECH)),
    (TopK(k=8, frames=SURE), Mass(mass=0.5, max_entries=3, frames=SURER)),
    (TopK(k=8, frames=RIGHT), ByteBudget(bytes_per_frame=7, max_entries=8, frames=RIGHT_AND_SPEECH)),
    (BUDGET_OF_RIGHT, ByteBudget(bytes_per_frame=6, max_entries=8, frames=RIGHT)),
    (BUDGET_OF_RIGHT, TopK(k=1, frames=RIGHT_AND_SPEECH)),
    (TopK(k=NUM_CLASSES, frames=RIGHT), RandomSampling(draws=5, frames=RIGHT)),
    (RandomSampling(draws=5, frames=RIGHT), RandomSampling(draws=5, frames=RIGHT)),
]
NOT_DERIVABLE = [
    (TopK(k=8), TopK(k=9), "at most 8 entries per frame were kept, 9 are asked for"),
    (TopK(k=8), Mass(mass=0.1, max_entries=9), "at most 8 entries per frame were kept, 9 are asked for"),
    (TopK(k=8), TopK(k=2, keep_hard_label=True), "the hard label was not always kept"),
    (Mass(mass=0.9, max_entries=8), Mass(mass=0.95, max_entries=8), "mass 0.9 was kept, 0.95 is asked for"),
    (
        Mass(mass=0.9, max_entries=8, keep_hard_label=True),
        Mass(mass=0.9, max_entries=8),
        "a hard label kept beside the selection cannot be told from its last entry; keep hard labels",
    ),
    (
        Mass(mass=0.9, max_entries=8),
        TopK(k=2),
        "a 'top_k' selection needs entries that a 'mass' selection may have dropped",
    ),
    (
        Threshold(min_prob=0.01, max_entries=8),
        Mass(mass=0.1, max_entries=8),
        "a 'mass' selection needs entries that a 'threshold' selection may have dropped",
    ),
    (
        Threshold(min_prob=0.01, max_entries=8),
        Threshold(min_prob=0.001, max_entries=8),
        "classes below 0.01 were dropped, min_prob 0.001 is asked for",
    ),
    *(
        (SAMPLE, wanted, "a sample was stored, from which no other selection can be made")
        for wanted in OTHER_THAN_SAMPLE
    ),
    *(
        (stored, SAMPLE, "a sample is drawn from all 12 classes, which only a 'top_k' selection of so many keeps")
        for stored in (TopK(k=11), Mass(mass=1.0, max_entries=12), Threshold(min_prob=1e-9, max_entries=12), BUDGET)
    ),
    (TopK(k=7), BUDGET, "at most 7 entries per frame were kept, 8 are asked for"),
    (
        Mass(mass=1.0, max_entries=8),
        BUDGET,
        "a 'byte_budget' selection needs entries that a 'mass' selection may have dropped",
    ),
    (BUDGET, TopK(k=2), "a 'top_k' selection needs entries that a 'byte_budget' selection may have dropped"),
    (BUDGET, TopK(k=1, keep_hard_label=True), "the hard label was not always kept"),
    (BUDGET, ByteBudget(bytes_per_frame=9, max_entries=8), "8 bytes per frame were kept, 9 are asked for"),
    *(
        (
            stored,
            wanted,
            "of two budgets 'max_entries' and 'frames' must be equal: what one frame may not spend, "
            "another one spends on entries that may have been dropped",
        )
        for stored, wanted in (
            (BUDGET, ByteBudget(bytes_per_frame=8, max_entries=7)),
            (BUDGET, BUDGET_OF_RIGHT),
            (BUDGET_OF_RIGHT, ByteBudget(bytes_per_frame=8, max_entries=8, frames=RIGHT_AND_SPEECH)),
        )
    ),
    *(
        (stored, wanted, "frames were dropped that it keeps")
        for stored, wanted in (
            (TopK(k=8, frames=RIGHT), TopK(k=8)),
            (TopK(k=8, frames=RIGHT_AND_SPEECH), TopK(k=1, frames=RIGHT)),
            (TopK(k=8, frames=SURER), TopK(k=8, frames=SURE)),
            (TopK(k=8, frames=SURE), TopK(k=8, frames=RIGHT)),
            (TopK(k=NUM_CLASSES, frames=RIGHT), SAMPLE),
            (BUDGET_OF_RIGHT, BUDGET),
        )
    ),
]


@pytest.mark.parametrize(("stored", "wanted"), DERIVABLE)
def test_derivable(stored: AnySelection, wanted: AnySelection) -> None:
    check_derivable(stored, wanted, num_classes=NUM_CLASSES)


@pytest.mark.parametrize(("stored", "wanted", "reason"), NOT_DERIVABLE)
def test_not_derivable(stored: AnySelection, wanted: AnySelection, reason: str) -> None:
    message = f"cannot be derived from the stored one: {reason}; label again with a wider one"
    with pytest.raises(InputError, match=re.escape(message)):
        check_derivable(stored, wanted, num_classes=NUM_CLASSES)


def test_a_sample_has_no_other_temperature() -> None:
    check_derivable(ALL, TopK(k=3), num_classes=NUM_CLASSES, temperature=2.0)
    for stored in (ALL, SAMPLE):
        with pytest.raises(InputError, match="a sample is of temperature 1, 2 is asked for"):
            check_derivable(stored, SAMPLE, num_classes=NUM_CLASSES, temperature=2.0)


def test_the_stored_selection_is_left_as_it_is() -> None:
    """Selected again, a sample would be drawn from a sample, and a lossy codec's masses would be cut elsewhere."""
    targets = random_targets(np.random.default_rng(0))
    for selection in (RandomSampling(draws=8), Mass(mass=0.3, max_entries=8)):
        spec = SPEC.model_copy(update={"selection": selection})
        assert_same_targets(narrow(targets, spec, selection, utterance_id="utt"), targets)


def test_frames_are_dropped_by_labels_and_classes_of_silence() -> None:
    targets = random_targets(np.random.default_rng(0))
    wanted = TopK(k=8, frames=RIGHT)
    with pytest.raises(ValueError, match="needs 20 hard labels, one per frame, found none"):
        narrow(targets, SPEC, wanted, utterance_id="utt")
    with pytest.raises(ValueError, match="needs to know the classes of silence"):
        narrow(targets, SPEC, wanted, utterance_id="utt", hard_labels_T=np.zeros(20, np.int32))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"policy": "top_k", "k": 3, "frames": {"silence": 0.5}}, "keeps a frame (weight 1) or drops it (0), found a weight"),
        ({"policy": "top_k", "k": 3, "frames": {}}, "no frame is selected"),
        ({"policy": "head_and_sample", "k": 65_000, "draws": 535}, "k + draws is 65535, at most 65534 entries of a frame"),
        ({"policy": "random_sampling", "draws": 3, "keep_hard_label": True}, "unknown key 'keep_hard_label'"),
    ],
)  # fmt: skip
def test_what_no_selection_can_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        parse(type(SPEC), SPEC.model_dump() | {"temperatures": (1.0,), "selection": fields}, where="spec")


@pytest.mark.parametrize("selection", [SAMPLE, HEAD_AND_SAMPLE])
def test_a_spec_of_a_sample_has_temperature_1_alone(selection: AnySelection) -> None:
    fields = SPEC.model_dump() | {"selection": selection.model_dump()}
    with pytest.raises(InputError, match=re.escape("gives no other: temperatures must be [1.0], found [1.0, 2.0")):
        parse(type(SPEC), fields, where="spec")


def test_frames_that_are_not_selected_leave_documents_as_they_were() -> None:
    """And so fingerprints."""
    assert TopK(k=8).model_dump() == {"policy": "top_k", "k": 8, "keep_hard_label": False}
    assert RandomSampling(draws=8).model_dump() == {"policy": "random_sampling", "draws": 8, "seed": 0}
    assert TopK(k=8, frames=RIGHT).model_dump(mode="json")["frames"] == {
        "disagreeing": 0.0,
        "uncertain": 1.0,
        "min_top1": 0.5,
        "silence": 1.0,
    }
