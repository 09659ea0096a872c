"""How alike a model's answers to one prompt are: self-BLEU (arXiv 1802.01886), lower where they differ more."""

import math
import re
import statistics
from collections import Counter
from collections.abc import Sequence

MAX_ORDER = 4
NO_MATCH = 0.1
"""Counted in place of 0 matches of an order, as Texygen does: the mean over orders would else be 0."""

_WORD = re.compile(r"\w+|[^\w\s]")


def self_bleu(answers: Sequence[str]) -> float:
    """Mean BLEU of each answer against all others to the same prompt, in [0, 1]; at least two."""
    words = [_WORD.findall(answer.lower()) for answer in answers]
    return statistics.fmean(bleu(own, words[:i] + words[i + 1 :]) for i, own in enumerate(words))


def bleu(words: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Geometric mean of the n-gram precisions for n = 1 to 4, times exp(1 - r / c) where c < r.

    c is the number of words, r that of the reference nearest in length, the shorter of two. Orders that an answer is
    too short for are left out; one without words is like another without words and like nothing else.
    """
    if not words:
        return float(any(not reference for reference in references))
    logs = []
    for order in range(1, min(MAX_ORDER, len(words)) + 1):
        most: Counter[tuple[str, ...]] = Counter()
        for reference in references:
            most |= ngrams(reference, order)
        own = ngrams(words, order)
        logs.append(math.log((sum((own & most).values()) or NO_MATCH) / own.total()))
    nearest = min(map(len, references), key=lambda length: (abs(length - len(words)), length))
    return math.exp(statistics.fmean(logs) + min(0.0, 1 - nearest / len(words)))


def ngrams(words: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    """How often each run of `order` words occurs."""
    return Counter(tuple(words[start : start + order]) for start in range(len(words) - order + 1))
