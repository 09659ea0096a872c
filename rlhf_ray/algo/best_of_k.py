"""Best of K (Llama 2 §3.2.3): which of a prompt's answers is the best, and what the best of fewer would be worth.

Of plain numbers, a prompt at a time. Imports no torch.
"""

from collections.abc import Sequence
from math import comb


def best_first(
    helpfulness: Sequence[float], safety: Sequence[float], *, is_safety: bool, threshold: float
) -> list[int]:
    """Numbers of a prompt's answers, the best first; of equal ones the earlier.

    Answers to a prompt tagged as risky go by their safety score. Others go by helpfulness, and below all of them come
    those that look unsafe, by safety. In PPO the gate hands such an answer's safety score on as its reward; the scales
    of two raw scores differ, and no whitening comes between here, so within one prompt they are not compared.

    Args:
        helpfulness, safety: raw scores of each answer.
        threshold: the raw safety score below which an answer looks unsafe.
    Source: Llama 2 §3.2.3 for the gate; that it ranks is ours, the paper does not say by what it chooses.
    """

    def key(answer: int) -> tuple[bool, float]:
        looks_safe = is_safety or safety[answer] >= threshold
        return looks_safe, combine(helpfulness[answer], safety[answer], is_safety=is_safety, threshold=threshold)

    return sorted(range(len(safety)), key=key, reverse=True)


def combine(helpfulness: float, safety: float, *, is_safety: bool, threshold: float) -> float:
    """The gate's score of one answer: `combine_rewards` of plain numbers."""
    return safety if is_safety or safety < threshold else helpfulness


def expected_best(values: Sequence[float], k: int) -> float:
    """The mean of the best answer's value over all choices of k of the answers: no answer is drawn twice.

    sum over i of values[i] C(n - 1 - i, k - 1) / C(n, k)

    Args:
        values: of each answer, the best answer first.
        k: 1 to the number of answers.
    """
    n = len(values)
    return sum(value * comb(n - 1 - place, k - 1) for place, value in enumerate(values)) / comb(n, k)
