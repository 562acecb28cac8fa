"""An S3 server that fails when told to."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from tests.support.fault_proxy import FaultProxy
from tests.support.rgw import Rgw, s3_environment


@pytest.fixture
def proxy(rgw: Rgw) -> Iterator[FaultProxy]:
    """Between this process and the server, without faults until it is given some."""
    with (
        FaultProxy(rgw.endpoint, seed=2019, credentials=(rgw.access_key, rgw.secret_key)) as proxy,
        # botocore would try again by itself and pause for seconds; what our own retries do is to be seen.
        s3_environment(rgw.environment() | {"AWS_ENDPOINT_URL": proxy.endpoint, "AWS_MAX_ATTEMPTS": "1"}),
    ):
        yield proxy


@pytest.fixture
def url(rgw: Rgw) -> str:
    """An unused destination."""
    return f"s3://{rgw.bucket}/{uuid.uuid4().hex}"
