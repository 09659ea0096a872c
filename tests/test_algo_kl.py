"""KL estimators: hand arithmetic, unbiasedness against the exact sum, extreme log-ratios."""

import math

import pytest
import torch

from rlhf_ray.algo.kl import kl_estimate


def test_hand_arithmetic():
    logprobs, ref_logprobs = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    # d = 0.5, -1
    for estimator, expected in {
        "k1": [0.5, -1.0],
        "k2": [0.125, 0.5],
        "k3": [math.exp(-0.5) - 0.5, math.exp(1) - 2],  # exp(-d) - 1 + d
    }.items():
        estimate = kl_estimate(logprobs, ref_logprobs, estimator=estimator)
        torch.testing.assert_close(estimate, torch.tensor(expected))


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_expectation_is_the_exact_divergence(estimator):
    policy, reference = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.5, 0.3])
    exact = (policy * (policy / reference).log()).sum()
    # Weighting every possible token by its probability is the expectation of the estimate.
    expectation = (policy * kl_estimate(policy.log(), reference.log(), estimator=estimator)).sum()
    torch.testing.assert_close(expectation, exact)


def test_k3_keeps_its_digits_near_zero():
    # k3 = d^2/2 - d^3/6 + ... = 4.99833e-7 at d = 1e-3; exp(-d) - 1 + d in float32 is off by up to 6e-8.
    estimate = kl_estimate(torch.tensor([1e-3]), torch.tensor([0.0]), estimator="k3")
    torch.testing.assert_close(estimate, torch.tensor([4.99833e-7]), rtol=1e-3, atol=0)


def test_only_the_exponent_is_clamped():
    logprobs, ref_logprobs = torch.tensor([-500.0, 0.0]), torch.tensor([0.0, -500.0])  # d = -500, 500
    k3 = kl_estimate(logprobs, ref_logprobs, estimator="k3")
    # exp(20) - 1 - 500 and exp(-500) - 1 + 500
    torch.testing.assert_close(k3, torch.tensor([math.exp(20) - 501, 499.0]))
    assert kl_estimate(logprobs, ref_logprobs, estimator="k1").tolist() == [-500.0, 500.0]
    assert kl_estimate(logprobs, ref_logprobs, estimator="k2").tolist() == [125000.0, 125000.0]


def test_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="estimator='k4' must be one of"):
        kl_estimate(torch.zeros(1), torch.zeros(1), estimator="k4")
