"""Phones from classes: of a dense posterior, and of stored targets with their tail."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from softlabel_schemas import ClassInventory, InputError
from student_trainer.phone_posteriors import PhoneColumns
from tests.support.speech import TEMPERATURES
from tests.support.targets import targets_from_dense

# Silence is two phones; the phones' names are not in the order of the classes.
INVENTORY = ClassInventory(
    names=("b-1", "sil", "a-1", "noise", "b-2", "b-3"),
    phones=("b", "sil", "a", "noise", "b", "b"),
    silence_phones=("sil", "noise"),
)
COLUMNS = PhoneColumns.of(INVENTORY)
PROBS_TV = np.array([[0.4, 0.1, 0.2, 0.1, 0.15, 0.05], [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]])


def test_columns() -> None:
    assert (COLUMNS.phones, COLUMNS.silence, COLUMNS.spoken) == (("a", "b", "sil"), "sil", ("a", "b"))
    assert COLUMNS.column_of_class_V.tolist() == [1, 2, 0, 2, 1, 1]
    assert COLUMNS.count(np.array([0, 5, 3, 2])).tolist() == [1, 2, 1]


def test_without_silence() -> None:
    columns = PhoneColumns.of(ClassInventory(names=("x", "y"), phones=("b", "a")))
    assert (columns.phones, columns.silence, columns.spoken) == (("a", "b"), None, ("a", "b"))


def test_an_inventory_without_phones() -> None:
    with pytest.raises(InputError, match="names no phones"):
        PhoneColumns.of(ClassInventory(names=("x", "y")))


def test_of_a_model() -> None:
    found_TC = COLUMNS.of_model(torch.from_numpy(PROBS_TV).float().log())
    assert found_TC.dtype == np.float32
    assert np.exp(found_TC[0]) == pytest.approx([0.2, 0.6, 0.2])
    # What has no probability is unlikely, not impossible.
    assert np.isfinite(found_TC).all()
    assert np.exp(found_TC[1]) == pytest.approx([1, 0, 0], abs=1e-6)


def test_stored_targets_share_their_tail_among_the_classes_not_kept() -> None:
    kept_TV = np.array([[True, False, True, False, False, False], [False, False, True, False, False, False]])
    with np.errstate(divide="ignore"):
        targets = targets_from_dense(np.log(PROBS_TV[:1]), kept_TV[:1], TEMPERATURES)
    # Kept: b-1 0.4 and a-1 0.2; the tail of 0.4 is 0.1 for each of four classes, two of b and two of silence.
    assert np.exp(COLUMNS.of_stored(targets)) == pytest.approx(np.array([[0.2, 0.6, 0.2]]), abs=1e-6)


def test_stored_targets_that_kept_every_class_are_the_posterior() -> None:
    targets = targets_from_dense(np.log(PROBS_TV[:1]), np.ones((1, 6), dtype=bool), TEMPERATURES)
    expected_TC = COLUMNS.of_model(torch.from_numpy(PROBS_TV[:1]).float().log())
    assert COLUMNS.of_stored(targets) == pytest.approx(expected_TC, abs=1e-5)
