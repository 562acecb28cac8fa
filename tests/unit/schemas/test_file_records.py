"""FileRecords: lists of files that are checked as text, against the models that say what a list is."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from softlabel_schemas import IntegrityError, manifest
from softlabel_schemas.digest import canonical_json, sha256_hex, unseal
from softlabel_schemas.file_records import FileRecord, FileRecords, take_out_files
from softlabel_schemas.limits import MAX_COUNT, MAX_SHARD_BYTES
from softlabel_schemas.manifest import CommitRecord, Manifest, ShardRecord, from_bytes, to_bytes
from tests.fuzz import document_targets, seeds
from tests.fuzz.mutate import mutate_bytes

FILES = TypeAdapter(FileRecords)

names = st.from_regex(r"[A-Za-z0-9_]+([./][A-Za-z0-9_]+){0,3}", fullmatch=True).filter(lambda name: len(name) <= 200)
digests = st.binary(max_size=8).map(sha256_hex)
records = st.builds(FileRecord, name=names, num_bytes=st.integers(0, MAX_COUNT), sha256=digests)
file_lists = st.lists(records, min_size=1, max_size=5, unique_by=lambda record: record.name).map(
    lambda found: FileRecords.of(sorted(found, key=lambda record: record.name))
)
GOOD = {"name": "b/c.1", "num_bytes": 12, "sha256": "0" * 64}
# As they may be or not.
ODD: dict[str, list[Any]] = {
    "name": [
        "b/c.1",
        "b/c.10",
        "",
        ".",
        "d.",
        "/d",
        "d//e",
        "d/../e",
        "d\\e",
        'd"',
        "ä",
        "d e",
        "d\n",
        "a",
        *(n * "d" for n in (200, 201)),
    ],
    "num_bytes": [0, MAX_COUNT, MAX_COUNT + 1, 10**18, 2**63, 10**30, -1, -0.0, 1.0, 1e3, True, None, "1", [1]],
    "sha256": ["", "1" * 63, "1" * 65, "A" * 64, "g" * 64, "1" * 63 + "\n", None],
    "other": [1],
}
EDITS = {
    b"},{": [b"};{", b"}{", b"},,{", b"}, {"],
    b"[{": [b"[[{", b"[ {"],
    b"}]": [b"},]", b" }]", b"},{}]"],
    b'{"name":"b': [b'{"name":"\\u0062', b'{"nam":"b', b'{"name":"a","name":"b', b'{"a":1,"name":"b', b'{"name":b'],
    b'"num_bytes":12,': [
        b"",
        *(b'"num_bytes":%b,' % text for text in (b"", b"012", b"-12", b"12.0", b" 12", b"1" * 40)),
    ],
    b'"}': [b'","z":1}', b"}", b'" }'],
}


def document(*lists: bytes) -> bytes:
    return b'{"shards":[' + b",".join(b'{"files":' + text + b',"index":0}' for text in lists) + b"]}"


def is_valid(text: bytes) -> bool:
    """By the models, and by what they write."""
    try:
        return canonical_json(FILES.dump_python(FILES.validate_python(json.loads(text)), mode="json")) == text
    except ValueError:
        return False


def is_taken(text: bytes) -> bool:
    """As one list, the whole of it."""
    rest, lists = take_out_files(document(text))
    assert lists or rest == document(text)
    return rest == document(b"[]") and [each.canonical for each in lists] == [text]


@given(st.lists(file_lists, min_size=1, max_size=3))
def test_lists_that_are_taken_out_are_those_that_stood_there(lists: list[FileRecords]) -> None:
    rest, found = take_out_files(document(*(each.canonical for each in lists)))
    assert rest == document(*[b"[]"] * len(lists))
    assert found == lists
    for each in found:
        stored = json.loads(each.canonical)
        assert [record.model_dump() for record in each] == stored
        assert (len(each), each[-1].name) == (len(stored), stored[-1]["name"])
        assert each.num_bytes == sum(record["num_bytes"] for record in stored)
        assert each.digest() == sha256_hex(canonical_json(stored))


def test_a_list_is_taken_out_where_the_models_accept_it() -> None:
    texts = [canonical_json([GOOD, GOOD | {"name": "d"} | {field: value}]) for field in ODD for value in ODD[field]]
    texts += [canonical_json([]), canonical_json([GOOD]), canonical_json([GOOD | {"name": "d"}, GOOD])]
    pair = canonical_json([GOOD, GOOD | {"name": "d"}])
    for old, edits in EDITS.items():
        assert old in pair
        texts += [pair.replace(old, new, count) for new in edits for count in (1, -1)]
    assert {text for text in texts if is_taken(text)} == {text for text in texts if is_valid(text)}
    assert sum(map(is_taken, texts)) == 5


def test_where_one_list_is_odd_none_is_taken_out() -> None:
    good = canonical_json([GOOD])
    for odd in (b"[]", b"[1]", canonical_json([GOOD, GOOD]), good[:-2]):
        for body in (document(good, odd), document(odd, good)):
            assert take_out_files(body) == (body, [])


@given(file_lists, st.integers(0, 2**32))
def test_so_is_a_list_of_other_bytes(files: FileRecords, seed: int) -> None:
    text = mutate_bytes(Random(seed), files.canonical)
    assert is_taken(text) == is_valid(text)


@given(file_lists)
def test_a_document_that_ends_anywhere_is_read_to_its_end_alone(files: FileRecords) -> None:
    whole = document(files.canonical)
    end = whole.index(files.canonical) + len(files.canonical)
    for length in range(len(whole)):
        rest, lists = take_out_files(whole[:length])
        assert bool(lists) == (length >= end)
        assert len(rest) == length - (len(files.canonical) - 2 if lists else 0)


def test_every_list_of_a_dataset_is_taken_out() -> None:
    """Of both formats: what is left is read at the cost of objects."""
    for dataset in seeds.datasets():
        for name, data in dataset.items():
            if name == "manifest.json" or name.startswith("commits/"):
                rest, lists = take_out_files(unseal(data, where=name))
                assert len(lists) == (2 if name == "manifest.json" else 1)
                assert b'"sha256"' not in rest


# --- documents --------------------------------------------------------------------------------------------------------


def as_it_is(body: bytes) -> tuple[bytes, list[FileRecords]]:
    return body, []


def read_both_ways(model: type[Manifest] | type[CommitRecord], data: bytes, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What is read with the lists taken out and with everything as objects: the same document, or an error in either way."""
    found: list[Any] = []
    for take_out in (take_out_files, as_it_is):
        monkeypatch.setattr(manifest, "take_out_files", take_out)
        try:
            found.append(from_bytes(model, data, where="here"))
        except IntegrityError:
            found.append(None)
    assert found[0] == found[1]
    if found[0] is not None:
        assert to_bytes(found[0]) == data
        assert found[0].model_dump() == found[1].model_dump()
    return found[0]


def test_hostile_documents_are_read_as_they_would_be_as_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    rng, num_read = Random(0), 0
    for _ in range(50):
        manifest_bytes = document_targets.document(rng, "manifest.json", document_targets.repair_manifest)
        commit_bytes = document_targets.document(rng, "commits/000000.json")
        num_read += read_both_ways(Manifest, manifest_bytes, monkeypatch) is not None
        num_read += read_both_ways(CommitRecord, commit_bytes, monkeypatch) is not None
    assert num_read > 0


def first_list(body: bytes) -> bytes:
    """With its name and the comma behind it."""
    start = body.index(b'"files":[')
    return body[start : body.index(b"]", start) + 2]


def elsewhere(body: bytes) -> bytes:
    return body.replace(b'"spec":{', b'"spec":{' + first_list(body))


MISPLACED: dict[str, Callable[[bytes], bytes]] = {
    "a list twice": lambda body: body.replace(first_list(body), 2 * first_list(body)),
    "a list elsewhere": lambda body: elsewhere(body).replace(first_list(body), b"", 1),
    "a list more, elsewhere": elsewhere,
    "a list elsewhere and an empty one": lambda body: elsewhere(body).replace(first_list(body), b'"files":[],', 1),
    "a list elsewhere and one of white space": lambda body: elsewhere(body).replace(
        first_list(body), b'"files":[ ],', 1
    ),
    "a list elsewhere and an empty one behind white space": lambda body: elsewhere(body).replace(
        first_list(body), b'"files": [],', 1
    ),
    "a name that ends alike": lambda body: body.replace(b'"files":[', b'"\\"files":[', 1),
    "a name with an escape": lambda body: body.replace(b'"files":[', b'"\\u0066iles":[', 1),
    "white space before a list": lambda body: body.replace(b'"files":[', b'"files": [', 1),
}


@pytest.mark.parametrize("name", MISPLACED)
def test_a_list_that_does_not_stand_in_its_shard_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body = unseal(seeds.datasets()[0]["manifest.json"], where="here")
    changed = MISPLACED[name](body)
    assert changed != body
    json.loads(changed)
    data = b'{"body":' + changed + b',"sha256":"' + sha256_hex(changed).encode() + b'"}'
    assert read_both_ways(Manifest, data, monkeypatch) is None


def test_records_are_refused_as_models_refuse_them() -> None:
    """Those of a writer: objects, not text."""
    shard = seeds.body(seeds.datasets()[0], "manifest.json")["shards"][0]
    record = FileRecord(name="b", num_bytes=MAX_SHARD_BYTES, sha256="0" * 64)
    for files in ([record, record], [record, record.model_copy(update={"name": "a"})]):
        with pytest.raises(ValueError, match="not sorted by name, each once"):
            FileRecords.of(files)
        with pytest.raises(ValidationError, match="not sorted by name, each once"):
            ShardRecord.model_validate(shard | {"files": files})
    for problem, files in {
        "at least 1 item": [],
        "a shard at most": [record, record.model_copy(update={"name": "c"})],
    }.items():
        with pytest.raises(ValidationError, match=problem):
            ShardRecord.model_validate(shard | {"files": files})
