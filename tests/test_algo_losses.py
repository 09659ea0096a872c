"""Losses: hand arithmetic, gradients where clipped, extreme values, additivity over micro-batches."""

import math

import pytest
import torch

from rlhf_ray.algo.losses import (
    explained_variance,
    importance_weights,
    lm_loss,
    policy_loss,
    value_loss,
)


def log(*values):
    return torch.tensor([values], dtype=torch.float32).log()


def test_policy_loss_by_hand():
    # Ratios 1.5, 1.5, 0.5, 1.1 from old probability 0.2; clip range [0.8, 1.2].
    logprobs, old_logprobs = log(0.3, 0.3, 0.1, 0.22), log(0.2, 0.2, 0.2, 0.2)
    advantages = torch.tensor([[1.0, -1.0, -2.0, 3.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    loss, metrics = policy_loss(logprobs, old_logprobs, advantages, mask, clip_ratio=0.2)
    # max(-A r, -A clip(r)): max(-1.5, -1.2) = -1.2; max(1.5, 1.2) = 1.5; max(1, 1.6) = 1.6; -3.3
    # mean = (-1.2 + 1.5 + 1.6 - 3.3) / 4 = -0.35
    assert loss.item() == pytest.approx(-0.35)
    assert metrics["policy_loss"].item() == pytest.approx(-0.35)
    assert metrics["clipfrac"].item() == pytest.approx(3 / 4)
    assert metrics["ratio"].item() == pytest.approx((1.5 + 1.5 + 0.5 + 1.1) / 4)
    # k3 of KL(old || new) = r - 1 - log r
    k3 = [r - 1 - math.log(r) for r in (1.5, 1.5, 0.5, 1.1)]
    assert metrics["approx_kl"].item() == pytest.approx(sum(k3) / 4, rel=1e-5)


def test_policy_gradient_is_zero_where_the_clip_binds_and_only_there():
    old_logprobs = log(0.2, 0.2, 0.2, 0.2, 0.2)
    logprobs = log(0.3, 0.3, 0.1, 0.1, 0.2).requires_grad_()  # ratios 1.5, 1.5, 0.5, 0.5, 1
    advantages = torch.tensor([[1.0, -1.0, -1.0, 1.0, 2.0]])
    mask = torch.ones(1, 5, dtype=torch.bool)
    policy_loss(logprobs, old_logprobs, advantages, mask, clip_ratio=0.2)[0].backward()
    # d(-A r)/dlogprob = -A r, over 5 tokens: 0 (good enough), 1.5/5, 0 (bad enough), -0.5/5, -2/5
    torch.testing.assert_close(logprobs.grad, torch.tensor([[0.0, 0.3, 0.0, -0.1, -0.4]]))


def test_first_update_has_ratio_one_and_loss_minus_mean_advantage():
    logprobs = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    advantages = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 5, dtype=torch.bool)
    loss, metrics = policy_loss(logprobs, logprobs, advantages, mask, clip_ratio=0.2)
    torch.testing.assert_close(loss, -advantages.mean())
    assert (metrics["approx_kl"].item(), metrics["clipfrac"].item(), metrics["ratio"].item()) == (0, 0, 1)


def test_importance_weights_scale_the_loss_but_not_the_metrics():
    logprobs, old_logprobs = log(0.2, 0.2), log(0.2, 0.2)
    mask = torch.ones(1, 2, dtype=torch.bool)
    # min(0.2/0.1, 1.5) = 1.5; 0.2/0.4 = 0.5
    weights = importance_weights(old_logprobs, log(0.1, 0.4), cap=1.5)
    torch.testing.assert_close(weights, torch.tensor([[1.5, 0.5]]))
    arguments = (logprobs, old_logprobs, torch.tensor([[1.0, 2.0]]), mask)
    loss, metrics = policy_loss(*arguments, clip_ratio=0.2, weights=weights)
    assert loss.item() == pytest.approx(-(1.5 * 1 + 0.5 * 2) / 2)
    assert metrics["ratio"].item() == 1


def test_importance_weights_carry_no_gradient_and_stay_finite():
    logprobs = torch.tensor([[-500.0, 0.0]], requires_grad=True)
    weights = importance_weights(logprobs, torch.tensor([[0.0, -500.0]]), cap=2.0)
    assert not weights.requires_grad
    torch.testing.assert_close(weights, torch.tensor([[math.exp(-20), 2.0]]))


def test_value_loss_by_hand():
    values = torch.tensor([[1.0, 2.0, 0.0]])
    old_values = torch.tensor([[0.0, 1.9, 0.1]])
    returns = torch.tensor([[2.0, 2.5, 0.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    loss, metrics = value_loss(values, old_values, returns, mask, clip_value=0.2)
    # v_clipped = 0.2, 2.0, 0.0
    # max((1-2)^2, (0.2-2)^2) = 3.24; (2-2.5)^2 = 0.25 both; 0
    # half the mean = (3.24 + 0.25 + 0) / 3 / 2
    assert loss.item() == pytest.approx(3.49 / 6)
    assert metrics["value_clipfrac"].item() == pytest.approx(1 / 3)
    unclipped, metrics = value_loss(values, old_values, returns, mask, clip_value=None)
    assert unclipped.item() == pytest.approx((1 + 0.25 + 0) / 6)
    assert metrics["value_clipfrac"].item() == 0


def test_value_gradient_is_zero_where_clipped():
    values = torch.tensor([[1.0, 1.0]], requires_grad=True)
    old_values, returns = torch.tensor([[0.0, 2.0]]), torch.tensor([[2.0, -1.0]])
    # Token 0: clipped 0.2 is further from 2 than 1 is, so the clipped branch counts and has no gradient.
    # Token 1: clipped 1.8 is further from -1 than 1 is: clipped too.
    loss, _ = value_loss(values, old_values, returns, torch.tensor([[True, True]]), clip_value=0.2)
    loss.backward()
    assert values.grad.tolist() == [[0.0, 0.0]]
    # Moving away from the return: the plain error is larger and keeps its gradient, (v - R) / 2 tokens.
    values = torch.tensor([[1.0, 1.0]], requires_grad=True)
    returns = torch.tensor([[-1.0, 3.0]])
    value_loss(values, old_values, returns, torch.tensor([[True, True]]), clip_value=0.2)[0].backward()
    assert values.grad.tolist() == [[1.0, -1.0]]


def test_explained_variance_by_hand():
    # Returns 1, 2, 3 and errors 0.5, 0, -0.5: variances 2 / 3 and 0.5 / 3.
    by_hand = explained_variance(return_mean=2, return_sq_mean=14 / 3, error_mean=0, error_sq_mean=0.5 / 3)
    assert by_hand == pytest.approx(0.75)
    # A constant offset is no error of variance; a constant prediction explains nothing.
    assert explained_variance(return_mean=2, return_sq_mean=14 / 3, error_mean=5, error_sq_mean=25) == pytest.approx(1)
    assert explained_variance(return_mean=2, return_sq_mean=14 / 3, error_mean=2, error_sq_mean=14 / 3) == 0
    assert explained_variance(return_mean=1, return_sq_mean=1, error_mean=0, error_sq_mean=1) == 0


def test_explained_variance_from_the_metrics_of_value_loss():
    generator = torch.Generator().manual_seed(0)
    returns = torch.randn(4, 6, generator=generator) + 2
    values = returns + 0.5 * torch.randn(4, 6, generator=generator)
    mask = torch.rand(4, 6, generator=generator) < 0.7
    _, metrics = value_loss(values, values, returns, mask, clip_value=None)
    names = ("return_mean", "return_sq_mean", "error_mean", "error_sq_mean")
    from_means = explained_variance(**{name: metrics[name].item() for name in names})
    plain = 1 - (returns - values)[mask].double().var() / returns[mask].double().var()
    assert from_means == pytest.approx(plain.item(), abs=1e-5)


def test_lm_loss_by_hand():
    logprobs = log(0.5, 0.25, 0.125)
    loss, metrics = lm_loss(logprobs, torch.tensor([[False, True, True]]))
    # (2 ln 2 + 3 ln 2) / 2
    assert loss.item() == pytest.approx(2.5 * math.log(2))
    assert metrics["lm_loss"].item() == loss.item()


def run_policy_loss(x, rows, denominator):
    loss, metrics = policy_loss(
        x[0][rows], x[1][rows], x[2][rows], x[3][rows] > 0, clip_ratio=0.2, denominator=denominator
    )
    return loss, metrics


def run_value_loss(x, rows, denominator):
    return value_loss(x[0][rows], x[1][rows], x[2][rows], x[3][rows] > 0, clip_value=0.2, denominator=denominator)


def run_lm_loss(x, rows, denominator):
    return lm_loss(x[0][rows], x[3][rows] > 0, denominator=denominator)


@pytest.mark.parametrize("run", [run_policy_loss, run_value_loss, run_lm_loss])
def test_micro_batches_add_up_to_the_batch(run):
    x = torch.randn(4, 6, 7, generator=torch.Generator().manual_seed(2))
    x[3, 5] = -1  # a row without response tokens, alone in its micro-batch
    x.requires_grad_()
    num_tokens = int((x[3] > 0).sum())
    loss, metrics = run(x, slice(0, 6), None)
    (expected_grad,) = torch.autograd.grad(loss, x)
    parts = [run(x, rows, num_tokens) for rows in (slice(0, 1), slice(1, 5), slice(5, 6))]
    torch.testing.assert_close(sum(part for part, _ in parts), loss)
    for name, value in metrics.items():
        assert not value.requires_grad
        torch.testing.assert_close(sum(part[name] for _, part in parts), value)
    grad = sum(torch.autograd.grad(part, x, retain_graph=True)[0] for part, _ in parts)
    torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("run", [run_policy_loss, run_value_loss, run_lm_loss])
def test_an_empty_batch_gives_zero_loss_and_zero_gradient(run):
    x = torch.full((4, 2, 3), -1.0, requires_grad=True)
    loss, metrics = run(x, slice(0, 2), None)
    loss.backward()
    assert loss.item() == 0
    assert all(value.item() == 0 for value in metrics.values())
    assert torch.count_nonzero(x.grad) == 0


@pytest.mark.parametrize("run", [run_policy_loss, run_value_loss, run_lm_loss])
def test_what_stands_outside_the_mask_reaches_neither_loss_nor_gradient(run):
    x = torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(3))
    x[3] = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0])
    dirty = x.clone()
    dirty[:3, :, 2:] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    x.requires_grad_()
    dirty.requires_grad_()
    results = [run(values, slice(0, 2), None) for values in (x, dirty)]
    torch.testing.assert_close(results[1], results[0])
    grads = [torch.autograd.grad(result[0], values)[0] for result, values in zip(results, (x, dirty), strict=True)]
    torch.testing.assert_close(grads[1], grads[0])


def test_extreme_log_ratios_stay_finite():
    logprobs = torch.tensor([[0.0, -1000.0, 0.0, -1000.0]], requires_grad=True)
    old_logprobs = torch.tensor([[-1000.0, 0.0, -1000.0, 0.0]])
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    loss, metrics = policy_loss(logprobs, old_logprobs, advantages, mask, clip_ratio=0.2)
    loss.backward()
    # -1.2 (clipped), -exp(-20), exp(20) (the pessimistic side is never clipped), 0.8 (clipped)
    assert loss.item() == pytest.approx((-1.2 - math.exp(-20) + math.exp(20) + 0.8) / 4)
    assert all(torch.isfinite(value) for value in metrics.values())
    assert torch.isfinite(logprobs.grad).all()
