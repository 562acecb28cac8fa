"""Honest datasets to start from, made once in each worker."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from softlabel_schemas.codec import PackedCodec, build_codec
from softlabel_schemas.containers import CONTAINERS
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.shard import ShardColumns, encode_columns
from tests.support.datasets import CODECS, INVENTORY, SHARD_FORMATS, SPEC, random_rows, random_utterance, write_dataset

# Frames of the utterances of each shard, and how often it is taken; 70 are more than a Parquet row group has.
_SHARDS: tuple[tuple[Sequence[int], int], ...] = (((), 1), ((3,), 3), ((5, 0, 20), 5), ((1,) * 70, 1))


@dataclass(frozen=True)
class ShardSeed:
    weight: int
    codec: PackedCodec
    columns: ShardColumns
    parquet: dict[str, bytes]
    zarr: dict[str, bytes]


@cache
def shards() -> list[ShardSeed]:
    rng = np.random.default_rng(0)
    found = []
    for codec_name in CODECS:
        codec = build_codec(SPEC.model_copy(update={"codec": codec_name}))
        for frames, weight in _SHARDS:
            utterances = [random_utterance(rng, f"utt-ü{n}", count) for n, count in enumerate(frames)]
            columns = encode_columns(utterances, codec)
            found.append(
                ShardSeed(
                    weight, codec, columns, CONTAINERS["parquet"].encode(columns), CONTAINERS["zarr"].encode(columns)
                )
            )
    return found


@cache
def datasets() -> list[dict[str, bytes]]:
    """Every file of a published dataset of each format, by path."""
    found = []
    for shard_format in SHARD_FORMATS:
        url = f"memory://fuzz-seed-{shard_format}"
        write_dataset(url, shard_format=shard_format, num_shards=2, rows=random_rows(num_rows=5))
        store = ObjectStore(url)
        found.append({key: store.read(key) for key in store.list("")})
    return found


def body(dataset: dict[str, bytes], name: str) -> Any:
    """The body of a sealed document, the caller's own."""
    return json.loads(dataset[name])["body"]


def inventory() -> Any:
    return json.loads(INVENTORY.to_json()) | {"phones": [f"p{n % 7}" for n in range(50)], "silence_phones": ["p0"]}
