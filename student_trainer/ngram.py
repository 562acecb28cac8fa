"""An n-gram language model with interpolated Witten-Bell smoothing.

Witten and Bell, "The zero-frequency problem" (IEEE Transactions on Information Theory, 1991), method C, in the recursive form
of Chen and Goodman, "An empirical study of smoothing techniques for language modeling" (1999). With c the counts of a word
after the history h, and T(h) the number of different words seen after it::

    p(w | h) = (c(h w) + T(h) p(w | h less its first word)) / (c(h) + T(h))

and below the unigrams 1 / (number of words + 1): every word of the training text, and the end of a sentence. It needs no
counts of counts, which a small text does not give reliably. A word unseen after h has the probability p(w | shorter h)
times T(h) / (c(h) + T(h)), so the model is a back-off acceptor without approximation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from softlabel_schemas.errors import InputError

History = tuple[str, ...]
START, END = "<s>", "</s>"


@dataclass(frozen=True, slots=True)
class NGram:
    """``counts``: of each word, or ``END``, after each history of 0 .. order - 1 words that was seen."""

    order: int
    counts: dict[History, Counter[str]]

    @property
    def words(self) -> list[str]:
        return sorted(set(self.counts[()]) - {END})

    def start(self) -> History:
        return self.longest_history((START,))

    def longest_history(self, history: History) -> History:
        """The longest ending of ``history`` that was seen."""
        while history not in self.counts:
            history = history[1:]
        return history

    def next_history(self, history: History, word: str) -> History:
        kept = (*history, word)[-(self.order - 1) :] if self.order > 1 else ()
        return self.longest_history(kept)

    def backoff_prob(self, history: History) -> float:
        """What is left to the words not seen after ``history``, in units of the shorter history's probabilities."""
        followers = self.counts[history]
        return len(followers) / (followers.total() + len(followers))

    def prob(self, word: str, history: History) -> float:
        """p(word | history); ``word`` is of the training text or ``END``, ``history`` one that was seen."""
        followers = self.counts[history]
        shorter = self.prob(word, history[1:]) if history else 1 / len(followers)
        return followers[word] / (followers.total() + len(followers)) + self.backoff_prob(history) * shorter


def train_ngram(sentences: Iterable[Sequence[str]], order: int) -> NGram:
    """Count ``sentences``, each a sequence of words. Raises InputError where there is no word at all."""
    counts: dict[History, Counter[str]] = {(): Counter()}
    for sentence in sentences:
        tokens = (START, *sentence, END)
        for position in range(1, len(tokens)):
            for length in range(min(order, position + 1)):
                history = tokens[position - length : position]
                counts.setdefault(history, Counter())[tokens[position]] += 1
    if not set(counts[()]) - {END}:
        raise InputError("the training transcripts hold no words, so no language model can be counted")
    return NGram(order, counts)
