"""``softlabels catalog --html``: structure, escaping and links of the pages, and in a real browser contrast and keyboard."""

from __future__ import annotations

import html.parser
import itertools
import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from click.testing import CliRunner

from softlabel_schemas.cli import main
from softlabel_schemas.sampled_shards import evenly_spaced, share_of
from tests.support.browser import CHROMIUM, dump_dom, probe
from tests.support.shared import HOSTILE, write_prefix
from tests.support.trees import tree


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_prefix(tmp_path_factory.mktemp("prefix") / "team")


@pytest.fixture(scope="module")
def pages(prefix: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By dataset; ``index`` too."""
    folder = tmp_path_factory.mktemp("pages") / "catalogue"
    result = CliRunner().invoke(main, ["catalog", prefix, "--html", str(folder)])
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, f"wrote 4 pages to {folder}")
    return {re.sub(r"(-[0-9a-f]{8})?\.html$", "", path.name): path for path in folder.iterdir()}


class Page(html.parser.HTMLParser):
    """Start tags with their attributes, the levels of headings, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag in tags]


NAMES = ["index", "labels-1", "labels-2", "deep-er-labels-3"]


@pytest.mark.parametrize("name", NAMES)
def test_structure(pages: dict[str, Path], name: str) -> None:
    text = pages[name].read_text(encoding="utf-8")
    page = Page(text)
    assert page.of("html") == [{"lang": "en"}]
    (policy,) = [each["content"] for each in page.of("meta") if each.get("http-equiv")]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(following <= level + 1 for level, following in itertools.pairwise(levels))
    for landmark in ("header", "main", "footer"):
        assert len(page.of(landmark)) == 1
    assert page.of("main") == [{"id": "content"}]
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for attributes in [attributes for _, attributes in page.tags]:
        for label in (attributes.get("aria-labelledby") or "").split():
            assert label in ids
    # Cells have headers, and pictures have words.
    assert all(each.get("scope") in ("col", "row") for each in page.of("th"))
    assert all(each["role"] == "img" and each["aria-labelledby"] for each in page.of("svg"))
    assert len(page.of("svg")) == (0 if name == "index" else 3)


@pytest.mark.parametrize("name", NAMES)
def test_no_script_no_request_and_every_link_leads_somewhere(pages: dict[str, Path], name: str) -> None:
    page = Page(pages[name].read_text(encoding="utf-8"))
    assert not page.of("script", "img", "link", "iframe", "object", "embed", "form", "base")
    assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on") or key == "src"]
    links = [str(each["href"]) for each in page.of("a")]
    assert links[0] == "#content"
    for link in links[1:]:
        assert not urlsplit(link).scheme
        assert (pages[name].parent / link).is_file()
    assert len(links) == (4 if name == "index" else 2)


def test_the_index_names_everything(pages: dict[str, Path], prefix: str) -> None:
    text = Page(pages["index"].read_text(encoding="utf-8")).text
    for wanted in ("Read speech", "english:1", "speech team", "CC-BY-4.0", "top_k: k 8", "begun", "broken"):
        assert wanted in text
    assert "not finished: 1 of 2 shards are committed" in text
    # As it was typed, thrice: title, owner, corpus, licence, and in the notice of another dataset.
    assert text.count(HOSTILE) == 5


def test_a_page_has_the_card_and_the_notice(pages: dict[str, Path], prefix: str) -> None:
    text = Page(pages["labels-2"].read_text(encoding="utf-8")).text
    assert f"deprecated: wrong lexicon {HOSTILE}; use {prefix}#english:1" in text
    described = Page(pages["labels-1"].read_text(encoding="utf-8")).text
    for wanted in (
        "Not for telling speakers apart.",
        "open_dataset",
        "Kept mass",
        "1. no list\n- nor here | *not bold* <b>",
    ):
        assert wanted in described
    assert Page(pages["deep-er-labels-3"].read_text(encoding="utf-8")).text.count(HOSTILE) >= 6


def test_the_same_datasets_give_the_same_bytes(pages: dict[str, Path], prefix: str, tmp_path: Path) -> None:
    CliRunner().invoke(main, ["catalog", prefix, "--html", str(tmp_path / "again")])
    assert tree(tmp_path / "again") == tree(pages["index"].parent)


@pytest.mark.skipif(not CHROMIUM.is_file(), reason="no Chromium: apt-get install chromium")
def test_in_a_browser(pages: dict[str, Path], tmp_path: Path) -> None:
    # The hostile page as the browser has it: nothing ran, nothing became an element.
    page = Page(dump_dom(pages["deep-er-labels-3"], tmp_path / "profile"))
    assert not page.of("script", "img")
    assert HOSTILE in page.text
    for name, dark in (("index", True), ("labels-2", False)):
        found = probe(pages[name], tmp_path, dark=dark)
        low = [(contrast, text) for contrast, text in found["contrasts"] if contrast < 4.5]
        assert len(found["contrasts"]) > 20
        assert low == []
        # The skip link comes first; all are reached, and each says what it is.
        assert found["focusable"][0][1] == "Skip to the content"
        assert all(label and reached for _, label, reached in found["focusable"])
        assert len(found["focusable"]) == (5 if name == "index" else 3)
        # Wide tables and code scroll by themselves, the page does not.
        assert found["width"] <= found["window"]


@pytest.mark.parametrize(
    ("num_shards", "num_wanted", "expected"),
    [(0, 8, []), (3, 8, [0, 1, 2]), (10, 1, [5]), (10, 2, [2, 7]), (9, 3, [1, 4, 7])],
)
def test_shards_that_stand_for_all(num_shards: int, num_wanted: int, expected: list[int]) -> None:
    assert evenly_spaced(num_shards, num_wanted) == expected


def test_a_share_is_at_least_one() -> None:
    assert [share_of(count, 0.01) for count in (0, 1, 100, 101, 1000)] == [0, 1, 1, 2, 10]
