"""Byte budget: which entries are kept, and whether the bytes are those that were asked for."""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softlabel_schemas.byte_budget import COSTS, keep_within_budget
from softlabel_schemas.commit import begin, commit_shard, publish
from softlabel_schemas.inventory import ClassInventory
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.plan import ShardRange
from softlabel_schemas.selection import ByteBudget
from softlabel_schemas.shard import LabelledUtterance
from softlabel_schemas.spec import CodecName
from tests.benchmarks.codec import DEFAULT_FILE, load
from tests.support.datasets import make_document
from tests.support.targets import random_log_posterior, targets_from_dense

CODEC: CodecName = "packed-u8"


def budget_for(entries_per_frame: float, max_entries: int) -> ByteBudget:
    """Half an entry more than so many: the edge is float arithmetic's."""
    cost = COSTS[CODEC]
    return ByteBudget(bytes_per_frame=cost.frame + cost.entry * entries_per_frame, max_entries=max_entries)


@settings(max_examples=50)
@given(seed=st.integers(0, 2**32), num_entries=st.integers(0, 12), max_entries=st.integers(1, 4))
def test_no_other_choice_of_as_many_entries_keeps_more(seed: int, num_entries: int, max_entries: int) -> None:
    log_posterior_TV = random_log_posterior(np.random.default_rng(seed), 3, 4, scale=1.5)
    targets = targets_from_dense(log_posterior_TV, np.ones((3, 4), dtype=bool), (1.0, 2.0))
    found = keep_within_budget(targets, budget_for((num_entries + 0.5) / 3, max_entries), CODEC).validate()
    affordable = min(max(num_entries, 3), 3 * max_entries)
    choices = [counts for counts in itertools.product(range(1, max_entries + 1), repeat=3) if sum(counts) == affordable]
    probs_TV = -np.sort(-np.exp(log_posterior_TV.astype(np.float64)), axis=1)
    best = max(sum(probs_TV[t, :count].sum() for t, count in enumerate(counts)) for counts in choices)
    assert found.num_entries == affordable
    assert found.kept_mass_T().sum() == pytest.approx(best, abs=1e-6)
    # A prefix of each frame's ranking.
    for frame, count in enumerate(found.counts_T):
        own, all_entries = (each.frames(frame, frame + 1).class_ids for each in (found, targets))
        np.testing.assert_array_equal(own, all_entries[:count])


def test_frames_without_entries_leave_their_bytes_to_the_others() -> None:
    log_posterior_TV = random_log_posterior(np.random.default_rng(0), 4, 20, scale=0.5)
    targets = targets_from_dense(log_posterior_TV, np.ones((4, 20), dtype=bool), (1.0,))
    targets = targets.keep(np.repeat([True, False, True, True], 20))
    found = keep_within_budget(targets, budget_for(8.1, 20), CODEC)
    assert found.counts_T[1] == 0
    assert found.num_entries == 32


@pytest.mark.parametrize("codec", COSTS)
@pytest.mark.parametrize("entries", [0.3, 1.0, 4.5, 40.0])
def test_entries_are_the_inverse_of_the_cost(codec: CodecName, entries: float) -> None:
    cost = COSTS[codec]
    assert cost.entries(cost.frame + cost.entry * entries + cost.root * entries**0.5) == pytest.approx(entries)
    assert cost.entries(cost.frame) == 0
    assert cost.entries(cost.frame / 2) == 0


@pytest.mark.skipif(not DEFAULT_FILE.exists(), reason=f"{DEFAULT_FILE} is not there")
@pytest.mark.parametrize(
    ("codec", "bytes_per_frame"),
    [*(("mtf-sqrt", size) for size in (4, 8, 16, 32)), ("packed-u8", 16), ("packed-f32", 32)],
)
def test_the_bytes_are_those_asked_for(codec: CodecName, bytes_per_frame: float) -> None:
    """Within 12%, on posteriors that the costs were not fitted on."""
    posteriors = load(DEFAULT_FILE, 64)
    selection = ByteBudget(bytes_per_frame=bytes_per_frame, max_entries=64)
    kept = [
        replace(utterance, targets=keep_within_budget(utterance.targets, selection, codec))
        for utterance in posteriors.utterances()
    ]
    found = growing_bytes(kept, selection, codec) / posteriors.num_frames
    assert found == pytest.approx(bytes_per_frame, rel=0.12)


def growing_bytes(utterances: list[LabelledUtterance], selection: ByteBudget, codec: CodecName) -> int:
    """Of a published dataset, without the documents whose size does not depend on the corpus."""
    num_classes = utterances[0].targets.num_classes
    inventory = ClassInventory(names=tuple(f"senone-{index}" for index in range(num_classes)))
    changes = {
        "inventory_digest": inventory.digest(),
        "num_classes": num_classes,
        "temperatures": (1.0,),
        "selection": selection,
    }
    document = make_document(len(utterances), shard_format="parquet", codec=codec, num_shards=1)
    document = document.model_copy(update={"spec": document.spec.model_copy(update=changes)})
    with tempfile.TemporaryDirectory() as folder:
        store = ObjectStore(folder)
        begin(store, document, inventory)
        commit_shard(store, document, ShardRange(index=0, first_row=0, num_rows=len(utterances)), utterances, [])
        publish(store, document)
        folders = ("commits", "index", "shards")
        files = [path for name in folders for path in (Path(folder) / name).rglob("*") if path.is_file()]
        return sum(path.stat().st_size for path in files)
