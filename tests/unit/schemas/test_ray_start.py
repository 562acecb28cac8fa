"""Joining Ray: arguments, the terminating signal, and one message for whatever Ray raises."""

from __future__ import annotations

import signal

import pytest

from softlabel_schemas import InputError
from softlabel_schemas.ray_start import joining


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with joining(None) as options:
        assert options["address"] == "local"
        assert options["include_dashboard"] is False


def test_the_cluster_that_submitted_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with joining(None) as options:
        assert options == {"address": "auto", "log_to_driver": False, "logging_level": "ERROR"}


def test_the_handler_of_sigterm_stays() -> None:
    """Ray puts its own in its place."""
    before = signal.getsignal(signal.SIGTERM)
    with joining("local"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGTERM) is before


def test_ray_that_does_not_start_is_one_message() -> None:
    with (
        pytest.raises(
            InputError, match=r"Ray cannot be started on this machine: timed out\. \(if this machine is busy"
        ),
        joining("local"),
    ):
        raise Exception("timed out.")


def test_a_cluster_that_cannot_be_joined_is_one_message() -> None:
    with (
        pytest.raises(
            InputError, match=r"Ray cannot be joined at nonsense: no route \(the address is HOST:PORT; .* RAY_AUTH_"
        ),
        joining("nonsense"),
    ):
        raise ConnectionError("no route")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:99999"])
def test_an_address_at_which_nothing_listens(address: str) -> None:
    with pytest.raises(InputError, match=f"no Ray cluster answers at {address}: "), joining(address):
        pytest.fail("Ray would wait for many minutes")
