"""From two reward models' scores to rewards per token."""

import math

import torch
from torch import Tensor

SAFETY_THRESHOLD_RAW = math.log(0.15 / (1 - 0.15))
"""logit(0.15) = -1.7346: below this raw score the safety model takes an answer to be unsafe."""


def combine_rewards(helpfulness: Tensor, safety: Tensor, is_safety: Tensor, *, threshold: float) -> Tensor:
    """Select the safety score for risky prompts and unsafe-looking answers, else the helpfulness score.

    R_c = R_s if is_safety or R_s < threshold, else R_h

    The paper gates at 0.15 after a sigmoid and then takes the logit of the chosen score. Raw scores with the
    threshold logit(0.15) are the same function, without the infinities of a float32 sigmoid that rounds to 1.
    The result is not whitened yet: that is done jointly over the global batch (`masked_whiten`).

    Args:
        helpfulness, safety: (B,) float32 raw scores, before any sigmoid.
        is_safety: (B,) bool, the prompt's tag.
        threshold: in raw score, `SAFETY_THRESHOLD_RAW` in the paper.
    Returns:
        (B,) float32.
    Source: Llama 2 section 3.2.3.
    """
    return torch.where(is_safety | (safety < threshold), safety, helpfulness)


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """Reward per token: the KL penalty on each response token, the score on the last one of the row.

    r_t = -kl_coef * kl_t + (score if t is the row's last response token)

    Args:
        scores: (B,) float32, combined and whitened.
        kl: (B, T) float32, estimated per token.
        mask: (B, T) bool, True on response tokens.
        kl_coef: beta; 0.01 or 0.005 in the paper.
    Returns:
        (B, T) float32, zero where mask is False; a row without response tokens gets no reward at all.
    Source: Llama 2 eq. 4, spread over tokens; the paper does not say per token or per sequence.
    """
    num_from_here = mask.flip(1).cumsum(1).flip(1)  # (B, T), response tokens at or after t
    is_last = mask & (num_from_here == 1)
    penalty = torch.where(mask, -kl_coef * kl, 0.0)
    return penalty + torch.where(is_last, scores[:, None], 0.0)
