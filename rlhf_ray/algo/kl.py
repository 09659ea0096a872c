"""Estimators of the KL divergence from samples, per token."""

from typing import Literal

import torch
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]

# exp(20) is about 5e8: far beyond any ratio worth acting on, and far from the float32 limit of exp(88).
MAX_LOG_RATIO = 20.0


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: KLEstimator) -> Tensor:
    """KL(policy || reference) per token, estimated at tokens that the policy sampled.

    With d = logprobs - ref_logprobs:
        k1 = d                  unbiased, may be negative, largest variance
        k2 = d^2 / 2            biased, never negative
        k3 = exp(-d) - 1 + d    unbiased, never negative
    Only the exponent of k3 is clamped, to at most 20, so that one odd token cannot overflow; k1, k2 and the
    linear part of k3 are exact at every d.

    Args:
        logprobs: float32 of any shape, of the sampled tokens under the policy.
        ref_logprobs: same shape, under the reference.
    Returns:
        The estimate, same shape. Positions outside the response carry no meaning and must be masked.
    Raises:
        ValueError: unknown estimator.
    Source: J. Schulman, "Approximating KL divergence" (2020). Llama 2 does not say which estimator it used.
    """
    d = logprobs - ref_logprobs
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * d.square()
    if estimator == "k3":
        # expm1 keeps the digits that exp(-d) - 1 loses near d = 0, where a policy starts.
        return torch.expm1((-d).clamp(max=MAX_LOG_RATIO)) + d
    raise ValueError(f"estimator={estimator!r} must be one of 'k1', 'k2', 'k3'")
