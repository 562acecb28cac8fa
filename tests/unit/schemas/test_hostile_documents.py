"""Documents by an attacker who writes every file, with valid seals and digests: each is refused before it does harm.

Every test is a hole that was there once, or would be with a general reader in place of ours; ``tests/fuzz`` looks for more.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from softlabel_schemas import (
    ClassInventory,
    InputError,
    IntegrityError,
    digest,
    open_dataset,
)
from softlabel_schemas.bundle import BundleReader
from softlabel_schemas.commit import read_commits, read_spec
from softlabel_schemas.digest import LabelHash, canonical_json, parse_canonical, parse_json, seal, sha256_hex, unseal
from softlabel_schemas.limits import MAX_COUNT, MAX_DOCUMENT_VALUES, MAX_SHARD_BYTES
from softlabel_schemas.manifest import CommitRecord, Manifest, from_bytes
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.strict import parse
from softlabel_schemas.utterance_index import BucketTable
from tests.fuzz import seeds


def set_field(path: str, value: Any) -> Callable[[Any], None]:
    *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))

    def change(body: Any) -> None:
        for part in parents:
            body = body[part]
        body[last] = value

    return change


def repeat_file(body: Any) -> None:
    body["shards"][0]["files"] *= 2


def set_version_1(body: Any) -> None:
    body["spec"]["format_version"] = 1
    body["fingerprint"] = sha256_hex(canonical_json(body["spec"]))


HOSTILE_MANIFESTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a count that int64 cannot hold": (set_field("shards.0.num_frames", 2**63), "less than or equal to 1099511627776"),
    "a count whose total int64 cannot hold": (set_field("shards.0.num_entries", MAX_COUNT + 1), "num_entries"),
    "more bytes than a shard may have": (
        set_field("shards.0.files.0.num_bytes", MAX_SHARD_BYTES + 1),
        "a shard at most",
    ),
    "a file given twice": (repeat_file, "the files are not sorted by name, each once"),
    "a sum that overflows": (set_field("shards.0.sums.entropy", 1e308), "sums.entropy"),
    "a frame shift without end": (set_field("spec.frame_shift_ms", 1e308), "spec.frame_shift_ms"),
    "rows without end": (set_field("storage.num_rows", 10**30), "storage.num_rows"),
    "an index of another size": (set_field("index", "AAAA"), "an index of 3 bytes, expected 1 buckets of 36"),
    "an index of other utterances": (
        set_field("index", BucketTable.of([(0, "0" * 64)]).to_base64()),
        "the buckets of the index do not hold 4 utterances",
    ),
    "an index that is no base64": (set_field("index", "!" * 48), "index|base64"),
    "no index": (lambda body: body.pop("index"), "an utterance index belongs to format version 2"),
    "an index that is null": (set_field("index", None), "an utterance index belongs to format version 2"),
    "an index in format version 1": (set_version_1, "an utterance index belongs to format version 2"),
}


@pytest.mark.parametrize("name", HOSTILE_MANIFESTS)
def test_a_hostile_manifest_is_refused(tmp_path: Path, name: str) -> None:
    change, message = HOSTILE_MANIFESTS[name]
    body = seeds.body(seeds.datasets()[0], "manifest.json")
    from_bytes(Manifest, seal(body), where="here")
    change(body)
    (tmp_path / "manifest.json").write_bytes(seal(body))
    with pytest.raises(IntegrityError, match=message):
        open_dataset(tmp_path)


@pytest.mark.parametrize("text", ["", "AAAA", "A" * 2731 + "!", "ä" * 2732, LabelHash().to_base64()[:-2] + "B="])
def test_a_commit_record_with_another_label_hash_is_refused(text: str) -> None:
    body = seeds.body(seeds.datasets()[0], "commits/000000.json")
    from_bytes(CommitRecord, seal(body), where="here")
    with pytest.raises(IntegrityError, match=r"^here is not valid:\n  label_hash: "):
        from_bytes(CommitRecord, seal(body | {"label_hash": text}), where="here")


@pytest.mark.parametrize("text", ["", "AAAA", "!" * 64, None])
def test_a_commit_record_with_another_index_is_refused(tmp_path: Path, text: str | None) -> None:
    for name, data in seeds.datasets()[0].items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    body = seeds.body(seeds.datasets()[0], "commits/000000.json")
    body["index"] = text
    if text is None:
        del body["index"]
    (tmp_path / "commits" / "000000.json").write_bytes(seal(body))
    store = ObjectStore(tmp_path)
    for read in (lambda: open_dataset(tmp_path)[0], lambda: read_commits(store, read_spec(store), [0])):
        with pytest.raises(IntegrityError, match=r"(?s)000000\.json.*(index|base64)"):
            read()


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 100_000,
        b'{"names":' * 100_000,
        b'{"names":["\\ud800"]}',
        b'{"names":["\\uDFFF"]}',
        b"[" + b"1" * 5000 + b"]",
        '{"names":["a"]}'.encode("utf-16-le"),
    ],
    ids=["deep", "deep objects", "half a surrogate pair", "the other half", "a long number", "UTF-16"],
)
def test_a_hostile_inventory_is_refused(data: bytes) -> None:
    with pytest.raises(InputError, match=r"^here is not a class inventory: "):
        ClassInventory.from_json(data, where="here")


def test_a_bundle_whose_description_is_too_deep(tmp_path: Path) -> None:
    (tmp_path / "teacher.json").write_bytes(b"[" * 200_000)
    with pytest.raises(InputError, match=r"teacher\.json is not JSON: its values are nested too deep"):
        BundleReader(tmp_path)


def test_a_surrogate_pair_is_a_character() -> None:
    assert ClassInventory.from_json(b'{"names":["\\ud83d\\ude00"]}', where="here").names == ("\U0001f600",)


def test_a_repeated_name_is_found_in_linear_time() -> None:
    """Comparing each with each takes half an hour."""
    names = [str(n) for n in range(500_000)]
    with pytest.raises(InputError, match="'499999' is repeated"):
        parse(ClassInventory, {"names": [*names, "499999"]}, where="here")


def test_a_document_of_too_many_values_is_neither_parsed_nor_written(monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"[" + b"0," * MAX_DOCUMENT_VALUES + b"0]"
    with pytest.raises(ValueError, match="a JSON document of 4194305 values, expected at most 4194304"):
        parse_json(data)
    monkeypatch.setattr(digest, "MAX_DOCUMENT_VALUES", 99)
    with pytest.raises(InputError, match="a JSON document of 100 values, expected at most 99; fewer shards or"):
        seal([0] * 100)
    with pytest.raises(InputError, match="the class inventory cannot be stored: a JSON document of 105 values"):
        ClassInventory(names=tuple(map(str, range(100)))).to_json()


def test_messages_stay_short_and_printable() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    hostile = {"names": [deep] * 1000, "\x1b[2J": 1, "x" * 1_000_000: 1}
    with pytest.raises(InputError) as caught:
        parse(ClassInventory, hostile, where="here")
    message = str(caught.value)
    assert message.endswith("  and 982 problems more")
    assert len(message) < 5000
    assert message.replace("\n", "").isprintable()


@pytest.mark.parametrize(
    "body", [b"NaN", b"1e999", b'{"a":1,"a":2}', b'"\\ud800"', b"01", b"\xff", b" 1", b"[" * 100_000]
)
def test_a_seal_does_not_make_json_of_anything(body: bytes) -> None:
    data = b'{"body":' + body + b',"sha256":"' + sha256_hex(body).encode() + b'"}'
    with pytest.raises(IntegrityError, match=r"^here: (not a sealed JSON document|its JSON is not in canonical form)"):
        parse_canonical(unseal(data, where="here"), where="here")
