"""Names of datasets: versions never change hands, nothing leads out of the prefix, other labels are noticed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from softlabel_schemas import InputError, IntegrityError, open_dataset
from softlabel_schemas.cli import main
from softlabel_schemas.digest import seal
from softlabel_schemas.names import Address, list_names, parse_address, resolve, tag, wanted_address
from softlabel_schemas.object_store import ObjectStore
from tests.support.datasets import Written, random_rows, write_dataset


def softlabels(*args: str) -> Result:
    return CliRunner().invoke(main, args)


def write(url: str, seed: int) -> Written:
    return write_dataset(url, shard_format="parquet", num_shards=1, rows=random_rows(seed))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("names")
    write(str(folder / "labels-1"), 1)
    write(str(folder / "old" / "labels-2"), 2)
    return folder


@pytest.fixture
def prefix(published: Path, tmp_path: Path) -> str:
    """Two datasets of different labels, the second one deeper; nothing has a name."""
    shutil.copytree(published, tmp_path / "team")
    return str(tmp_path / "team")


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("s3://bucket/team#english", Address(prefix="s3://bucket/team", name="english", version=None)),
        ("s3://bucket/team#english:12", Address(prefix="s3://bucket/team", name="english", version=12)),
        ("../labels#a#b:1", Address(prefix="../labels#a", name="b", version=1)),
        ("s3://bucket/team#1/", None),
        ("s3://bucket/team", None),
        ("labels#English", None),
        ("labels#a:0", None),
        ("labels#a:01", None),
        ("labels#../b", None),
        ("labels#a\n", None),
        ("#a", None),
    ],
)
def test_addresses(text: str, address: Address | None) -> None:
    assert parse_address(text) == address
    assert address is None or str(address) == text


def test_a_folder_that_is_there_is_no_name(tmp_path: Path) -> None:
    written = write(str(tmp_path / "labels#1"), 3)
    assert open_dataset(written.url).manifest == written.manifest


def test_a_url_that_looks_like_a_name(new_url: Callable[[str], str]) -> None:
    """A name comes first; where there is none, the dataset is read that always could be."""
    base = new_url("memory")
    literal, named = write(f"{base}/labels#english", 3), write(f"{base}/labels/1", 4)
    assert open_dataset(literal.url).manifest == literal.manifest
    tag(named.url, wanted_address(f"{base}/labels#english"))
    assert open_dataset(literal.url).manifest == named.manifest
    assert open_dataset(f"{literal.url}/").manifest == literal.manifest


@pytest.mark.parametrize("store", ["local", "memory"])
def test_versions_and_what_they_lead_to(new_url: Callable[[str], str], store: str) -> None:
    base = new_url(store)
    first, second = write(f"{base}/labels-1", 1), write(f"{base}/old/labels-2", 2)
    english = wanted_address(f"{base}#english")
    assert [tag(url, english).version for url in (first.url, second.url, second.url, first.url)] == [1, 2, 2, 3]
    for version, written in ((1, first), (2, second), (3, first)):
        found, record = resolve(wanted_address(f"{base}#english:{version}"))
        assert (found, record.content_digest) == (written.url, written.manifest.content_digest)
        assert open_dataset(f"{base}#english:{version}").manifest == written.manifest
    assert open_dataset(f"{base}#english").manifest == first.manifest
    assert [(each.name, each.version, each.path) for each in list_names(ObjectStore(base))] == [
        ("english", 1, "labels-1"),
        ("english", 2, "old/labels-2"),
        ("english", 3, "labels-1"),
    ]


def test_a_version_never_changes_hands(prefix: str) -> None:
    address = wanted_address(f"{prefix}#english:7")
    tag(f"{prefix}/labels-1", address)
    assert tag(f"{prefix}/labels-1", address).version == 7
    with pytest.raises(InputError, match=r"english:7 is taken \(labels-1, content digest .*never changes hands"):
        tag(f"{prefix}/old/labels-2", address)
    assert tag(f"{prefix}/old/labels-2", wanted_address(f"{prefix}#english")).version == 8


def test_writers_at_once_get_versions_of_their_own(prefix: str) -> None:
    urls = [f"{prefix}/labels-1", f"{prefix}/old/labels-2"] * 8
    with ThreadPoolExecutor(8) as pool:
        records = list(pool.map(lambda url: tag(url, wanted_address(f"{prefix}#english")), urls))
    stored = list_names(ObjectStore(prefix))
    assert [record.version for record in stored] == list(range(1, len(stored) + 1))
    assert {record.version: record for record in records} == {record.version: record for record in stored}


def test_only_what_is_published_under_the_prefix(prefix: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a published dataset"):
        tag(f"{prefix}/nothing", wanted_address(f"{prefix}#english"))
    with pytest.raises(InputError, match="is not under"):
        tag(f"{prefix}/labels-1", wanted_address(f"{prefix}/old#english"))
    # Another folder whose name begins alike.
    with pytest.raises(InputError, match="is not under"):
        tag(f"{prefix}/labels-1", wanted_address(f"{prefix}/label#english"))
    with pytest.raises(InputError, match="is not under"):
        tag(f"{prefix}/labels-1", wanted_address("memory://bucket#english"))


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("labels\u3000two", "path: it has U+3000, expected printable characters; rename the folder"),
        ("labels\u00a0two", "path: it has U+00A0, expected printable characters; rename the folder"),
        ("labels\\two", "path: it has a \\, which separates folders on some systems; rename the folder"),
        ("caf\udce9", "path: Input should be a valid string, unable to parse raw data as a unicode string, found"),
        ("/".join(["x" * 200] * 5), "path: String should have at most 1000 characters, found"),
    ],
)
def test_a_folder_that_cannot_have_a_name(prefix: str, folder: str, message: str) -> None:
    (Path(prefix) / folder).parent.mkdir(parents=True, exist_ok=True)
    shutil.move(f"{prefix}/labels-1", f"{prefix}/{folder}")
    refused = softlabels("tag", f"{prefix}/{folder}", f"{prefix}#english")
    assert refused.exit_code == 2
    assert f"is not valid:\n  {message}" in refused.stderr
    assert not (Path(prefix) / "names").exists()


def test_a_prefix_can_be_moved(prefix: str, tmp_path: Path) -> None:
    tag(f"{prefix}/old/labels-2", wanted_address(f"{prefix}#english"))
    digest = open_dataset(f"{prefix}#english").manifest.content_digest
    shutil.move(prefix, tmp_path / "moved")
    assert open_dataset(f"{tmp_path}/moved#english").manifest.content_digest == digest


def test_what_is_not_there(prefix: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"there is no {prefix}#english: no name was given under {prefix}")):
        open_dataset(f"{prefix}#english")
    tag(f"{prefix}/labels-1", wanted_address(f"{prefix}#english"))
    with pytest.raises(InputError, match=r"there is no .*#english:2: english has the versions 1"):
        open_dataset(f"{prefix}#english:2")
    with pytest.raises(InputError, match=r"there is no .*#german: the names there are english"):
        open_dataset(f"{prefix}#german")


def test_other_labels_at_that_place(prefix: str) -> None:
    tag(f"{prefix}/labels-1", wanted_address(f"{prefix}#english"))
    shutil.rmtree(f"{prefix}/labels-1")
    write(f"{prefix}/labels-1", 9)
    with pytest.raises(
        IntegrityError, match=r"english: version 1 was given to the labels .* the dataset was replaced there"
    ):
        open_dataset(f"{prefix}#english")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        *((path, "a part is empty, '.' or '..'") for path in ("../outside", "a/../../b", "/etc", "a//b", "a/./b", "")),
        ("a\\..\\b", "it has a \\,"),
        ("a\n", "it has U+000A,"),
    ],
)
def test_a_record_cannot_lead_out_of_the_prefix(tmp_path: Path, path: str, message: str) -> None:
    record = {"name": "english", "version": 1, "path": path, "content_digest": "0" * 64}
    ObjectStore(tmp_path).put("names/english/1.json", seal(record))
    with pytest.raises(IntegrityError, match=re.escape(f"1.json is not valid:\n  path: {message}")):
        open_dataset(f"{tmp_path}#english")


def test_a_record_of_another_name(prefix: str) -> None:
    tag(f"{prefix}/labels-1", wanted_address(f"{prefix}#english"))
    names = Path(prefix) / "names"
    (names / "german").mkdir()
    shutil.copy(names / "english" / "1.json", names / "german" / "1.json")
    with pytest.raises(IntegrityError, match="is the record of english:1"):
        open_dataset(f"{prefix}#german")


def test_the_commands(prefix: str) -> None:
    tagged = softlabels("tag", f"{prefix}/labels-1", f"{prefix}#english")
    digest = open_dataset(f"{prefix}/labels-1").manifest.content_digest
    line = f"{prefix}#english:1 is {prefix}/labels-1, content digest {digest}\n"
    assert (tagged.exit_code, tagged.stdout) == (0, line)
    assert softlabels("resolve", f"{prefix}#english").stdout == line
    assert json.loads(softlabels("resolve", f"{prefix}#english:1", "--json").stdout) == {
        "url": f"{prefix}/labels-1",
        "name": "english",
        "version": 1,
        "content_digest": digest,
    }
    assert softlabels("verify", f"{prefix}#english:1").exit_code == 0
    # A name stands for the dataset here too.
    assert softlabels("tag", f"{prefix}#english:1", f"{prefix}#stable").stdout.startswith(
        f"{prefix}#stable:1 is {prefix}/labels-1"
    )
    assert (
        softlabels("deprecate", f"{prefix}#stable", "--reason", "old").stdout
        == f"{prefix}/labels-1 is deprecated: old\n"
    )
    refused = softlabels("resolve", f"{prefix}/labels-1")
    assert refused.exit_code == 2
    assert "is not a name: expected PREFIX#NAME" in refused.stderr
