"""Shards in their containers, row groups alone, and the streams of "mtf-sqrt"."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import numpy as np

from softlabel_schemas import IntegrityError
from softlabel_schemas.codec import Codec, PackedCodec
from softlabel_schemas.containers import CONTAINERS
from softlabel_schemas.limits import max_decoded_bytes
from softlabel_schemas.mtf_sqrt import MtfSqrtCodec
from softlabel_schemas.shard import Shard, ShardColumns, decode_columns
from softlabel_schemas.streams import Streams
from softlabel_schemas.targets import Int64, SoftTargets, offsets_of
from tests.fuzz import parquet_forge, seeds, stream_forge, zarr_forge
from tests.fuzz.mutate import EXTREMES, mutate_bytes, mutate_int
from tests.golden import mtf_sqrt
from tests.support.targets import assert_same_targets


def _shard_number(rng: Random) -> int:
    """Mostly of three utterances: the empty shard is soon known, that of two row groups takes long."""
    return rng.choice([n for n, seed in enumerate(seeds.shards()) for _ in range(seed.weight)])


def parquet(rng: Random) -> None:
    number = _shard_number(rng)
    seed = seeds.shards()[number]
    kind = rng.random()
    if kind < 0.65:
        data = parquet_forge.forge(rng, number)
    else:
        data = seed.parquet["shard.parquet"]
        footer_size = int.from_bytes(data[-8:-4], "little") + 8
        head, footer = data[:-footer_size], data[-footer_size:]
        data = mutate_bytes(rng, data) if kind < 0.8 else head + mutate_bytes(rng, footer)
    _decode_files(rng, "parquet", {"shard.parquet": data}, seed.codec)


def block(rng: Random) -> None:
    """A row group alone, as for one utterance."""
    number = _shard_number(rng)
    seed = seeds.shards()[number]
    if not seed.blocks:
        data, num_rows = rng.randbytes(rng.randrange(100)), rng.choice(EXTREMES)
    elif rng.random() < 0.65:
        data, num_rows = parquet_forge.forge_block(rng, number)
    else:
        block = rng.choice(seed.blocks)
        data, num_rows = mutate_bytes(rng, seed.parquet[block.file][block.start : block.stop]), block.num_rows
    if rng.random() < 0.1:
        num_rows = mutate_int(rng, num_rows)
    columns = CONTAINERS["parquet"].decode_block(data, num_rows, seed.codec.streams, where="here")
    assert len(columns.utterance_ids) == num_rows
    _decode_columns(rng, columns, len(data), seed.codec)


def zarr(rng: Random) -> None:
    number = _shard_number(rng)
    _decode_files(rng, "zarr", zarr_forge.forge(rng, number), seeds.shards()[number].codec)


def _decode_files(rng: Random, shard_format: Any, files: dict[str, bytes], codec: PackedCodec | MtfSqrtCodec) -> None:
    columns = CONTAINERS[shard_format].decode(files, codec.streams, where="here")
    _decode_columns(rng, columns, sum(map(len, files.values())), codec)


def _decode_columns(rng: Random, columns: ShardColumns, stored_bytes: int, codec: PackedCodec | MtfSqrtCodec) -> None:
    _check_columns(columns, stored_bytes)
    if rng.random() < 0.05:
        # A spec that fits other labels.
        codec = replace(codec, num_classes=rng.choice((1, 49, 2**31 - 1)), max_entries=rng.choice((1, 7, 65_535)))
    shard = decode_columns(columns, codec, where="here")
    _check_shard(shard, codec)


def _check_columns(columns: ShardColumns, stored_bytes: int) -> None:
    num_utterances = len(columns.utterance_ids)
    for name in ("num_frames", "num_entries", "kept_mass", "entropy", "agreement"):
        array = getattr(columns, name)
        assert array.shape == (num_utterances,), name
        assert array.dtype == (np.int32 if name.startswith("num") else np.float32), name
    for name, (data, offsets) in columns.streams.items():
        assert offsets.shape == (num_utterances + 1,), name
        assert (offsets[0], offsets[-1]) == (0, len(data)), name
        assert (np.diff(offsets) >= 0).all(), name
    assert sum(len(data) for data, _ in columns.streams.values()) <= max_decoded_bytes(stored_bytes)


def _check_shard(shard: Shard, codec: Codec) -> None:
    shard.targets.validate(mass_tolerance=codec.mass_tolerance)
    assert len(set(shard.utterance_ids)) == len(shard)
    num_frames = 0
    for utterance in shard:
        utterance.targets.validate(mass_tolerance=codec.mass_tolerance)
        num_frames += utterance.targets.num_frames
        assert np.isfinite((utterance.stats.kept_mass, utterance.stats.entropy)).all()
    assert num_frames == shard.targets.num_frames
    shard.label_hash()


def streams(rng: Random) -> None:
    """The streams of "mtf-sqrt": refused or accepted as by the second decoder, and the same labels."""
    seed = rng.choice(seeds.streams())
    streams, frame_offsets = stream_forge.forge(rng, seed)
    expected = _decoded_again(streams, frame_offsets, seed.codec)
    targets, problem = None, ""
    try:
        targets = seed.codec.decode(streams, frame_offsets)
    except ValueError as error:
        problem = str(error)
    if targets is None:
        # By a check, not by a library.
        assert problem.startswith(("stream '", "frame ", "a frame has")), problem
        assert expected is None, f"refused by one decoder alone: {problem}"
        raise IntegrityError(problem)
    targets.validate(mass_tolerance=seed.codec.mass_tolerance)
    assert expected is not None, "accepted by one decoder alone"
    assert_same_targets(targets, expected)


def _decoded_again(streams: Streams, frame_offsets: Int64, codec: MtfSqrtCodec) -> SoftTargets | None:
    """None where the second decoder refuses them."""
    for data, offsets in streams.values():
        if (offsets[0], offsets[-1]) != (0, len(data)) or (np.diff(offsets) < 0).any():
            return None
    try:
        utterances = [
            mtf_sqrt.decode(
                pieces,
                num_frames=int(num_frames),
                num_classes=codec.num_classes,
                max_entries=codec.max_entries,
                num_temperatures=len(codec.temperatures),
            )
            for pieces, num_frames in zip(
                stream_forge.pieces_of(streams, len(frame_offsets) - 1), np.diff(frame_offsets), strict=True
            )
        ]
    except mtf_sqrt.FormatError:
        return None

    def joined(name: str) -> list[Any]:
        return [value for utterance in utterances for value in getattr(utterance, name)]

    return SoftTargets(
        num_classes=codec.num_classes,
        temperatures=codec.temperatures,
        offsets=offsets_of(joined("counts")),
        class_ids=np.array(joined("class_ids"), np.int32),
        log_probs=np.array(joined("log_probs"), np.float32),
        tail_mass=np.array(joined("tail_mass"), np.float32).reshape(-1, len(codec.temperatures)),
    )
