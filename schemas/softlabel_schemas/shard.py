"""Shard: the decoded labels of a run of utterances, and the contract that both containers fulfil.

A container is a pair of pure functions between a shard's encoded columns and named files in memory::

    encode: ShardColumns -> {file name: bytes}        decode: {file name: bytes} -> ShardColumns

Keeping storage out of it lets one conformance suite test both, and lets every file be checked against its digest
before any parser sees it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from softlabel_schemas.codec import STREAMS, PackedCodec
from softlabel_schemas.errors import IntegrityError
from softlabel_schemas.targets import SoftTargets, labels_digest, offsets_of


@dataclass(frozen=True, slots=True, kw_only=True)
class UtteranceStats:
    """Means over the frames of one utterance, taken from the whole posterior before selection.

    Attributes:
        kept_mass: probability of the kept entries.
        entropy: of the ensemble's posterior, nats.
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
        streams: for each of the codec's streams the bytes of all utterances joined, and int64 [N + 1] offsets.
    """

    utterance_ids: tuple[str, ...]
    num_frames: npt.NDArray[np.int32]
    num_entries: npt.NDArray[np.int32]
    kept_mass: npt.NDArray[np.float32]
    entropy: npt.NDArray[np.float32]
    agreement: npt.NDArray[np.float32]
    streams: dict[str, tuple[memoryview, npt.NDArray[np.int64]]]


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

    def label_digests(self) -> Iterator[bytes]:
        for utterance in self:
            yield labels_digest(utterance.utterance_id, utterance.targets)


def encode_columns(utterances: Sequence[LabelledUtterance], codec: PackedCodec) -> ShardColumns:
    """Validate and encode. Raises ValueError naming the utterance whose targets break an invariant."""
    pieces: dict[str, list[bytes]] = {stream: [] for stream in STREAMS}
    for utterance in utterances:
        try:
            encoded = codec.encode(utterance.targets.validate())
        except ValueError as error:
            raise ValueError(f"utterance {utterance.utterance_id}: {error}") from error
        for stream in STREAMS:
            pieces[stream].append(encoded[stream])
    return ShardColumns(
        utterance_ids=tuple(utterance.utterance_id for utterance in utterances),
        num_frames=np.array([u.targets.num_frames for u in utterances], dtype=np.int32),
        num_entries=np.array([u.targets.num_entries for u in utterances], dtype=np.int32),
        kept_mass=np.array([u.stats.kept_mass for u in utterances], dtype=np.float32),
        entropy=np.array([u.stats.entropy for u in utterances], dtype=np.float32),
        agreement=np.array([u.stats.agreement for u in utterances], dtype=np.float32),
        streams={
            stream: (memoryview(b"".join(parts)), offsets_of([len(part) for part in parts]))
            for stream, parts in pieces.items()
        },
    )


def decode_columns(columns: ShardColumns, codec: PackedCodec, *, where: str) -> Shard:
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
        joined = {stream: data for stream, (data, _) in columns.streams.items()}
        targets = codec.decode(joined, int(frame_offsets[-1]))
        _check_boundaries(columns, targets, frame_offsets, codec)
        targets.validate(mass_tolerance=codec.mass_tolerance)
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


def _check_boundaries(
    columns: ShardColumns, targets: SoftTargets, frame_offsets: npt.NDArray[np.int64], codec: PackedCodec
) -> None:
    """Each utterance's own bytes must be as long as its frames and entries say, not just their sum."""
    entry_offsets = targets.offsets[frame_offsets]
    if not np.array_equal(np.diff(entry_offsets), columns.num_entries):
        raise ValueError("num_entries does not match the stored counts")
    expected = {
        "counts": frame_offsets * codec.count_dtype.itemsize,
        "class_ids": entry_offsets * codec.id_dtype.itemsize,
        "log_probs": entry_offsets * codec.log_prob_dtype.itemsize,
        "tail_mass": frame_offsets * codec.tail_dtype.itemsize * len(codec.temperatures),
    }
    for stream, (_, offsets) in columns.streams.items():
        if not np.array_equal(offsets, expected[stream]):
            raise ValueError(f"stream '{stream}' is cut at other places than the utterances are")
