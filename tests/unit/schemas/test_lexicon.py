"""Reading a lexicon: stress marks, variants, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from softlabel_schemas import InputError
from softlabel_schemas.lexicon import load_lexicon

PHONES = ("AH", "B", "EH", "IY", "R", "D")


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "lexicon.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_variants_and_stress_marks(tmp_path: Path) -> None:
    path = write(tmp_path, ";;; a comment\nREAD\tR EH1 D\n\nREAD(2) R IY1 D\nREAD R EH0 D\nA  AH0\n")
    lexicon = load_lexicon(path, PHONES)
    # The third READ differs in stress alone.
    assert lexicon.pronunciations == {"READ": (("R", "EH", "D"), ("R", "IY", "D")), "A": (("AH",),)}
    assert list(lexicon.of_words(["READ", "A", "A"])) == ["A", "READ"]


def test_an_inventory_with_stress_marks_keeps_them(tmp_path: Path) -> None:
    assert load_lexicon(write(tmp_path, "A AH0\n"), ["AH0", "AH1", "AH"]).pronunciations == {"A": (("AH0",),)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A AH0\nREAD R EH1 T\n", "line 2: the class inventory has no phone 'T'; its phones, silence apart, are AH B"),
        ("A AH0\nREAD\n", "line 2: 'READ' has no phones; expected a word and its phones"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        load_lexicon(write(tmp_path, text), PHONES)


def test_a_lexicon_that_windows_wrote(tmp_path: Path) -> None:
    """With a byte order mark, and other ends of lines."""
    (tmp_path / "lexicon.txt").write_bytes("A AH0\r\nB B\r\n".encode("utf-8-sig"))
    assert list(load_lexicon(tmp_path / "lexicon.txt", PHONES).pronunciations) == ["A", "B"]


def test_words_without_a_pronunciation_are_named(tmp_path: Path) -> None:
    lexicon = load_lexicon(write(tmp_path, "A AH0\n"), PHONES)
    with pytest.raises(InputError, match="no pronunciation of 2 of the 3 words in the training transcripts: BE, RED;"):
        lexicon.of_words(["RED", "A", "BE", "BE"])


def test_files_that_are_no_lexicon(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere does not exist"):
        load_lexicon(tmp_path / "nowhere", PHONES)
    (tmp_path / "binary").write_bytes(b"A \xff\xfe")
    with pytest.raises(InputError, match="binary is not UTF-8 text"):
        load_lexicon(tmp_path / "binary", PHONES)
