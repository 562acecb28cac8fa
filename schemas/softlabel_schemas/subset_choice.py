"""Which utterances of a dataset a subset is made of: by hours, by shards, by utterance ids or by speakers."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from softlabel_schemas.corpus import Corpus
from softlabel_schemas.dataset import SoftLabelDataset
from softlabel_schemas.digest import canonical_json, sha256_hex
from softlabel_schemas.errors import InputError
from softlabel_schemas.manifest import ShardRecord
from softlabel_schemas.strict import printable


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What is taken of a shard. ``utterance_ids`` None: all of its rows, skipped ones too."""

    shard: ShardRecord
    utterance_ids: frozenset[str] | None

    @property
    def num_rows(self) -> int:
        return self.shard.num_rows if self.utterance_ids is None else len(self.utterance_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Attributes:
    text: for people.
    parts: in the order of the dataset, one for each shard that something is taken of.
    """

    text: str
    parts: tuple[Part, ...]

    def digest(self) -> str:
        """See :class:`softlabel_schemas.spec.SubsetSpec`."""
        parts = [
            [part.shard.folder, None if part.utterance_ids is None else sorted(part.utterance_ids)]
            for part in self.parts
        ]
        return sha256_hex(canonical_json(parts))


def choose_shards(dataset: SoftLabelDataset, wanted: str) -> Choice:
    """Whole shards: ``0-3,7``. Raises InputError for a shard that is not there, and for other text."""
    indices: set[int] = set()
    for piece in wanted.split(","):
        ends = piece.strip().split("-")
        if not all(end.isdecimal() for end in ends) or len(ends) > 2 or int(ends[0]) > int(ends[-1]):
            raise InputError(f"--shards are numbers and ranges from 0, such as 0-3,7; found {wanted!r}")
        if int(ends[-1]) >= dataset.num_shards:
            raise InputError(f"{dataset.store.url} has the shards 0 to {dataset.num_shards - 1}, found {ends[-1]}")
        indices.update(range(int(ends[0]), int(ends[-1]) + 1))
    return Choice(text=f"shards {_ranges(sorted(indices))}", parts=_whole(dataset, indices))


def choose_hours(dataset: SoftLabelDataset, hours: float) -> Choice:
    """Shards in an order drawn from the content digest, whole ones but for the last, whose first utterances are taken.

    Not the first shards: a corpus is sorted, so that they would be a few speakers. Nothing but the shards taken is read.

    Raises:
        InputError: the dataset has less.
    """
    manifest = dataset.manifest
    shift_ms = manifest.spec.frame_shift_ms
    num_frames = hours * 3_600_000 / shift_ms
    # With room for the rounding of what was asked for.
    if not 0 < num_frames <= manifest.num_frames * (1 + 1e-9):
        raise InputError(
            f"--hours must be above 0 and at most the {manifest.num_frames * shift_ms / 3_600_000:g} hours of "
            f"{dataset.store.url}; found {hours:g}"
        )
    wanted = math.ceil(min(num_frames, manifest.num_frames))
    keys = [
        hashlib.sha256(f"{manifest.content_digest}:{index}".encode()).digest() for index in range(dataset.num_shards)
    ]
    whole: list[int] = []
    parts: list[Part] = []
    for index in sorted(range(dataset.num_shards), key=keys.__getitem__):
        shard = manifest.shards[index]
        if shard.num_frames <= wanted:
            whole.append(index)
            wanted -= shard.num_frames
        elif wanted > 0:
            columns = dataset.shards.read_columns(index)[1]
            num_taken = int(np.searchsorted(np.cumsum(columns.num_frames), wanted)) + 1
            parts.append(_part(shard, columns.utterance_ids[:num_taken]))
        if wanted <= 0 or parts:
            break
    parts += _whole(dataset, whole)
    return Choice(text=f"{hours:g} hours", parts=tuple(sorted(parts, key=lambda part: part.shard.index)))


def choose_utterances(dataset: SoftLabelDataset, utterance_ids: Collection[str]) -> Choice:
    """Raises InputError where the dataset does not know one of them: neither labelled nor skipped it."""
    parts, unknown = _parts_of(dataset, utterance_ids)
    if unknown:
        raise InputError(
            f"{dataset.store.url} has no utterance {printable(min(unknown))!r}"
            + (f", nor {len(unknown) - 1} others that are asked for" if len(unknown) > 1 else "")
        )
    return Choice(text=f"{len(set(utterance_ids)):,} utterances by id", parts=parts)


def choose_speakers(dataset: SoftLabelDataset, speakers: Collection[str], corpus: Corpus, *, where: str) -> Choice:
    """What the dataset has of these speakers; other utterances of theirs, of other splits for instance, are passed over.

    Raises:
        InputError: the corpus has no such speaker, or the dataset nothing of any of them.
    """
    wanted = pa.array(sorted(set(speakers)), pa.string())
    known = set(pc.unique(corpus.table["speaker"]).to_pylist())
    missing = sorted(set(speakers) - known)
    if missing:
        raise InputError(f"{where} has no speaker {printable(missing[0])!r}; check the names, one on each line")
    rows = corpus.table.filter(pc.is_in(corpus.table["speaker"], wanted))
    parts, _ = _parts_of(dataset, rows["utterance_id"].to_pylist())
    if not parts:
        raise InputError(f"{dataset.store.url} has no utterance of these speakers")
    return Choice(text=f"{len(wanted):,} speakers", parts=parts)


def _parts_of(dataset: SoftLabelDataset, utterance_ids: Collection[str]) -> tuple[tuple[Part, ...], set[str]]:
    """The parts, and the ids that the dataset neither labelled nor skipped."""
    wanted = set(utterance_ids)
    by_shard: defaultdict[int, set[str]] = defaultdict(set)
    for shard in dataset.manifest.shards:
        skipped = {entry.utterance_id for entry in shard.skipped} & wanted
        if skipped:
            by_shard[shard.index] |= skipped
    left = sorted(wanted.difference(*by_shard.values()))
    unknown: set[str] = set()
    for utterance_id, index in dataset.shards_of(left).items():
        if index is None:
            unknown.add(utterance_id)
        else:
            by_shard[index].add(utterance_id)
    shards = dataset.manifest.shards
    return tuple(_part(shards[index], ids) for index, ids in sorted(by_shard.items())), unknown


def _part(shard: ShardRecord, utterance_ids: Collection[str]) -> Part:
    """Distinct ids of rows of the shard. All of them are the whole shard, so that a subset has one digest."""
    return Part(shard=shard, utterance_ids=None if len(utterance_ids) == shard.num_rows else frozenset(utterance_ids))


def _whole(dataset: SoftLabelDataset, indices: Collection[int]) -> tuple[Part, ...]:
    return tuple(Part(shard=dataset.manifest.shards[index], utterance_ids=None) for index in sorted(indices))


def _ranges(indices: Sequence[int]) -> str:
    """``0-3,7``; cut where it gets long, since the digest tells the rest."""
    starts = [indices[0], *(after for before, after in pairwise(indices) if after != before + 1)]
    ends = [*(before for before, after in pairwise(indices) if after != before + 1), indices[-1]]
    shown = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
    return shown if len(shown) <= 150 else f"{shown[:150]}..., {len(indices):,} in all"
