"""Settings of all tests, and stores to write datasets to."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import fsspec
import hypothesis
import pytest

from tests.support import rgw as ceph

# Without a deadline: a busy machine is not a failure. Derandomised: a red run can be repeated.
hypothesis.settings.register_profile("essence-distill", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("essence-distill")

# Of a command that a shell starts in the background it is ignored, and so it would be by all tests of Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """Those that a test installs, by calling a command in this process, end with it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


BUCKET_VARIABLE = "SOFTLABELS_TEST_BUCKET"


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Destination:
    """A bucket that the variables in ``os.environ`` give access to; tests write below ``prefix`` only."""

    endpoint: str
    bucket: str
    prefix: str


@pytest.fixture(scope="session")
def rgw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ceph.Rgw]:
    """An S3 server of our own, for tests that must be its administrator; ``os.environ`` stays as it is."""
    pytest.importorskip("s3fs", reason="no S3: pip install '.[s3]'")
    if missing := ceph.missing_programs():
        pytest.skip(
            f"no S3 server: set AWS_ENDPOINT_URL, {BUCKET_VARIABLE} and keys, or apt-get install {ceph.PACKAGES} "
            f"({', '.join(missing)} not on PATH)"
        )
    with ceph.serve(tmp_path_factory.mktemp("rgw")) as server:
        yield server


@pytest.fixture(scope="session")
def s3(request: pytest.FixtureRequest) -> Iterator[S3Destination]:
    """The configured S3 server, or else one of our own; ``os.environ`` has its variables while the session lasts."""
    pytest.importorskip("s3fs", reason="no S3: pip install '.[s3]'")
    endpoint, bucket, prefix = os.environ.get("AWS_ENDPOINT_URL"), os.environ.get(BUCKET_VARIABLE), uuid.uuid4().hex
    if endpoint and bucket:
        yield S3Destination(endpoint=endpoint, bucket=bucket, prefix=prefix)
        remove(f"s3://{bucket}/{prefix}")
        return
    # Its data end with it.
    server: ceph.Rgw = request.getfixturevalue("rgw")
    with ceph.s3_environment(server.environment()):
        yield S3Destination(endpoint=server.endpoint, bucket=server.bucket, prefix=prefix)


def remove(url: str) -> None:
    filesystem, path = fsspec.core.url_to_fs(url)
    filesystem.invalidate_cache()
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)


@pytest.fixture(scope="session")
def new_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """A function from the name of a store to the URL of an unused destination in it; skips where there is no such store."""
    prefix = uuid.uuid4().hex
    count = 0

    def make(store: str) -> str:
        nonlocal count
        count += 1
        if store == "local":
            return str(tmp_path_factory.mktemp("store") / "labels")
        if store == "memory":
            return f"memory://{prefix}/{count}"
        destination: S3Destination = request.getfixturevalue("s3")
        return f"s3://{destination.bucket}/{destination.prefix}/{count}"

    yield make
    remove(f"memory://{prefix}")
