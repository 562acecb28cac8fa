"""The repository's Markdown pages: their links, headings and code blocks, as a library of CommonMark reads them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

from tests.support.command_lines import ROOT

_FOLDERS = ("schemas", "teacher_service", "student_trainer", "deploy", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in _FOLDERS for page in (ROOT / folder).rglob("*.md"))])


def links(page: Path) -> list[str]:
    """Targets of links and pictures, in order."""
    inner = [child for token in _tokens(page) for child in token.children or ()]
    return [str(found) for child in inner for found in (child.attrs.get("href"), child.attrs.get("src")) if found]


def anchors(page: Path) -> set[str]:
    """What GitHub makes of headings: small letters, without punctuation, hyphens for spaces, and a number where one recurs."""
    found: set[str] = set()
    tokens = _tokens(page)
    for opening, heading in itertools.pairwise(tokens):
        if opening.type == "heading_open":
            text = "".join(child.content for child in heading.children or ())
            anchor = unique = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            number = 0
            while unique in found:
                number += 1
                unique = f"{anchor}-{number}"
            found.add(unique)
    return found


def fenced(page: Path, language: str) -> list[str]:
    """The code blocks in this language, in order."""
    return [block for found, block in blocks(page) if found == language]


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Language and text of each fenced code block, in order."""
    return ((token.info.strip(), token.content) for token in _tokens(page) if token.type == "fence")


def _tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))
