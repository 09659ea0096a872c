"""Advantages: hand arithmetic, and a loop over the compacted tokens of each row."""

import pytest
import torch

from rlhf_ray.algo.gae import gae


def compacted_gae(rewards, values, mask, gamma, lam, bootstrap):
    """Slow reference: drop the masked tokens of a row, then the textbook recursion on what is left."""
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for row in range(rewards.shape[0]):
        positions = [t for t in range(rewards.shape[1]) if mask[row, t]]
        r = [float(rewards[row, t]) for t in positions]
        v = [float(values[row, t]) for t in positions] + [float(bootstrap[row])]
        for i in range(len(positions)):
            total = 0.0
            for j in range(i, len(positions)):
                total += (gamma * lam) ** (j - i) * (r[j] + gamma * v[j + 1] - v[j])
            advantages[row, positions[i]] = total
            returns[row, positions[i]] = total + v[i]
    return advantages, returns


def test_hand_arithmetic_without_gaps():
    rewards = torch.tensor([[0.0, 1.0, 2.0]])
    values = torch.tensor([[0.5, 1.0, 1.5]])
    mask = torch.tensor([[True, True, True]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    # delta_2 = 2 + 0 - 1.5 = 0.5;          A_2 = 0.5
    # delta_1 = 1 + 0.5*1.5 - 1 = 0.75;     A_1 = 0.75 + 0.25*0.5 = 0.875
    # delta_0 = 0 + 0.5*1 - 0.5 = 0;        A_0 = 0 + 0.25*0.875 = 0.21875
    torch.testing.assert_close(advantages, torch.tensor([[0.21875, 0.875, 0.5]]))
    torch.testing.assert_close(returns, torch.tensor([[0.71875, 1.875, 2.0]]))


def test_gap_neither_decays_nor_contributes():
    mask = torch.tensor([[False, True, False, False, True, False]])
    rewards = torch.tensor([[9.0, 1.0, 9.0, 9.0, 2.0, 9.0]])
    values = torch.tensor([[7.0, 0.5, 7.0, 7.0, 1.0, 7.0]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    # delta_4 = 2 - 1 = 1;  delta_1 = 1 + 0.5*1 - 0.5 = 1;  A_1 = 1 + 0.25*1 = 1.25
    torch.testing.assert_close(advantages, torch.tensor([[0.0, 1.25, 0.0, 0.0, 1.0, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[0.0, 1.75, 0.0, 0.0, 2.0, 0.0]]))


def test_bootstrap_is_the_value_after_the_last_response_token():
    rewards, values = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 5.0]])
    mask = torch.tensor([[True, False]])
    advantages, _ = gae(rewards, values, mask, gamma=0.5, lam=0.9, bootstrap=torch.tensor([4.0]))
    # delta_0 = 1 + 0.5*4 - 2 = 1
    torch.testing.assert_close(advantages, torch.tensor([[1.0, 0.0]]))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_equals_compacted_loop_on_random_masks(gamma, lam):
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 6, 13, generator=generator)
    mask = torch.rand(6, 13, generator=generator) < 0.5
    mask[0] = False  # a row without response tokens
    mask[1] = False
    mask[1, 4] = True  # a single token
    mask[2] = True
    bootstrap = torch.randn(6, generator=generator)
    expected = compacted_gae(rewards, values, mask, gamma, lam, bootstrap)
    torch.testing.assert_close(gae(rewards, values, mask, gamma=gamma, lam=lam, bootstrap=bootstrap), expected)


def test_what_stands_outside_the_mask_has_no_influence():
    mask = torch.tensor([[False, True, False, True, False]])
    clean = torch.tensor([[0.0, 1.0, 0.0, 2.0, 0.0]])
    dirty = torch.where(mask, clean, torch.nan)
    expected = gae(clean, clean, mask, gamma=0.9, lam=0.9)
    torch.testing.assert_close(gae(dirty, dirty, mask, gamma=0.9, lam=0.9), expected)


def test_lambda_one_gives_return_minus_value():
    rewards, values = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 5, dtype=torch.bool)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    reward_to_go = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(returns, reward_to_go)
    torch.testing.assert_close(advantages, reward_to_go - values)
