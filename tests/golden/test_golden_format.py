"""Both format versions in committed bytes: what was written then reads today, and today's documents are those of version 2.

``v1/parquet`` holds packed-u8, ``v2/parquet`` mtf-sqrt, both ``zarr`` packed-f32. Parquet, Zarr and zstd may write other bytes
in other versions, so the committed data files are only read. ``python -m tests.golden.test_golden_format`` writes ``v2`` anew;
a released format version never needs that.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softlabel_schemas import ClassInventory, LabelledUtterance, SoftTargets, UtteranceStats, open_dataset, verify
from softlabel_schemas.commit import begin, publish
from softlabel_schemas.manifest import CommitRecord, SkippedUtterance, SpecDocument, from_bytes, to_bytes
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.selection import TopK
from softlabel_schemas.spec import CodecName, DatasetSpec, StorageSpec, TeacherSpec
from softlabel_schemas.targets import offsets_of
from tests.support.datasets import SHARD_FORMATS, Row, commit_rows, cut_evenly
from tests.support.trees import tree

GOLDEN = Path(__file__).parent
V2 = GOLDEN / "v2"
# By format version and shard format.
CODEC_OF: dict[str, CodecName] = {
    "v1/parquet": "packed-u8",
    "v1/zarr": "packed-f32",
    "v2/parquet": "mtf-sqrt",
    "v2/zarr": "packed-f32",
}
NUM_SHARDS = 2
COMMITS = [f"commits/{index:06d}.json" for index in range(NUM_SHARDS)]

INVENTORY = ClassInventory(
    names=("sil_0", "a_0", "a_1", "ß_0", "ß_1"), phones=("sil", "a", "a", "ß", "ß"), silence_phones=("sil",)
)

Frame = tuple[list[int], list[float], list[float]]
# Of each frame: class ids, log-probabilities, tail masses at temperatures 1 and 2.
FRAMES: dict[str, list[Frame]] = {
    "first": [([2, 0], [-0.25, -2.0], [0.0859, 0.2888]), ([4], [-0.0625], [0.0606, 0.3369])],
    "zweite-ü": [([], [], [1.0, 1.0]), ([1, 3, 0], [-0.7, -1.3, -2.5], [0.1488, 0.265])],
    "third": [
        ([0, 1], [-0.01, -20.0], [0.01, 0.1483]),
        ([2], [-1.0], [0.6321, 0.7239]),
        ([4, 3, 2], [-1.0, -1.0, -1.5], [0.0411, 0.1454]),
    ],
}
# The same frames in the codes of packed-u8.
U8_CODES: dict[str, list[tuple[list[int], list[int]]]] = {
    "first": [([4, 32], [19207, 35219]), ([1], [16133, 38039])],
    "zweite-ü": [([], [65535, 65535]), ([11, 21, 40], [25280, 33736])],
    "third": [([0, 255], [6553, 25237]), ([16], [52103, 55759]), ([16, 16, 24], [13286, 24989])],
}
# And in those of mtf-sqrt.
MTF_CODES: dict[str, list[tuple[list[int], list[int]]]] = {
    "first": [([169, 71], [48, 92]), ([186], [40, 101])],
    "zweite-ü": [([], [255, 255]), ([135, 100, 55], [64, 88])],
    "third": [([191, 0], [16, 64]), ([116], [149, 165]), ([116, 116, 91], [33, 64])],
}
STATS = {
    "first": UtteranceStats(kept_mass=0.875, entropy=0.5, agreement=1.0),
    "zweite-ü": UtteranceStats(kept_mass=0.4375, entropy=1.25, agreement=math.nan),
    "third": UtteranceStats(kept_mass=0.75, entropy=0.75, agreement=0.25),
}
# Here too, so that writing the files anew does not go unnoticed.
CONTENT_DIGESTS = {
    "packed-u8": "7af6339399dfbae0cb72acbe141460121eb72c4518ea089239b0be8d580e5e3e",
    "packed-f32": "cc716770bc5da10982c4c1d14982ca73dd9c18cae7ce6a719823b0904d289dcd",
    "mtf-sqrt": "57ebbc03d45515297a0bcfa7de5d4587e6f0ce1cf72ca4c6cb1833d0176dd580",
}
SKIPPED = SkippedUtterance(utterance_id="silent", reason="0 samples are less than half a frame shift")


def targets_of(frames: list[Frame]) -> SoftTargets:
    return SoftTargets(
        num_classes=5,
        temperatures=(1.0, 2.0),
        offsets=offsets_of([len(ids) for ids, _, _ in frames]),
        class_ids=np.array([class_id for ids, _, _ in frames for class_id in ids], dtype=np.int32),
        log_probs=np.array([value for _, log_probs, _ in frames for value in log_probs], dtype=np.float32),
        tail_mass=np.array([tails for _, _, tails in frames], dtype=np.float32),
    )


def expected_targets(utterance_id: str, codec: CodecName) -> SoftTargets:
    frames = FRAMES[utterance_id]
    if codec == "packed-f32":
        return targets_of(frames)
    codes = (U8_CODES if codec == "packed-u8" else MTF_CODES)[utterance_id]
    decoded: list[Frame] = [
        (
            ids,
            [log_prob_of(codec, code) for code in log_prob_codes],
            [tail_of(codec, code) for code in tail_codes],
        )
        for (ids, _, _), (log_prob_codes, tail_codes) in zip(frames, codes, strict=True)
    ]
    return targets_of(decoded)


def log_prob_of(codec: CodecName, code: int) -> float:
    return -code / 16 if codec == "packed-u8" else 2 * math.log((code or 0.25) / 192)


def tail_of(codec: CodecName, code: int) -> float:
    return (code / 65_535) ** 2 if codec == "packed-u8" else math.sin(code * math.pi / 510) ** 2


def write(url: Path, shard_format: str) -> None:
    """As version 2."""
    first, second, third = (
        LabelledUtterance(utterance_id=name, targets=targets_of(frames), stats=STATS[name])
        for name, frames in FRAMES.items()
    )
    rows: list[Row] = [first, SKIPPED, second, third]
    storage: dict[str, Any] = {"shard_format": shard_format, "num_shards": NUM_SHARDS, "num_rows": len(rows)}
    document = SpecDocument(
        spec=DatasetSpec(
            corpus_digest="0" * 64,
            inventory_digest=INVENTORY.digest(),
            num_classes=5,
            frame_shift_ms=10.0,
            teachers=(
                TeacherSpec(name="tdnn", digest="1" * 64, weight=0.75),
                TeacherSpec(name="blstm", digest="2" * 64, weight=0.25),
            ),
            combination="log_linear",
            temperatures=(1.0, 2.0),
            selection=TopK(k=3),
            codec=CODEC_OF[f"v2/{shard_format}"],
            precision="float32",
        ),
        storage=StorageSpec(**storage, shard_seconds=0.05, batch_seconds=60.0, on_error="skip"),
    )
    store = ObjectStore(url)
    begin(store, document, INVENTORY)
    for shard_range in cut_evenly(len(rows), NUM_SHARDS):
        commit_rows(store, document, shard_range, rows)
    publish(store, document)


@pytest.fixture(params=SHARD_FORMATS)
def shard_format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


committed = pytest.mark.parametrize("name", CODEC_OF)


@pytest.fixture
def today(tmp_path: Path, shard_format: str) -> Path:
    write(tmp_path / "labels", shard_format)
    return tmp_path / "labels"


def check_reads_as_expected(url: Path, codec: CodecName) -> None:
    dataset = open_dataset(url)
    assert [utterance.utterance_id for utterance in dataset] == list(FRAMES)
    assert dataset.manifest.content_digest == CONTENT_DIGESTS[codec]
    for utterance in (*dataset, *(dataset[name] for name in FRAMES)):
        expected = expected_targets(utterance.utterance_id, codec)
        assert utterance.targets.temperatures == (1.0, 2.0)
        for name in ("offsets", "class_ids", "log_probs", "tail_mass"):
            np.testing.assert_array_equal(
                getattr(utterance.targets, name), getattr(expected, name), err_msg=name, strict=True
            )
        assert repr(utterance.stats) == repr(STATS[utterance.utterance_id])
    assert dataset.manifest.skipped == (SKIPPED,)
    assert dataset.inventory == INVENTORY
    assert all(problem == "" for _, problem in verify(dataset))


@committed
def test_the_committed_bytes_read_as_ever(name: str) -> None:
    check_reads_as_expected(GOLDEN / name, CODEC_OF[name])
    assert open_dataset(GOLDEN / name).manifest.spec.format_version == int(name[1])


def test_bytes_written_today_read_alike(today: Path, shard_format: str) -> None:
    check_reads_as_expected(today, CODEC_OF[f"v2/{shard_format}"])


@pytest.mark.parametrize("name", ["spec.json", "inventory.json"])
def test_documents_are_the_committed_bytes(today: Path, shard_format: str, name: str) -> None:
    assert (today / name).read_bytes() == (V2 / shard_format / name).read_bytes()


@pytest.mark.parametrize("name", COMMITS)
def test_commit_records_differ_in_the_data_files_alone(today: Path, shard_format: str, name: str) -> None:
    old_bytes = (V2 / shard_format / name).read_bytes()
    old = from_bytes(CommitRecord, old_bytes, where=name)
    record = from_bytes(CommitRecord, (today / name).read_bytes(), where=name)
    # Blocks are places in the data files, keys are not.
    np.testing.assert_array_equal(record.shard_index().keys_N, old.shard_index().keys_N)
    shard = record.shard.model_copy(update={"files": old.shard.files})
    assert to_bytes(record.model_copy(update={"shard": shard, "index": old.index})) == old_bytes


@committed
def test_publishing_the_committed_shards_gives_the_committed_manifest(tmp_path: Path, name: str) -> None:
    url = tmp_path / "labels"
    shutil.copytree(GOLDEN / name, url, ignore=shutil.ignore_patterns("manifest.json", "index"))
    store = ObjectStore(url)
    publish(store, from_bytes(SpecDocument, store.read("spec.json"), where="spec.json"))
    assert tree(url) == tree(GOLDEN / name)


def regenerate() -> None:
    for shard_format in SHARD_FORMATS:
        shutil.rmtree(V2 / shard_format, ignore_errors=True)
        write(V2 / shard_format, shard_format)
        print(shard_format, open_dataset(V2 / shard_format).manifest.content_digest)


if __name__ == "__main__":
    regenerate()
