"""Datasets of single teachers that label the same corpus, to be combined."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from softlabel_schemas.commit import begin, publish
from softlabel_schemas.manifest import SkippedUtterance
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.shard import LabelledUtterance, UtteranceStats
from softlabel_schemas.spec import TeacherSpec
from tests.support.datasets import INVENTORY, TEMPERATURES, Row, commit_rows, cut_evenly, make_document
from tests.support.targets import random_targets

NUM_ROWS = 9


def member_rows(
    seed: int,
    *,
    skipped: Sequence[int] = (),
    longer: Sequence[int] = (),
    temperatures: tuple[float, ...] = TEMPERATURES,
) -> list[Row]:
    """Utterance ``i`` has ``5 + i`` frames, those in ``longer`` one more."""
    rng = np.random.default_rng(seed)
    found: list[Row] = []
    for index in range(NUM_ROWS):
        utterance_id = f"utt-{index}"
        targets = random_targets(rng, num_frames=5 + index + (index in longer), temperatures=temperatures)
        stats = UtteranceStats(kept_mass=float(targets.kept_mass_T().mean()), entropy=1.0, agreement=0.5)
        if index in skipped:
            found.append(SkippedUtterance(utterance_id=utterance_id, reason=f"fault {seed}"))
        else:
            found.append(LabelledUtterance(utterance_id=utterance_id, targets=targets, stats=stats))
    return found


def write_member(
    url: Path, labels: Sequence[Row], *, name: str = "tdnn", num_shards: int = 3, codec: str = "packed-f32", **spec: Any
) -> str:
    """Publish the labels of one teacher; ``spec``: fields to replace. Returns the URL."""
    document = make_document(len(labels), shard_format="parquet", codec=codec, num_shards=num_shards)
    teachers = (TeacherSpec(name=name, digest=format(len(name), "064x"), weight=1.0),)
    document = document.model_copy(update={"spec": document.spec.model_copy(update={"teachers": teachers} | spec)})
    store = ObjectStore(url)
    begin(store, document, INVENTORY)
    for shard_range in cut_evenly(len(labels), num_shards):
        commit_rows(store, document, shard_range, labels)
    publish(store, document)
    return str(url)
