"""Shards to be spoiled: small, valid, by either codec."""

from __future__ import annotations

import numpy as np
import pytest

from softlabel_schemas.codec import Codec, build_codec
from softlabel_schemas.shard import ShardColumns, encode_columns
from tests.support.datasets import SPEC, random_utterance

CODEC = build_codec(SPEC)
either_codec = pytest.mark.parametrize(
    "codec", [CODEC, build_codec(SPEC.model_copy(update={"codec": "mtf-sqrt"}))], ids=["packed-u8", "mtf-sqrt"]
)


def columns_of(codec: Codec) -> ShardColumns:
    rng = np.random.default_rng(0)
    return encode_columns([random_utterance(rng, name, 20) for name in ("a", "ü", "c")], codec)
