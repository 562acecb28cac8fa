"""Classes of senones."""

from __future__ import annotations

import numpy as np

from softlabel_schemas.senones import MIN_FRAMES, back_off


def utterance(*runs: tuple[int, str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Runs of a senone, its phone and a number of frames."""
    counts = [count for _, _, count in runs]
    return np.repeat([senone for senone, _, _ in runs], counts), np.repeat([phone for _, phone, _ in runs], counts)


def test_rare_senones_become_the_most_frequent_one_of_their_phone() -> None:
    many = MIN_FRAMES
    classes = back_off(
        [
            utterance((7, "AH", many), (8, "AH", many + 1), (9, "AH", many - 1), (3, "SIL", 2)),
            utterance((9, "AH", 0), (4, "B", 1), (5, "B", 2)),
        ]
    )
    # The most frequent first; a phone keeps one however rare it is.
    assert classes.inventory.names == ("AH/8", "AH/7", "B/5", "SIL/3")
    assert classes.inventory.phones == ("AH", "AH", "B", "SIL")
    assert classes.inventory.silence_phones == ("SIL",)
    labels_T = classes.labels_T(
        *utterance((8, "AH", 1), (7, "AH", 1), (9, "AH", 1), (4, "B", 1), (5, "B", 2), (3, "SIL", 1))
    )
    assert labels_T.tolist() == [0, 1, 0, 2, 2, 2, 3]
    assert labels_T.dtype == np.int32


def test_senones_that_were_not_heard() -> None:
    classes = back_off([utterance((7, "AH", 2), (3, "SIL", 2))])
    assert classes.labels_T(*utterance((99, "AH", 1), (98, "ZH", 1), (99, "SIL", 1))).tolist() == [0, -1, 1]


def test_a_senone_of_two_phones_belongs_to_the_one_it_is_heard_in_most() -> None:
    frames = utterance((7, "AH", 40), (7, "AA", 50), (8, "AH", 30))
    classes = back_off([frames])
    assert classes.inventory.names == ("AA/7", "AH/8")
    assert classes.labels_T(*utterance((7, "AH", 1))).tolist() == [0]
