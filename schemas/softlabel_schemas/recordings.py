"""The order in which parts of recordings are read, so that each recording is fetched once and not for every part."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from softlabel_schemas.corpus import Corpus, has_start_samples


def rows_by_recording(corpus: Corpus, min_seconds: float) -> list[npt.NDArray[np.int64]]:
    """Rows that are to be read together, each group in the corpus's order: those of as many recordings as hold
    ``min_seconds`` of the corpus's speech. Utterances that are files of their own are one group.

    Batches of like lengths that are made of all rows take each recording's parts one here and one there; an hour of it is
    some 100 MB, more than can be kept for all.

    The group with the longest utterance comes first.
    """
    seconds_N = corpus.seconds()
    if not has_start_samples(corpus.table):
        return [np.arange(len(corpus))]
    columns = [corpus.table[name].to_pylist() for name in ("start_sample", "audio", "audio_offset", "audio_bytes")]
    rows_of: dict[tuple[str, int | None, int | None] | None, list[int]] = {}
    for row, (start_sample, *file) in enumerate(zip(*columns, strict=True)):
        rows_of.setdefault(None if start_sample is None else tuple(file), []).append(row)
    whole_files = rows_of.pop(None, [])
    groups, together = [whole_files] if whole_files else [], list[int]()
    for rows in rows_of.values():
        together += rows
        if seconds_N[together].sum() >= min_seconds:
            groups.append(together)
            together = []
    if together:
        groups.append(together)
    return sorted((np.sort(rows) for rows in groups), key=lambda rows: -seconds_N[rows].max())
