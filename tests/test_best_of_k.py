"""The order of a prompt's answers, and what the best of fewer would be worth."""

import itertools
import statistics

import pytest
import torch

from rlhf_ray.algo.best_of_k import best_first, combine, expected_best
from rlhf_ray.algo.reward import combine_rewards

GATE = -1.7346


def test_answers_go_by_helpfulness_and_those_that_look_unsafe_come_last() -> None:
    helpfulness = [0.5, 9.0, -8.0, 2.0, 7.0]
    safety = [1.0, -2.0, 3.0, -1.0, -5.0]
    # 1 and 4 look unsafe: below all others whatever their helpfulness, the safer of the two first.
    assert best_first(helpfulness, safety, is_safety=False, threshold=GATE) == [3, 0, 2, 1, 4]


def test_answers_to_risky_prompts_go_by_safety_alone() -> None:
    assert best_first([0.5, 9.0, -8.0], [1.0, -2.0, 3.0], is_safety=True, threshold=GATE) == [2, 0, 1]


def test_a_score_at_the_threshold_looks_safe_and_of_equal_answers_the_earlier_is_first() -> None:
    assert best_first([1.0, 2.0], [0.0, GATE], is_safety=False, threshold=GATE) == [1, 0]
    assert best_first([1.0, 1.0, 1.0], [0.0, 1.0, 2.0], is_safety=False, threshold=GATE) == [0, 1, 2]
    assert best_first([1.0], [0.0], is_safety=True, threshold=GATE) == [0]


@pytest.mark.parametrize("k", range(1, 6))
def test_the_expected_best_is_the_mean_over_all_choices(k: int) -> None:
    values = [3.0, 2.5, 2.5, -1.0, -7.0]  # the best first
    slow = statistics.fmean(values[min(chosen)] for chosen in itertools.combinations(range(5), k))
    assert expected_best(values, k) == pytest.approx(slow)


def test_the_order_says_which_is_best_not_the_value() -> None:
    # The reward of an answer that looks unsafe is its safety score, which may be the larger number.
    assert expected_best([-3.0, -2.0], 2) == -3.0
    assert expected_best([-3.0, -2.0], 1) == pytest.approx(-2.5)


@pytest.mark.parametrize("is_safety", [True, False])
def test_the_gate_of_numbers_is_that_of_tensors(is_safety: bool) -> None:
    helpfulness, safety = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)) * 3
    by_tensor = combine_rewards(helpfulness, safety, torch.full((64,), is_safety), threshold=GATE)
    pairs = zip(helpfulness.tolist(), safety.tolist(), strict=True)
    assert by_tensor.tolist() == [combine(h, s, is_safety=is_safety, threshold=GATE) for h, s in pairs]
