"""The bare loop's maths, written out without masks, against the project's masked functions."""

import pytest
import torch
from bare_ppo import Batch, Trained, advantages_and_returns, clipped_policy_loss, clipped_value_loss, values_of
from measuring import median_interval
from torch import nn

from model.config import PRESETS
from model.heads import state_values
from model.llama import Llama
from rlhf_ray.algo.gae import gae
from rlhf_ray.algo.kl import kl_estimate
from rlhf_ray.algo.losses import policy_loss, value_loss
from rlhf_ray.algo.reward import SAFETY_THRESHOLD_RAW, combine_rewards, token_rewards
from rlhf_ray.algo.whiten import masked_whiten
from rlhf_ray.config import OptimSection

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14], [15]]
ANSWERS = [[20 + i, 30, 2, 40 + i] for i in range(4)]  # EOS in the middle ends nothing
ROWS, TOKENS = len(PROMPTS), len(ANSWERS[0])


@pytest.fixture
def batch():
    return Batch.of(PROMPTS, ANSWERS)


def noise(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spread_out(values, batch):
    """(B, R) at its places in (B, T)."""
    return torch.zeros(batch.tokens.shape).scatter(1, batch.places, values)


def test_places_are_those_of_the_answers(batch):
    assert batch.tokens.gather(1, batch.places).tolist() == ANSWERS
    assert batch.tokens[batch.mask].tolist() == [token for answer in ANSWERS for token in answer]
    assert batch.lengths.tolist() == [7, 6, 9, 5]


def test_micro_batches_hold_every_row_once_within_the_budget(batch):
    parts = list(batch.micro_batches(range(ROWS), 14))
    assert sorted(row for rows, _ in parts for row in rows.tolist()) == [0, 1, 2, 3]
    assert [part.tokens.shape for _, part in parts] == [(1, 9), (2, 7), (1, 5)]
    for rows, part in parts:
        assert part.tokens.gather(1, part.places).tolist() == [ANSWERS[row] for row in rows]


@pytest.mark.parametrize("whiten_advantages", [True, False])
def test_advantages_and_returns(batch, whiten_advantages):
    logprobs, reference, values = (noise(ROWS, TOKENS, seed=seed) for seed in range(3))
    helpfulness, safety = 3 * noise(ROWS, seed=3), 3 * noise(ROWS, seed=4)
    is_safety = torch.tensor([True, False, False, False])
    advantages, returns = advantages_and_returns(
        logprobs, reference, values, helpfulness, safety, is_safety,
        safety_threshold_raw=SAFETY_THRESHOLD_RAW, kl_coef=0.1, gamma=0.9, gae_lambda=0.8,
        whiten_advantages=whiten_advantages,
    )  # fmt: skip
    scores = combine_rewards(helpfulness, safety, is_safety, threshold=SAFETY_THRESHOLD_RAW)
    whitened = masked_whiten(scores, torch.ones(ROWS, dtype=torch.bool))
    kl = spread_out(kl_estimate(logprobs, reference, estimator="k1"), batch)
    rewards = token_rewards(whitened, kl, batch.mask, kl_coef=0.1)
    expected, expected_returns = gae(rewards, spread_out(values, batch), batch.mask, gamma=0.9, lam=0.8)
    if whiten_advantages:
        expected = masked_whiten(expected, batch.mask)
    torch.testing.assert_close(spread_out(advantages, batch), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(spread_out(returns, batch), expected_returns, rtol=1e-5, atol=1e-6)


def test_losses(batch):
    new, old, advantages = (0.3 * noise(ROWS, TOKENS, seed=seed) for seed in range(3))
    wide = [spread_out(x, batch) for x in (new, old, advantages)]
    denominator = ROWS * TOKENS
    expected, metrics = policy_loss(*wide, batch.mask, clip_ratio=0.2, denominator=denominator)
    assert 0 < metrics["clipfrac"] < 1
    torch.testing.assert_close(clipped_policy_loss(new, old, advantages, 0.2) / denominator, expected)
    for clip_value in (0.2, None):
        expected, _ = value_loss(*wide, batch.mask, clip_value=clip_value, denominator=denominator)
        torch.testing.assert_close(clipped_value_loss(new, old, advantages, clip_value) / denominator, expected)


def test_values_are_of_the_states_before_each_token(batch):
    model = Llama(PRESETS["tiny"], head="scalar")
    wide = state_values(model(batch.tokens))
    assert torch.equal(spread_out(values_of(model, batch), batch), wide * batch.mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_adamw_on_master_weights(dtype):
    optim = OptimSection(lr=1e-2, weight_decay=0.1, grad_clip=0.5)
    weight, inputs = noise(6, 4, seed=1).to(dtype), [noise(3, 4, seed=seed).to(dtype) for seed in (2, 3)]
    layer = nn.Linear(4, 6, bias=False)
    layer.weight.data = weight.float()
    trained = Trained(layer, optim, dtype)
    for _ in range(2):
        for part in inputs:
            trained.backward(layer(part).float().square().sum())
        trained.step()
    master = weight.float().requires_grad_()
    adamw = torch.optim.AdamW([master], lr=1e-2, betas=optim.betas, eps=optim.eps, weight_decay=0.1)
    for _ in range(2):
        master.grad = torch.zeros_like(master)
        for part in inputs:
            rounded = master.detach().to(dtype).requires_grad_()
            (part @ rounded.T).float().square().sum().backward()
            master.grad += rounded.grad
        torch.nn.utils.clip_grad_norm_([master], 0.5)
        adamw.step()
    assert layer.weight.dtype == dtype
    torch.testing.assert_close(layer.weight.float(), master.detach().to(dtype).float(), rtol=1e-5, atol=1e-6)


def test_the_median_lies_between_order_statistics():
    # P(X < 2) for 10 fair coins is 11/1024: 2 x 11/1024 = 2.1 % outside, one more would be 10.9 %.
    assert median_interval(list(range(10))) == (1, 8)
    # 2 x (1 + 6) / 64 is more than 5 %, 2 x 1/64 is less.
    assert median_interval([5.0, 3.0, 1.0, 2.0, 4.0, 6.0]) == (1.0, 6.0)
    assert median_interval([1.0] * 5) is None
