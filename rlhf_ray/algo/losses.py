"""Losses of the policy and the value model, and the next-token loss."""

from typing import TypeAlias

import torch
from torch import Tensor

from rlhf_ray.algo.kl import MAX_LOG_RATIO, kl_estimate
from rlhf_ray.algo.masked import Denominator, keep, masked_mean

Metrics: TypeAlias = dict[str, Tensor]


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_ratio: float,
    denominator: Denominator | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """PPO's clipped policy loss.

    r = exp(logprobs - old_logprobs)
    loss = mean of w * max(-A r, -A clip(r, 1 - clip_ratio, 1 + clip_ratio))

    The log-ratio is clamped to +-20 before exp; beyond that a token has no gradient.

    Args:
        logprobs: (B, T) float32 of the policy being trained, with gradient.
        old_logprobs: (B, T) float32 of the policy before this step's updates, from the same engine.
        advantages: (B, T) float32.
        mask: (B, T) bool, True on response tokens.
        clip_ratio: half-width of the range in which the ratio may move.
        denominator: of the mean; the number of response tokens by default.
        weights: (B, T) float32, truncated importance weights w (see `importance_weights`); 1 by default.
    Returns:
        (loss, metrics), the metrics with the loss's denominator and never weighted:
        policy_loss; approx_kl, estimator k3 of KL(old || new), which is at tokens sampled by old;
        clipfrac, share of tokens whose ratio lies outside the clip range; ratio, its mean.
    Source: arXiv 1707.06347 eq. 7; clip 0.2 in Llama 2 section 3.2.3.
    """
    log_ratio = keep(logprobs - old_logprobs, mask)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    advantages = keep(advantages, mask)
    clipped_ratio = ratio.clamp(1 - clip_ratio, 1 + clip_ratio)
    per_token = torch.maximum(-advantages * ratio, -advantages * clipped_ratio)  # (B, T)
    if weights is not None:
        per_token = per_token * keep(weights, mask)
    loss = masked_mean(per_token, mask, denominator=denominator)
    with torch.no_grad():
        approx_kl = kl_estimate(torch.zeros_like(log_ratio), log_ratio, estimator="k3")
        outside = ((ratio - 1).abs() > clip_ratio).float()
        metrics = {
            "policy_loss": loss.detach(),
            "approx_kl": masked_mean(approx_kl, mask, denominator=denominator),
            "clipfrac": masked_mean(outside, mask, denominator=denominator),
            "ratio": masked_mean(ratio, mask, denominator=denominator),
        }
    return loss, metrics


def importance_weights(logprobs: Tensor, rollout_logprobs: Tensor, *, cap: float) -> Tensor:
    """Truncated importance weights min(exp(logprobs - rollout_logprobs), cap), without gradient.

    They correct for the engine that sampled (another program, other kernels) differing from the trainer that
    computed `logprobs` with the same weights; the cap bounds the variance.

    Args:
        logprobs: (B, T) float32 of the trainer before this step's updates.
        rollout_logprobs: (B, T) float32 as reported by the rollout engine.
        cap: largest weight, > 0; 2 is usual.
    Returns:
        (B, T) float32. Positions outside the response carry no meaning.
    Source: E. Ionides, "Truncated importance sampling" (2008).
    """
    log_ratio = (logprobs - rollout_logprobs).detach()
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp(max=cap)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip_value: float | None,
    denominator: Denominator | None = None,
) -> tuple[Tensor, Metrics]:
    """Half the squared error of the value model, clipped around its prediction at rollout time.

    v_clipped = old + clip(v - old, +-clip_value);  loss = mean of max((v - R)^2, (v_clipped - R)^2) / 2

    Args:
        values: (B, T) float32 with gradient; values[:, t] belongs to the state before token t.
        old_values: (B, T) float32, at rollout time.
        returns: (B, T) float32, R.
        mask: (B, T) bool, True on response tokens.
        clip_value: how far a value may move from the old one; None for the plain squared error.
        denominator: of the mean; the number of response tokens by default.
    Returns:
        (loss, metrics), the metrics with the loss's denominator: value_loss; value_clipfrac, share of tokens
        that moved further than clip_value (0 without clipping); and the means of the returns, of the errors
        R - v and of the squares of both (return_mean, return_sq_mean, error_mean, error_sq_mean), from
        which `explained_variance` gives the explained variance of a whole batch.
    Source: Llama 2 does not describe its value loss; this is the usual one of PPO implementations.
    """
    values, old_values, returns = (keep(x, mask) for x in (values, old_values, returns))
    squared_error = (values - returns).square()
    moved_too_far = torch.zeros_like(values)
    if clip_value is not None:
        move = values - old_values
        clipped_values = old_values + move.clamp(-clip_value, clip_value)
        squared_error = torch.maximum(squared_error, (clipped_values - returns).square())
        moved_too_far = (move.detach().abs() > clip_value).float()
    loss = masked_mean(0.5 * squared_error, mask, denominator=denominator)
    with torch.no_grad():
        error = returns - values
        parts = {
            "value_clipfrac": moved_too_far,
            "return_mean": returns,
            "return_sq_mean": returns.square(),
            "error_mean": error,
            "error_sq_mean": error.square(),
        }
        metrics = {name: masked_mean(part, mask, denominator=denominator) for name, part in parts.items()}
    return loss, {"value_loss": loss.detach(), **metrics}


def explained_variance(*, return_mean: float, return_sq_mean: float, error_mean: float, error_sq_mean: float) -> float:
    """Explained variance of a batch from the means that `value_loss` reports, summed over its micro-batches.

    Var(x) = E[x^2] - E[x]^2. Returns 0 where the returns do not vary, since there is nothing to explain.
    """
    return_variance = return_sq_mean - return_mean**2
    if return_variance <= 0:
        return 0.0
    return 1 - (error_sq_mean - error_mean**2) / return_variance


def lm_loss(logprobs: Tensor, mask: Tensor, *, denominator: Denominator | None = None) -> tuple[Tensor, Metrics]:
    """Next-token loss: minus the mean log-probability of the tokens under the mask, in nats.

    Args:
        logprobs: (B, T) float32 with gradient; logprobs[:, t] is that of token t given the tokens before it.
        mask: (B, T) bool: answer tokens in fine-tuning (prompts give no gradient), all but the first token
            of each document in pretraining.
        denominator: of the mean; the number of tokens under the mask by default.
    Returns:
        (loss, metrics) with the one metric lm_loss.
    Source: Llama 2 section 3.1.
    """
    loss = masked_mean(-logprobs, mask, denominator=denominator)
    return loss, {"lm_loss": loss.detach()}
