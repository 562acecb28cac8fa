"""Small datasets, written through the commit protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from softlabel_schemas.commit import begin, commit_shard, publish, read_manifest
from softlabel_schemas.inventory import ClassInventory
from softlabel_schemas.manifest import CommitRecord, Manifest, SkippedUtterance, SpecDocument
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.plan import ShardRange
from softlabel_schemas.selection import TopK
from softlabel_schemas.shard import LabelledUtterance, UtteranceStats
from softlabel_schemas.spec import CodecName, DatasetSpec, StorageSpec, TeacherSpec
from tests.support.targets import random_targets

SHARD_FORMATS = ("parquet", "zarr")
CODECS: tuple[CodecName, ...] = ("mtf-sqrt", "packed-u8", "packed-f32")
NUM_CLASSES = 50
TEMPERATURES = (1.0, 2.0, 4.0)
INVENTORY = ClassInventory(names=tuple(f"senone-{index}" for index in range(NUM_CLASSES)))
SPEC = DatasetSpec(
    corpus_digest="c" * 64,
    inventory_digest=INVENTORY.digest(),
    num_classes=NUM_CLASSES,
    frame_shift_ms=10.0,
    teachers=(TeacherSpec(name="tdnn", digest="d" * 64, weight=1.0),),
    combination="arithmetic",
    temperatures=TEMPERATURES,
    selection=TopK(k=8),
    codec="packed-u8",
    precision="float32",
)

Row = LabelledUtterance | SkippedUtterance


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A published dataset and what went into it."""

    url: str
    document: SpecDocument
    rows: tuple[Row, ...]
    manifest: Manifest

    @property
    def utterances(self) -> list[LabelledUtterance]:
        return [row for row in self.rows if isinstance(row, LabelledUtterance)]


def random_utterance(rng: np.random.Generator, utterance_id: str, num_frames: int, **kwargs: Any) -> LabelledUtterance:
    """Statistics are float32 values, which is what is stored; one utterance in three has no agreement."""
    kept_mass, entropy, agreement = (float(np.float32(value)) for value in rng.random(3))
    if rng.random() < 1 / 3:
        agreement = float("nan")
    return LabelledUtterance(
        utterance_id=utterance_id,
        targets=random_targets(
            rng, num_frames=num_frames, num_classes=NUM_CLASSES, temperatures=TEMPERATURES, **kwargs
        ),
        stats=UtteranceStats(kept_mass=kept_mass, entropy=entropy, agreement=agreement),
    )


def random_rows(seed: int = 0, num_rows: int = 9) -> tuple[Row, ...]:
    """Utterances of 0 to 40 frames, ids not all ASCII; the second is skipped, the last two are hard cases."""
    rng = np.random.default_rng(seed)
    rows: list[Row] = [
        random_utterance(rng, f"utt-ü{index}", int(rng.integers(1, 40, endpoint=True))) for index in range(num_rows - 2)
    ]
    rows[1] = SkippedUtterance(utterance_id="utt-silent", reason="its audio is empty")
    # No frames at all; frames without a single entry.
    return (*rows, random_utterance(rng, "utt-none", 0), random_utterance(rng, "utt-bare", 3, max_entries=0))


def make_document(num_rows: int, *, shard_format: str, codec: str, num_shards: int) -> SpecDocument:
    storage = {
        "shard_format": shard_format,
        "num_shards": num_shards,
        "num_rows": num_rows,
        "shard_seconds": 3600.0,
        "batch_seconds": 60.0,
        "on_error": "skip",
    }
    return SpecDocument(
        spec=SPEC.model_copy(update={"codec": codec}),
        storage=StorageSpec.model_validate(storage),
    )


def cut_evenly(num_rows: int, num_shards: int) -> list[ShardRange]:
    pieces = np.array_split(np.arange(num_rows), num_shards)
    return [ShardRange(index=index, first_row=int(piece[0]), num_rows=len(piece)) for index, piece in enumerate(pieces)]


def commit_rows(
    store: ObjectStore, document: SpecDocument, shard_range: ShardRange, rows: Sequence[Row]
) -> CommitRecord:
    own = rows[shard_range.first_row : shard_range.first_row + shard_range.num_rows]
    utterances = [row for row in own if isinstance(row, LabelledUtterance)]
    skipped = [row for row in own if isinstance(row, SkippedUtterance)]
    return commit_shard(store, document, shard_range, utterances, skipped)


def write_dataset(
    url: str,
    *,
    shard_format: str,
    codec: str = "packed-u8",
    num_shards: int = 3,
    rows: Sequence[Row] | None = None,
    last_shard_first: bool = False,
) -> Written:
    """Begin, commit every shard and publish."""
    rows = random_rows() if rows is None else tuple(rows)
    document = make_document(len(rows), shard_format=shard_format, codec=codec, num_shards=num_shards)
    store = ObjectStore(url)
    begin(store, document, INVENTORY)
    ranges = cut_evenly(len(rows), num_shards)
    for shard_range in reversed(ranges) if last_shard_first else ranges:
        commit_rows(store, document, shard_range, rows)
    publish(store, document)
    return Written(url=url, document=document, rows=rows, manifest=read_manifest(store))
