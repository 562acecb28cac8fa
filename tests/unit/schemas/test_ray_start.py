"""Joining Ray: what it raises where its own processes do not start."""

from __future__ import annotations

import pytest

from softlabel_schemas import InputError
from softlabel_schemas.ray_start import join_limit


def test_ray_that_does_not_start_is_one_message() -> None:
    with (
        pytest.raises(InputError, match=r"Ray did not start \(local\): timed out\. If this machine is busy"),
        join_limit("local"),
    ):
        raise Exception("timed out.")


def test_other_errors_are_the_callers() -> None:
    with pytest.raises(ConnectionError, match="no route"), join_limit("head:6379"):
        raise ConnectionError("no route")
