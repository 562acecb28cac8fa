"""Settings of all tests, and stores to write datasets to."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator

import fsspec
import hypothesis
import pytest

# Without a deadline: a busy machine is not a failure. Derandomised: a red run can be repeated.
hypothesis.settings.register_profile("essence-distill", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("essence-distill")


@pytest.fixture(scope="session")
def new_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """A function from the name of a store to the URL of an unused destination in it."""
    prefix = f"/{uuid.uuid4().hex}"
    count = 0

    def make(store: str) -> str:
        nonlocal count
        count += 1
        return str(tmp_path_factory.mktemp("store") / "labels") if store == "local" else f"memory:/{prefix}/{count}"

    yield make
    memory = fsspec.filesystem("memory")
    if memory.exists(prefix):
        memory.rm(prefix, recursive=True)
