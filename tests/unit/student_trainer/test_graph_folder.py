"""The folder of a graph: read back, and refused where it does not fit or is damaged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from softlabel_schemas import ClassInventory, InputError, IntegrityError, load_corpus, write_corpus
from student_trainer.decode import Decoder, DecoderSettings
from student_trainer.graph_folder import load_graph, make_graph
from tests.support.speech import FRAME_SHIFT_MS, INVENTORY
from tests.support.words import log_probs, write_graph

SETTINGS = DecoderSettings(acoustic_scale=1.0, prior_exponent=0.5, word_insertion_penalty=0.5)


@pytest.mark.parametrize("ngram_order", [1, 2, 3])
def test_what_is_read_decodes_as_what_was_made(tmp_path: Path, ngram_order: int) -> None:
    made = write_graph(tmp_path, ["AH SEE", "SEE AB", "AH SEE AB"], ngram_order=ngram_order)
    read = load_graph(made.path, INVENTORY)
    assert (read.description, read.words) == (made.description, ("AB", "AH", "SEE"))
    assert (read.description.ngram_order, read.description.splits) == (ngram_order, ("train",))
    frames = log_probs("aa.cc.ab")
    assert Decoder(read, SETTINGS).decode(frames) == Decoder(made, SETTINGS).decode(frames)
    assert Decoder(read, SETTINGS).decode(frames).words == ("AH", "SEE", "AB")


def test_the_same_input_gives_the_same_graph(tmp_path: Path) -> None:
    first, second = (write_graph(tmp_path / name, ["AH SEE", "SEE AB"]) for name in ("a", "b"))
    assert first.description.digest() == second.description.digest()
    other = write_graph(tmp_path / "c", ["AH SEE", "SEE AH"])
    assert other.description.digest() != first.description.digest()


def test_one_word_is_enough(tmp_path: Path) -> None:
    graph = write_graph(tmp_path, ["CAB"])
    assert Decoder(graph, SETTINGS).decode(log_probs(".ccaab.")).words == ("CAB",)


def test_only_words_of_the_transcripts_are_in_the_graph(tmp_path: Path) -> None:
    assert write_graph(tmp_path, ["BEE SEE"]).words == ("BEE", "SEE")


def test_refusals_when_it_is_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no pronunciation of 1 of the 2 words in the training transcripts: ZEBRA"):
        write_graph(tmp_path / "a", ["AH ZEBRA"])
    with pytest.raises(InputError, match=r"line 1: the class inventory has no phone 'sil'"):
        write_graph(tmp_path / "b", ["AH"], lexicon="AH sil\n")
    assert not (tmp_path / "a" / "graph").exists()
    write_graph(tmp_path / "c", ["AH"])
    with pytest.raises(InputError, match="graph holds a decoding graph already"):
        write_graph(tmp_path / "c", ["AH"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": None}, "utterance utt-0 has no text"),
        ({"text": " "}, "the training transcripts hold no words"),
        ({"hard_labels": None}, "no frame has a hard label"),
    ],
)
def test_utterances_without_words_or_labels(tmp_path: Path, change: dict[str, None], message: str) -> None:
    write_graph(tmp_path, ["AH"])
    manifest = tmp_path / "corpus.parquet"
    (utterance,) = load_corpus(manifest)
    write_corpus(
        manifest, [replace(utterance, **change)], inventory=INVENTORY, hard_label_frame_shift_ms=FRAME_SHIFT_MS
    )
    with pytest.raises(InputError, match=message):
        make_graph(
            str(manifest), ["train"], str(tmp_path / "lexicon.txt"), INVENTORY, str(tmp_path / "g"), ngram_order=2
        )


def test_refusals_when_it_is_read(tmp_path: Path) -> None:
    path = write_graph(tmp_path, ["AH SEE"]).path
    other = ClassInventory(names=INVENTORY.names, phones=INVENTORY.phones)
    with pytest.raises(
        InputError, match=f"made for the class inventory {INVENTORY.digest()[:12]}.*{other.digest()[:12]}"
    ):
        load_graph(path, other)
    with pytest.raises(InputError, match=r"nowhere holds no decoding graph; make it with: student-trainer graph"):
        load_graph(str(tmp_path / "nowhere"), INVENTORY)


@pytest.mark.parametrize("name", ["HLG.fst", "words.txt"])
def test_damaged_files_are_noticed(tmp_path: Path, name: str) -> None:
    path = write_graph(tmp_path, ["AH SEE"]).path
    file = Path(path) / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(IntegrityError, match=rf"{name} has sha256 \w+, expected \w+; make the graph again"):
        load_graph(path, INVENTORY)
    file.unlink()
    with pytest.raises(IntegrityError, match=f"{name} is missing"):
        load_graph(path, INVENTORY)


def test_a_damaged_description(tmp_path: Path) -> None:
    path = write_graph(tmp_path, ["AH SEE"]).path
    (Path(path) / "graph.json").write_text("{")
    with pytest.raises(IntegrityError, match=r"graph\.json cannot be read"):
        load_graph(path, INVENTORY)
