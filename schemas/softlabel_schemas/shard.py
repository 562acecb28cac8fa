"""Shard: the decoded labels of a run of utterances, and the contract that both containers fulfil.

A container is a pair of pure functions between a shard's encoded columns and named files in memory::

    encode: ShardColumns -> {file name: bytes}        decode: {file name: bytes}, stream names -> ShardColumns

Keeping storage out of it lets one conformance suite test both, and lets every file be checked against its digest
before any parser sees it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from softlabel_schemas.codec import Codec, check_encodable
from softlabel_schemas.digest import LabelHash
from softlabel_schemas.errors import IntegrityError
from softlabel_schemas.streams import Streams
from softlabel_schemas.targets import SoftTargets, concatenate, labels_digest, offsets_of


@dataclass(frozen=True, slots=True, kw_only=True)
class UtteranceStats:
    """Means over all frames of one utterance, those that the selection drops too.

    Attributes:
        kept_mass: stored probability of the kept entries: 0 in a dropped frame; in a sample 1, whatever was drawn.
        entropy: of the ensemble's whole posterior, nats.
        agreement: share of frames whose likeliest class is the hard label; NaN without hard labels.
    """

    kept_mass: float
    entropy: float
    agreement: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledUtterance:
    utterance_id: str
    targets: SoftTargets
    stats: UtteranceStats


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardColumns:
    """What a container stores, one element per utterance (N of them).

    Attributes:
        num_frames, num_entries: int32 [N].
        kept_mass, entropy, agreement: float32 [N], see :class:`UtteranceStats`.
        streams: the codec's.
    """

    utterance_ids: tuple[str, ...]
    num_frames: npt.NDArray[np.int32]
    num_entries: npt.NDArray[np.int32]
    kept_mass: npt.NDArray[np.float32]
    entropy: npt.NDArray[np.float32]
    agreement: npt.NDArray[np.float32]
    streams: Streams

    def take(self, rows: Sequence[int]) -> ShardColumns:
        """Some of the utterances, their streams as they are: an utterance's bytes stand for themselves."""
        streams: Streams = {}
        for name, (data, offsets) in self.streams.items():
            pieces = [bytes(data[offsets[row] : offsets[row + 1]]) for row in rows]
            streams[name] = (memoryview(b"".join(pieces)), offsets_of([len(piece) for piece in pieces]))
        indices = np.asarray(rows, dtype=np.int64)
        return ShardColumns(
            utterance_ids=tuple(self.utterance_ids[row] for row in rows),
            num_frames=self.num_frames[indices],
            num_entries=self.num_entries[indices],
            kept_mass=self.kept_mass[indices],
            entropy=self.entropy[indices],
            agreement=self.agreement[indices],
            streams=streams,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Utterances of a shard whose bytes lie together: ``start`` to ``stop - 1`` of a file."""

    file: str
    start: int
    stop: int
    first_row: int
    num_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Decoded labels of N utterances: their targets joined, and where each begins.

    Attributes:
        frame_offsets: int64 [N + 1].
    """

    utterance_ids: tuple[str, ...]
    frame_offsets: npt.NDArray[np.int64]
    targets: SoftTargets
    kept_mass: npt.NDArray[np.float32]
    entropy: npt.NDArray[np.float32]
    agreement: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.utterance_ids)

    def __contains__(self, utterance_id: object) -> bool:
        """Whether the shard has the utterance of this id; what is no id is not in it."""
        return isinstance(utterance_id, str) and utterance_id in self.utterance_ids

    def __getitem__(self, index: int) -> LabelledUtterance:
        if not 0 <= index < len(self):
            raise IndexError(f"utterance {index} asked for, the shard has {len(self)}")
        start, stop = self.frame_offsets[index : index + 2]
        return LabelledUtterance(
            utterance_id=self.utterance_ids[index],
            targets=self.targets.frames(int(start), int(stop)),
            stats=UtteranceStats(
                kept_mass=float(self.kept_mass[index]),
                entropy=float(self.entropy[index]),
                agreement=float(self.agreement[index]),
            ),
        )

    def __iter__(self) -> Iterator[LabelledUtterance]:
        return (self[index] for index in range(len(self)))

    def label_hash(self) -> LabelHash:
        label_hash = LabelHash()
        for utterance in self:
            label_hash.add_utterance(labels_digest(utterance.utterance_id, utterance.targets))
        return label_hash


def encode_columns(utterances: Sequence[LabelledUtterance], codec: Codec) -> ShardColumns:
    """Validate and encode. Raises ValueError naming the utterance whose targets break an invariant."""
    frame_offsets = offsets_of([utterance.targets.num_frames for utterance in utterances])
    try:
        joined = concatenate([_no_targets(codec), *(utterance.targets for utterance in utterances)])
        check_encodable(joined, codec)
        streams = codec.encode(joined, frame_offsets)
    except ValueError:
        for utterance in utterances:
            try:
                check_encodable(utterance.targets.validate(), codec)
            except ValueError as error:
                raise ValueError(f"utterance {utterance.utterance_id}: {error}") from error
        raise
    return ShardColumns(
        utterance_ids=tuple(utterance.utterance_id for utterance in utterances),
        num_frames=np.array([u.targets.num_frames for u in utterances], dtype=np.int32),
        num_entries=np.array([u.targets.num_entries for u in utterances], dtype=np.int32),
        kept_mass=np.array([u.stats.kept_mass for u in utterances], dtype=np.float32),
        entropy=np.array([u.stats.entropy for u in utterances], dtype=np.float32),
        agreement=np.array([u.stats.agreement for u in utterances], dtype=np.float32),
        streams=streams,
    )


def decode_columns(columns: ShardColumns, codec: Codec, *, where: str) -> Shard:
    """Decode and check every invariant.

    Raises:
        IntegrityError: names ``where`` and what does not fit.
    """
    try:
        frame_offsets = offsets_of(columns.num_frames)
        if (columns.num_frames < 0).any():
            raise ValueError("num_frames is negative")
        if len(set(columns.utterance_ids)) != len(columns.utterance_ids):
            raise ValueError("an utterance id is repeated")
        for name in ("kept_mass", "entropy"):
            if not np.isfinite(getattr(columns, name)).all():
                raise ValueError(f"{name} is not finite")
        if np.isinf(columns.agreement).any():
            raise ValueError("agreement is infinite")
        targets = codec.decode(columns.streams, frame_offsets)
        if not np.array_equal(np.diff(targets.offsets[frame_offsets]), columns.num_entries):
            raise ValueError("num_entries does not match the stored counts")
    except ValueError as error:
        raise IntegrityError(f"{where}: {error}") from error
    return Shard(
        utterance_ids=columns.utterance_ids,
        frame_offsets=frame_offsets,
        targets=targets,
        kept_mass=columns.kept_mass,
        entropy=columns.entropy,
        agreement=columns.agreement,
    )


def _no_targets(codec: Codec) -> SoftTargets:
    return SoftTargets(
        num_classes=codec.num_classes,
        temperatures=codec.temperatures,
        offsets=np.zeros(1, np.int64),
        class_ids=np.empty(0, np.int32),
        log_probs=np.empty(0, np.float32),
        tail_mass=np.empty((0, len(codec.temperatures)), np.float32),
    )
