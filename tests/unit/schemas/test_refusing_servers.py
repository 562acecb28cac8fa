"""HTTP servers that refuse or fail, or redirect to signed addresses, as a bucket at a plain https:// URL does."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner, Result
from fsspec.implementations.memory import MemoryFileSystem

from softlabel_schemas import open_dataset
from softlabel_schemas.cli import main
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.retrying import call_with_retries
from tests.support.datasets import Written, write_dataset
from tests.support.http_server import QuietHandler, serving

pytest.importorskip("aiohttp", reason="needs aiohttp")

SIGNATURE = "X-Amz-Signature=planted"


class Handler(QuietHandler):
    """Answers 403 for what is not there, and where the first folder is a status, redirects to a signed address with it."""

    def do_GET(self) -> None:
        first, _, rest = self.path.lstrip("/").partition("/")
        if SIGNATURE in self.path:
            self.send_error(int(first))
        elif first.isdecimal():
            self.send_response(307)
            self.send_header("Location", f"/{first}/{rest}?{SIGNATURE}")
            self.end_headers()
        elif Path(self.translate_path(self.path)).is_file():
            super().do_GET()
        else:
            self.send_error(403)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    with serving(tmp_path, Handler) as url:
        yield url


class Failing(QuietHandler):
    """Answers 503 twice for each path: size asks with HEAD and then with GET."""

    requests: ClassVar[Counter[str]] = Counter()

    def send_head(self) -> Any:
        self.requests[self.path] += 1
        if self.requests[self.path] > 2:
            return super().send_head()
        self.send_error(503)
        return None


@pytest.fixture
def failing(tmp_path: Path) -> Iterator[str]:
    Failing.requests.clear()
    with serving(tmp_path, Failing) as url:
        yield url


@pytest.fixture
def written(tmp_path: Path) -> Written:
    return write_dataset(str(tmp_path / "labels"), shard_format="parquet", num_shards=1)


def softlabels(*args: str) -> Result:
    return CliRunner().invoke(main, args)


def test_what_is_refused_is_one_message(server: str) -> None:
    result = softlabels("describe", f"{server}/labels")
    where = f"{server}/labels/manifest.json"
    assert isinstance(result.exception, SystemExit)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: PermissionError: {where}: access was refused (HTTP status 403); ")
    assert result.stderr.count(where) == 1
    assert "there may be no such object" in result.stderr


@pytest.mark.parametrize(
    ("status", "error"), [(400, OSError), (401, PermissionError), (403, PermissionError), (405, OSError)]
)
def test_what_a_signed_address_answers(server: str, status: int, error: type[OSError]) -> None:
    with pytest.raises(error, match=f"{server}/{status}/a: .*HTTP status {status}") as caught:
        ObjectStore(f"{server}/{status}").read("a")
    assert "planted" not in str(caught.getrepr())
    result = softlabels("describe", f"{server}/{status}")
    assert isinstance(result.exception, SystemExit)
    assert (result.exit_code, "planted" in result.output) == (2, False)


def test_a_signed_address_that_keeps_failing(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softlabel_schemas.retrying.GIVE_UP_SECONDS", 0.2)
    with pytest.raises(OSError, match=rf"{server}/503/a: gave up after \d+ .*the last: HTTP status 503$") as caught:
        ObjectStore(f"{server}/503").read("a")
    assert "planted" not in str(caught.getrepr())


def test_the_queries_of_addresses_in_other_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softlabel_schemas.retrying.GIVE_UP_SECONDS", 0.0)

    def fail() -> None:
        raise ConnectionError(f"cannot reach 'https://host/a?{SIGNATURE}' (try again?)")

    with pytest.raises(OSError, match=r"^here: gave up .*: cannot reach 'https://host/a' \(try again\?\)$"):
        call_with_retries(fail, where="here")


def test_a_range_behind_the_end(server: str) -> None:
    """Or of an empty object: a server that is strict about ranges says 416."""
    assert ObjectStore(f"{server}/416").read("a") == b""


def test_what_fails_is_asked_again(tmp_path: Path, failing: str) -> None:
    """And not taken for absent."""
    (tmp_path / "a").write_bytes(b"data")
    store = ObjectStore(failing)
    for name, found in (("a", True), ("gone", False)):
        assert (store.exists(name), Failing.requests[f"/{name}"]) == (found, 3)
    Failing.requests.clear()
    assert store.size("a") == 4
    with pytest.raises(FileNotFoundError, match=f"{failing}/gone does not exist"):
        store.size("gone")


def test_what_is_refused_is_not_absent(server: str, tmp_path: Path) -> None:
    store = ObjectStore(server)
    for ask in (store.exists, store.size):
        with pytest.raises(PermissionError, match=f"{server}/gone: access was refused"):
            ask("gone")
    # Nor is what a disk cannot follow.
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(OSError, match="circle") as caught:
        ObjectStore(tmp_path).exists("circle")
    assert caught.value.errno == errno.ELOOP


def test_a_bucket_that_refuses_what_is_not_there(written: Written, server: str) -> None:
    """Neither about.json nor deprecated.json exists; without the right to list, S3 answers that access is refused."""
    assert len(open_dataset(f"{server}/labels")) == written.manifest.num_utterances
    for command in ("describe", "verify", "card"):
        result = softlabels(command, f"{server}/labels")
        assert (result.exit_code, "403" in result.output) == (0, False), result.output


def test_new_credentials_are_taken_up_by_one_connection_for_all_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """An S3 client takes 12 MiB, and a corpus may lie in many thousand folders."""
    stores = [ObjectStore(f"memory://rotated/{folder}") for folder in range(5)]
    for store in stores:
        store.put("a", b"here")
    expired = [stores[0]._fs]
    assert all(store._fs is expired[0] for store in stores)
    read = MemoryFileSystem.cat_file

    def refusing(self: MemoryFileSystem, path: str, *args: Any, **kwargs: Any) -> Any:
        if any(self is each for each in expired):
            raise PermissionError("ExpiredToken")
        return read(self, path, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", refusing)
    for store in stores[:4]:
        assert store.read("a") == b"here"
    assert len({id(store._fs) for store in stores[:4]}) == 1
    # Nor does a place that was left alone while credentials changed twice stay with those of between.
    expired.append(stores[0]._fs)
    assert stores[4].read("a") == b"here"
