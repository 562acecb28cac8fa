"""What is fuzzed: for each target one case, made from (seed, number), read, and judged."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import fsspec
import numpy as np

from softlabel_schemas import InputError, IntegrityError, layout, open_dataset, verify
from softlabel_schemas.cli import description
from softlabel_schemas.codec import Codec, PackedCodec, build_codec
from softlabel_schemas.containers import CONTAINERS
from softlabel_schemas.digest import LabelHash, canonical_json, sha256_hex
from softlabel_schemas.inventory import ClassInventory
from softlabel_schemas.limits import max_decoded_bytes
from softlabel_schemas.manifest import CommitRecord, Manifest, ShardRecord, SpecDocument, from_bytes, to_bytes
from softlabel_schemas.mtf_sqrt import MtfSqrtCodec
from softlabel_schemas.shard import Shard, ShardColumns, decode_columns
from softlabel_schemas.spec import DatasetSpec
from softlabel_schemas.streams import Streams
from softlabel_schemas.strict import StrictModel
from softlabel_schemas.targets import Int64, SoftTargets, offsets_of
from softlabel_schemas.utterance_index import BucketTable, ShardIndex
from tests.fuzz import parquet_forge, seeds, stream_forge, zarr_forge
from tests.fuzz.mutate import EXTREMES, mutate_bytes, mutate_int, mutate_json, mutate_values
from tests.golden import mtf_sqrt
from tests.support.targets import assert_same_targets

REFUSED = (IntegrityError, InputError)
# Of a hundred cases. A whole dataset takes thirty times as long as a document.
SHARES = {
    "manifest": 15, "commit": 10, "spec": 8, "inventory": 6,
    "streams": 20, "parquet": 18, "block": 7, "zarr": 15, "dataset": 1,
}  # fmt: skip
_TARGET_OF = tuple(name for name, share in SHARES.items() for _ in range(share))


def target_of(number: int) -> str:
    # 37: so that neighbouring numbers are of different targets.
    return _TARGET_OF[number * 37 % 100]


def run_case(seed: int, number: int) -> str:
    """How the case ended: "accepted", or the name of the clean error. Anything else is raised."""
    rng = Random(f"{seed}:{number}")
    try:
        _TARGETS[target_of(number)](rng)
    except REFUSED as error:
        # An attacker's text is shown, but not all of it, and nothing that a terminal obeys.
        message = str(error)
        assert len(message) < 20_000, f"a message of {len(message)} characters"
        assert "\x1b" not in message, "a control character in a message"
        return type(error).__name__
    return "accepted"


def warm_up() -> None:
    """Import and make everything that is needed, so that a case itself does neither."""
    for number in range(300):
        # What is wrong with a reader shall be the finding of a case, not the end of the worker.
        with contextlib.suppress(Exception):
            run_case(0, number)


# --- documents --------------------------------------------------------------------------------------------------------


def _sealed(rng: Random, body: Any) -> bytes:
    """A document of a body that may be anything; mostly canonical, always with the right digest."""
    try:
        data = canonical_json(body)
    except ValueError:
        data = json.dumps(body).encode()
    if rng.random() < 0.15:
        data = mutate_bytes(rng, data)
    return b'{"body":' + data + b',"sha256":"' + sha256_hex(data).encode() + b'"}'


def _document(rng: Random, name: str, consistent: Callable[[Random, Any], None] = lambda rng, body: None) -> bytes:
    body = seeds.body(rng.choice(seeds.datasets()), name)
    if rng.random() < 0.1:
        return mutate_bytes(rng, _sealed(Random(0), body))
    body = mutate_json(rng, body)
    if rng.random() < 0.7:
        consistent(rng, body)
    return _sealed(rng, body)


def _read_document(model: type[StrictModel], data: bytes) -> Any:
    document: Any = from_bytes(model, data, where="here")
    assert to_bytes(document) == data
    return document


def _repair_manifest(rng: Random, body: Any) -> None:
    """What an attacker would see to: the fingerprint, and the numbers of shards and rows."""
    try:
        body["fingerprint"] = sha256_hex(canonical_json(body["spec"]))
        body["storage"]["num_shards"] = len(body["shards"])
        next_row = 0
        for index, shard in enumerate(body["shards"]):
            if rng.random() < 0.5:
                shard["num_rows"] = shard["num_utterances"] + len(shard["skipped"])
            shard["index"], shard["first_row"] = index, next_row
            next_row += shard["num_rows"]
        body["storage"]["num_rows"] = next_row
    except (KeyError, TypeError, ValueError, AttributeError):
        return


def _manifest(rng: Random) -> None:
    manifest = _read_document(Manifest, _document(rng, "manifest.json", _repair_manifest))
    build_codec(manifest.spec)
    for name in ("num_utterances", "num_frames", "num_entries", "num_bytes"):
        offsets = offsets_of([getattr(shard, name) for shard in manifest.shards])
        assert (np.diff(offsets) >= 0).all()
        assert int(offsets[-1]) == getattr(manifest, name)
    for shard in manifest.shards:
        _check_record(shard)


def _check_record(record: ShardRecord) -> None:
    for file in record.files:
        path = f"{record.folder}/{file.name}"
        assert path.startswith("shards/")
        assert not {"", ".", ".."} & set(path.split("/")), path
        assert path.isascii()
        assert path.isprintable()


def _commit(rng: Random) -> None:
    def repair(rng: Random, body: Any) -> None:
        try:
            body["shard"]["num_rows"] = body["shard"]["num_utterances"] + len(body["shard"]["skipped"])
        except (KeyError, TypeError):
            return

    record = _read_document(CommitRecord, _document(rng, f"commits/00000{rng.randrange(2)}.json", repair))
    assert LabelHash.from_base64(record.label_hash).to_base64() == record.label_hash
    _check_record(record.shard)


def _spec(rng: Random) -> None:
    document = _read_document(SpecDocument, _document(rng, "spec.json"))
    codec = build_codec(document.spec)
    assert 1 <= codec.max_entries <= 65_535
    assert len(document.spec.fingerprint()) == 64


def _inventory(rng: Random) -> None:
    value = seeds.inventory()
    data = canonical_json(value)
    if rng.random() < 0.8:
        data = json.dumps(mutate_json(rng, value)).encode(errors="surrogatepass")
    if rng.random() < 0.3:
        data = mutate_bytes(rng, data)
    inventory = ClassInventory.from_json(data, where="here")
    assert ClassInventory.from_json(inventory.to_json(), where="here") == inventory
    if inventory.phones:
        phones, ids = inventory.phone_ids()
        assert [phones[i] for i in ids] == list(inventory.phones)


# --- shards -----------------------------------------------------------------------------------------------------------


def _shard_number(rng: Random) -> int:
    """Mostly of three utterances: the empty shard is soon known, that of two row groups takes long."""
    return rng.choice([n for n, seed in enumerate(seeds.shards()) for _ in range(seed.weight)])


def _parquet(rng: Random) -> None:
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


def _block(rng: Random) -> None:
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


def _zarr(rng: Random) -> None:
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
    label_hash = LabelHash()
    for digest in shard.label_digests():
        label_hash.add_utterance(digest)


# --- streams ----------------------------------------------------------------------------------------------------------


def _streams(rng: Random) -> None:
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


# --- whole datasets ---------------------------------------------------------------------------------------------------

_ROOT = "/fuzz-dataset"


def _dataset(rng: Random) -> None:
    files = dict(rng.choice(seeds.datasets()))
    kind = rng.random()
    if kind < 0.2:
        name = rng.choice(sorted(files))
        files[name] = mutate_bytes(rng, files[name])
    elif kind < 0.3:
        del files[rng.choice(sorted(files))]
    elif kind < 0.6:
        _forge_shard(rng, files)
    elif kind < 0.7:
        _forge_index(rng, files)
    else:
        _forge_manifest(rng, files)
    memory = fsspec.filesystem("memory")
    # An object below another, which an object store can hold and a folder cannot.
    below = {name for name in files for other in files if name.startswith(f"{other}/")}
    memory.pipe({f"{_ROOT}/{name}": data for name, data in files.items() if name not in below})
    try:
        _read_dataset(f"memory:/{_ROOT}")
    finally:
        memory.rm(_ROOT, recursive=True)


def _forge_shard(rng: Random, files: dict[str, bytes]) -> None:
    """Hostile shard files under the name that their digest gives, in a manifest and a commit record that say so."""
    body = seeds.body(files, "manifest.json")
    index = rng.randrange(len(body["shards"]))
    number = rng.choice(seeds.shard_numbers(DatasetSpec.model_validate(body["spec"])))
    if body["storage"]["shard_format"] == "parquet":
        made = {"shard.parquet": parquet_forge.forge(rng, number)}
    else:
        made = zarr_forge.forge(rng, number)
    record = body["shards"][index]
    record["files"] = [
        {"name": name, "num_bytes": len(data), "sha256": sha256_hex(data)} for name, data in sorted(made.items())
    ]
    seed = seeds.shards()[number]
    columns = seed.columns
    record["num_utterances"] = len(columns.utterance_ids)
    record["num_frames"], record["num_entries"] = int(columns.num_frames.sum()), int(columns.num_entries.sum())
    record["num_rows"] = record["num_utterances"] + len(record["skipped"]) or 1
    _repair_manifest(rng, body)
    folder = f"shards/{index:06d}-{sha256_hex(canonical_json(record['files']))[:32]}"
    files.update({f"{folder}/{name}": data for name, data in made.items()})
    commit = seeds.body(files, f"commits/{index:06d}.json") | {"shard": record}
    blocks = []
    if "shard.parquet" in made and seed.blocks and rng.random() < 0.7:
        # All pages of a shard that is otherwise as it was.
        num_rows = record["num_utterances"]
        blocks = [replace(seed.blocks[0], stop=_pages_end(made["shard.parquet"]), num_rows=num_rows)]
    commit["index"] = ShardIndex.of(columns.utterance_ids, blocks, made).to_base64()
    files[f"commits/{index:06d}.json"] = _sealed(Random(0), commit)
    files["manifest.json"] = _sealed(Random(0), body)
    _forge_index(rng, files)


def _pages_end(data: bytes) -> int:
    """Of a Parquet file, whatever its end says."""
    footer_size = int.from_bytes(data[-8:-4], "little") + 8
    return max(5, len(data) - footer_size)


def _forge_index(rng: Random, files: dict[str, bytes]) -> None:
    """A bucket that the manifest names, of the entries in the commit records or of others."""
    body = seeds.body(files, "manifest.json")
    entries = []
    for index, shard in enumerate(body["shards"]):
        commit = seeds.body(files, f"commits/{index:06d}.json")
        sizes = [file["num_bytes"] for file in shard["files"]]
        with contextlib.suppress(ValueError):
            found = ShardIndex.from_base64(commit["index"], num_utterances=shard["num_utterances"], file_bytes=sizes)
            entries.append(found.entries(index))
    data = np.sort(np.concatenate(entries), order="key").tobytes() if entries else b""
    if rng.random() < 0.5:
        data = mutate_values(rng, data)
    digest = sha256_hex(data)
    files[layout.index_bucket(0, digest)] = data
    body["index"] = BucketTable.of([(len(data), digest)]).to_base64()
    files["manifest.json"] = _sealed(Random(0), body)


def _forge_manifest(rng: Random, files: dict[str, bytes]) -> None:
    name = rng.choice(("manifest.json", "manifest.json", "spec.json", "commits/000000.json"))
    body = mutate_json(rng, seeds.body(files, name))
    if name == "manifest.json":
        _repair_manifest(rng, body)
    files[name] = _sealed(rng, body)
    if rng.random() < 0.2:
        files["inventory.json"] = canonical_json(seeds.inventory())


def _read_dataset(url: str) -> None:
    """Everything a reader can ask for. Verifying never raises."""
    dataset = open_dataset(url)
    json.dumps(description(dataset), allow_nan=False)
    for index, problem in verify(dataset):
        assert index is None or 0 <= index < dataset.num_shards
        assert isinstance(problem, str)
    assert dataset.inventory.num_classes
    utterances = list(dataset)
    assert len(utterances) == len(dataset)
    if utterances:
        assert dataset[0].utterance_id == utterances[0].utterance_id
        # An index may not know an utterance, but never give another for it.
        with contextlib.suppress(KeyError):
            assert dataset[utterances[-1].utterance_id].utterance_id == utterances[-1].utterance_id


_TARGETS: dict[str, Callable[[Random], None]] = {
    "manifest": _manifest,
    "commit": _commit,
    "spec": _spec,
    "inventory": _inventory,
    "streams": _streams,
    "parquet": _parquet,
    "block": _block,
    "zarr": _zarr,
    "dataset": _dataset,
}
