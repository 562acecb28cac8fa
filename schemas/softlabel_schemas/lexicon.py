"""The pronunciation lexicon: words and the phones of the class inventory that they are made of.

One pronunciation a line, the word first, as in the CMU Pronouncing Dictionary::

    ABOUT   AH0 B AW1 T
    READ    R EH1 D
    READ(2) R IY1 D

A word may stand on several lines, with or without a number in brackets. A phone that the inventory does not know is looked
for without its stress mark (``AH0`` -> ``AH``).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from softlabel_schemas.digest import sha256_hex
from softlabel_schemas.errors import InputError
from softlabel_schemas.imported import text_of

Pronunciation = tuple[str, ...]
_VARIANT = re.compile(r"\(\d+\)$")
_STRESS = re.compile(r"[0-9]$")
_COMMENT = ";;;"
_NUM_NAMED = 10


@dataclass(frozen=True, slots=True)
class Lexicon:
    """``pronunciations``: of each word, distinct, in the order of the file. ``digest``: sha256 of the file."""

    path: str
    pronunciations: Mapping[str, tuple[Pronunciation, ...]]
    digest: str

    def of_words(self, words: Collection[str]) -> dict[str, tuple[Pronunciation, ...]]:
        """Pronunciations of ``words``, sorted by word. Raises InputError for words that have none; names them."""
        missing = sorted(set(words) - set(self.pronunciations))
        if missing:
            raise InputError(
                f"{self.path} has no pronunciation of {len(missing)} of the {len(set(words))} words in the training "
                f"transcripts: {_some(missing)}; add them to the lexicon"
            )
        return {word: self.pronunciations[word] for word in sorted(set(words))}


def load_lexicon(path: str | Path, phones: Collection[str]) -> Lexicon:
    """Read a lexicon whose phones are ``phones``, with or without stress marks.

    Raises:
        InputError: the file does not exist or is not UTF-8 text; a line has no phones, or one that is not in ``phones``.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError(f"lexicon {path} does not exist") from None
    lines = text_of(data, f"lexicon {path}").splitlines()
    found: dict[str, dict[Pronunciation, None]] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip() and not line.startswith(_COMMENT):
            word, *spoken = line.split()
            if not spoken:
                raise InputError(f"{path}, line {number}: '{word}' has no phones; expected a word and its phones")
            pronunciation = tuple(_known(phone, phones, where=f"{path}, line {number}") for phone in spoken)
            found.setdefault(_VARIANT.sub("", word), {})[pronunciation] = None
    return Lexicon(str(path), {word: tuple(variants) for word, variants in found.items()}, sha256_hex(data))


def _known(phone: str, phones: Collection[str], *, where: str) -> str:
    unstressed = _STRESS.sub("", phone)
    for name in (phone, unstressed):
        if name in phones:
            return name
    raise InputError(
        f"{where}: the class inventory has no phone '{phone}'; its phones, silence apart, are {' '.join(sorted(phones))}"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NUM_NAMED]) + (", ..." if len(names) > _NUM_NAMED else "")
