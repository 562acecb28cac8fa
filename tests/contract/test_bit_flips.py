"""Damage to a published dataset: ``softlabels verify`` reports it, and no reader returns other labels for it."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from softlabel_schemas import InputError, IntegrityError, open_dataset
from softlabel_schemas.catalog import read_entry
from softlabel_schemas.cli import main
from softlabel_schemas.commit import read_spec
from softlabel_schemas.digest import LabelHash, seal
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.targets import labels_digest
from tests.support.datasets import SHARD_FORMATS, random_rows, write_dataset

NUM_FLIPS = 200
KINDS = {"spec.json", "inventory.json", "manifest.json", "commits", "shards", "index"}
# A reader of labels does not need these: damage there may not change what it returns.
NOT_READ = {"spec.json", "commits", "index"}

Labels = list[tuple[bytes, str]]


@pytest.fixture(params=SHARD_FORMATS)
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    url = tmp_path / "labels"
    write_dataset(str(url), shard_format=request.param, codec="mtf-sqrt", num_shards=2, rows=random_rows(num_rows=6))
    return url


def files_of(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def kind_of(root: Path, path: Path) -> str:
    return path.relative_to(root).parts[0]


def verify(root: Path) -> Result:
    return CliRunner().invoke(main, ["verify", str(root)])


def read_everything(root: Path) -> Labels:
    dataset = open_dataset(root)
    assert dataset.inventory.num_classes
    return [(labels_digest(utterance.utterance_id, utterance.targets), repr(utterance.stats)) for utterance in dataset]


def unnoticed(root: Path, path: Path, original: Labels) -> str:
    """What is wrong with how the damage at ``path`` was met; empty where verify reports it and no label is wrong."""
    result = verify(root)
    if result.exit_code != 1 or not result.stderr:
        return f"{path.relative_to(root)}: verify exits with {result.exit_code}: {result.output}{result.exception!r}\n"
    try:
        labels = read_everything(root)
    except IntegrityError:
        return ""
    if kind_of(root, path) in NOT_READ and labels == original:
        return ""
    return f"{path.relative_to(root)}: is read silently\n"


def test_every_single_bit_flip_is_noticed(root: Path) -> None:
    original = read_everything(root)
    rng = random.Random(2019)
    files = files_of(root)
    rng.shuffle(files)
    # Every file gets its turn, so every kind does.
    assert {kind_of(root, path) for path in files} == KINDS
    assert len(files) < NUM_FLIPS
    problems = []
    for flip in range(NUM_FLIPS):
        path = files[flip % len(files)]
        data = path.read_bytes()
        damaged = bytearray(data)
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        problems.append(unnoticed(root, path, original))
        path.write_bytes(data)
    assert "".join(problems) == ""
    assert verify(root).exit_code == 0
    assert read_everything(root) == original


def test_every_truncated_file_is_noticed(root: Path) -> None:
    original = read_everything(root)
    rng = random.Random(2019)
    problems = []
    for path in files_of(root):
        data = path.read_bytes()
        path.write_bytes(data[: rng.randrange(len(data))])
        problems.append(unnoticed(root, path, original))
        path.write_bytes(data)
    assert "".join(problems) == ""


def test_every_deleted_file_is_noticed(root: Path) -> None:
    original = read_everything(root)
    problems = []
    # Without its manifest it is not a dataset: see test_shard_conformance.py.
    for path in set(files_of(root)) - {root / "manifest.json"}:
        data = path.read_bytes()
        path.unlink()
        problems.append(unnoticed(root, path, original))
        path.write_bytes(data)
    assert "".join(problems) == ""


def swap(first: Path, second: Path) -> None:
    aside = first.with_name("aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


def test_swapped_shards_are_noticed(root: Path) -> None:
    first, second = sorted((root / "shards").iterdir())
    swap(first, second)
    result = verify(root)
    assert result.exit_code == 1
    assert "shard 0: " in result.stderr
    assert "shard 1: " in result.stderr
    for index in (0, 1):
        with pytest.raises(IntegrityError, match=f"shard {index}.*changed after writing"):
            open_dataset(root).read_shard(index)


def test_swapped_commit_records_are_noticed(root: Path) -> None:
    swap(root / "commits" / "000000.json", root / "commits" / "000001.json")
    result = verify(root)
    assert result.exit_code == 1
    assert "000000.json: is of shard 1" in result.stderr
    assert "000001.json: is of shard 0" in result.stderr


@pytest.mark.parametrize("name", ["manifest.json", "spec.json", "inventory.json", "commits/000001.json"])
def test_a_document_of_another_dataset_is_noticed(root: Path, tmp_path: Path, name: str) -> None:
    """Its own checksum is right, so only what the documents say of each other tells."""
    other = tmp_path / "other"
    dataset = open_dataset(root)
    written = write_dataset(
        str(other),
        shard_format=dataset.manifest.storage.shard_format,
        codec="packed-f32",
        num_shards=2,
        rows=random_rows(seed=1, num_rows=6),
    )
    assert written.manifest.content_digest != dataset.manifest.content_digest
    document = (other / name).read_bytes() if name != "inventory.json" else b'{"names":["a"],"phones":[]}'
    (root / name).write_bytes(document)
    result = verify(root)
    assert result.exit_code == 1
    assert name.removesuffix(".json") in result.stderr


def test_an_utterance_in_two_shards_is_noticed(root: Path, tmp_path: Path) -> None:
    rows = random_rows(num_rows=6)
    shard_format = open_dataset(root).manifest.storage.shard_format
    write_dataset(str(tmp_path / "twice"), shard_format=shard_format, num_shards=2, rows=[*rows, rows[0]])
    result = verify(tmp_path / "twice")
    assert result.exit_code == 1
    assert "utterance utt-ü0 is there 2 times, in different shards" in result.stderr


def reverse_shards(body: Any) -> None:
    body["shards"].reverse()


FORGERIES: dict[str, tuple[Callable[[Any], object], str]] = {
    "fingerprint": (lambda body: body.update(fingerprint="0" * 64), "the fingerprint is not that of the spec"),
    "spec": (lambda body: body["spec"].update(num_classes=51), "the fingerprint is not that of the spec"),
    "a shard too few": (lambda body: body["shards"].pop(), "1 shards are listed, the storage spec says 2"),
    "shards out of order": (reverse_shards, "shard 0 should begin at row 0, found 1 at 3"),
    "rows": (lambda body: body["storage"].update(num_rows=7), "shards cover 6 rows, the storage spec says 7"),
    "utterances": (
        lambda body: body["shards"][0].update(num_utterances=3),
        "3 utterances and 1 skipped are not 3 rows",
    ),
    "no files": (lambda body: body["shards"][0].update(files=[]), "shards.0.files: Tuple should have at least 1 item"),
    "a file elsewhere": (
        lambda body: body["shards"][0]["files"][0].update(name="../../other"),
        "shards.0.files.0.name: String should match pattern",
    ),
    "an absolute file": (
        lambda body: body["shards"][0]["files"][0].update(name="/other"),
        "shards.0.files.0.name: String should match pattern",
    ),
    "an unknown key": (lambda body: body.update(digest=""), "digest: unknown key 'digest'"),
    "another version": (
        lambda body: body["spec"].update(format_version=0),
        "spec.format_version: Input should be 1",
    ),
    "another form": (lambda body: body["storage"].update(shard_seconds=3600), "not in their canonical form"),
}


def forge(path: Path, change: Callable[[Any], object]) -> None:
    """Change a document and seal it again."""
    body = json.loads(path.read_bytes())["body"]
    change(body)
    path.write_bytes(seal(body))


@pytest.mark.parametrize("name", FORGERIES)
def test_a_sealed_manifest_that_contradicts_itself_is_refused(root: Path, name: str) -> None:
    change, message = FORGERIES[name]
    forge(root / "manifest.json", change)
    with pytest.raises(IntegrityError, match=re.escape(message)):
        open_dataset(root)
    assert verify(root).exit_code == 1


def test_a_newer_format_version_is_not_damage(root: Path) -> None:
    """It is seen before what is new in it."""

    def renew(body: Any) -> None:
        body["spec"].update(format_version=99, sampler={"kind": "new"})
        body["storage"]["layout"] = "new"
        for shard in body.get("shards", ()):
            shard["files"][0]["compression"] = "new"

    for name in ("manifest.json", "spec.json"):
        forge(root / name, renew)
    with pytest.raises(
        InputError, match=r"manifest\.json is of format version 99, this package reads versions up to \d;"
    ):
        open_dataset(root)
    with pytest.raises(InputError, match=r"spec\.json is of format version 99.*: upgrade essence-distill"):
        read_spec(ObjectStore(root))
    result = verify(root)
    assert result.exit_code == 2
    entry = read_entry(ObjectStore(root), "")
    assert (entry.state, entry.standing) == ("unreadable", entry.problem)
    assert "upgrade essence-distill" in entry.problem


def test_a_sealed_manifest_that_contradicts_its_shards_is_noticed(root: Path) -> None:
    forge(root / "manifest.json", lambda body: body["shards"][1].update(num_frames=7))
    with pytest.raises(IntegrityError, match=r"\(shard 1\): \(utterances, frames, entries\) are .*, its record says"):
        open_dataset(root).read_shard(1)
    result = verify(root)
    assert result.exit_code == 1
    assert "commits/000001.json does not match the manifest's record of shard 1" in result.stderr


def test_a_sealed_manifest_with_another_content_digest_is_noticed(root: Path) -> None:
    forge(root / "manifest.json", lambda body: body.update(content_digest="0" * 64))
    result = verify(root)
    assert result.exit_code == 1
    assert f"the manifest says {'0' * 64}" in result.stderr


def test_a_sealed_commit_record_of_other_labels_is_noticed(root: Path) -> None:
    forge(root / "commits" / "000001.json", lambda body: body.update(label_hash=LabelHash().to_base64()))
    result = verify(root)
    assert result.exit_code == 1
    assert "shard 1: its labels are not those that were committed" in result.stderr


def test_an_inventory_in_another_form_is_noticed(root: Path) -> None:
    path = root / "inventory.json"
    path.write_bytes(path.read_bytes() + b"\n")
    assert verify(root).exit_code == 1
    with pytest.raises(IntegrityError, match="not the class inventory that the manifest names"):
        read_everything(root)


def test_verify_names_the_bad_shard_alone(root: Path) -> None:
    bad = next(path for path in files_of(root / "shards") if "000001-" in str(path))
    bad.write_bytes(bad.read_bytes() + b"\0")
    result = verify(root)
    assert "1 problem" in result.stderr
    assert "shard 1: " in result.stderr
    assert "shard 0: " not in result.stderr
