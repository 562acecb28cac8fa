"""``softlabels catalog`` and ``card``: what is found, what is said of it, and that people's text stays text."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from markdown_it import MarkdownIt

from softlabel_schemas import open_dataset
from softlabel_schemas.cli import main
from softlabel_schemas.describe import codec_kl, selection_words
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.selection import ByteBudget, Mass, RandomSampling
from tests.support.datasets import CODECS, NUM_CLASSES, write_dataset
from tests.support.members import member_rows, write_member
from tests.support.shared import DESCRIPTION, HOSTILE, write_prefix
from tests.support.targets import random_targets
from tests.support.trees import tree


def softlabels(*args: str) -> Result:
    return CliRunner().invoke(main, args)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_prefix(tmp_path_factory.mktemp("prefix") / "team")


def test_every_dataset_is_found_and_says_what_it_is(prefix: str) -> None:
    before = tree(Path(prefix))
    found = json.loads(softlabels("catalog", prefix, "--json").stdout)
    entries = {entry["path"]: entry for entry in found["datasets"]}
    assert {path: (entry["state"], entry["names"]) for path, entry in entries.items()} == {
        "begun": ("unfinished", []),
        "broken": ("damaged", []),
        "deep/er/labels-3": ("published", []),
        "labels-1": ("published", ["english:1"]),
        "labels-2": ("published", ["english:2"]),
    }
    assert entries["begun"]["problem"] == "not finished: 1 of 2 shards are committed"
    assert "manifest.json" in entries["broken"]["problem"]
    assert entries["labels-1"]["description"] == DESCRIPTION.model_dump(mode="json")
    assert entries["labels-2"]["deprecated"]["use"] == f"{prefix}#english:1"
    assert entries["labels-1"]["deprecated"] is None
    manifest = open_dataset(f"{prefix}/labels-2").manifest
    assert entries["labels-2"]["facts"]["content_digest"] == manifest.content_digest
    assert found["problems"] == []
    assert tree(Path(prefix)) == before


def test_a_folder_whose_name_is_no_utf_8(tmp_path: Path) -> None:
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/team/caf\xe9")
    write_dataset(folder, shard_format="parquet")
    pages = tmp_path / "pages"
    for args in (("card", folder), ("describe", folder), ("catalog", f"{tmp_path}/team", "--html", str(pages))):
        result = softlabels(*args)
        assert (result.exit_code, result.exception) == (0, None)
    assert "caf\\udce9" in softlabels("describe", folder).stdout
    assert len(list(pages.glob("caf-*.html"))) == 1


def test_a_folder_whose_name_is_no_url(tmp_path: Path) -> None:
    write_dataset(f"{tmp_path}/good", shard_format="parquet")
    for path in ("old::labels", "::home/names"):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "old::labels" / "spec.json").write_text("{}")
    found = json.loads(softlabels("catalog", str(tmp_path), "--json").stdout)
    assert [(entry["path"], entry["state"]) for entry in found["datasets"]] == [
        ("good", "published"),
        ("old::labels", "unreadable"),
    ]
    for problem, path in ((found["datasets"][1]["problem"], "old::labels"), (found["problems"][0], "::home")):
        assert problem.startswith(f"cannot use the URL {tmp_path}/{path}: ")


def test_folders_that_are_too_deep_are_a_problem_of_the_catalogue(tmp_path: Path) -> None:
    write_dataset(str(tmp_path.joinpath(*"abcdefghijklm", "labels")), shard_format="parquet")
    found = json.loads(softlabels("catalog", str(tmp_path), "--json").stdout)
    assert found["datasets"] == []
    assert found["problems"] == [
        f"{tmp_path}/a/b/c/d/e/f/g/h/i/j/k/l: the folders in it are not looked into, 12 levels below {tmp_path}"
    ]
    write_dataset(str(tmp_path.joinpath(*"abcdefghijk", "labels")), shard_format="parquet")
    assert len(json.loads(softlabels("catalog", str(tmp_path), "--json").stdout)["datasets"]) == 1


def test_settings_are_said_as_they_are() -> None:
    assert selection_words(RandomSampling(draws=50, seed=20_261_128)) == "random_sampling: draws 50, seed 20261128"
    assert selection_words(Mass(mass=0.9999999, max_entries=20)) == "mass: mass 0.9999999, max_entries 20"
    assert (
        selection_words(ByteBudget(bytes_per_frame=8, max_entries=20))
        == "byte_budget: bytes_per_frame 8, max_entries 20"
    )


def test_a_card_has_nothing_that_a_terminal_obeys(tmp_path: Path) -> None:
    url = write_member(tmp_path / "labels", member_rows(1), name="tdnn\x1b]0;owned\x07")
    result = softlabels("card", url)
    assert result.exit_code == 0
    assert "owned" in result.stdout
    assert not {"\x1b", "\x07"} & set(result.stdout)


def test_the_text(prefix: str) -> None:
    result = softlabels("catalog", prefix)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert "labels-1  (english:1)" in lines
    assert "  owner     speech team" in lines
    assert "  state     published" in lines
    assert "  state     not finished: 1 of 2 shards are committed" in lines
    assert any(line.startswith("  state     damaged: ") and "manifest.json" in line for line in lines)
    assert f"  state     deprecated: wrong lexicon {HOSTILE}; use {prefix}#english:1" in lines
    assert "  selection top_k: k 8" in lines
    assert lines[-1] == f"{prefix}: 5 datasets"


def test_a_prefix_of_an_object_store(new_url: Callable[[str], str]) -> None:
    base = new_url("memory")
    # A URL that would be a name, if it were not walked to.
    write_dataset(f"{base}/a/labels#1", shard_format="parquet", num_shards=1)
    write_dataset(f"{base}/b", shard_format="zarr", num_shards=1)
    found = json.loads(softlabels("catalog", base, "--json").stdout)
    states = [(entry["path"], entry["state"]) for entry in found["datasets"]]
    assert states == [("a/labels#1", "published"), ("b", "published")]
    assert ObjectStore(base).children("a/labels#1") == (
        ["commits", "index", "shards"],
        ["inventory.json", "manifest.json", "spec.json"],
    )


def test_a_dataset_and_nothing(prefix: str, tmp_path: Path) -> None:
    (only,) = json.loads(softlabels("catalog", f"{prefix}/labels-1", "--json").stdout)["datasets"]
    assert (only["path"], only["url"], only["state"]) == ("", f"{prefix}/labels-1", "published")
    assert softlabels("catalog", str(tmp_path)).stdout == f"{tmp_path}: 0 datasets\n"
    refused = softlabels("catalog", str(tmp_path / "nowhere"))
    assert (refused.exit_code, "nowhere is no folder" in refused.stderr) == (2, True)


def test_a_damaged_name_is_a_problem_of_the_catalogue(tmp_path: Path) -> None:
    write_dataset(str(tmp_path / "labels"), shard_format="parquet", num_shards=1)
    ObjectStore(tmp_path).put("names/english/1.json", b"{}")
    found = json.loads(softlabels("catalog", str(tmp_path), "--json").stdout)
    assert [entry["state"] for entry in found["datasets"]] == ["published"]
    assert "names/english/1.json: not a sealed JSON document" in found["problems"][0]


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Refuses what is at or under a path as a disk does, also to root, for whom permissions do not count."""

    def refuse(path: str) -> None:
        for name in ("ls", "open"):
            method = getattr(LocalFileSystem, name)

            def refusing(self: LocalFileSystem, asked: str, *args: Any, method: Any = method, **kwargs: Any) -> Any:
                if asked.rstrip("/") == path or asked.startswith(f"{path}/"):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), asked.rstrip("/"))
                return method(self, asked, *args, **kwargs)

            monkeypatch.setattr(LocalFileSystem, name, refusing)

    return refuse


def test_a_folder_that_cannot_be_read_is_a_problem_of_the_catalogue(
    prefix: str, unreadable: Callable[[str], None]
) -> None:
    before = json.loads(softlabels("catalog", prefix, "--json").stdout)
    refused = [f"{prefix}/deep/er", f"{prefix}/names/english/2.json"]
    for path in refused:
        unreadable(path)
    found = json.loads(softlabels("catalog", prefix, "--json").stdout)
    assert found["problems"] == [f"[Errno 13] Permission denied: '{path}'" for path in refused]
    states = [(entry["path"], entry["state"]) for entry in before["datasets"] if entry["path"] != "deep/er/labels-3"]
    assert [(entry["path"], entry["state"]) for entry in found["datasets"]] == states
    unreadable(prefix)
    nothing = softlabels("catalog", prefix)
    assert (nothing.exit_code, f"Permission denied: '{prefix}'" in nothing.stderr) == (2, True)


def test_a_dataset_that_cannot_be_read_is_an_entry(prefix: str, unreadable: Callable[[str], None]) -> None:
    path = f"{prefix}/labels-1/manifest.json"
    unreadable(path)
    found = json.loads(softlabels("catalog", prefix, "--json").stdout)
    entries = {entry["path"]: entry for entry in found["datasets"]}
    assert (entries["labels-1"]["state"], entries["labels-1"]["names"]) == ("damaged", ["english:1"])
    # And nothing of credentials, which a disk does not have.
    assert entries["labels-1"]["problem"] == f"[Errno 13] Permission denied: '{path}'"
    assert (entries["labels-2"]["state"], len(entries), found["problems"]) == ("published", 5, [])
    text = softlabels("catalog", prefix)
    assert (text.exit_code, f"damaged: [Errno 13] Permission denied: '{path}'" in text.stdout) == (0, True)


def test_a_store_that_refuses_says_what_to_do(new_url: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    base = new_url("memory")
    for name in ("a", "b"):
        write_dataset(f"{base}/{name}", shard_format="parquet", num_shards=1)
    read = MemoryFileSystem.cat_file

    def refusing(self: MemoryFileSystem, path: str, *args: Any, **kwargs: Any) -> Any:
        if path.endswith("/a/manifest.json"):
            raise PermissionError("AccessDenied")
        return read(self, path, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", refusing)
    first, second = json.loads(softlabels("catalog", base, "--json").stdout)["datasets"]
    assert (first["state"], second["state"]) == ("damaged", "published")
    assert f"{base}/a/manifest.json: access was refused (AccessDenied); credentials may be missing" in first["problem"]


def front_matter(text: str) -> dict[str, object]:
    _, block, _ = text.split("---\n", 2)
    lines = [line for line in block.splitlines() if not line.startswith("#")]
    return {name: json.loads(value) for name, value in (line.split(": ", 1) for line in lines)}


def test_the_card_begins_with_what_the_hub_reads(prefix: str, tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    assert softlabels("card", f"{prefix}#english:1", "--output", str(card)).stdout == f"wrote {card}\n"
    fields = front_matter(card.read_text())
    (config,) = fields.pop("configs")  # type: ignore[misc]
    assert fields == {
        "pretty_name": "Read speech",
        "license": "cc-by-4.0",
        "language": ["en", "pt"],
        "language_bcp47": ["pt-BR"],
        "task_categories": ["automatic-speech-recognition"],
        "tags": ["knowledge-distillation", "soft-labels", "speech"],
        "size_categories": ["n<1K"],
    }
    (files,) = config["data_files"]
    assert [(Path(prefix) / "labels-1" / path).is_file() for path in files["path"]] == [True, True]
    hub = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub")
    data = hub.DatasetCard(card.read_text()).data
    assert (data.license, data.pretty_name, data.configs) == ("cc-by-4.0", "Read speech", [config])


@pytest.mark.parametrize(
    ("licence", "fields"),
    [
        ("Our Own Terms, 2026", {"license": "other", "license_name": "our-own-terms-2026"}),
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("？", {"license": "other", "license_name": "other"}),
    ],
)
def test_licences(licence: str, fields: dict[str, str]) -> None:
    from softlabel_schemas.card import _licence

    assert _licence(licence) == fields


def test_the_card_of_many_shards_says_what_its_pattern_matches(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One by one up to a thousand; the pattern of more has what lost a race, too."""
    named = front_matter(softlabels("card", f"{prefix}#english:1").stdout)["configs"]
    assert "/*/" not in json.dumps(named)
    monkeypatch.setattr("softlabel_schemas.card._MAX_FILES", 0)
    card = softlabels("card", f"{prefix}#english:1").stdout
    assert "shards/*/shard.parquet" in json.dumps(front_matter(card)["configs"])
    (comment,) = [line for line in card.split("---\n")[1].splitlines() if line.startswith("#")]
    assert "'softlabels gc URL --delete'" in comment


def test_people_s_text_stays_text_in_the_card(prefix: str) -> None:
    for path in ("labels-1", "deep/er/labels-3", "labels-2"):
        body = softlabels("card", f"{prefix}/{path}", "--output", "-").stdout.split("---\n", 2)[2]
        page = MarkdownIt("commonmark", {"html": True}).enable("table").render(body)
        assert set(re.findall(r"<(\w+)", page)) <= {
            *("h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td", "pre", "code", "blockquote", "strong")
        }
        assert page.count("<h1>") == 1
        assert len(re.findall("<h2>", page)) == 6
    assert "# no heading\n1. no list\n- nor here | *not bold* &lt;b&gt;nor so&lt;/b&gt;" in MarkdownIt(
        "commonmark"
    ).render(softlabels("card", f"{prefix}/labels-1", "--output", "-").stdout)


def test_the_card_s_code_runs(prefix: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = softlabels("card", f"{prefix}/labels-1").stdout
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 5
    exec(code, {})
    assert "utt-" in capsys.readouterr().out


def test_no_card_of_what_is_not_published(prefix: str) -> None:
    result = softlabels("card", f"{prefix}/begun")
    assert result.exit_code == 2
    assert "is not a published dataset" in result.stderr


@pytest.mark.parametrize("codec", CODECS)
def test_what_the_codec_adds(codec: str, tmp_path: Path) -> None:
    """The stated divergence is that of decoded targets, within a factor of three either way."""
    import numpy as np

    from softlabel_schemas.shard import LabelledUtterance, UtteranceStats

    targets = random_targets(
        np.random.default_rng(0), num_frames=400, num_classes=NUM_CLASSES, temperatures=(1.0, 2.0, 4.0)
    )
    stats = UtteranceStats(kept_mass=0.0, entropy=0.0, agreement=0.0)
    row = LabelledUtterance(utterance_id="a", targets=targets, stats=stats)
    written = write_dataset(str(tmp_path / "labels"), shard_format="parquet", codec=codec, num_shards=1, rows=[row])
    decoded = open_dataset(written.url)["a"].targets
    p, q = (np.exp(each.log_probs.astype(np.float64)) for each in (targets, decoded))
    tails = targets.tail_mass[:, 0].astype(np.float64), decoded.tail_mass[:, 0].astype(np.float64)
    # Of unnormalised q: sum p ln(p / q) - p + q.
    kl = (p * np.log(p / q) - p + q).sum() + (
        np.where(tails[0] > 0, tails[0] * np.log(np.maximum(tails[0], 1e-30) / np.maximum(tails[1], 1e-30)), 0)
        - tails[0]
        + tails[1]
    ).sum()
    stated = codec_kl(codec, targets.num_entries / targets.num_frames)  # type: ignore[arg-type]
    assert stated / 3 < kl / targets.num_frames < 3 * stated or (stated == 0 and abs(kl) < 1e-9)
