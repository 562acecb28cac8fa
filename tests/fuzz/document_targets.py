"""Sealed documents and the class inventory."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np

from softlabel_schemas.codec import build_codec
from softlabel_schemas.digest import LabelHash, canonical_json, sha256_hex
from softlabel_schemas.inventory import ClassInventory
from softlabel_schemas.manifest import CommitRecord, Manifest, ShardRecord, SpecDocument, from_bytes, to_bytes
from softlabel_schemas.strict import StrictModel
from softlabel_schemas.targets import offsets_of
from tests.fuzz import seeds
from tests.fuzz.mutate import mutate_bytes, mutate_json


def sealed(rng: Random, body: Any) -> bytes:
    """A document of a body that may be anything; mostly canonical, always with the right digest."""
    try:
        data = canonical_json(body)
    except ValueError:
        data = json.dumps(body).encode()
    if rng.random() < 0.15:
        data = mutate_bytes(rng, data)
    return b'{"body":' + data + b',"sha256":"' + sha256_hex(data).encode() + b'"}'


def document(rng: Random, name: str, consistent: Callable[[Random, Any], None] = lambda rng, body: None) -> bytes:
    body = seeds.body(rng.choice(seeds.datasets()), name)
    if rng.random() < 0.1:
        return mutate_bytes(rng, sealed(Random(0), body))
    body = mutate_json(rng, body)
    if rng.random() < 0.7:
        consistent(rng, body)
    return sealed(rng, body)


def _read_document(model: type[StrictModel], data: bytes) -> Any:
    read: Any = from_bytes(model, data, where="here")
    assert to_bytes(read) == data
    return read


def repair_manifest(rng: Random, body: Any) -> None:
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


def manifest(rng: Random) -> None:
    manifest = _read_document(Manifest, document(rng, "manifest.json", repair_manifest))
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


def commit(rng: Random) -> None:
    def repair(rng: Random, body: Any) -> None:
        try:
            body["shard"]["num_rows"] = body["shard"]["num_utterances"] + len(body["shard"]["skipped"])
        except (KeyError, TypeError):
            return

    record = _read_document(CommitRecord, document(rng, f"commits/00000{rng.randrange(2)}.json", repair))
    assert LabelHash.from_base64(record.label_hash).to_base64() == record.label_hash
    _check_record(record.shard)


def spec(rng: Random) -> None:
    read = _read_document(SpecDocument, document(rng, "spec.json"))
    codec = build_codec(read.spec)
    assert 1 <= codec.max_entries <= 65_535
    assert len(read.spec.fingerprint()) == 64


def inventory(rng: Random) -> None:
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
