"""Whole datasets: files lost or damaged, and shards, indices and documents that are hostile but have right digests."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from random import Random

import fsspec
import numpy as np

from softlabel_schemas import layout, open_dataset, verify
from softlabel_schemas.describe import description
from softlabel_schemas.digest import canonical_json, sha256_hex
from softlabel_schemas.spec import DatasetSpec
from softlabel_schemas.utterance_index import BucketTable, ShardIndex
from tests.fuzz import parquet_forge, seeds, zarr_forge
from tests.fuzz.document_targets import repair_manifest, sealed
from tests.fuzz.mutate import mutate_bytes, mutate_json, mutate_values

_ROOT = "/fuzz-dataset"


def dataset(rng: Random) -> None:
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
    repair_manifest(rng, body)
    folder = f"shards/{index:06d}-{sha256_hex(canonical_json(record['files']))[:32]}"
    files.update({f"{folder}/{name}": data for name, data in made.items()})
    commit = seeds.body(files, f"commits/{index:06d}.json") | {"shard": record}
    blocks = []
    if "shard.parquet" in made and seed.blocks and rng.random() < 0.7:
        # All pages of a shard that is otherwise as it was.
        num_rows = record["num_utterances"]
        blocks = [replace(seed.blocks[0], stop=_pages_end(made["shard.parquet"]), num_rows=num_rows)]
    commit["index"] = ShardIndex.of(columns.utterance_ids, blocks, made).to_base64()
    files[f"commits/{index:06d}.json"] = sealed(Random(0), commit)
    files["manifest.json"] = sealed(Random(0), body)
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
    files["manifest.json"] = sealed(Random(0), body)


def _forge_manifest(rng: Random, files: dict[str, bytes]) -> None:
    name = rng.choice(("manifest.json", "manifest.json", "spec.json", "commits/000000.json"))
    body = mutate_json(rng, seeds.body(files, name))
    if name == "manifest.json":
        repair_manifest(rng, body)
    files[name] = sealed(rng, body)
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
