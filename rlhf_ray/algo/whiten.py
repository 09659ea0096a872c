"""Whitening, with moments that can be merged over ranks."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_ray.algo.masked import keep

# Added to the variance, so that equal values whiten to 0 rather than to nan.
EPSILON = 1e-8


class Moments(NamedTuple):
    """Number, mean and unbiased variance of a set of numbers, each a 0-dim float64 tensor.

    These three determine the sum of squared deviations (variance * (number - 1)), so moments of parts merge
    into those of the whole without the cancellation that sums of squares suffer. Below two values the
    variance is 0; without values the mean is 0 too.
    """

    num_values: Tensor
    mean: Tensor
    variance: Tensor


def masked_moments(values: Tensor, mask: Tensor) -> Moments:
    """Moments of the values where mask is True.

    Args:
        values: float, any shape ((B,) scores, (B, T) advantages).
        mask: bool, same shape.
    """
    kept = values.detach()[mask].double()
    count = torch.tensor(float(kept.numel()), dtype=torch.float64, device=values.device)
    mean = kept.sum() / count.clamp(min=1)
    return Moments(count, mean, (kept - mean).square().sum() / (count - 1).clamp(min=1))


def merge_moments(parts: Sequence[Moments]) -> Moments:
    """Moments of the union of disjoint parts, such as the shards of the ranks; empty parts are welcome.

    Sum of squared deviations = sum over parts of (inside the part + number * (part's mean - mean)^2).

    Args:
        parts: at least one.
    Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm" (1979).
    """
    counts = torch.stack([part.num_values for part in parts])  # (parts,)
    means = torch.stack([part.mean for part in parts])
    inside = torch.stack([part.variance * (part.num_values - 1).clamp(min=0) for part in parts])
    count = counts.sum()
    mean = (counts * means).sum() / count.clamp(min=1)
    squares = inside.sum() + (counts * (means - mean).square()).sum()
    return Moments(count, mean, squares / (count - 1).clamp(min=1))


def masked_whiten(
    values: Tensor,
    mask: Tensor,
    *,
    shift_mean: bool = True,
    moments: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Scale the values under the mask to unit variance and, with shift_mean, to zero mean.

    Fewer than two values have no spread to measure and come back as they are.

    Args:
        values: float, any shape.
        mask: bool, same shape.
        shift_mean: False keeps the mean where it was and scales only the deviations from it.
        moments: (number of values, mean, unbiased variance) of the whole batch over all ranks, as
            `Moments`; those of these values by default.
    Returns:
        Same shape and dtype, zero where mask is False.
    Source: whitening of rewards, Llama 2 section 3.2.3; its scope and its mean shift are not in the paper.
    """
    count, mean, variance = masked_moments(values, mask) if moments is None else moments
    if count < 2:
        return keep(values, mask)
    whitened = (values - mean) * torch.rsqrt(variance + EPSILON)
    if not shift_mean:
        whitened = whitened + mean
    return keep(whitened, mask).to(values.dtype)
