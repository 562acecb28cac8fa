"""The commit protocol over a failing S3 server: every outcome is that of an undisturbed run on a local disk, or an error."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from softlabel_schemas import InputError, IntegrityError, layout, open_dataset, verify
from softlabel_schemas.commit import begin, publish, read_manifest
from softlabel_schemas.manifest import CommitRecord, Manifest, SpecDocument, to_bytes
from softlabel_schemas.object_store import ConditionalWriteError, ObjectStore
from tests.support.datasets import (
    INVENTORY,
    SHARD_FORMATS,
    Written,
    commit_rows,
    cut_evenly,
    make_document,
    random_rows,
    write_dataset,
)
from tests.support.fault_proxy import RANDOM_FAULTS, Fault, FaultProxy
from tests.support.rgw import Rgw, s3_environment

NUM_SHARDS = 3
ROWS = random_rows()
RANGES = cut_evenly(len(ROWS), NUM_SHARDS)
# Three are enough for each fault to occur; a proxy that makes none must not go on for ever.
MAX_DATASETS = 20


@pytest.fixture(scope="module")
def shard_format() -> str:
    """Where it makes no difference."""
    return "parquet"


@pytest.fixture(scope="module")
def undisturbed(shard_format: str, new_url: Callable[[str], str]) -> Written:
    return write_dataset(new_url("local"), shard_format=shard_format, num_shards=NUM_SHARDS, rows=ROWS)


@pytest.fixture
def document(undisturbed: Written) -> SpecDocument:
    return undisturbed.document


def contents(url: str) -> dict[str, bytes]:
    store = ObjectStore(url)
    keys = list(store.list("", temporaries=True))
    return dict(zip(keys, store.read_many(keys), strict=True))


def assert_same(url: str, undisturbed: Written) -> None:
    """The same objects, byte for byte, and nothing else; asked of the server as it is."""
    assert contents(url) == contents(undisturbed.url)
    dataset = open_dataset(url)
    assert dataset.manifest == undisturbed.manifest
    assert list(verify(dataset)) == [(index, "") for index in range(NUM_SHARDS)]


def write(store: ObjectStore, document: SpecDocument) -> Manifest:
    begin(store, document, INVENTORY)
    for shard_range in RANGES:
        commit_rows(store, document, shard_range, ROWS)
    publish(store, document)
    return read_manifest(store)


@pytest.mark.parametrize("shard_format", SHARD_FORMATS, scope="module")
def test_one_request_in_five_fails(
    proxy: FaultProxy, url: str, rgw: Rgw, undisturbed: Written, shard_format: str
) -> None:
    """Written and read through the faults, until each has occurred."""
    proxy.share = 0.2
    urls = []
    while set(proxy.counts()) < set(RANDOM_FAULTS):
        assert len(urls) < MAX_DATASETS, f"only {proxy.counts()} in {proxy.num_requests} requests"
        urls.append(f"{url}/{len(urls)}")
        written = write_dataset(urls[-1], shard_format=shard_format, num_shards=NUM_SHARDS, rows=ROWS)
        assert written.manifest == undisturbed.manifest
        assert list(verify(open_dataset(urls[-1]))) == [(index, "") for index in range(NUM_SHARDS)]
    assert sum(proxy.counts().values()) > 0.1 * proxy.num_requests
    with s3_environment(rgw.environment()):
        for each in urls:
            assert_same(each, undisturbed)


@pytest.mark.parametrize("shard_format", SHARD_FORMATS, scope="module")
def test_two_jobs_race_over_a_failing_server(proxy: FaultProxy, url: str, rgw: Rgw, undisturbed: Written) -> None:
    proxy.share = 0.2
    with ThreadPoolExecutor(max_workers=2) as pool:
        manifests = list(pool.map(lambda _: write(ObjectStore(url), undisturbed.document), range(2)))
    assert manifests == [undisturbed.manifest] * 2
    assert proxy.counts()
    with s3_environment(rgw.environment()):
        assert_same(url, undisturbed)


@pytest.mark.parametrize("key", ["spec.json", "inventory.json", "commits/000001.json", "manifest.json"])
def test_the_response_to_a_creation_is_lost(
    proxy: FaultProxy, url: str, undisturbed: Written, document: SpecDocument, key: str
) -> None:
    """The object is there, the client does not know: its next attempt finds its own bytes."""
    rule = proxy.rule(Fault.LOST_RESPONSE, method="PUT", path=key, times=1)
    assert write(ObjectStore(url), document) == undisturbed.manifest
    assert (rule.applied, proxy.counts()) == (1, {Fault.LOST_RESPONSE: 1})
    assert_same(url, undisturbed)


def test_every_response_to_a_creation_is_lost_once(
    proxy: FaultProxy, url: str, undisturbed: Written, document: SpecDocument
) -> None:
    """Among them all four of those who create the spec at once."""
    keys = ["spec.json", "inventory.json", "manifest.json", *(f"commits/{index:06d}" for index in range(NUM_SHARDS))]
    rules = [proxy.rule(Fault.LOST_RESPONSE, method="PUT", path=key, times=4) for key in keys]
    assert write(ObjectStore(url), document) == undisturbed.manifest
    assert all(rule.applied for rule in rules)
    assert rules[0].applied == 4
    assert_same(url, undisturbed)


@pytest.fixture
def won(proxy: FaultProxy, url: str, document: SpecDocument) -> CommitRecord:
    """The record of shard 0 by another writer, whose labels differ."""
    store = ObjectStore(url)
    begin(store, document, INVENTORY)
    return commit_rows(store, document, RANGES[0], random_rows(seed=1))


def test_the_response_to_a_lost_race_is_lost(
    proxy: FaultProxy, url: str, document: SpecDocument, won: CommitRecord
) -> None:
    rule = proxy.rule(Fault.LOST_RESPONSE, method="PUT", path="commits/000000.json", times=1)
    store = ObjectStore(url)
    assert commit_rows(store, document, RANGES[0], ROWS) == won
    assert rule.applied == 1
    assert store.read("commits/000000.json") == to_bytes(won)


def test_the_response_to_a_won_race_is_lost(
    proxy: FaultProxy, url: str, undisturbed: Written, document: SpecDocument
) -> None:
    """A second writer, with other bytes, comes between our creation and our second attempt, and must lose."""
    store = ObjectStore(url)
    begin(store, document, INVENTORY)
    rule = proxy.rule(Fault.LOST_RESPONSE, method="PUT", path="commits/000000.json", times=1)
    ours = commit_rows(store, document, RANGES[0], ROWS)
    assert rule.applied == 1
    assert commit_rows(store, document, RANGES[0], random_rows(seed=1)) == ours
    assert ours.shard == undisturbed.manifest.shards[0]


@pytest.mark.parametrize("fault", [Fault.IGNORED_CONDITION, Fault.LATE_CONDITION, Fault.ERROR_501])
def test_a_server_without_conditional_writes_is_refused(
    proxy: FaultProxy, url: str, undisturbed: Written, document: SpecDocument, fault: Fault
) -> None:
    rule = proxy.rule(fault, method="PUT")
    with pytest.raises(InputError, match=r"accept_last_writer_wins") as caught:
        begin(ObjectStore(url), document, INVENTORY)
    assert isinstance(caught.value, ConditionalWriteError)
    assert caught.value.args[0].startswith(url)
    assert rule.applied > 0
    # Nothing stays that the next attempt would join without seeing a race.
    assert contents(url) == {}
    with pytest.raises(ConditionalWriteError):
        begin(ObjectStore(url), document, INVENTORY)
    applied = rule.applied
    # Accepted by name, it works, and asks for no condition.
    assert write(ObjectStore(url, last_writer_wins=True), document) == undisturbed.manifest
    assert rule.applied == applied
    assert_same(url, undisturbed)


def test_joining_proves_it_once_more(proxy: FaultProxy, url: str, document: SpecDocument) -> None:
    """A killed writer has left the spec alone, which the server keeps from being replaced one after the other."""
    store = ObjectStore(url)
    store.put(layout.SPEC, to_bytes(document))
    proxy.rule(Fault.LATE_CONDITION, method="PUT")
    for _ in range(2):
        with pytest.raises(ConditionalWriteError, match=r"writers created inventory\.json at once"):
            begin(ObjectStore(url), document, INVENTORY)
        assert contents(url) == {layout.SPEC: to_bytes(document)}


def test_what_cannot_be_withdrawn_is_named(
    proxy: FaultProxy, url: str, document: SpecDocument, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("softlabel_schemas.retrying.GIVE_UP_SECONDS", 1.0)
    proxy.rule(Fault.LATE_CONDITION, method="PUT")
    proxy.rule(Fault.ERROR_500, method="DELETE")
    with pytest.raises(ConditionalWriteError, match=rf"conditional creation.*Delete {url}/spec.json by hand.*gave up"):
        begin(ObjectStore(url), document, INVENTORY)


def test_a_server_that_ignores_conditions_does_not_replace_a_spec(
    proxy: FaultProxy, url: str, document: SpecDocument
) -> None:
    begin(ObjectStore(url), document, INVENTORY)
    before = contents(url)
    proxy.rule(Fault.IGNORED_CONDITION, method="PUT")
    other = make_document(len(ROWS), shard_format="parquet", codec="packed-f32", num_shards=NUM_SHARDS)
    with pytest.raises(InputError, match="started with other settings"):
        begin(ObjectStore(url), other, INVENTORY)
    with pytest.raises(ConditionalWriteError):
        begin(ObjectStore(url), document, INVENTORY)
    assert contents(url) == before


@pytest.mark.parametrize("key", ["spec.json", "shards/000001-", "commits/000001.json", "manifest.json"])
def test_a_stuck_upload_is_given_up_and_repeated(
    proxy: FaultProxy,
    url: str,
    undisturbed: Written,
    document: SpecDocument,
    monkeypatch: pytest.MonkeyPatch,
    key: str,
) -> None:
    monkeypatch.setattr("softlabel_schemas.connection._ATTEMPT_SECONDS", 1.0)
    rule = proxy.rule(Fault.HANG, method="PUT", path=key, times=1)
    assert write(ObjectStore(url), document) == undisturbed.manifest
    assert (rule.applied, proxy.counts()) == (1, {Fault.HANG: 1})
    assert_same(url, undisturbed)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_stuck_request_is_given_up_and_repeated(
    proxy: FaultProxy,
    url: str,
    undisturbed: Written,
    document: SpecDocument,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    monkeypatch.setattr("softlabel_schemas.connection._ATTEMPT_SECONDS", 1.0)
    rule = proxy.rule(Fault.HANG, method=method, times=1)
    assert write(ObjectStore(url), document) == undisturbed.manifest
    assert rule.applied == 1
    assert_same(url, undisturbed)


def test_a_server_that_always_fails_is_given_up(
    proxy: FaultProxy, url: str, document: SpecDocument, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("softlabel_schemas.retrying.GIVE_UP_SECONDS", 1.0)
    store = ObjectStore(url)
    begin(store, document, INVENTORY)
    rule = proxy.rule(Fault.ERROR_500, method="PUT", path="commits/")
    with pytest.raises(OSError, match=rf"{url}/commits/000000.json: gave up after \d+ attempts .*made by a test"):
        commit_rows(store, document, RANGES[0], ROWS)
    assert rule.applied > 2
    assert not store.exists("commits/000000.json")


@pytest.mark.parametrize(
    ("method", "fault"),
    [
        *(("PUT", fault) for fault in (Fault.ERROR_500, Fault.SLOW_DOWN, Fault.RESET, Fault.LOST_RESPONSE)),
        *(("GET", fault) for fault in (Fault.ERROR_500, Fault.SLOW_DOWN, Fault.RESET, Fault.TRUNCATED_BODY)),
        *(("HEAD", fault) for fault in (Fault.ERROR_500, Fault.SLOW_DOWN, Fault.RESET)),
    ],
)
def test_an_attempt_is_one_request(
    proxy: FaultProxy, url: str, monkeypatch: pytest.MonkeyPatch, method: str, fault: Fault
) -> None:
    """What s3fs and botocore would repeat by themselves is left to us."""
    monkeypatch.delenv("AWS_MAX_ATTEMPTS")
    monkeypatch.setattr("softlabel_schemas.retrying.GIVE_UP_SECONDS", 0.5)
    store = ObjectStore(url)
    store.put("a", bytes(1000))
    rule = proxy.rule(fault, method=method)
    ask = {
        "PUT": lambda: store.put("a", b""),
        "GET": lambda: store.read("a", max_bytes=1000),
        "HEAD": lambda: store.size("a"),
    }[method]
    with pytest.raises(OSError, match="gave up after") as caught:
        ask()
    told = re.search(r"gave up after (\d+) attempts in (\d+) s,", str(caught.value))
    assert told is not None
    # aiohttp repeats a request at once when its connection breaks, and cannot be told not to.
    per_attempt = 2 if fault in (Fault.RESET, Fault.LOST_RESPONSE) else 1
    assert rule.applied == per_attempt * int(told[1]) > 1
    # How long it really took.
    assert int(told[2]) < 100


def test_a_large_object_is_read_in_pieces(proxy: FaultProxy, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five and a half of them: a failure costs one more request, not all again."""
    monkeypatch.setattr("softlabel_schemas.object_store._PIECE_BYTES", 1 << 20)
    store, data = ObjectStore(url), bytes(range(256)) * (11 << 11)
    store.put("a", data)

    def num_requests(max_bytes: int | None) -> int:
        before = proxy.num_requests
        assert store.read("a", max_bytes=max_bytes) == data
        return proxy.num_requests - before

    for max_bytes in (None, len(data), 100 << 20):
        assert num_requests(max_bytes) == 6
        proxy.rule(Fault.TRUNCATED_BODY, method="GET", times=1)
        assert num_requests(max_bytes) == 7
    before = proxy.num_requests
    with pytest.raises(IntegrityError, match="more than the 3145728 bytes"):
        store.read("a", max_bytes=3 << 20)
    assert proxy.num_requests - before == 4


def test_a_small_object_takes_one_request(proxy: FaultProxy, url: str) -> None:
    store = ObjectStore(url)
    store.put("a", b"data")
    for max_bytes in (None, 4, 96 << 20):
        before = proxy.num_requests
        assert store.read("a", max_bytes=max_bytes) == b"data"
        assert proxy.num_requests - before == 1


def test_each_piece_has_a_time_limit_of_its_own(proxy: FaultProxy, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten pieces that come in drops take several times the limit of an attempt, and arrive."""
    store, data = ObjectStore(url), bytes(10_000)
    store.put("a", data)
    monkeypatch.setattr("softlabel_schemas.object_store._PIECE_BYTES", 1000)
    monkeypatch.setattr("softlabel_schemas.connection._ATTEMPT_SECONDS", 2.0)
    rule = proxy.rule(Fault.SLOW_BODY, method="GET")
    assert store.read("a") == data
    # The last finds the end, with nothing to send slowly.
    assert rule.applied == 11
