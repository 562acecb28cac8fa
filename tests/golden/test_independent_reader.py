"""A second reader, written from FORMAT.md alone, must see what the package sees.

The first half of this file is that reader: the standard library, numpy, and pyarrow for Parquet and zstd; nothing of
``softlabel_schemas`` and no Zarr library. Its decoder of "mtf-sqrt" is in ``mtf_sqrt.py``. The second half writes datasets with
the package and compares.
"""

import base64
import hashlib
import io
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from softlabel_schemas import (
    ClassInventory,
    LabelledUtterance,
    SoftTargets,
    Utterance,
    UtteranceStats,
    load_corpus,
    open_dataset,
    verify,
    write_corpus,
)
from softlabel_schemas.commit import begin, commit_shard, publish
from softlabel_schemas.containers import CONTAINERS
from softlabel_schemas.digest import LabelHash, canonical_json
from softlabel_schemas.manifest import SkippedUtterance, SpecDocument
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.plan import ShardRange
from softlabel_schemas.selection import TopK
from softlabel_schemas.shard import ShardColumns
from softlabel_schemas.spec import DatasetSpec, StorageSpec, TeacherSpec
from softlabel_schemas.targets import labels_digest, offsets_of
from tests.golden import mtf_sqrt
from tests.golden.mtf_sqrt import FormatError, require

GOLDEN = Path(__file__).parent
FORMAT_MD = GOLDEN.parents[1] / "schemas" / "FORMAT.md"

# ---------------------------------------------------------------------------------------------------------------------
# The independent reader
# ---------------------------------------------------------------------------------------------------------------------


# Of the codecs, in the order of section 7.
STREAMS = {
    "mtf-sqrt": mtf_sqrt.STREAMS,
    "packed-u8": ("counts", "class_ids", "log_probs", "tail_mass"),
    "packed-f32": ("counts", "class_ids", "log_probs", "tail_mass"),
}


@dataclass(frozen=True)
class Labels:
    utterance_id: str
    counts: np.ndarray
    class_ids: np.ndarray
    log_probs: np.ndarray
    tail_mass: np.ndarray
    kept_mass: float
    entropy: float
    agreement: float


@dataclass(frozen=True)
class Dataset:
    fingerprint: str
    content_digest: str
    names: list[str]
    skipped: list[str]
    utterances: list[Labels]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def open_seal(data: bytes) -> str:
    """Section 2: the canonical text of a sealed document's body."""
    head, body, tail = data[:8], data[8:-77], data[-77:]
    require(head == b'{"body":' and tail[:11] == b',"sha256":"' and tail[75:] == b'"}', "not sealed")
    require(tail[11:75] == sha256(body).encode(), "the seal is broken")
    return body.decode()


def raw_members(text: str) -> dict[str, str]:
    """The members of a canonical JSON object, each as the text that stands in the document."""
    decoder, position, members = json.JSONDecoder(), 1, {}
    while text[position] != "}":
        key, position = decoder.raw_decode(text, position)
        start = position + 1
        _, position = decoder.raw_decode(text, start)
        members[key] = text[start:position]
        position += text[position] == ","
    return members


def raw_items(text: str) -> Iterator[str]:
    decoder, position = json.JSONDecoder(), 1
    while text[position] != "]":
        start = position
        _, position = decoder.raw_decode(text, start)
        yield text[start:position]
        position += text[position] == ","


def float_form(value: float) -> str:
    """Section 2: how a float stands in canonical JSON, put together from its shortest digits."""
    sign, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
    text = "".join(map(str, digits))
    point = len(text) + int(exponent)
    if not value:
        text, point = "0", 1
    if -3 <= point <= 16:
        whole, fraction = ("0", "0" * -point + text) if point <= 0 else (text[:point].ljust(point, "0"), text[point:])
        form = f"{whole}.{fraction or '0'}"
    else:
        form = f"{text[0]}{'.' if text[1:] else ''}{text[1:]}e{point - 1:+03d}"
    return ("-" if sign else "") + form


def read_dataset(root: Path) -> Dataset:
    require((root / "manifest.json").exists(), "no manifest: not a dataset")
    manifest = raw_members(open_seal((root / "manifest.json").read_bytes()))
    spec, storage = json.loads(manifest["spec"]), json.loads(manifest["storage"])
    require(spec["format_version"] in (1, 2), "unknown format version")
    fingerprint = sha256(manifest["spec"].encode())
    require(json.loads(manifest["fingerprint"]) == fingerprint, "fingerprint")
    require(raw_members(open_seal((root / "spec.json").read_bytes()))["spec"] == manifest["spec"], "spec.json differs")
    inventory = (root / "inventory.json").read_bytes()
    require(sha256(inventory) == spec["inventory_digest"], "inventory digest")
    names = json.loads(inventory)["names"]
    require(len(names) == spec["num_classes"], "inventory size")

    utterances: list[Labels] = []
    skipped: list[str] = []
    entries: list[bytes] = []
    total, next_row = np.zeros(1024, "<u2"), 0
    raw_shards = list(raw_items(manifest["shards"]))
    require(len(raw_shards) == storage["num_shards"], "number of shards")
    for index, raw in enumerate(raw_shards):
        record = json.loads(raw)
        require((record["index"], record["first_row"]) == (index, next_row), "rows are not consecutive")
        require(record["num_utterances"] + len(record["skipped"]) == record["num_rows"], "rows do not add up")
        next_row += record["num_rows"]
        skipped += [entry["utterance_id"] for entry in record["skipped"]]
        folder = root / "shards" / f"{index:06d}-{sha256(raw_members(raw)['files'].encode())[:32]}"
        files = {file["name"]: read_file(folder, file) for file in record["files"]}
        rows = parquet_rows(files) if storage["shard_format"] == "parquet" else zarr_rows(files, STREAMS[spec["codec"]])
        labels = [decode(spec, row) for row in rows]
        found = (len(labels), sum(len(u.counts) for u in labels), sum(len(u.class_ids) for u in labels))
        require(found == (record["num_utterances"], record["num_frames"], record["num_entries"]), "totals")
        lanes = sum((label_lanes(u) for u in labels), start=np.zeros(1024, "<u2"))
        commit = raw_members(open_seal((root / "commits" / f"{index:06d}.json").read_bytes()))
        require(commit["shard"] == raw and json.loads(commit["fingerprint"]) == fingerprint, "commit record")
        require(base64.b64decode(json.loads(commit["label_hash"])) == lanes.tobytes(), "label hash")
        if spec["format_version"] == 2:
            entries += index_entries(index, base64.b64decode(json.loads(commit["index"])), files, labels)
        total += lanes
        utterances += labels
    require(next_row == storage["num_rows"], "rows are missing")
    require(len({u.utterance_id for u in utterances}) == len(utterances), "an id is repeated")
    content_digest = sha256(total.tobytes())
    require(json.loads(manifest["content_digest"]) == content_digest, "content digest")
    require(("index" in manifest) == (spec["format_version"] == 2), "an utterance index belongs to version 2")
    if "index" in manifest:
        check_index(root, base64.b64decode(json.loads(manifest["index"])), storage["num_rows"], entries)
    return Dataset(fingerprint, content_digest, names, skipped, utterances)


def index_entries(shard: int, index: bytes, files: dict[str, bytes], labels: list[Labels]) -> list[bytes]:
    """Section 10, "Index of a shard": the entries of its utterances, once their blocks were found to be what it says."""
    cut = len(index) - 8 * len(labels)
    require(cut >= 0 and cut % 28 == 0 and (cut == 0 or len(files) == 1), "a shard's index has another length")
    places, end = [], 0
    for start in range(0, cut, 28):
        block = index[start : start + 28]
        first, size, num_rows = struct.unpack("<III", block[:12])
        require(first >= end and size and num_rows, "blocks overlap or are empty")
        (file,) = files.values()
        end = first + size
        require(hashlib.sha256(file[first:end]).digest()[:16] == block[12:] and end <= len(file), "a block was changed")
        places += [block] * num_rows
    places = places or [bytes(28)] * len(labels)
    require(len(places) == len(labels), "blocks do not hold the utterances")
    keys = [hashlib.sha256(u.utterance_id.encode()).digest()[:8] for u in labels]
    require(b"".join(keys) == index[cut:], "keys")
    return [key + struct.pack("<I", shard) + place for key, place in zip(keys, places, strict=True)]


def check_index(root: Path, table: bytes, num_rows: int, entries: list[bytes]) -> None:
    """Section 11, "Utterance index": the table of buckets, and every bucket."""
    num_bits = (max(1, min(-(-num_rows // 4096), 131_072)) - 1).bit_length()
    require(len(table) == 36 * 2**num_bits, "table of buckets")
    buckets: list[list[bytes]] = [[] for _ in range(2**num_bits)]
    for entry in sorted(entries, key=lambda entry: entry[:8]):
        buckets[int.from_bytes(entry[:8], "big") >> (64 - num_bits)].append(entry)
    for number, bucket in enumerate(buckets):
        size, digest = struct.unpack("<I32s", table[36 * number : 36 * number + 36])
        data = (root / "index" / f"{number:06d}-{digest.hex()[:32]}").read_bytes()
        require(len(data) == 40 * size and sha256(data) == digest.hex(), "a bucket was changed")
        require(data == b"".join(bucket), "a bucket has other entries")


def read_file(folder: Path, file: dict[str, Any]) -> bytes:
    data = (folder / file["name"]).read_bytes()
    require(len(data) == file["num_bytes"] and sha256(data) == file["sha256"], f"{file['name']} was changed")
    return data


def parquet_rows(files: dict[str, bytes]) -> list[dict[str, Any]]:
    """Section 8."""
    require(list(files) == ["shard.parquet"], "a Parquet shard is one file")
    rows: list[dict[str, Any]] = pq.read_table(
        io.BytesIO(files["shard.parquet"]), page_checksum_verification=True
    ).to_pylist()
    return [{**row, "agreement": np.nan if row["agreement"] is None else row["agreement"]} for row in rows]


def zarr_rows(files: dict[str, bytes], streams: tuple[str, ...]) -> list[dict[str, Any]]:
    """Section 9."""
    joined = ("utterance_id", *streams)
    plain = ("num_frames", "num_entries", "kept_mass", "entropy", "agreement")
    columns: dict[str, list[Any]] = {name: zarr_array(files, name).tolist() for name in plain}
    num_utterances = len(columns["num_frames"])
    lengths = zarr_array(files, "lengths").reshape(len(joined), num_utterances)
    for name, row in zip(joined, lengths, strict=True):
        data, ends = zarr_array(files, name).tobytes(), np.cumsum(row)
        require(len(data) == row.sum() and (row >= 0).all(), f"lengths of {name}")
        columns[name] = [data[end - size : end] for end, size in zip(ends, row, strict=True)]
    columns["utterance_id"] = [name.decode() for name in columns["utterance_id"]]
    return [{name: values[n] for name, values in columns.items()} for n in range(num_utterances)]


def zarr_array(files: dict[str, bytes], name: str) -> np.ndarray:
    metadata = json.loads(files[f"{name}/zarr.json"])
    (size,), (chunk,) = metadata["shape"], metadata["chunk_grid"]["configuration"]["chunk_shape"]
    require(chunk == max(1, min(size, 1_048_576)), "chunk size")
    zstd = metadata["codecs"][1]
    zstd_codecs = [{"name": "zstd", "configuration": {"level": level, "checksum": True}} for level in (1, 3)]
    require(zstd in zstd_codecs, "codec")
    dtype = np.dtype(metadata["data_type"]).newbyteorder("<")
    parts = [
        pa.decompress(files[f"{name}/c/{k}"], chunk * dtype.itemsize, codec="zstd", asbytes=True)
        for k in range(-(-size // chunk))
    ]
    return np.frombuffer(b"".join(parts), dtype)[:size]


def decode(spec: dict[str, Any], row: dict[str, Any]) -> Labels:
    """Sections 6 and 7: the streams of one utterance."""
    selection, num_classes, num_temperatures = spec["selection"], spec["num_classes"], len(spec["temperatures"])
    cap = selection["k"] if selection["policy"] == "top_k" else selection["max_entries"]
    max_entries = min(cap + selection["keep_hard_label"], num_classes)
    num_frames, num_entries = row["num_frames"], row["num_entries"]
    if spec["codec"] == "mtf-sqrt":
        found = mtf_sqrt.decode(
            {name: row[name] for name in STREAMS["mtf-sqrt"]},
            num_frames=num_frames,
            num_classes=num_classes,
            max_entries=max_entries,
            num_temperatures=num_temperatures,
        )
        labels = labels_of(row, found.counts, found.class_ids, found.log_probs, found.tail_mass, num_temperatures)
        require(len(labels.class_ids) == num_entries, "number of entries")
        check_invariants(labels, num_classes, mtf_sqrt.mass_tolerance(max_entries))
        return labels
    lossy = {"packed-u8": True, "packed-f32": False}[spec["codec"]]
    stored = {
        "counts": ("u1" if max_entries <= 255 else "<u2", num_frames),
        "class_ids": ("<u2" if num_classes <= 65_536 else "<u4", num_entries),
        "log_probs": ("u1" if lossy else "<f4", num_entries),
        "tail_mass": ("<u2" if lossy else "<f4", num_frames * num_temperatures),
    }
    values = {name: np.frombuffer(row[name], dtype) for name, (dtype, _) in stored.items()}
    require(all(len(values[name]) == length for name, (_, length) in stored.items()), "a stream has another length")
    log_probs, tails = values["log_probs"], values["tail_mass"]
    if lossy:
        log_probs = [-(code / 16) if code else 0.0 for code in log_probs.tolist()]
        tails = [(code / 65535) * (code / 65535) for code in tails.tolist()]
    labels = labels_of(row, values["counts"], values["class_ids"], log_probs, tails, num_temperatures)
    check_invariants(labels, num_classes, mass_tolerance=0.042 if lossy else 0.001)
    return labels


def labels_of(
    row: dict[str, Any], counts: Any, class_ids: Any, log_probs: Any, tails: Any, num_temperatures: int
) -> Labels:
    return Labels(
        utterance_id=row["utterance_id"],
        counts=np.asarray(counts, "<u4"),
        class_ids=np.asarray(class_ids, "<u4"),
        log_probs=np.asarray(log_probs, np.float32),
        tail_mass=np.asarray(tails, np.float32).reshape(row["num_frames"], num_temperatures),
        kept_mass=row["kept_mass"],
        entropy=row["entropy"],
        agreement=row["agreement"],
    )


def check_invariants(labels: Labels, num_classes: int, mass_tolerance: float) -> None:
    """Section 5."""
    ends = np.cumsum(labels.counts, dtype=np.int64)
    require((ends[-1] if len(ends) else 0) == len(labels.class_ids), "counts do not add up to the entries")
    require(((labels.tail_mass >= 0) & (labels.tail_mass <= 1)).all(), "tail mass")
    for end, count, tail in zip(ends, labels.counts, labels.tail_mass, strict=True):
        ids, log_probs = labels.class_ids[end - count : end], labels.log_probs[end - count : end].astype(np.float64)
        require(len(np.unique(ids)) == count and (ids < num_classes).all(), "class ids")
        require(np.isfinite(log_probs).all() and (log_probs <= 0).all(), "log-probabilities")
        require((log_probs[1:] <= log_probs[:-1]).all(), "log-probabilities rise")
        require(abs(np.exp(log_probs).sum() + tail[0] - 1) <= mass_tolerance, "mass")


def label_bytes(labels: Labels) -> bytes:
    """Section 10, "Content digest", step 1."""
    name = labels.utterance_id.encode()
    parts = (labels.counts, labels.class_ids, labels.log_probs, labels.tail_mass)
    head = struct.pack("<III", len(name), len(labels.counts), labels.tail_mass.shape[1])
    return head + name + b"".join(part.tobytes() for part in parts)


def label_lanes(labels: Labels) -> np.ndarray:
    """Step 2."""
    digest = hashlib.sha256(label_bytes(labels)).digest()
    return np.frombuffer(hashlib.shake_128(digest).digest(2048), "<u2")


def at_temperature(labels: Labels, temperatures: list[float], k: int) -> np.ndarray:
    """Section 5: log-probabilities at the k-th stored temperature."""
    scaled = labels.log_probs.astype(np.float64) / temperatures[k]
    ends = np.cumsum(labels.counts, dtype=np.int64)
    for end, count, tail in zip(ends, labels.counts, labels.tail_mass[:, k].astype(np.float64), strict=True):
        frame = slice(end - count, end)
        scaled[frame] += np.log(1 - tail) - np.log(np.exp(scaled[frame]).sum())
    return scaled


def corpus_digest(path: Path) -> str:
    """Section 12, all rows."""
    table = pq.read_table(path)
    metadata = table.schema.metadata
    inventory = metadata.get(b"softlabels.inventory_digest", b"None").decode()
    frame_shift = metadata.get(b"softlabels.hard_label_frame_shift_ms", b"None").decode()
    rows = table.to_pylist()
    starts = [row.get("start_sample") for row in rows]
    has_segments = any(start is not None for start in starts)
    data = f"{inventory}|{frame_shift}|{len(rows)}{'|segments' if has_segments else ''}".encode()
    for name in ("utterance_id", "sha256"):
        values = [(row[name] or "").encode() for row in rows]
        data += np.array([len(value) for value in values], "<i4").tobytes() + b"".join(values)
    data += np.array([row["sample_rate"] for row in rows], "<i4").tobytes()
    data += np.array([row["num_samples"] for row in rows], "<i8").tobytes()
    if has_segments:
        data += np.array([-1 if start is None else start for start in starts], "<i8").tobytes()
    labels = [row["hard_labels"] for row in rows]
    data += np.array([-1 if values is None else len(values) for values in labels], "<i4").tobytes()
    return sha256(data + np.array([label for values in labels for label in values or ()], "<i4").tobytes())


# ---------------------------------------------------------------------------------------------------------------------
# Datasets written by the package
# ---------------------------------------------------------------------------------------------------------------------

TEMPERATURES = (1.0, 2.0)
FORMATS = ("parquet", "zarr")
CODECS = tuple(STREAMS)


@dataclass(frozen=True)
class Size:
    """``wide`` needs the wider integer types, and more bytes in a stream than a Zarr chunk holds."""

    num_classes: int
    num_candidates: int
    num_kept: int
    keep_hard_label: bool
    num_frames: int


SIZES = {
    "small": Size(num_classes=50, num_candidates=50, num_kept=8, keep_hard_label=False, num_frames=40),
    "wide": Size(num_classes=70_000, num_candidates=300, num_kept=255, keep_hard_label=True, num_frames=1100),
}


def labelled(rng: np.random.Generator, utterance_id: str, num_frames: int, size: Size) -> LabelledUtterance:
    """Random posteriors over ``num_candidates`` classes; frames keep 1 to ``num_kept`` of them, the first frame all."""
    probs_TC = -np.sort(-rng.dirichlet(np.full(size.num_candidates, 0.3), size=num_frames), axis=1)
    softened_TC = np.sqrt(probs_TC)
    softened_TC /= softened_TC.sum(axis=1, keepdims=True)
    counts_T = rng.integers(size.num_kept - size.num_kept // 10, size.num_kept + 1, size=num_frames)
    counts_T[:1] = size.num_kept
    kept_TC = np.arange(size.num_candidates) < counts_T[:, None]
    # A stride without a common factor with the number of classes: distinct ids.
    ids_TC = rng.integers(size.num_classes, size=(num_frames, 1)) + 197 * np.arange(size.num_candidates)
    tails_TK = np.stack([np.where(kept_TC, 0, probs).sum(axis=1) for probs in (probs_TC, softened_TC)], axis=1)
    targets = SoftTargets(
        num_classes=size.num_classes,
        temperatures=TEMPERATURES,
        offsets=offsets_of(counts_T),
        class_ids=(ids_TC % size.num_classes)[kept_TC].astype(np.int32),
        log_probs=np.maximum(np.log(np.maximum(probs_TC, 1e-300)), -100)[kept_TC].astype(np.float32),
        tail_mass=tails_TK.astype(np.float32),
    )
    stats = UtteranceStats(
        kept_mass=float(targets.kept_mass_T().mean()) if num_frames else 0.0,
        entropy=1.25 if num_frames else 0.0,
        agreement=float(rng.random()) if rng.random() < 0.5 else float("nan"),
    )
    return LabelledUtterance(utterance_id=utterance_id, targets=targets, stats=stats)


def write_dataset(url: Path, shard_format: str, codec: str, size: Size) -> None:
    inventory = ClassInventory(names=tuple(f"senone-{i}" for i in range(size.num_classes)))
    teachers = (
        TeacherSpec(name="TDNN »größer«", digest="1" * 64, weight=1 / 3),
        TeacherSpec(name="BLSTM", digest="2" * 64, weight=2 / 3),
    )
    document = SpecDocument(
        spec=DatasetSpec(
            corpus_digest="0" * 64,
            inventory_digest=inventory.digest(),
            num_classes=size.num_classes,
            frame_shift_ms=1e-05,
            teachers=teachers,
            combination="log_linear",
            temperatures=TEMPERATURES,
            selection=TopK(k=size.num_kept, keep_hard_label=size.keep_hard_label),
            codec=codec,
            precision="float32",
        ),
        storage=StorageSpec(
            shard_format=shard_format, num_shards=3, num_rows=77, shard_seconds=60, batch_seconds=10, on_error="skip"
        ),
    )
    rng = np.random.default_rng(17)
    shards = [
        [("utt-1", size.num_frames), ("utt-é", 3), ("no-frames", 0), ("話", 1), ("utt-5", 7)],
        [(f"short-{n}", 2) for n in range(70)],
        [],
    ]
    store, first_row = ObjectStore(url), 0
    begin(store, document, inventory)
    for index, lengths in enumerate(shards):
        utterances = [labelled(rng, name, num_frames, size) for name, num_frames in lengths]
        skipped = [SkippedUtterance(utterance_id=f"bad-{index}", reason='"unreadable"\n')] if index else []
        num_rows = len(utterances) + len(skipped)
        commit_shard(
            store, document, ShardRange(index=index, first_row=first_row, num_rows=num_rows), utterances, skipped
        )
        first_row += num_rows
    publish(store, document)


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shard_format", FORMATS)
def test_both_readers_see_the_same(tmp_path: Path, shard_format: str, codec: str, size: Size) -> None:
    write_dataset(tmp_path, shard_format, codec, size)
    ours = open_dataset(tmp_path)
    assert [problem for _, problem in verify(ours) if problem] == []

    theirs = read_dataset(tmp_path)

    assert theirs.fingerprint == ours.manifest.fingerprint
    assert theirs.content_digest == ours.manifest.content_digest
    assert theirs.names == list(ours.inventory.names)
    assert theirs.skipped == [entry.utterance_id for entry in ours.manifest.skipped] == ["bad-1", "bad-2"]
    assert len(theirs.utterances) == len(ours) == 75
    for found, expected in zip(theirs.utterances, ours, strict=True):
        targets = expected.targets
        assert found.utterance_id == expected.utterance_id
        assert np.array_equal(found.counts, targets.counts_T)
        assert np.array_equal(found.class_ids, targets.class_ids)
        assert same_bits(found.log_probs, targets.log_probs)
        assert same_bits(found.tail_mass, targets.tail_mass)
        stats = (expected.stats.kept_mass, expected.stats.entropy, expected.stats.agreement)
        assert np.array_equal((found.kept_mass, found.entropy, found.agreement), stats, equal_nan=True)
        for k, temperature in enumerate(TEMPERATURES[1:], start=1):
            derived, _ = targets.at_temperature(temperature)
            np.testing.assert_allclose(at_temperature(found, list(TEMPERATURES), k), derived, atol=1e-5)


@pytest.mark.parametrize("name", ["v1/parquet", "v1/zarr", "v2/parquet", "v2/zarr"])
def test_the_committed_datasets_are_read(name: str) -> None:
    assert read_dataset(GOLDEN / name).content_digest == open_dataset(GOLDEN / name).manifest.content_digest


@pytest.mark.parametrize("codec", CODECS)
def test_parquet_layout(tmp_path: Path, codec: str) -> None:
    write_dataset(tmp_path, "parquet", codec, SIZES["small"])
    file = pq.ParquetFile(next(tmp_path.glob("shards/000001-*/shard.parquet")))
    columns = [file.schema.column(n) for n in range(len(file.schema.names))]
    rows = [
        f"| `{column.name}` | {column.physical_type}{', STRING' if str(column.logical_type) == 'String' else ''} | "
        f"{'yes' if column.max_definition_level else 'no'} |"
        for column in columns
    ]
    section = FORMAT_MD.read_text(encoding="utf-8").partition("## 8.")[2].partition("## 9.")[0].splitlines()
    assert [line[: len(row)] for line, row in zip(section[6:12], rows, strict=False)] == rows[:6]
    assert section[12].startswith("| the codec's streams, in the order of section 7 | BYTE_ARRAY | no |")
    assert rows[6:] == [f"| `{name}` | BYTE_ARRAY | no |" for name in STREAMS[codec]]
    assert file.metadata.num_row_groups == 1
    chunks = [file.metadata.row_group(0).column(n) for n in range(len(columns))]
    assert {chunk.compression for chunk in chunks} == {"ZSTD"}
    assert not any(chunk.has_dictionary_page or chunk.is_stats_set for chunk in chunks)


def test_parquet_row_groups() -> None:
    """A row belongs to group floor(f / 32768), f being the frames of all rows before it."""
    num_frames = (32_767, 1, 5, 0, 70_000, 0, 3)
    columns = ShardColumns(
        utterance_ids=tuple(f"utt-{n}" for n in range(len(num_frames))),
        num_frames=np.array(num_frames, np.int32),
        num_entries=np.zeros(len(num_frames), np.int32),
        kept_mass=np.zeros(len(num_frames), np.float32),
        entropy=np.zeros(len(num_frames), np.float32),
        agreement=np.zeros(len(num_frames), np.float32),
        streams={"counts": (memoryview(b""), np.zeros(len(num_frames) + 1, np.int64))},
    )
    files = CONTAINERS["parquet"].encode(columns, 1)
    metadata = pq.ParquetFile(io.BytesIO(files["shard.parquet"])).metadata
    assert [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)] == [2, 3, 2]


def test_content_digest_does_not_depend_on_the_container(tmp_path: Path) -> None:
    digests = {}
    for shard_format in FORMATS:
        for codec in CODECS:
            folder = tmp_path / f"{shard_format}-{codec}"
            write_dataset(folder, shard_format, codec, SIZES["small"])
            digests[shard_format, codec] = read_dataset(folder).content_digest
    assert all(digests["parquet", codec] == digests["zarr", codec] for codec in CODECS)
    assert len(set(digests.values())) == len(CODECS)


@pytest.mark.parametrize("shard_format", FORMATS)
def test_the_independent_reader_notices_damage(tmp_path: Path, shard_format: str) -> None:
    write_dataset(tmp_path, shard_format, "mtf-sqrt", SIZES["small"])
    read_dataset(tmp_path)
    rng = np.random.default_rng(3)
    for path in sorted(path for path in tmp_path.rglob("*") if path.is_file()):
        data = path.read_bytes()
        damaged = bytearray(data)
        damaged[rng.integers(len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        # A flipped bit of spec.json, the inventory, a commit record, the manifest or any shard file.
        with pytest.raises(FormatError):
            read_dataset(tmp_path)
        path.write_bytes(data)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(FormatError, match="no manifest"):
        read_dataset(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# The test vectors in FORMAT.md
# ---------------------------------------------------------------------------------------------------------------------

INVENTORY = ClassInventory(names=("a", "b", "c", "d", "e"))


def vectors() -> list[SoftTargets]:
    def targets(counts: list[int], ids: list[int], log_probs: list[float], tails: list[list[float]]) -> SoftTargets:
        return SoftTargets(
            num_classes=5,
            temperatures=TEMPERATURES,
            offsets=offsets_of(counts),
            class_ids=np.array(ids, np.int32),
            log_probs=np.array(log_probs, np.float32),
            tail_mass=np.array(tails, np.float32),
        ).validate()

    return [
        targets([2, 1], [3, 1, 0], [-0.25, -2.0, -0.0625], [[0.0859375, 0.25], [0.060546875, 0.125]]),
        targets([1], [4], [0.0], [[0.0, 0.0]]),
    ]


def test_content_digest_vectors() -> None:
    specified = FORMAT_MD.read_text(encoding="utf-8")
    label_hash, lanes = LabelHash(), np.zeros(1024, "<u2")
    assert label_hash.hexdigest() == sha256(lanes.tobytes())
    assert f"| content digest of {{}} | `{label_hash.hexdigest()}` |" in specified
    for name, utterance_id, targets, sets in zip(
        ("A", "B"), ("utt-1", "utt-é"), vectors(), ("{A}", "{A, B}"), strict=True
    ):
        labels = Labels(
            utterance_id=utterance_id,
            counts=targets.counts_T.astype("<u4"),
            class_ids=targets.class_ids.astype("<u4"),
            log_probs=targets.log_probs,
            tail_mass=targets.tail_mass,
            kept_mass=1.0,
            entropy=0.0,
            agreement=0.0,
        )
        digest = labels_digest(utterance_id, targets)
        assert digest.hex() == sha256(label_bytes(labels))
        assert f"| d of {name} | `{digest.hex()}` |" in specified
        label_hash.add_utterance(digest)
        lanes += label_lanes(labels)
        assert label_hash.hexdigest() == sha256(lanes.tobytes())
        assert f"| content digest of {sets} | `{label_hash.hexdigest()}` |" in specified
        if name == "A":
            assert label_bytes(labels).hex() in "".join(specified.split())
            assert f"| first 8 bytes of SHAKE128(d of A) | `{label_lanes(labels)[:4].tobytes().hex()}` |" in specified
    assert f"| first 8 bytes of the label hash of {{A, B}} | `{lanes[:4].tobytes().hex()}` |" in specified


def test_spec_inventory_and_corpus_vectors(tmp_path: Path) -> None:
    specified = FORMAT_MD.read_text(encoding="utf-8")
    assert f"`{INVENTORY.to_json().decode()}`" in specified
    assert f"`{INVENTORY.digest()}`" in specified

    line = next(line.strip() for line in specified.splitlines() if line.startswith('    {"codec":'))
    spec = DatasetSpec.model_validate(json.loads(line))
    assert canonical_json(spec.fields()) == line.encode()
    assert spec.fingerprint() == sha256(line.encode())
    assert f"Its fingerprint is `{spec.fingerprint()}`" in specified
    assert spec.inventory_digest == INVENTORY.digest()

    path = tmp_path / "corpus.parquet"
    rows = [
        Utterance(
            utterance_id="utt-1",
            audio="a.wav",
            sha256="ab" * 32,
            sample_rate=16_000,
            num_samples=320,
            split="train",
            hard_labels=np.array([3, -1], np.int32),
        ),
        Utterance(utterance_id="utt-é", audio="b.wav", sample_rate=8_000, num_samples=80, split="dev"),
    ]
    write_corpus(path, rows, inventory=INVENTORY, hard_label_frame_shift_ms=10)
    assert load_corpus(path).digest == corpus_digest(path) == spec.corpus_digest

    write_corpus(path, rows[1:])
    assert load_corpus(path).digest == corpus_digest(path)

    rows[1] = replace(rows[1], start_sample=0, audio_offset=512, audio_bytes=99)
    write_corpus(path, rows, inventory=INVENTORY, hard_label_frame_shift_ms=10)
    assert load_corpus(path).digest == corpus_digest(path)
    assert f"`start_sample` 0 in row 2 it is `{load_corpus(path).digest}`" in specified


def test_float_form() -> None:
    rng = np.random.default_rng(5)
    values = [*rng.integers(0, 2**63, 2000).view(np.float64), *(10.0**p for p in range(-30, 30)), *rng.random(2000)]
    values += [0.0, -0.0, 1 / 3, -1e-5, 1e15 + 1, 9999999999999998.0, 12345678901234567.0, 0.00012, 5e-324, 1.7e308]
    finite = [float(value) for value in values if np.isfinite(value)]
    assert [float_form(value) for value in finite] == [canonical_json(value).decode() for value in finite]
