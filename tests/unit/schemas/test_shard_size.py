"""What a shard can hold, and what is said of more: it is no fault of the machine that labelled it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from softlabel_schemas import InputError
from softlabel_schemas.codec import build_codec
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.selection import TopK
from softlabel_schemas.spec import CodecName
from softlabel_schemas.targets import offsets_of
from tests.support.datasets import CODECS, SHARD_FORMATS, SPEC, write_dataset
from tests.support.targets import random_log_posterior, targets_from_dense

# The format, what is lowered to 100 bytes, and the message.
SIZES = [
    ("parquet", "parquet_shard.PARQUET_STREAM_BYTES", r"a shard's stream '\w+' has \d+ bytes, expected less than 100"),
    *(
        (each, f"commit.MAX_{name}_BYTES", rf"shard 0: its {what} have \d+ bytes together, expected at most 100")
        for each in SHARD_FORMATS
        for name, what in (("DECODED", "streams"), ("SHARD", "files"))
    ),
]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("num_classes", [1, 40, 800])
@pytest.mark.parametrize("num_temperatures", [1, 9])
def test_the_least_of_the_largest_stream(codec: CodecName, num_classes: int, num_temperatures: int) -> None:
    """Of frames that keep all classes, which is what makes large shards."""
    temperatures = tuple(1.0 + index for index in range(num_temperatures))
    changes = {"num_classes": num_classes, "selection": TopK(k=num_classes), "temperatures": temperatures}
    built = build_codec(SPEC.model_copy(update={"codec": codec, **changes}))
    posterior_TV = random_log_posterior(np.random.default_rng(0), 20, num_classes, scale=1.0)
    targets = targets_from_dense(posterior_TV, np.ones_like(posterior_TV, dtype=bool), temperatures)
    streams = built.encode(targets, offsets_of([20]))
    largest, least = max(len(data) for data, _ in streams.values()), 20 * built.least_bytes(num_classes)
    assert least <= largest <= (least if codec != "mtf-sqrt" else 1.3 * least + 20)


@pytest.mark.parametrize(("shard_format", "limit", "message"), SIZES)
def test_more_than_a_shard_can_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_format: str, limit: str, message: str
) -> None:
    monkeypatch.setattr(f"softlabel_schemas.{limit}", 100)
    with pytest.raises(InputError, match=f"{message}; set a smaller destination.shard_seconds"):
        write_dataset(str(tmp_path / "labels"), shard_format=shard_format)
    assert not ObjectStore(tmp_path / "labels").list("shards")
