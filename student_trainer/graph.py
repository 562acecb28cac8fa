"""The decoding graph H.L.G: phones of frames in, words out, at the cost of the language model (tropical weights, nats).

::

    H  phones of frames, with a shortest duration     L  lexicon, silence optional between words     G  n-gram

After Mohri, Pereira and Riley, "Speech recognition with weighted finite-state transducers" (2008): L.G is determinised and
minimised, with disambiguation symbols (#0 for a back-off, #1, #2, ... after pronunciations that are the same or the
beginning of another, the last one after silence) that H then drops. Nothing is assumed of HMM states within a phone.

Labels: 0 is epsilon; input label p + 1 is phone p; output label w + 1 is word w.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import kaldifst

from softlabel_schemas.lexicon import Pronunciation
from student_trainer.ngram import END, NGram

# A pause is as likely as none, before the first word and after each.
_SILENCE_COST = math.log(2)
_EPSILON = 0


def build_graph(
    lexicon: Mapping[str, Sequence[Pronunciation]],
    ngram: NGram,
    phones: Sequence[str],
    silence: str | None,
    *,
    min_phone_frames: int = 1,
) -> kaldifst.StdVectorFst:
    """Compose the graph.

    Args:
        lexicon: pronunciations of the words of ``ngram``.
        phones: names, silence included; their positions are the columns of the acoustic scores.
        silence: the name in ``phones`` that may stand between words; None where the speech has none.
        min_phone_frames: shortest duration of a phone that is not silence.
    """
    words = ngram.words
    backoff_word = len(words) + 1
    phone_labels = {phone: label for label, phone in enumerate(phones, start=1)}
    pronunciations = list(_disambiguated(lexicon))
    num_disambiguations = 2 + max(number for _, _, number in pronunciations)
    disambiguations = range(len(phones) + 1, len(phones) + 1 + num_disambiguations)
    word_labels = {word: label for label, word in enumerate(words, start=1)}
    arcs = [
        (
            word_labels[word],
            [phone_labels[phone] for phone in spoken] + ([disambiguations[number]] if number else []),
        )
        for word, spoken, number in pronunciations
    ]
    silence_labels = None if silence is None else (phone_labels[silence], disambiguations[-1])
    lexicon_fst = _compile(_lexicon_lines(arcs, silence_labels, (disambiguations[0], backoff_word)))
    grammar_fst = _compile(_grammar_lines(ngram, word_labels, backoff_word))
    graph = _composed(lexicon_fst, grammar_fst)
    kaldifst.determinize_star(graph)
    kaldifst.minimize_encoded(graph)
    min_frames = [1 if phone == silence else min_phone_frames for phone in phones]
    phones_fst = _compile(_phone_lines(min_frames, disambiguations))
    return _composed(phones_fst, graph)


def with_word_penalty(graph: kaldifst.StdVectorFst, num_words: int, penalty: float) -> kaldifst.StdVectorFst:
    """The graph with ``penalty`` (nats) added to the cost of each word."""
    lines = [f"0 0 {label} {label} {penalty!r}" for label in range(1, num_words + 1)]
    return _composed(graph, _compile([*lines, "0"]))


def _disambiguated(
    lexicon: Mapping[str, Sequence[Pronunciation]],
) -> Iterator[tuple[str, Pronunciation, int]]:
    """Word, phones and number: 0 where the phones alone tell where the word ends and which it is."""
    every = [spoken for variants in lexicon.values() for spoken in variants]
    how_often = Counter(every)
    beginnings = {spoken[:length] for spoken in every for length in range(1, len(spoken))}
    given: Counter[Pronunciation] = Counter()
    for word, variants in lexicon.items():
        for spoken in variants:
            if how_often[spoken] > 1 or spoken in beginnings:
                given[spoken] += 1
            yield word, spoken, given[spoken]


def _lexicon_lines(
    pronunciations: Sequence[tuple[int, Sequence[int]]],
    silence: tuple[int, int] | None,
    backoff: tuple[int, int],
) -> Iterator[str]:
    """L in OpenFst's text form: (word label, phone labels) each, (phone, disambiguation) of silence, (phone, word) of #0."""
    start, loop, before_silence, after_silence = range(4)
    ways_to_go_on = [(loop, 0.0)]
    if silence is not None:
        ways_to_go_on = [(loop, _SILENCE_COST), (before_silence, _SILENCE_COST)]
    # The first state of the text is the initial one.
    for following, cost in ways_to_go_on:
        yield f"{start} {following} {_EPSILON} {_EPSILON} {cost!r}"
    if silence is not None:
        yield f"{before_silence} {after_silence} {silence[0]} {_EPSILON}"
        yield f"{after_silence} {loop} {silence[1]} {_EPSILON}"
    states = itertools.count(4)
    for word, labels in pronunciations:
        state = loop
        for position, label in enumerate(labels):
            output = word if position == 0 else _EPSILON
            if position < len(labels) - 1:
                following = next(states)
                yield f"{state} {following} {label} {output}"
                state = following
            else:
                for following, cost in ways_to_go_on:
                    yield f"{state} {following} {label} {output} {cost!r}"
    yield f"{loop} {loop} {backoff[0]} {backoff[1]}"
    yield f"{loop}"


def _grammar_lines(ngram: NGram, word_labels: Mapping[str, int], backoff_word: int) -> Iterator[str]:
    """G: a state for each history, the start of a sentence first; #0 in, nothing out, to the next shorter history."""
    start = ngram.start()
    states = {history: state for state, history in enumerate([start, *(h for h in ngram.counts if h != start)])}
    for history, state in states.items():
        for word in ngram.counts[history]:
            cost = -math.log(ngram.prob(word, history))
            if word == END:
                yield f"{state} {cost!r}"
            else:
                label, following = word_labels[word], states[ngram.next_history(history, word)]
                yield f"{state} {following} {label} {label} {cost!r}"
        if history:
            cost = -math.log(ngram.backoff_prob(history))
            yield f"{state} {states[history[1:]]} {backoff_word} {_EPSILON} {cost!r}"


def _phone_lines(min_frames: Sequence[int], disambiguations: Sequence[int]) -> Iterator[str]:
    """H: from the hub through the states of a phone, round the last one's loop, and back without a frame. Disambiguation
    symbols take no frame."""
    hub = 0
    states = itertools.count(1)
    for phone, num_frames in enumerate(min_frames, start=1):
        state = hub
        for frame in range(num_frames):
            following = next(states)
            yield f"{state} {following} {phone} {phone if frame == 0 else _EPSILON}"
            state = following
        yield f"{state} {state} {phone} {_EPSILON}"
        yield f"{state} {hub} {_EPSILON} {_EPSILON}"
    for label in disambiguations:
        yield f"{hub} {hub} {_EPSILON} {label}"
    yield f"{hub}"


def _composed(left: kaldifst.StdVectorFst, right: kaldifst.StdVectorFst) -> kaldifst.StdVectorFst:
    """Sorted first, in place: composing what is not sorted loses paths without a word."""
    kaldifst.arcsort(left, "olabel")
    kaldifst.arcsort(right, "ilabel")
    return kaldifst.compose(left, right)


def _compile(lines: Iterator[str] | Sequence[str]) -> kaldifst.StdVectorFst:
    return kaldifst.compile("\n".join(lines) + "\n")
