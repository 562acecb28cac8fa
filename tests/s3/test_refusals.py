"""A server that refuses: keys that are revoked or rotated while a writer runs, and a destination that is full."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from softlabel_schemas import InputError, open_dataset, verify
from softlabel_schemas.commit import begin, committed_shards, publish, read_manifest
from softlabel_schemas.object_store import ObjectStore
from tests.support.datasets import (
    INVENTORY,
    SHARD_FORMATS,
    Written,
    commit_rows,
    cut_evenly,
    random_rows,
    write_dataset,
)
from tests.support.rgw import Rgw, s3_environment

NUM_SHARDS = 3
ROWS = random_rows()
RANGES = cut_evenly(len(ROWS), NUM_SHARDS)


@pytest.fixture(scope="module", params=SHARD_FORMATS)
def undisturbed(request: pytest.FixtureRequest, new_url: Callable[[str], str]) -> Written:
    return write_dataset(new_url("local"), shard_format=request.param, num_shards=NUM_SHARDS, rows=ROWS)


@pytest.fixture
def account(rgw: Rgw) -> Iterator[Rgw]:
    """A user whose keys and quota are the test's own, with its keys in the environment."""
    user = rgw.add_user()
    with s3_environment(user.environment()):
        yield user


def test_revoked_keys_end_the_run_with_what_to_do(account: Rgw, undisturbed: Written) -> None:
    store, document = ObjectStore(f"s3://{account.bucket}/labels"), undisturbed.document
    begin(store, document, INVENTORY)
    commit_rows(store, document, RANGES[0], ROWS)
    account.remove_keys()
    for ask in (
        lambda: commit_rows(store, document, RANGES[1], ROWS),
        lambda: committed_shards(store),
        lambda: store.read("spec.json"),
    ):
        with pytest.raises(
            PermissionError, match=rf"{store.url}/.*: access was refused .*credentials .*renew"
        ) as caught:
            ask()
        shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
        assert account.access_key not in shown
        assert account.secret_key not in shown
    # With new keys in the environment the run goes on where it was.
    with s3_environment(account.add_keys().environment()):
        store = ObjectStore(store.url)
        assert committed_shards(store) == {0}
        for shard_range in RANGES[1:]:
            commit_rows(store, document, shard_range, ROWS)
        publish(store, document)
        assert read_manifest(store) == undisturbed.manifest


def test_rotated_keys_are_taken_up(account: Rgw, undisturbed: Written, tmp_path: Path) -> None:
    """Long runs outlive temporary credentials: a file that something else keeps up to date is read again."""

    def write_credentials(user: Rgw) -> None:
        keys = f"aws_access_key_id = {user.access_key}\naws_secret_access_key = {user.secret_key}\n"
        (tmp_path / "credentials").write_text(f"[default]\n{keys}")

    write_credentials(account)
    without_keys = {
        name: value
        for name, value in account.environment().items()
        if name not in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    }
    with s3_environment(without_keys | {"AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials")}):
        store, document, current = ObjectStore(f"s3://{account.bucket}/labels"), undisturbed.document, account
        begin(store, document, INVENTORY)
        for shard_range in RANGES:
            following = current.add_keys()
            write_credentials(following)
            current.remove_keys()
            current = following
            commit_rows(store, document, shard_range, ROWS)
        publish(store, document)
        assert read_manifest(store) == undisturbed.manifest
        assert not any(problem for _, problem in verify(open_dataset(store.url)))


@pytest.mark.parametrize("num_more", [0, 1])
def test_a_full_destination(account: Rgw, undisturbed: Written, num_more: int) -> None:
    """Full before the second shard, or after its first file; then there is room again and the same writer goes on."""
    store, document = ObjectStore(f"s3://{account.bucket}/labels"), undisturbed.document
    begin(store, document, INVENTORY)
    commit_rows(store, document, RANGES[0], ROWS)
    quota = ("--quota-scope", "bucket", "--uid", account.user, "--bucket", account.bucket)
    account.admin("quota", "set", *quota, "--max-objects", str(len(store.list("")) + num_more))
    account.admin("quota", "enable", *quota)
    with pytest.raises(OSError, match=rf"{store.url}/(shards|commits)/000001.*QuotaExceeded"):
        commit_rows(store, document, RANGES[1], ROWS)
    assert committed_shards(store) == {0}
    with pytest.raises(InputError, match="2 of 3 shards are not committed, the first is shard 1"):
        publish(store, document)
    with pytest.raises(InputError, match="is not a published dataset"):
        open_dataset(store.url)
    account.admin("quota", "disable", *quota)
    for shard_range in RANGES[1:]:
        commit_rows(store, document, shard_range, ROWS)
    publish(store, document)
    assert read_manifest(store) == undisturbed.manifest
    local = ObjectStore(undisturbed.url)
    assert store.list("").keys() == local.list("").keys()
    assert all(store.read(key) == local.read(key) for key in local.list(""))


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({}, "Unable to locate credentials"),
        ({"AWS_ACCESS_KEY_ID": "half"}, "Partial credentials"),
        ({"AWS_PROFILE": "missing"}, "missing"),
    ],
)
def test_no_credentials_are_not_waited_for(
    account: Rgw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], reason: str
) -> None:
    """They do not come by themselves."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    # Else a failing test would take minutes.
    monkeypatch.setattr("softlabel_schemas.retrying.GIVE_UP_SECONDS", 1.0)
    store = ObjectStore(f"s3://{account.bucket}/labels")
    for ask in (lambda: store.read("spec.json"), lambda: store.exists("spec.json"), lambda: store.put("a", b"")):
        with pytest.raises(PermissionError, match=rf"{store.url}/.*: access was refused .*{reason}"):
            ask()


@pytest.mark.parametrize("code", ["InvalidToken", "ExpiredToken"])
def test_an_expired_token_as_aws_answers(account: Rgw, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """With status 400, and to HEAD without a word. Asked twice: a new connection may have new credentials."""
    monkeypatch.setattr("softlabel_schemas.retrying.GIVE_UP_SECONDS", 1.0)
    requests: list[str] = []

    class Server(BaseHTTPRequestHandler):
        def answer(self) -> None:
            # On a refused HEAD, botocore asks for the bucket's region besides.
            if self.path.startswith("/bucket/labels/a"):
                requests.append(self.command)
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            content = b"" if self.command == "HEAD" else f"<Error><Code>{code}</Code></Error>".encode()
            self.send_response(400)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_HEAD = do_PUT = answer

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
        store = ObjectStore("s3://bucket/labels")
        for ask, method, told in (
            (lambda: store.exists("a"), "HEAD", "400"),
            (lambda: store.read("a"), "GET", code),
            (lambda: store.put("a", b""), "PUT", code),
        ):
            requests.clear()
            with pytest.raises(PermissionError, match=rf"{store.url}/a: access was refused \({told}\).*renew"):
                ask()
            assert requests == [method] * 2
        server.shutdown()
        thread.join()


def test_settings_that_cannot_work_are_not_waited_for(account: Rgw, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softlabel_schemas.retrying.GIVE_UP_SECONDS", 1.0)
    store = ObjectStore("s3://no such bucket/labels")
    with pytest.raises(OSError, match="Invalid bucket name") as caught:
        store.put("a", b"")
    assert "gave up" not in str(caught.value)
    assert store.url in str(caught.value)


def test_a_missing_bucket_is_named(account: Rgw, undisturbed: Written) -> None:
    store = ObjectStore("s3://no-such-bucket/labels")
    message = f"the bucket or folder of {store.url}/spec.json does not exist"
    with pytest.raises(FileNotFoundError, match=message):
        begin(store, undisturbed.document, INVENTORY)
    with pytest.raises(FileNotFoundError, match=message):
        store.read("spec.json")
