"""Means over a mask, with a named denominator."""

from typing import TypeAlias

import torch
from torch import Tensor

Denominator: TypeAlias = float | Tensor


def masked_mean(values: Tensor, mask: Tensor, *, denominator: Denominator | None = None) -> Tensor:
    """Sum of the values where mask is True, divided by the denominator.

    With one global denominator for all micro-batches the results add up to the mean over the whole batch,
    however the rows were split. Without tokens the result is 0, still attached to the graph, so that a rank
    with an empty micro-batch can run its backward.

    Args:
        values: any shape, float. What stands outside the mask, even nan or inf, has no influence on the
            result; its gradient is zero.
        mask: bool, same shape.
        denominator: what the sum is divided by; the number of True entries by default.
    Returns:
        0-dim tensor of the values' dtype.
    """
    if denominator is None:
        denominator = mask.sum().clamp(min=1)
    return keep(values, mask).sum() / denominator


def keep(values: Tensor, mask: Tensor) -> Tensor:
    """The values where mask is True and 0 elsewhere; unlike `values * mask` it also drops nan and inf."""
    return torch.where(mask, values, 0.0)
