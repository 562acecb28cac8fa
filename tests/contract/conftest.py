"""What the contract is tested over: shard formats, stores and codecs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from softlabel_schemas.object_store import ObjectStore
from tests.support.datasets import CODECS, SHARD_FORMATS

STORES = ("local", "memory", "s3")


@pytest.fixture(scope="module", params=CODECS)
def codec(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=STORES)
def store_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=SHARD_FORMATS)
def shard_format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def store(new_url: Callable[[str], str], store_name: str) -> ObjectStore:
    return ObjectStore(new_url(store_name))
