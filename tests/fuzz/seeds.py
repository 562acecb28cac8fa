"""Honest datasets to start from, made once in each worker."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from softlabel_schemas.codec import PackedCodec, build_codec
from softlabel_schemas.containers import CONTAINERS
from softlabel_schemas.mtf_sqrt import MtfSqrtCodec
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.parquet_shard import FRAMES_PER_GROUP
from softlabel_schemas.selection import TopK
from softlabel_schemas.shard import Block, ShardColumns, encode_columns
from softlabel_schemas.spec import DatasetSpec
from softlabel_schemas.streams import Streams
from softlabel_schemas.targets import Int64, concatenate, offsets_of
from tests.support.datasets import (
    CODECS,
    INVENTORY,
    SHARD_FORMATS,
    SPEC,
    TEMPERATURES,
    random_rows,
    random_utterance,
    write_dataset,
)
from tests.support.targets import random_targets

# Frames of the utterances of each shard, and how often it is taken; the last has several Parquet row groups.
_SHARDS: tuple[tuple[Sequence[int], int], ...] = (((), 1), ((3,), 3), ((5, 0, 20), 5), ((2, FRAMES_PER_GROUP, 3), 1))
# Classes and entries of a frame: ids of every width, more classes than have stamps, lists and counts at their limits.
_STREAMS = ((50, 8), (768, 40), (900, 80), (70_000, 20), (2_000_000, 12), (400, 300))
_STREAM_FRAMES = (5, 0, 12, 1)


@dataclass(frozen=True)
class ShardSeed:
    weight: int
    codec: PackedCodec | MtfSqrtCodec
    columns: ShardColumns
    parquet: dict[str, bytes]
    zarr: dict[str, bytes]
    blocks: list[Block]


@dataclass(frozen=True)
class StreamSeed:
    codec: MtfSqrtCodec
    streams: Streams
    frame_offsets: Int64


@cache
def shards() -> list[ShardSeed]:
    rng = np.random.default_rng(0)
    found = []
    for codec_name in CODECS:
        codec: Any = build_codec(SPEC.model_copy(update={"codec": codec_name}))
        for frames, weight in _SHARDS:
            # The frames of a long one have no entries, so that it is soon read.
            utterances = [
                random_utterance(rng, f"utt-ü{n}", count, max_entries=8 if count < 100 else 0)
                for n, count in enumerate(frames)
            ]
            columns = encode_columns(utterances, codec)
            parquet, zarr = (
                CONTAINERS[shard_format].encode(columns, codec.zstd_level) for shard_format in SHARD_FORMATS
            )
            found.append(ShardSeed(weight, codec, columns, parquet, zarr, CONTAINERS["parquet"].blocks(parquet)))
    return found


@cache
def streams() -> list[StreamSeed]:
    """Of "mtf-sqrt", from posteriors that change slowly and from others."""
    rng = np.random.default_rng(0)
    found = []
    for num_classes, max_entries in _STREAMS:
        update = {"codec": "mtf-sqrt", "num_classes": num_classes, "selection": TopK(k=max_entries)}
        codec: Any = build_codec(SPEC.model_copy(update=update))
        for slowness in (0.0, 0.97):
            parts = [
                random_targets(
                    rng,
                    num_frames=num_frames,
                    num_classes=min(num_classes, 1000),
                    max_entries=max_entries,
                    temperatures=TEMPERATURES,
                    slowness=slowness,
                )
                for num_frames in _STREAM_FRAMES
            ]
            targets, frame_offsets = concatenate(parts), offsets_of(_STREAM_FRAMES)
            # Ids from the whole inventory.
            ids = targets.class_ids * max(1, num_classes // 1000)
            targets = replace(targets, num_classes=num_classes, class_ids=ids)
            found.append(StreamSeed(codec, codec.encode(targets, frame_offsets), frame_offsets))
    return found


@cache
def datasets() -> list[dict[str, bytes]]:
    """Every file of published datasets, by path: of each format, with a packed codec and with "mtf-sqrt"."""
    found = []
    for codec in ("packed-u8", "mtf-sqrt"):
        for shard_format in SHARD_FORMATS:
            url = f"memory://fuzz-seed-{shard_format}-{codec}"
            write_dataset(url, shard_format=shard_format, codec=codec, num_shards=2, rows=random_rows(num_rows=5))
            store = ObjectStore(url)
            found.append({key: store.read(key) for key in store.list("")})
    return found


def shard_numbers(spec: DatasetSpec) -> list[int]:
    """The shards that are of such a dataset."""
    codec = build_codec(spec)
    return [number for number, seed in enumerate(shards()) if seed.codec == codec]


def body(dataset: dict[str, bytes], name: str) -> Any:
    """The body of a sealed document, the caller's own."""
    return json.loads(dataset[name])["body"]


def inventory() -> Any:
    return json.loads(INVENTORY.to_json()) | {"phones": [f"p{n % 7}" for n in range(50)], "silence_phones": ["p0"]}
