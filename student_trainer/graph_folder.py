"""The folder of a decoding graph, made once for a corpus and a class inventory.

    graph/
      graph.json  digests of what it was made from and of the files beside it, phones and their priors
      HLG.fst     the graph, in OpenFst's binary form
      words.txt   one word a line: output label n is line n

``graph.json`` is written last: a folder that has one is whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import kaldifst
import numpy as np

from softlabel_schemas.corpus import Corpus, check_hard_labels, load_corpus
from softlabel_schemas.digest import canonical_json, parse_json, sha256_hex
from softlabel_schemas.errors import InputError, IntegrityError
from softlabel_schemas.inventory import ClassInventory
from softlabel_schemas.lexicon import load_lexicon
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.strict import StrictModel, parse
from student_trainer.graph import build_graph
from student_trainer.ngram import train_ngram
from student_trainer.phone_posteriors import PhoneColumns

DESCRIPTION, GRAPH, WORDS = "graph.json", "HLG.fst", "words.txt"


class GraphDescription(StrictModel):
    """``graph.json``.

    Attributes:
        text_digest: sha256 of the training transcripts, which a corpus digest leaves out.
        phones: columns of the acoustic scores (``PhoneColumns``).
        phone_priors: share of each phone in the hard labels of ``splits``, one added to each count.
        sha256: of the files beside it.
    """

    version: Literal[1] = 1
    inventory_digest: str
    lexicon_digest: str
    corpus_digest: str
    text_digest: str
    splits: tuple[str, ...]
    ngram_order: int
    min_phone_frames: int
    phones: tuple[str, ...]
    phone_priors: tuple[float, ...]
    sha256: dict[str, str]

    def digest(self) -> str:
        """Evaluations with the same digest were decoded with the same graph."""
        return sha256_hex(canonical_json(self.model_dump(mode="json")))


@dataclass(frozen=True, slots=True)
class DecodingGraph:
    path: str
    description: GraphDescription
    fst: kaldifst.StdVectorFst
    words: tuple[str, ...]
    columns: PhoneColumns


def make_graph(
    manifest: str,
    splits: Sequence[str],
    lexicon: str,
    inventory: ClassInventory,
    output: str,
    *,
    ngram_order: int = 2,
    min_phone_frames: int = 1,
) -> DecodingGraph:
    """Build a graph from the transcripts and the hard labels of ``splits`` and write its folder.

    Raises:
        InputError: the folder holds a graph already; an utterance has no transcript or no hard labels; the inventory names
            no phones; see also :func:`~softlabel_schemas.lexicon.load_lexicon` and ``Lexicon.of_words``.
    """
    store = ObjectStore(output)
    if store.exists(DESCRIPTION):
        raise InputError(f"{output} holds a decoding graph already; give another folder or delete this one")
    corpus = load_corpus(manifest).select_splits(splits)
    check_hard_labels(corpus, inventory, where=manifest)
    texts = transcripts(corpus, where=manifest)
    columns = PhoneColumns.of(inventory)
    found = load_lexicon(lexicon, columns.spoken)
    ngram = train_ngram((text.split() for text in texts.values()), ngram_order)
    pronunciations = found.of_words(ngram.words)
    fst = build_graph(pronunciations, ngram, columns.phones, columns.silence, min_phone_frames=min_phone_frames)
    words = tuple(ngram.words)
    store.put(WORDS, "".join(f"{word}\n" for word in words).encode())
    path = Path(output)
    if not fst.write(str(path / GRAPH)):
        raise InputError(f"{path / GRAPH} cannot be written; give a folder on a disk with room")
    description = GraphDescription(
        inventory_digest=inventory.digest(),
        lexicon_digest=found.digest,
        corpus_digest=corpus.digest,
        text_digest=sha256_hex(canonical_json(texts)),
        splits=tuple(splits),
        ngram_order=ngram_order,
        min_phone_frames=min_phone_frames,
        phones=columns.phones,
        phone_priors=_priors(corpus, columns, where=manifest),
        sha256={name: _file_digest(path / name) for name in (GRAPH, WORDS)},
    )
    store.put(DESCRIPTION, canonical_json(description.model_dump(mode="json")))
    return DecodingGraph(output, description, fst, words, columns)


def load_description(path: str) -> GraphDescription:
    """What a graph's folder says of it; its files are neither read nor checked. Raises InputError, IntegrityError."""
    try:
        data = parse_json(ObjectStore(path).read(DESCRIPTION))
    except FileNotFoundError:
        raise InputError(f"{path} holds no decoding graph; make it with: student-trainer graph") from None
    except ValueError as error:
        raise IntegrityError(f"{path}/{DESCRIPTION} cannot be read: {error}") from None
    return parse(GraphDescription, data, where=f"{path}/{DESCRIPTION}")


def load_graph(path: str, inventory: ClassInventory) -> DecodingGraph:
    """Read a graph's folder. Raises as :func:`check_graph`."""
    description, folder = check_graph(path, inventory), Path(path)
    words = tuple((folder / WORDS).read_text(encoding="utf-8").splitlines())
    fst = kaldifst.StdVectorFst.read(str(folder / GRAPH))
    return DecodingGraph(path, description, fst, words, PhoneColumns.of(inventory))


def check_graph(path: str, inventory: ClassInventory) -> GraphDescription:
    """What a graph's folder says of it, once its files are as it says.

    Raises:
        InputError: there is no graph, or it was made for another class inventory.
        IntegrityError: a file is missing, or is not what was written.
    """
    description = load_description(path)
    if description.inventory_digest != inventory.digest():
        raise InputError(
            f"{path} was made for the class inventory {description.inventory_digest[:12]}, the classes to decode are of "
            f"{inventory.digest()[:12]}; make a graph with this inventory"
        )
    folder = Path(path)
    for name in (GRAPH, WORDS):
        if not (folder / name).exists():
            raise IntegrityError(f"{folder / name} is missing; make the graph again")
        expected, found = description.sha256.get(name), _file_digest(folder / name)
        if found != expected:
            raise IntegrityError(f"{folder / name} has sha256 {found}, expected {expected}; make the graph again")
    return description


def transcripts(corpus: Corpus, *, where: str) -> dict[str, str]:
    """The text of each utterance by id. Raises InputError where one has none; names it."""
    texts: dict[str, str] = {}
    for utterance_id, text in zip(
        corpus.table["utterance_id"].to_pylist(), corpus.table["text"].to_pylist(), strict=True
    ):
        if text is None:
            raise InputError(
                f"{where}: utterance {utterance_id} has no text; words need the transcript of every utterance"
            )
        texts[utterance_id] = text
    return texts


def _priors(corpus: Corpus, columns: PhoneColumns, *, where: str) -> tuple[float, ...]:
    counts = np.zeros(len(columns.phones), dtype=np.int64)
    for utterance in corpus:
        if utterance.hard_labels is not None:
            counts += columns.count(utterance.hard_labels[utterance.hard_labels >= 0])
    if not counts.any():
        raise InputError(f"{where}: no frame has a hard label, and phone priors are counted from them")
    return tuple(((counts + 1) / (counts + 1).sum()).tolist())


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
