"""Generalised advantage estimation over response tokens."""

import torch
from torch import Tensor


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    lam: float,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns by generalised advantage estimation.

    A_t = delta_t + gamma * lam * A_{t+1};  delta_t = r_t + gamma * V_{t+1} - V_t;  return_t = A_t + V_t
    where t+1 is the next response token of the row: the mask may have gaps (tool or user turns), and tokens
    in a gap neither discount nor contribute.

    Args:
        rewards: (B, T) float32, KL penalty already subtracted.
        values: (B, T) float32 at rollout time; values[:, t] belongs to the state before token t.
        mask: (B, T) bool, True on response tokens.
        gamma: discount per response token.
        lam: 0 gives one-step advantages, 1 gives return minus value.
        bootstrap: (B,) float32, value of the state after the last response token, for answers that were cut
            off; 0 for finished ones. None means that every answer ended.
    Returns:
        (advantages, returns), each (B, T), zero where mask is False.
    Source: arXiv 1506.02438 section 3.
    """
    num_rows, num_tokens = rewards.shape
    next_value = rewards.new_zeros(num_rows) if bootstrap is None else bootstrap.to(rewards)  # (B,)
    next_advantage = rewards.new_zeros(num_rows)  # (B,)
    advantages = torch.zeros_like(rewards)
    for t in range(num_tokens - 1, -1, -1):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        # A masked token leaves both carries as they are: the token before it sees across the gap.
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
        advantages[:, t] = torch.where(mask[:, t], advantage, 0.0)
    returns = torch.where(mask, advantages + values, 0.0)
    return advantages, returns
