"""Random access on a real S3 server: how many requests it takes, and an index that a disturbed publisher leaves."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from softlabel_schemas import InputError, open_dataset, utterance_index, verify
from softlabel_schemas.commit import begin, publish
from softlabel_schemas.gc import find_garbage
from softlabel_schemas.object_store import ObjectStore
from tests.support.datasets import INVENTORY, Written, commit_rows, cut_evenly, random_rows, write_dataset
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.rgw import Rgw, s3_environment

NUM_SHARDS = 3
ROWS = random_rows(seed=5, num_rows=600)


@pytest.fixture(autouse=True)
def several_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utterance_index, "_ENTRIES_PER_BUCKET", 100)


@pytest.fixture
def undisturbed(new_url: Callable[[str], str], several_buckets: None) -> Written:
    return write_dataset(new_url("local"), shard_format="parquet", num_shards=NUM_SHARDS, rows=ROWS)


@pytest.fixture
def committed(url: str, undisturbed: Written, proxy: FaultProxy) -> ObjectStore:
    """All shards are, nothing is published."""
    store = ObjectStore(url)
    begin(store, undisturbed.document, INVENTORY)
    for shard_range in cut_evenly(len(ROWS), NUM_SHARDS):
        commit_rows(store, undisturbed.document, shard_range, ROWS)
    return store


def assert_same(store: ObjectStore, undisturbed: Written) -> None:
    keys = list(store.list("", temporaries=True))
    local = ObjectStore(undisturbed.url)
    assert keys == list(local.list(""))
    assert store.read_many(keys) == local.read_many(keys)
    assert [problem for _, problem in verify(open_dataset(store.url)) if problem] == []


def test_one_utterance(proxy: FaultProxy, url: str) -> None:
    written = write_dataset(url, shard_format="parquet", num_shards=NUM_SHARDS, rows=ROWS)
    ids = [utterance.utterance_id for utterance in written.utterances]
    dataset = open_dataset(url)
    before = proxy.num_requests
    assert dataset[ids[300]].utterance_id == ids[300]
    assert proxy.num_requests - before == 2
    dataset.read_utterances(ids)
    for wanted in ids[::67]:
        before = proxy.num_requests
        assert dataset[wanted].utterance_id == wanted
        # None where the block is in memory.
        assert proxy.num_requests - before <= 1


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_64_random_utterances(proxy: FaultProxy, url: str, undisturbed: Written, share: float) -> None:
    written = write_dataset(url, shard_format="parquet", num_shards=NUM_SHARDS, rows=ROWS)
    ids = [utterance.utterance_id for utterance in written.utterances]
    wanted = [ids[n] for n in np.random.default_rng(0).permutation(len(ids))[:64]]
    dataset = open_dataset(url)
    before, proxy.share = proxy.num_requests, share
    found = dataset.read_utterances(wanted)
    if not share:
        # Each bucket once; most of each shard is needed.
        assert proxy.num_requests - before == len(dataset.manifest.bucket_table()) + NUM_SHARDS
    assert [str(u) for u in found] == [str(u) for u in open_dataset(undisturbed.url).read_utterances(wanted)]


@pytest.mark.parametrize("path", ["index/000002-", "manifest.json"])
def test_a_publisher_that_dies(
    proxy: FaultProxy,
    committed: ObjectStore,
    undisturbed: Written,
    rgw: Rgw,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
) -> None:
    """Within the index, or after it: nothing is published, and the next one goes on from there."""
    with monkeypatch.context() as patch:
        patch.setattr("softlabel_schemas.retrying.GIVE_UP_SECONDS", 0.5)
        proxy.rule(Fault.ERROR_500, method="PUT", path=path)
        with pytest.raises(OSError, match="gave up after"):
            publish(committed, undisturbed.document)
    proxy.clear_rules()
    there = committed.list("index")
    with pytest.raises(InputError, match="is not a published dataset"):
        open_dataset(committed.url)
    found = find_garbage(committed)
    assert found.garbage == ()
    assert {finding.path for finding in found.kept} == there.keys()
    publish(committed, undisturbed.document)
    # What was there is not stored again.
    again = committed.list("index")
    assert {key: again[key] for key in there} == there
    with s3_environment(rgw.environment()):
        assert_same(ObjectStore(committed.url), undisturbed)


def test_two_publishers_over_a_failing_server(
    proxy: FaultProxy, committed: ObjectStore, undisturbed: Written, rgw: Rgw
) -> None:
    proxy.share = 0.2
    with ThreadPoolExecutor(max_workers=2) as pool:
        digests = list(
            pool.map(lambda _: publish(ObjectStore(committed.url), undisturbed.document).content_digest, range(2))
        )
    assert digests == [undisturbed.manifest.content_digest] * 2
    with s3_environment(rgw.environment()):
        assert_same(ObjectStore(committed.url), undisturbed)


def test_the_response_to_a_bucket_is_lost(
    proxy: FaultProxy, committed: ObjectStore, undisturbed: Written, rgw: Rgw
) -> None:
    rule = proxy.rule(Fault.LOST_RESPONSE, method="PUT", path="index/", times=3)
    publish(committed, undisturbed.document)
    assert rule.applied == 3
    with s3_environment(rgw.environment()):
        assert_same(ObjectStore(committed.url), undisturbed)


def test_publishing_again_stores_nothing(proxy: FaultProxy, committed: ObjectStore, undisturbed: Written) -> None:
    publish(committed, undisturbed.document)
    there = committed.list("")
    publish(committed, undisturbed.document)
    assert committed.list("") == there
