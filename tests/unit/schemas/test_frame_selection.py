"""Frame selection: which rule holds for which frame, and what several together give."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from softlabel_schemas import ClassInventory, InputError
from softlabel_schemas.frame_selection import FrameSelection, frame_weights, silence_classes
from softlabel_schemas.targets import SoftTargets
from tests.support.targets import random_log_posterior, targets_from_dense

INVENTORY = ClassInventory(
    names=("sil", "a-1", "a-2", "noise"), phones=("SIL", "a", "a", "SPN"), silence_phones=("SIL", "SPN")
)


def targets(*frames: dict[int, float]) -> SoftTargets:
    """Entries of each frame by falling probability."""
    return SoftTargets(
        num_classes=4,
        temperatures=(1.0,),
        offsets=np.cumsum([0, *map(len, frames)]),
        class_ids=np.array([i for frame in frames for i in frame], dtype=np.int32),
        log_probs=np.log(np.array([p for frame in frames for p in frame.values()], dtype=np.float32)),
        tail_mass=np.array([[1 - sum(frame.values())] for frame in frames], dtype=np.float32),
    ).validate()


# By frame: right; wrong; right but weak; wrong and weak; no label; silence; silence by its top class; no entries.
TARGETS = targets({1: 0.9}, {2: 0.8, 1: 0.1}, {1: 0.4, 2: 0.3}, {2: 0.4}, {1: 0.9}, {0: 0.9}, {3: 0.9}, {})
LABELS_T = np.array([1, 1, 1, 1, -1, 0, -1, 0])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"disagreeing": 0.0}, [1, 0, 1, 0, 1, 1, 1, 1]),
        ({"uncertain": 0.25}, [1, 1, 0.25, 0.25, 1, 1, 1, 1]),
        ({"uncertain": 0.25, "min_top1": 0.85}, [1, 0.25, 0.25, 0.25, 1, 1, 1, 1]),
        ({"silence": 0.5}, [1, 1, 1, 1, 1, 0.5, 0.5, 0.5]),
        ({"disagreeing": 0.75, "uncertain": 0.25, "silence": 0.5}, [1, 0.75, 0.25, 0.25, 1, 0.5, 0.5, 0.5]),
    ],
)
def test_by_hand(config: dict[str, float], expected: list[float]) -> None:
    selection = FrameSelection.model_validate(config)
    found = frame_weights(TARGETS, LABELS_T, silence_classes(INVENTORY, selection), selection)
    assert found.dtype == np.float32
    assert found.tolist() == expected


weights = st.floats(0, 1, width=32)


@given(seed=st.integers(0, 2**32 - 1), disagreeing=weights, uncertain=weights, silence=st.floats(0, 0.875, width=32))
def test_several_rules_give_the_smallest_of_each_alone(
    seed: int, disagreeing: float, uncertain: float, silence: float
) -> None:
    rng = np.random.default_rng(seed)
    log_posterior_TV = random_log_posterior(rng, 12, 4, scale=2.0)
    kept_TV = log_posterior_TV >= np.sort(log_posterior_TV)[:, [-rng.integers(1, 5)]]
    stored = targets_from_dense(log_posterior_TV, kept_TV, (1.0,))
    labels_T = rng.integers(-1, 4, 12)
    both = FrameSelection(disagreeing=disagreeing, uncertain=uncertain, silence=silence, min_top1=0.6)
    silence_V = silence_classes(INVENTORY, both)
    posterior_TV = np.exp(log_posterior_TV)
    class_T = np.where(labels_T >= 0, labels_T, posterior_TV.argmax(axis=1))
    expected_T = np.minimum.reduce(
        [
            np.where((labels_T >= 0) & (labels_T != posterior_TV.argmax(axis=1)), disagreeing, 1),
            np.where(posterior_TV.max(axis=1) < 0.6, uncertain, 1),
            np.where(np.isin(class_T, (0, 3)), silence, 1),
        ]
    )
    np.testing.assert_array_equal(frame_weights(stored, labels_T, silence_V, both), expected_T.astype(np.float32))


def test_silence_classes() -> None:
    assert silence_classes(INVENTORY, FrameSelection(silence=0.0)).tolist() == [True, False, False, True]
    nameless = ClassInventory(names=("a", "b"))
    assert silence_classes(nameless, FrameSelection(disagreeing=0.0)).tolist() == [False, False]
    with pytest.raises(InputError, match=r"silence = 0\.5 weighs frames of silence, but the class inventory names no"):
        silence_classes(nameless, FrameSelection(silence=0.5))


def test_labels_of_another_length() -> None:
    config = FrameSelection(disagreeing=0.0)
    with pytest.raises(ValueError, match="8 frames need one label each, found 7"):
        frame_weights(TARGETS, LABELS_T[:-1], silence_classes(INVENTORY, config), config)


def test_a_table_that_does_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no frame is selected"):
        FrameSelection(min_top1=0.9)
