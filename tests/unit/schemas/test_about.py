"""What is said of a dataset beside its labels: the description, the software, and that it is deprecated."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from softlabel_schemas import IntegrityError, open_dataset
from softlabel_schemas.about import About, Description, begin_about, read_about, write_about
from softlabel_schemas.cli import main
from softlabel_schemas.deprecation import read_deprecation
from softlabel_schemas.digest import seal
from softlabel_schemas.gc import find_garbage
from softlabel_schemas.manifest import to_bytes
from softlabel_schemas.names import tag, wanted_address
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.strict import parse
from softlabel_schemas.version import SOFTWARE
from tests.support.datasets import Written, write_dataset

DESCRIPTION = Description(title="Read speech", owner="speech team", licence="CC-BY-4.0", languages=("en", "pt-BR"))


def softlabels(*args: str) -> Result:
    return CliRunner().invoke(main, args)


@pytest.fixture
def written(tmp_path: Path) -> Written:
    return write_dataset(str(tmp_path / "labels"), shard_format="parquet", num_shards=1)


def test_the_description_may_change_and_the_software_stays(written: Written) -> None:
    store = ObjectStore(written.url)
    assert read_about(store) is None
    store.put("about.json", to_bytes(About(software="essence-distill 0.0.1", description=DESCRIPTION)))
    other = DESCRIPTION.model_copy(update={"text": "Line one.\n\nLine two."})
    write_about(store, other)
    assert read_about(store) == About(software="essence-distill 0.0.1", description=other)
    assert open_dataset(written.url).manifest == written.manifest
    assert softlabels("verify", written.url).exit_code == 0
    assert not find_garbage(store).garbage


def test_a_description_is_given_afterwards(written: Written, tmp_path: Path) -> None:
    (tmp_path / "description.toml").write_text('title = "Read speech"\nlicence = "CC0-1.0"\n')
    result = softlabels("about", written.url, str(tmp_path / "description.toml"))
    assert (result.exit_code, result.stdout) == (0, f"{written.url}: described as Read speech\n")
    # What made the labels is not known by now.
    assert read_about(ObjectStore(written.url)) == About(
        description=Description(title="Read speech", licence="CC0-1.0")
    )
    (tmp_path / "description.toml").write_text('titel = "Read speech"\n')
    refused = softlabels("about", written.url, str(tmp_path / "description.toml"))
    assert (refused.exit_code, "did you mean 'title'?" in refused.stderr) == (2, True)


def test_describe_says_it(written: Written) -> None:
    write_about(ObjectStore(written.url), DESCRIPTION)
    facts = json.loads(softlabels("describe", written.url, "--json").stdout)
    assert {name: facts[name] for name in ("software", "title", "licence", "languages")} == {
        "software": SOFTWARE,
        "title": "Read speech",
        "licence": "CC-BY-4.0",
        "languages": ["en", "pt-BR"],
    }
    assert "deprecated" not in facts
    write_about(ObjectStore(written.url), Description(text="one\ntwo"))
    (line,) = [line for line in softlabels("describe", written.url).stdout.splitlines() if line.startswith("text ")]
    assert line.split(maxsplit=1)[1] == '"one\\ntwo"'


@pytest.mark.parametrize(
    "fields",
    [
        {"title": "two\nlines"},
        {"owner": "\x1b[31mred"},
        {"licence": ""},
        {"languages": ["English"]},
        {"text": "x" * 20_001},
        {"restrictions": "one\n\x1b[2Jtwo"},
        {"author": "me"},
    ],
)
def test_a_bad_description(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="the description is not valid"):
        parse(Description, fields, where="the description")


def test_a_damaged_document_is_an_error(written: Written) -> None:
    for name, read in (("about.json", read_about), ("deprecated.json", read_deprecation)):
        store = ObjectStore(written.url)
        store.put(name, b'{"body":{"reason":"x"},"sha256":"' + b"0" * 64 + b'"}')
        with pytest.raises(IntegrityError, match=name):
            read(store)


def test_one_of_a_newer_writer_is_left_out_and_nothing_else(written: Written, tmp_path: Path) -> None:
    said = {"description": {"languages": [], "homepage": "https://host"}, "software": "essence-distill 99"}
    ObjectStore(written.url).put("about.json", seal(said))
    unknown = "about.json is not valid:\n  description.homepage: unknown key 'homepage'"
    described = softlabels("describe", written.url, "--json")
    assert json.loads(described.stdout)["content_digest"] == written.manifest.content_digest
    pulled = softlabels("pull", written.url, str(tmp_path / "some"), "--shards", "0")
    assert read_about(ObjectStore(tmp_path / "some")) == About()
    card = softlabels("card", written.url)
    assert "# labels" in card.stdout
    for result in (described, pulled, card):
        assert result.exit_code == 0, result.stderr
        assert result.stderr.startswith("warning: the description of the dataset is left out: ")
        assert unknown in result.stderr.replace("\\n", "\n")
    (entry,) = json.loads(softlabels("catalog", written.url, "--json").stdout)["datasets"]
    assert (entry["state"], entry["description"]) == ("published", {})
    assert entry["facts"]["content_digest"] == written.manifest.content_digest
    assert f"published: {entry['problem']}" in softlabels("catalog", written.url).stdout
    assert unknown in entry["problem"].replace("\\n", "\n")


def test_a_source_that_fails_does_not_claim_the_output(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(store: ObjectStore) -> About:
        raise OSError(store.url)

    monkeypatch.setattr("softlabel_schemas.subset.read_about_or_warn", fail)
    assert softlabels("pull", written.url, str(tmp_path / "some"), "--shards", "0").exit_code == 2
    assert not (tmp_path / "some").exists()


def test_a_deprecated_dataset_is_readable_and_says_so(written: Written) -> None:
    noted = softlabels("deprecate", written.url, "--reason", "wrong lexicon", "--use", "s3://bucket/team#english:2")
    sentence = f"{written.url} is deprecated: wrong lexicon; use s3://bucket/team#english:2\n"
    assert (noted.exit_code, noted.stdout) == (0, sentence)
    described = softlabels("describe", written.url, "--json")
    assert described.stderr == f"warning: {sentence}"
    notice = {"reason": "wrong lexicon", "use": "s3://bucket/team#english:2"}
    assert json.loads(described.stdout)["deprecated"] == notice
    verified = softlabels("verify", written.url)
    assert verified.exit_code == 0
    assert verified.stderr.startswith(f"warning: {sentence}")
    assert not find_garbage(ObjectStore(written.url)).garbage
    assert softlabels("deprecate", written.url, "--reason", "withdrawn by the speakers").exit_code == 0
    assert softlabels("describe", written.url).stderr.endswith("is deprecated: withdrawn by the speakers\n")


@pytest.mark.parametrize(
    "notice",
    [
        seal({"reason": "old", "severity": "high"}),
        b'{"reason": "old"}',
        seal({"reason": "old"})[:-20],
        b"",
        bytes(1 << 17),
        seal({"reason": "old", "\U000e0001" * 500: 1}),
    ],
    ids=["newer", "by hand", "truncated", "empty", "long", "hostile"],
)
def test_a_notice_that_cannot_be_read_is_a_warning(written: Written, tmp_path: Path, notice: bytes) -> None:
    ObjectStore(written.url).put("deprecated.json", notice)
    described = softlabels("describe", written.url, "--json")
    for result in (
        described,
        softlabels("verify", written.url),
        softlabels("pull", written.url, str(tmp_path / "some"), "--shards", "0"),
    ):
        assert result.exit_code == 0, result.stderr
        assert result.stderr.startswith(f"warning: {written.url} is deprecated: its notice cannot be read: ")
    twice = softlabels("combine", written.url, written.url, "--top-k", "4", "--output", str(tmp_path / "both"))
    assert "error: the same labels are given twice" in twice.stderr
    reason = json.loads(described.stdout)["deprecated"]["reason"]
    assert reason.startswith("its notice cannot be read: deprecated.json")
    (entry,) = json.loads(softlabels("catalog", written.url, "--json").stdout)["datasets"]
    assert (entry["state"], entry["problem"]) == ("published", None)
    assert entry["deprecated"] == {"reason": reason}
    assert "This dataset is deprecated: its notice cannot be read: " in softlabels("card", written.url).stdout


def test_on_a_disk_a_document_that_may_not_be_read_is_there_all_the_same(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a colleague's with a strict umask. (The tests may run as root, who may read all.)"""
    store = ObjectStore(written.url)
    write_about(store, DESCRIPTION)
    about = store.read("about.json")
    store.put("deprecated.json", seal({"reason": "old"}))
    read = ObjectStore.read

    def refused(self: ObjectStore, key: str, *, max_bytes: int | None = None) -> bytes:
        if key in ("about.json", "deprecated.json"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), f"{self.url}/{key}")
        return read(self, key, max_bytes=max_bytes)

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "read", refused)
        described = softlabels("describe", written.url)
        assert "is deprecated: its notice cannot be read: " in described.stderr
        assert "Permission denied" in described.stderr
        pulled = softlabels("pull", written.url, str(tmp_path / "some"), "--shards", "0")
        assert pulled.exit_code == 0, pulled.stderr
        assert "warning: the description of the dataset is left out: " in pulled.stderr
        (entry,) = json.loads(softlabels("catalog", written.url, "--json").stdout)["datasets"]
        assert entry["state"] == "published"
        for replace in (begin_about, write_about):
            with pytest.raises(PermissionError):
                replace(store, Description(title="Another"))
    assert store.read("about.json") == about


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--reason", "one\nline"], "expected one line of printable text"),
        (["--reason", "old", "--use", "s3://key:secret@bucket/labels"], "the s3:// URL holds a credential"),
    ],
)
def test_bad_notices(written: Written, args: list[str], message: str) -> None:
    result = softlabels("deprecate", written.url, *args)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "secret" not in result.stderr
    assert read_deprecation(ObjectStore(written.url)) is None


def test_what_to_use_instead(written: Written, tmp_path: Path) -> None:
    """Not the dataset itself, under whatever name; that it is not there may be its reader's to mend."""
    tag(written.url, wanted_address(f"{tmp_path}#english"))
    for use in (written.url, f"{tmp_path}#english", f"{tmp_path}#english:1"):
        refused = softlabels("deprecate", written.url, "--reason", "old", "--use", use)
        assert (refused.exit_code, f"{written.url} itself" in refused.stderr) == (2, True)
    assert read_deprecation(ObjectStore(written.url)) is None
    noted = softlabels("deprecate", written.url, "--reason", "old", "--use", str(tmp_path / "yet-to-come"))
    assert noted.exit_code == 0
    assert f"warning: --use {tmp_path}/yet-to-come cannot be opened here: " in noted.stderr
    resolved = softlabels("resolve", f"{tmp_path}#english")
    assert resolved.stderr == f"warning: {written.url} is deprecated: old; use {tmp_path}/yet-to-come\n"


def test_only_a_published_dataset_is_deprecated(tmp_path: Path) -> None:
    result = softlabels("deprecate", str(tmp_path / "nothing"), "--reason", "old")
    assert result.exit_code == 2
    assert "is not a published dataset" in result.stderr
    assert not (tmp_path / "nothing").exists()
