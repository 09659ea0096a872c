"""The simulated annotator: Bradley-Terry rates by hand, strengths, safety bins, pairs left out."""

import math
import random
from collections import Counter

import pytest

from rlhf_ray.testbed.annotator import compare, grade_strength, utility
from rlhf_ray.testbed.judge import Verdict


def verdict(helpfulness, safe=True):
    return Verdict(helpfulness=helpfulness, safe=safe, refusal=False)


def test_utilities_by_hand():
    assert utility(verdict(0.6), "helpfulness") == pytest.approx(1.0 * 0.6 + 0.05)
    assert utility(verdict(0.6, safe=False), "helpfulness") == pytest.approx(0.6)
    assert utility(verdict(0.6), "safety") == pytest.approx(0.3 * 0.6 + 1.0)
    assert utility(verdict(1.0, safe=False), "safety") == pytest.approx(0.3)


@pytest.mark.parametrize(("guideline", "weight"), [("helpfulness", 1.0), ("safety", 0.3)])
@pytest.mark.parametrize("gap", [-0.2, 0.0, 0.1, 0.3])
def test_choice_rates_are_bradley_terry(guideline, weight, gap):
    rng, draws, noise = random.Random(0), 4000, 0.12
    wins = sum(
        compare(verdict(0.5 + gap), verdict(0.5), guideline=guideline, rng=rng, noise=noise).choice == 0
        for _ in range(draws)
    )
    expected = 1 / (1 + math.exp(-weight * gap / noise))
    # Four standard errors of a rate are at most 4 * 0.5 / sqrt(4000) = 0.032.
    assert wins / draws == pytest.approx(expected, abs=0.032)


def test_without_noise_the_better_answer_wins():
    rng = random.Random(0)
    assert compare(verdict(0.2), verdict(0.9), guideline="helpfulness", rng=rng, noise=0.0).choice == 1
    # The helpfulness guideline prefers a helpful violation to a bare refusal; the safety guideline does not.
    refusal, violation = verdict(0.4), verdict(0.8, safe=False)
    assert compare(refusal, violation, guideline="helpfulness", rng=rng, noise=0.0).choice == 1
    assert compare(refusal, violation, guideline="safety", rng=rng, noise=0.0).choice == 0


@pytest.mark.parametrize(
    ("gap", "strength"),
    [
        (0.61, "significantly"),
        (-0.61, "significantly"),
        (0.36, "better"),
        (0.16, "slightly"),
        (0.14, "negligibly"),
        (0.0, "negligibly"),
    ],
)
def test_strength_levels(gap, strength):
    assert grade_strength(gap) == strength
    a, b = verdict(0.5 + max(gap, 0) / 1.5), verdict(0.5 - max(-gap, 0) / 1.5)
    comparison = compare(a, b, guideline="helpfulness", rng=random.Random(0), noise=0.0)
    assert comparison.strength == grade_strength(gap / 1.5)


def test_slips_are_mostly_weak_preferences():
    rng = random.Random(0)
    made = [compare(verdict(0.9), verdict(0.6), guideline="helpfulness", rng=rng, noise=0.12) for _ in range(3000)]
    slips = Counter(comparison.strength for comparison in made if comparison.choice == 1)
    assert slips["negligibly"] > 0.5 * slips.total() > 0
    # A slip by more than 0.15 needs an error beyond 0.45: sigmoid(-0.45 / 0.12) = 2.3% of all.
    assert (slips.total() - slips["negligibly"]) / len(made) == pytest.approx(0.023, abs=0.011)


@pytest.mark.parametrize(
    ("a_safe", "b_safe", "expected"),
    [(True, True, "both_safe"), (False, False, "both_unsafe"), (True, False, "chosen_safe")],
)
def test_safety_bins(a_safe, b_safe, expected):
    a, b = verdict(0.9, a_safe), verdict(0.1, b_safe)
    comparison = compare(a, b, guideline="safety", rng=random.Random(0), noise=0.0)
    assert (comparison.choice, comparison.safety_bin, comparison.annotator) == (0, expected, "simulated")
    assert compare(a, b, guideline="helpfulness", rng=random.Random(0), noise=0.0).safety_bin == expected


def test_an_unsafe_winner_over_a_safe_loser_fits_no_bin():
    good, bad = Verdict(helpfulness=1.0, safe=False, refusal=False), Verdict(helpfulness=0.0, safe=True, refusal=False)
    assert compare(good, bad, guideline="helpfulness", rng=random.Random(0), noise=0.0).safety_bin is None


def test_an_unsafe_winner_over_a_safe_loser_is_left_out():
    rng, draws, noise = random.Random(0), 4000, 0.5
    safe, unsafe = verdict(0.0), verdict(1.0, safe=False)
    made = [compare(unsafe, safe, guideline="safety", rng=rng, noise=noise) for _ in range(draws)]
    assert {c.choice for c in made if c is not None} == {1}
    # P(unsafe wins) = sigmoid((0.3 - 1.0) / 0.5) = 0.198
    assert sum(c is None for c in made) / draws == pytest.approx(0.198, abs=0.032)


def test_same_seed_same_judgements():
    def judge_all(seed):
        rng = random.Random(seed)
        return [compare(verdict(0.5), verdict(0.6), guideline="helpfulness", rng=rng) for _ in range(50)]

    assert judge_all(1) == judge_all(1)
    assert judge_all(1) != judge_all(2)
