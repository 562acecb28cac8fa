"""The n-gram against probabilities computed by hand, and as a distribution."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softlabel_schemas import InputError
from student_trainer.ngram import END, train_ngram
from tests.support.perplexity import perplexity

# Tokens: a 3, b 2, </s> 2; 7 in all, 3 different ones, 2 words.
SENTENCES = [["a", "b", "a"], ["a", "b"]]


def test_unigrams_by_hand() -> None:
    ngram = train_ngram(SENTENCES, 1)
    # (3 + 3 * 1/3) / (7 + 3), ...
    assert [ngram.prob(word, ()) for word in ("a", "b", END)] == pytest.approx([0.4, 0.3, 0.3])
    assert ngram.words == ["a", "b"]


def test_bigrams_by_hand() -> None:
    ngram = train_ngram(SENTENCES, 2)
    # After <s>: a twice; one follower. (2 + 1 * 0.4) / (2 + 1), (0 + 1 * 0.3) / 3.
    assert ngram.prob("a", ("<s>",)) == pytest.approx(2.4 / 3)
    assert ngram.prob("b", ("<s>",)) == pytest.approx(0.3 / 3)
    # After a: b twice, </s> once; two followers.
    assert ngram.prob("b", ("a",)) == pytest.approx((2 + 2 * 0.3) / 5)
    assert ngram.prob(END, ("a",)) == pytest.approx((1 + 2 * 0.3) / 5)
    assert ngram.prob("a", ("a",)) == pytest.approx(2 * 0.4 / 5)
    assert ngram.backoff_prob(("a",)) == pytest.approx(2 / 5)


def test_trigrams_begin_at_the_start_of_a_sentence() -> None:
    ngram = train_ngram(SENTENCES, 3)
    # After <s> a: b twice.
    assert ngram.prob("b", ("<s>", "a")) == pytest.approx((2 + (2 + 2 * 0.3) / 5) / 3)
    assert ngram.next_history(("<s>", "a"), "b") == ("a", "b")
    # b b was never seen.
    assert ngram.next_history(("a", "b"), "b") == ("b",)


def test_perplexity_by_hand() -> None:
    ngram = train_ngram(SENTENCES, 2)
    probs = [2.4 / 3, (2 + 2 * 0.3) / 5, ngram.prob(END, ("b",))]
    assert perplexity(ngram, [["a", "b"]]) == pytest.approx(math.prod(probs) ** (-1 / 3))
    # An unknown word is passed over; what follows it has no history.
    unknown = [2.4 / 3, 0.3, ngram.prob(END, ("b",))]
    assert perplexity(ngram, [["a", "zebra", "b"]]) == pytest.approx(math.prod(unknown) ** (-1 / 3))


def test_history_helps_on_held_out_text() -> None:
    """Words in pairs: a bigram halves the perplexity of text that it has not seen; no model beats the text's entropy."""
    pairs = [["big", "dog"], ["small", "cat"], ["old", "man"], ["new", "day"]]
    train = [pairs[index % 4] + pairs[(index // 4) % 4] for index in range(32) if index % 5]
    held_out = [pairs[index % 4] + pairs[(index // 4) % 4] for index in range(0, 32, 5)]
    unigram, bigram = (perplexity(train_ngram(train, order), held_out) for order in (1, 2))
    assert 4 ** (2 / 5) < bigram < unigram / 2 < 9


@given(
    sentences=st.lists(st.lists(st.sampled_from("abcd"), max_size=5), min_size=1, max_size=8).filter(any),
    order=st.integers(1, 4),
)
def test_probabilities_sum_to_one_after_every_history(sentences: list[list[str]], order: int) -> None:
    ngram = train_ngram(sentences, order)
    for history in ngram.counts:
        assert len(history) < order
        assert sum(ngram.prob(word, history) for word in [*ngram.words, END]) == pytest.approx(1)


def test_no_words_are_refused() -> None:
    with pytest.raises(InputError, match="hold no words"):
        train_ngram([[], []], 2)
