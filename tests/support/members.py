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
from tests.support.datasets import INVENTORY, NUM_CLASSES, TEMPERATURES, Row, commit_rows, cut_evenly, make_document
from tests.support.targets import random_log_posterior, random_targets, targets_from_dense

NUM_ROWS = 9


def member_rows(
    seed: int,
    *,
    skipped: Sequence[int] = (),
    longer: Sequence[int] = (),
    temperatures: tuple[float, ...] = TEMPERATURES,
    is_whole: bool = False,
) -> list[Row]:
    """Utterance ``i`` has ``5 + i`` frames, those in ``longer`` one more; ``is_whole``: with an entry for each class."""
    rng = np.random.default_rng(seed)
    found: list[Row] = []
    for index in range(NUM_ROWS):
        utterance_id = f"utt-{index}"
        num_frames = 5 + index + (index in longer)
        targets = random_targets(rng, num_frames=num_frames, temperatures=temperatures)
        if is_whole:
            log_posterior_TV = random_log_posterior(rng, num_frames, NUM_CLASSES)
            targets = targets_from_dense(log_posterior_TV, np.isfinite(log_posterior_TV), temperatures)
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
