"""Perplexity of a language model, which decoding has no use for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from student_trainer.ngram import END, NGram


def perplexity(ngram: NGram, sentences: Iterable[Sequence[str]]) -> float:
    """Of the words of ``sentences`` and their ends; words that the model does not know are passed over."""
    log_prob, num_tokens, words = 0.0, 0, set(ngram.counts[()])
    for sentence in sentences:
        history = ngram.start()
        for word in (*sentence, END):
            if word in words:
                log_prob += math.log(ngram.prob(word, history))
                num_tokens += 1
                history = ngram.next_history(history, word) if word != END else history
            else:
                history = ()
    return math.exp(-log_prob / max(num_tokens, 1))
