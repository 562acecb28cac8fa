"""The corpus of a subset: the rows of its utterances, so that a student can be trained on them and nothing else.

Splits that were not labelled at all, such as dev and test, stay whole: a student is stopped by the one and evaluated on the
other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import replace

import numpy as np

from softlabel_schemas import layout
from softlabel_schemas.corpus import Corpus, check_label_inventory, load_corpus, write_corpus
from softlabel_schemas.dataset import SoftLabelDataset
from softlabel_schemas.errors import InputError, IntegrityError
from softlabel_schemas.object_store import ObjectStore

# In the folder of the dataset, where readers of datasets ignore it.
NAME = "corpus.parquet"


def check_no_other_corpus(store: ObjectStore) -> None:
    """Before anything is written: raises InputError where there is a corpus that no earlier attempt has written."""
    if store.exists(NAME) and not store.exists(layout.SPEC):
        raise _other_corpus(store)


def write_corpus_of(
    store: ObjectStore, utterance_ids: Collection[str], corpus: Corpus, dataset: SoftLabelDataset, *, where: str
) -> None:
    """Write it into the subset's folder; audio and features stay where they are and are named from there.

    Args:
        store: of the subset.
        utterance_ids: the subset's, those that were skipped too.
        dataset: that the subset is taken of.

    Raises:
        InputError: the corpus lacks an utterance, its hard labels are of another inventory, or another corpus is there.
        IntegrityError, OSError: the dataset's index cannot be read.
    """
    check_label_inventory(corpus.inventory_digest, dataset.inventory, where=where)
    ids, splits = corpus.table["utterance_id"].to_pylist(), corpus.table["split"].to_pylist()
    wanted = set(utterance_ids)
    of_subset_N = np.array([each in wanted for each in ids], dtype=bool)
    if int(of_subset_N.sum()) != len(wanted):
        missing = min(wanted.difference(ids))
        raise InputError(
            f"{where} has no utterance {missing!r}, which the dataset has; give the corpus that was labelled"
        )
    touched = {split for split, of_subset in zip(splits, of_subset_N, strict=True) if of_subset}
    others: defaultdict[str, list[str]] = defaultdict(list)
    for each, split in zip(ids, splits, strict=True):
        if split not in touched:
            others[split].append(each)
    unlabelled = {split for split, of_split in others.items() if not _has_any(dataset, of_split)}
    chosen_N = of_subset_N | np.array([split in unlabelled for split in splits], dtype=bool)
    chosen = corpus.where(chosen_N)
    # Looked for and then put: a large one is more than can be created conditionally.
    if store.exists(NAME) and not _has_rows(store.describe(NAME), chosen):
        raise _other_corpus(store)
    rows = (
        replace(
            row,
            audio=row.audio and corpus.location(row.audio),
            features=row.features and corpus.location(row.features),
        )
        for row in chosen
    )
    shift_ms = corpus.hard_label_frame_shift_ms
    write_corpus(store.describe(NAME), rows, inventory=dataset.inventory, hard_label_frame_shift_ms=shift_ms)


def _has_rows(manifest: str, expected: Corpus) -> bool:
    """Whether it is the same corpus, wherever the audio lay when it was written."""
    try:
        found = load_corpus(manifest)
    except (InputError, IntegrityError):
        return False
    tables = [each.table.drop_columns(["audio", "features"]) for each in (found, expected)]
    if tables[0] != tables[1]:
        return False
    # Without hard labels nothing is written of their classes and frames.
    classes = [(each.inventory_digest, each.hard_label_frame_shift_ms) for each in (found, expected)]
    return classes[0] == classes[1] or tables[1]["hard_labels"].null_count == len(tables[1])


def _other_corpus(store: ObjectStore) -> InputError:
    return InputError(
        f"{store.describe(NAME)} is there already, and is not the corpus of this subset; it is not replaced: give another "
        "output, or move it away"
    )


def _has_any(dataset: SoftLabelDataset, utterance_ids: Collection[str]) -> bool:
    """Whether it labelled one of them or skipped it."""
    if not {entry.utterance_id for entry in dataset.manifest.skipped}.isdisjoint(utterance_ids):
        return True
    return any(shard is not None for shard in dataset.shards_of(list(utterance_ids)).values())
