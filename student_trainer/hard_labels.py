"""Which utterances have hard labels, and what the rest need.

Speech without hard labels trains in the same run from its soft targets: its frames are in the mean of the soft loss and not in
that of the hard loss (see ``loss.py``).

Targets that were captured with ``keep_hard_label`` remember labels that are not used here: an entry that stands out of the
ranking gives its frame's label away. For an honest comparison narrow them by a selection that does not keep hard labels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from softlabel_schemas.corpus import Corpus, text_bytes, text_lengths
from softlabel_schemas.errors import InputError
from softlabel_schemas.front_end import Fbank
from softlabel_schemas.strict import printable
from student_trainer.config import SoftLabelConfig, TrainConfig
from student_trainer.models import ENCODERS


def label_column(config: TrainConfig) -> str:
    """Of the corpus, where the run's hard labels are."""
    return "hard_labels" if config.ctc is None else "text"


def with_labels_in_use(corpus: Corpus, config: TrainConfig) -> Corpus:
    """The same rows, with the hard labels that the run uses and no others."""
    if config.ctc is not None:
        corpus = without_frame_labels(corpus)
    splits = config.corpus.hard_label_splits
    return corpus if splits is None else only_hard_labels_of(corpus, splits, label_column(config))


def labelled_digest(corpus: Corpus, labels: str = "hard_labels") -> str:
    """sha256 of the ids of the utterances that have hard labels, in their order; the corpus digest is not over splits.

    Args:
        labels: their column.
    """
    ids = corpus.table["utterance_id"].filter(pc.is_valid(corpus.table[labels]))
    digest = hashlib.sha256(text_lengths(ids))
    digest.update(text_bytes(ids))
    return digest.hexdigest()


def only_hard_labels_of(corpus: Corpus, splits: Sequence[str], labels: str = "hard_labels") -> Corpus:
    """The same rows, without the hard labels of all other splits.

    Args:
        labels: their column; "text" where transcripts are the hard labels.
    """
    is_other_N = pc.invert(pc.is_in(corpus.table["split"], pa.array(splits, pa.string()))).to_numpy()
    values, chunks, start = corpus.table[labels], [], 0
    for chunk in values.chunks:
        # Each by itself: of all rows at once, Arrow joins the labels of all chunks, and 2^31 are too many.
        is_other = is_other_N[start : start + len(chunk)]
        chunks.append(chunk.take(pa.array(range(len(chunk)), pa.int64(), mask=is_other)))
        start += len(chunk)
    column = corpus.table.schema.get_field_index(labels)
    kept = pa.chunked_array(chunks, type=values.type)
    return corpus.with_table(corpus.table.set_column(column, corpus.table.schema.field(column), kept))


def without_frame_labels(corpus: Corpus) -> Corpus:
    """The same rows, without hard labels of frames, which CTC does not use."""
    column = corpus.table.schema.get_field_index("hard_labels")
    field = corpus.table.schema.field(column)
    table = corpus.table.set_column(column, field, pa.nulls(len(corpus), field.type))
    return Corpus(table, hard_label_frame_shift_ms=None, inventory_digest=None, base_url=corpus.base_url)


def check_label_frames(corpus: Corpus, config: TrainConfig, *, where: str) -> None:
    """Before anything is trained: labels that are mended once a run has a checkpoint make it another run.

    Of our own encoders on filterbanks, whose frames are known from the number of samples. All others are compared batch by
    batch.

    Raises:
        InputError: an utterance has not as many hard labels as the model gives frames.
    """
    front_end = config.front_end
    if config.model.architecture not in ENCODERS or not isinstance(front_end, Fbank):
        return
    table = corpus.table
    num_labels_N = pc.fill_null(pc.list_value_length(table["hard_labels"]), -1).to_numpy()
    num_samples = table["num_samples"].to_pylist()
    num_frames_N = np.fromiter(map(front_end.num_frames, num_samples), dtype=np.int64, count=len(corpus))
    # Audio of another rate is refused for that when it is read.
    has_labels_N = (num_labels_N >= 0) & (table["sample_rate"].to_numpy() == front_end.sample_rate)
    wrong = np.flatnonzero(has_labels_N & (num_labels_N != num_frames_N))
    if len(wrong):
        first = int(wrong[0])
        name = printable(table["utterance_id"][first].as_py())
        raise InputError(
            f"{where}: utterance {name}: the model gives {num_frames_N[first]} frames, there are {num_labels_N[first]} labels; "
            f"so it is with {len(wrong):,} of {len(corpus):,} utterances. Front end and labels need the same frames: set "
            "front_end.stack, frame_shift_ms or snip_edges, or make the labels again"
        )


def check_something_to_learn(
    corpus: Corpus, soft_labels: SoftLabelConfig | None, labels: str = "hard_labels", *, where: str
) -> None:
    """Raises InputError where utterances have neither hard labels nor soft targets, or the hard head of two learns nothing."""
    is_without = pc.is_null(corpus.table[labels])
    num_without = pc.sum(is_without).as_py()
    if soft_labels is None and num_without:
        first = corpus.table["utterance_id"].filter(is_without)[0].as_py()
        raise InputError(
            f"{where}: {num_without:,} of {len(corpus):,} training utterances have no hard labels in use "
            f"({printable(first)} is the first), and there is no [soft_labels] table; add one, or leave their splits out of "
            "corpus.train_splits"
        )
    if soft_labels is not None and soft_labels.num_heads == 2 and num_without == len(corpus):
        raise InputError(
            f"{where}: no training utterance has hard labels in use, so the hard head would stay untrained; in [soft_labels] "
            f"{soft_labels.as_one_head}"
        )
