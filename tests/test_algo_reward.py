"""Two reward models combined, and the reward of each token."""

import math

import pytest
import torch

from rlhf_ray.algo.reward import SAFETY_THRESHOLD_RAW, combine_rewards, token_rewards


def test_threshold_is_the_logit_of_15_percent():
    assert pytest.approx(-1.7346, abs=5e-5) == SAFETY_THRESHOLD_RAW
    assert 1 / (1 + math.exp(-SAFETY_THRESHOLD_RAW)) == pytest.approx(0.15)


def test_the_gate_selects_and_never_mixes():
    helpfulness = torch.tensor([1.0, 2.0, 3.0, 4.0])
    safety = torch.tensor([0.5, -1.8, -1.7, -9.0])
    is_safety = torch.tensor([True, False, False, True])
    combined = combine_rewards(helpfulness, safety, is_safety, threshold=SAFETY_THRESHOLD_RAW)
    # Tagged; below -1.7346; above it; both.
    assert combined.tolist() == [*safety[[0, 1]].tolist(), 3.0, -9.0]


def test_gate_equals_the_papers_form_through_the_sigmoid():
    generator = torch.Generator().manual_seed(0)
    helpfulness, safety = 3 * torch.randn(2, 200, generator=generator, dtype=torch.float64)
    is_safety = torch.rand(200, generator=generator) < 0.3
    r_h, r_s = helpfulness.sigmoid(), safety.sigmoid()
    papers = torch.where(is_safety | (r_s < 0.15), r_s, r_h).logit()
    combined = combine_rewards(helpfulness, safety, is_safety, threshold=SAFETY_THRESHOLD_RAW)
    torch.testing.assert_close(combined, papers)


def test_large_scores_stay_finite():
    score = torch.tensor([40.0])  # its float32 sigmoid is 1, whose logit is infinite
    assert combine_rewards(score, score, torch.tensor([False]), threshold=SAFETY_THRESHOLD_RAW).item() == 40


def test_score_sits_on_the_last_response_token_and_kl_on_each():
    mask = torch.tensor([[False, True, False, True, False], [True, True, False, False, False]])
    kl = torch.tensor([[9.0, 1.0, 9.0, 2.0, torch.nan], [0.5, -0.5, 9.0, 9.0, 9.0]])
    rewards = token_rewards(torch.tensor([3.0, -1.0]), kl, mask, kl_coef=0.1)
    # Row 0: -0.1*1; 3 - 0.1*2.  Row 1: -0.1*0.5; -1 + 0.1*0.5.
    expected = torch.tensor([[0.0, -0.1, 0.0, 2.8, 0.0], [-0.05, -0.95, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(rewards, expected)


def test_a_row_without_response_tokens_gets_nothing_and_the_rest_adds_up():
    mask = torch.rand(5, 8, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[0] = False
    mask[1] = True
    scores = torch.arange(1.0, 6.0)
    kl = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
    rewards = token_rewards(scores, kl, mask, kl_coef=0.02)
    totals = scores * mask.any(1) - 0.02 * (kl * mask).sum(1)
    torch.testing.assert_close(rewards.sum(1), totals)
    assert torch.count_nonzero(rewards[~mask]) == 0
