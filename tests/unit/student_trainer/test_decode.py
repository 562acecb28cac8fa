"""Known phones through small graphs: words, silence, homophones, beginnings of words, penalties, and errors counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from student_trainer.decode import Decoder, DecoderSettings, WordErrors
from student_trainer.graph_folder import DecodingGraph
from tests.support.words import PHONES, log_probs, write_graph

SENTENCES = ["AH SEE", "SEE AB", "ABBA", "BEE SEA", "BEE SEA AH"]


def settings(scale: float = 1.0, prior_exponent: float = 0.0, penalty: float = 0.0) -> DecoderSettings:
    return DecoderSettings(acoustic_scale=scale, prior_exponent=prior_exponent, word_insertion_penalty=penalty)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> DecodingGraph:
    return write_graph(tmp_path_factory.mktemp("graph"), SENTENCES)


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ("aaa..cc", "AH SEE"),
        # Silence between words is optional, at both ends and within a sentence.
        ("aaacc", "AH SEE"),
        ("..aaa...cc..", "AH SEE"),
        # One frame is enough for a phone.
        ("ac", "AH SEE"),
        # A word and one that begins with it.
        ("aabbaa", "ABBA"),
        # SEE and SEA sound alike: what was said before decides.
        ("bb.cc", "BEE SEA"),
        ("bbcc.aa", "BEE SEA AH"),
        ("ccaabb", "SEE AB"),
    ],
)
def test_known_phones_give_the_known_words(graph: DecodingGraph, frames: str, words: str) -> None:
    decoded = Decoder(graph, settings()).decode(log_probs(frames))
    assert (" ".join(decoded.words), decoded.finished) == (words, True)


def test_one_wrong_frame_is_overruled(graph: DecodingGraph) -> None:
    log_probs_TC = log_probs("aabbbaa", 0.7)
    log_probs_TC[3] = log_probs("c", 0.7)
    assert Decoder(graph, settings()).decode(log_probs_TC).words == ("ABBA",)


def test_a_decoder_keeps_nothing_of_the_utterance_before(graph: DecodingGraph) -> None:
    decoder = Decoder(graph, settings())
    for frames in ("aaacc", "bb.cc", "aaacc"):
        assert decoder.decode(log_probs(frames)) == Decoder(graph, settings()).decode(log_probs(frames))


def test_phones_have_a_shortest_duration(tmp_path: Path) -> None:
    """A single clear frame of b is no word where phones last two frames; silence may be as short as before."""
    one, two = (
        Decoder(write_graph(tmp_path / str(least), SENTENCES, min_phone_frames=least), settings()) for least in (1, 2)
    )
    assert one.decode(log_probs("aabccc")).words == ("AH", "BEE", "SEA")
    assert two.decode(log_probs("aabccc")).words == ("AH", "SEE")
    assert two.decode(log_probs("aabbb.ccc")).words == ("AH", "BEE", "SEA")


def test_silence_alone_is_no_words(graph: DecodingGraph) -> None:
    assert Decoder(graph, settings()).decode(log_probs("....")).words == ()


def test_without_frames_nothing_is_finished(graph: DecodingGraph) -> None:
    decoded = Decoder(graph, settings()).decode(np.zeros((0, 4), dtype=np.float32))
    assert (decoded.words, decoded.finished) == ((), False)


def test_half_a_word_gives_the_best_path_that_is_left(tmp_path: Path) -> None:
    """The only word has three phones, the utterance one frame, which cannot be silence."""
    decoder = Decoder(write_graph(tmp_path, ["CAB"]), settings())
    log_probs_TC = log_probs("c")
    log_probs_TC[:, PHONES.index("sil")] = -np.inf
    decoded = decoder.decode(log_probs_TC)
    assert not decoded.finished
    # The word is known by its first phone, as there is no other.
    assert decoded.words == ("CAB",)
    assert decoder.decode(log_probs("cab")).finished


def test_a_penalty_makes_fewer_words(graph: DecodingGraph) -> None:
    frames = log_probs("abacbabcab", 0.8)
    few, middle, many = (
        len(Decoder(graph, settings(penalty=penalty)).decode(frames).words) for penalty in (5.0, 0.0, -5.0)
    )
    assert few <= middle <= many
    assert few < many


def test_priors_raise_rare_phones(graph: DecodingGraph) -> None:
    """Classes are uniform in training: a and b have two each. Between a and c alike, the prior decides for c."""
    log_probs_TC = np.log(np.array([[0.45, 0.05, 0.45, 0.05]] * 3, dtype=np.float32))
    likelihood = Decoder(graph, settings(scale=4.0, prior_exponent=1.0)).decode(log_probs_TC).words
    opposite = Decoder(graph, settings(scale=4.0)).decode(log_probs_TC - np.float32([0, 0, 0.3, 0])).words
    assert likelihood in (("SEE",), ("SEA",))
    assert opposite == ("AH",)
    priors = dict(zip(graph.description.phones, graph.description.phone_priors, strict=True))
    # Five utterances: 10 frames of a and of b, 5 of c and of silence, and one added to each.
    assert priors == pytest.approx({"a": 11 / 34, "b": 11 / 34, "c": 6 / 34, "sil": 6 / 34})


def test_errors_by_hand(graph: DecodingGraph) -> None:
    """ZEBRA is not in the graph: it can only be an error."""
    texts = {"right": "BEE SEA AH", "wrong": "BEE ZEBRA AH AH", "empty": ""}
    errors = WordErrors(Decoder(graph, settings()), texts)
    heard = log_probs("bbcc.aa")
    assert errors.record("right", heard) == {
        "words": 3,
        "word_errors": 0,
        "oov_words": 0,
        "decoded": "BEE SEA AH",
        "decoding_finished": True,
    }
    # One substitution, one deletion; then three insertions.
    wrong, empty = errors.record("wrong", heard), errors.record("empty", heard)
    assert (wrong["words"], wrong["word_errors"], wrong["oov_words"]) == (4, 2, 1)
    assert (empty["words"], empty["word_errors"], empty["oov_words"]) == (0, 3, 0)
