"""Whitening: hand arithmetic, moments merged over shards, degenerate inputs."""

import pytest
import torch

from rlhf_ray.algo.whiten import Moments, masked_moments, masked_whiten, merge_moments


def test_whiten_by_hand_uses_the_unbiased_variance():
    values = torch.tensor([1.0, 2.0, 3.0, 50.0])
    mask = torch.tensor([True, True, True, False])
    # mean 2, variance (1 + 0 + 1) / (3 - 1) = 1
    torch.testing.assert_close(masked_whiten(values, mask), torch.tensor([-1.0, 0.0, 1.0, 0.0]))
    kept_mean = masked_whiten(3 * values, mask, shift_mean=False)
    # mean 6, variance 9: deviations -3, 0, 3 become -1, 0, 1 around 6
    torch.testing.assert_close(kept_mean, torch.tensor([5.0, 6.0, 7.0, 0.0]))


def test_two_dimensional_values_whiten_jointly():
    values = torch.randn(3, 7, generator=torch.Generator().manual_seed(0)) * 4 + 10
    mask = torch.rand(3, 7, generator=torch.Generator().manual_seed(1)) < 0.6
    whitened = masked_whiten(values, mask)
    torch.testing.assert_close(whitened[mask].mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(whitened[mask].std(), torch.tensor(1.0))
    assert torch.count_nonzero(whitened[~mask]) == 0
    assert whitened.dtype == torch.float32


@pytest.mark.parametrize("num_kept", [0, 1])
def test_fewer_than_two_values_are_left_alone(num_kept):
    mask = torch.arange(3) < num_kept
    whitened = masked_whiten(torch.tensor([5.0, 6.0, 7.0]), mask)
    assert whitened.tolist() == [5.0 if num_kept else 0.0, 0.0, 0.0]


def test_equal_values_whiten_to_zero_not_nan():
    assert masked_whiten(torch.full((3,), 0.1), torch.ones(3, dtype=torch.bool)).tolist() == [0.0, 0.0, 0.0]


def test_moments_merge_to_those_of_the_whole():
    values = torch.randn(100, generator=torch.Generator().manual_seed(0))
    everything = torch.ones(100, dtype=torch.bool)
    shards = [slice(0, 3), slice(3, 3), slice(3, 4), slice(4, 90), slice(90, 100)]  # one empty, one single
    merged = merge_moments([masked_moments(values[shard], everything[shard]) for shard in shards])
    torch.testing.assert_close(tuple(merged), tuple(masked_moments(values, everything)))
    assert merged.num_values == 100
    torch.testing.assert_close(merged.mean, values.double().mean())
    torch.testing.assert_close(merged.variance, values.double().var())


def test_sharded_whitening_equals_whitening_at_once():
    values = torch.randn(40, generator=torch.Generator().manual_seed(2)) * 3 + 1
    mask = torch.rand(40, generator=torch.Generator().manual_seed(3)) < 0.8
    shards = values.split(13), mask.split(13)
    merged = merge_moments([masked_moments(v, m) for v, m in zip(*shards, strict=True)])
    parts = [masked_whiten(v, m, moments=merged) for v, m in zip(*shards, strict=True)]
    torch.testing.assert_close(torch.cat(parts), masked_whiten(values, mask))


def test_merging_survives_a_mean_far_larger_than_the_spread():
    # Sums of squares would lose this variance of 1: float64 cannot tell 1e16 + 1 from 1e16.
    values = torch.tensor([1e8 - 1, 1e8, 1e8 + 1], dtype=torch.float64)
    mask = torch.ones(3, dtype=torch.bool)
    merged = merge_moments([masked_moments(values[i : i + 1], mask[:1]) for i in range(3)])
    assert merged.variance.item() == pytest.approx(1.0)


def test_moments_of_nothing():
    empty = masked_moments(torch.tensor([1.0, torch.nan]), torch.tensor([False, False]))
    zero = torch.tensor(0.0, dtype=torch.float64)
    assert empty == Moments(zero, zero, zero)
    assert merge_moments([empty, empty]) == Moments(zero, zero, zero)
