"""The corpus of a subset: the rows of its utterances, so that a student can be trained on them and nothing else."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np

from softlabel_schemas.corpus import Corpus, check_label_inventory, write_corpus
from softlabel_schemas.errors import InputError
from softlabel_schemas.inventory import ClassInventory
from softlabel_schemas.object_store import ObjectStore

# In the folder of the dataset, where readers of datasets ignore it.
NAME = "corpus.parquet"


def write_corpus_of(
    store: ObjectStore, utterance_ids: Collection[str], corpus: Corpus, inventory: ClassInventory, *, where: str
) -> None:
    """Write it into the dataset's folder; audio and features stay where they are and are named from there.

    Raises:
        InputError: the corpus lacks an utterance, or its hard labels are of another inventory.
    """
    check_label_inventory(corpus.inventory_digest, inventory, where=where)
    wanted = set(utterance_ids)
    chosen_N = np.array([each in wanted for each in corpus.table["utterance_id"].to_pylist()])
    if int(chosen_N.sum()) != len(wanted):
        missing = min(wanted.difference(corpus.table["utterance_id"].to_pylist()))
        raise InputError(
            f"{where} has no utterance {missing!r}, which the dataset has; give the corpus that was labelled"
        )

    def whole(location: str | None) -> str | None:
        if location is None:
            return None
        folder, name = corpus.resolve(location)
        return f"{folder}/{name}" if "://" in folder else str(Path(folder, name).resolve())

    rows = (replace(row, audio=whole(row.audio), features=whole(row.features)) for row in corpus.where(chosen_N))
    write_corpus(
        store.describe(NAME),
        rows,
        inventory=inventory,
        hard_label_frame_shift_ms=corpus.hard_label_frame_shift_ms,
    )
