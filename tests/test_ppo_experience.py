"""PPO's numbers: an exact first step; experience and updates that do not depend on ranks; NaN."""

import math
from typing import Any

import pytest
import ray
import torch
from torch import Tensor
from training_world import UNTIED, Trained, TrainingWorker, assert_same, begin, launch

from cluster.session import session
from cluster.worker_group import WorkerError, collect
from model.checkpoint import save_checkpoint
from model.llama import Llama
from rlhf_ray.backends.train import NonFiniteError
from rlhf_ray.config import PPOSection
from rlhf_ray.recipe.ppo import experience_settings, scoring_settings, update_settings
from rlhf_ray.records import Rollouts, StaleRolloutsError, WeightVersion
from rlhf_ray.workers.policy import PolicyWorker
from rlhf_ray.workers.scorer import Runtime, ScorerWorker
from rlhf_ray.workers.value import ValueWorker

ROWS = 8  # answers of a chunk
SECTION = PPOSection(
    batch_size=2 * ROWS, minibatch_size=2 * ROWS, num_chunks=2, micro_batch_tokens=10_000, kl_coef=0.05
)
TIMEOUT_S = 120
VERSION = WeightVersion("", 0)
"""Of the weights that have sampled, and of those that a worker has before it is told."""
GATE = math.log(0.15 / 0.85)


@pytest.fixture(scope="module")
def groups():
    """{ranks: worker group}"""
    with session(num_cpus=2):
        yield {ranks: launch(f"policy-{ranks}", ranks) for ranks in (1, 2)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The weights with which `begin` starts."""
    directory = tmp_path_factory.mktemp("checkpoint") / "model"
    model = Llama(UNTIED, head="lm")
    model.init_weights(seed=1)
    save_checkpoint(directory, UNTIED, model.named_parameters())
    return str(directory)


def rollouts(seed: int, *, equal_lengths: bool = False) -> Rollouts:
    """Random answers after prompts of six tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(10, 25, (ROWS,), generator=generator)
    lengths = torch.full((ROWS,), 24) if equal_lengths else lengths
    places = torch.arange(int(lengths.max()))
    real = places < lengths[:, None]
    mask = real & (places >= 6)
    return Rollouts(
        tokens=torch.randint(4, UNTIED.vocab_size, mask.shape, generator=generator) * real,
        response_mask=mask,
        rollout_logprobs=torch.full(mask.shape, -math.log(UNTIED.vocab_size)) * mask,
        finished=torch.arange(ROWS) % 3 > 0,
        is_safety=torch.arange(ROWS) % 2 > 0,
        prompt_ids=tuple(map(str, range(ROWS))),
        messages=([],) * ROWS,
        policy_version=VERSION,
    )


def scores(chunk: Rollouts, seed: int) -> list[Tensor]:
    """Values (B, T + 1), reference log-probs, helpfulness and safety scores."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator)

    mask, each = chunk.response_mask, torch.zeros(ROWS)
    values = torch.nn.functional.pad(0.3 * noise(mask), (0, 1), value=0.4)
    return [values, (0.2 * noise(mask) - 6.2) * mask, 2 * noise(each) + 1, 2 * noise(each)]


def build(group, chunks, chunk_scores, section: PPOSection = SECTION):
    """Calls of build_experience, chunk c on rank c % ranks, as the driver makes them."""
    group.call(PolicyWorker.set_version, VERSION)  # updates of earlier tests have changed it
    budget = {"temperature": section.temperature, "micro_batch_tokens": section.micro_batch_tokens}
    logprobs = [
        group.submit_one(c % group.num_ranks, ScorerWorker.logprobs, chunk, **budget, num_data=1)
        for c, chunk in enumerate(chunks)
    ]
    calls = []
    for rank in range(group.num_ranks):
        own = range(rank, len(chunks), group.num_ranks)
        inputs = [chunks[c] for c in own] + [logprobs[c].data[0] for c in own]
        inputs += [chunk_scores[c][kind] for kind in range(4) for c in own]
        calls.append(
            group.submit_one(
                rank,
                PolicyWorker.build_experience,
                len(own),
                experience_settings(section),
                scoring_settings(section).gate,
                *inputs,
                num_data=len(own),
            )
        )
    return calls


def in_order(calls, num_chunks: int) -> list[Any]:
    """References to the experience of each chunk."""
    return [calls[c % len(calls)].data[c // len(calls)] for c in range(num_chunks)]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_before_any_update_policy_and_reference_are_one_to_the_last_bit(groups, checkpoint, precision):
    group, chunk = groups[1], rollouts(1, equal_lengths=True)
    runtime = Runtime(precision=precision, device="cpu")
    # Equal lengths and micro-batches without a limit give scoring and update the same shapes.
    section = SECTION.model_copy(update={"num_chunks": 1, "minibatch_size": ROWS, "temperature": 0.8})
    group.call(ScorerWorker.load_frozen, checkpoint, head="lm", runtime=runtime)
    reference = group.submit_one(
        0, ScorerWorker.logprobs, chunk, temperature=0.8, micro_batch_tokens=10_000, num_data=1
    )
    begin(group, checkpoint, "lm", precision=precision)
    values, _, helpfulness, safety = scores(chunk, 2)
    [built] = build(group, [chunk], [[values, reference.data[0], helpfulness, safety]], section)
    [metrics] = collect([built], timeout_s=TIMEOUT_S)
    assert metrics["kl_per_sequence"] == metrics["kl_k1_per_token"] == metrics["kl_k3_per_token"] == 0.0
    assert metrics["logprob_gap_per_token"] > 0.01  # the chunk's own log-probs are made up
    [update] = group.call(PolicyWorker.train_policy, 0, update_settings(section, 3), *built.data)
    assert (update["ratio"], update["approx_kl"], update["clipfrac"]) == (1.0, 0.0, 0.0)
    # The update did change the policy: the same batch has another ratio now.
    [update] = group.call(PolicyWorker.train_policy, 1, update_settings(section, 3), *built.data)
    assert update["approx_kl"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [1, 3])
def test_experience_and_updates_are_the_same_on_two_ranks(groups, zero_stage):
    chunks = [rollouts(1), rollouts(2)]
    chunk_scores = [scores(chunk, seed) for seed, chunk in enumerate(chunks)]
    section = SECTION.model_copy(update={"minibatch_size": ROWS, "inner_epochs": 10, "micro_batch_tokens": 60})
    settings = update_settings(section, 3)
    metrics, experience, trained = [], [], []
    for ranks in (1, 2):
        group = groups[ranks]
        begin(group, UNTIED, "lm", zero_stage=zero_stage)
        calls = build(group, chunks, chunk_scores, section)
        metrics += collect(calls, timeout_s=TIMEOUT_S)
        references = in_order(calls, len(chunks))
        experience.append(ray.get(references))
        updates = group.call(PolicyWorker.train_policy, 0, settings, *references)  # 20 optimizer steps
        trained.append(Trained(group.call(TrainingWorker.copy_weights)[0], updates[:1]))
    for other in metrics[1:]:
        assert other == pytest.approx(metrics[0], rel=1e-5, abs=1e-7)
    for one, two in zip(*experience, strict=True):
        for name in ("logprobs", "advantages", "returns", "values", "weights"):
            torch.testing.assert_close(getattr(two, name), getattr(one, name), rtol=1e-5, atol=1e-6)
        assert torch.equal(two.tokens, one.tokens) and torch.equal(two.response_mask, one.response_mask)
    assert_same(trained[1], trained[0])
    # Advantages are whitened over both chunks: mean 0 and variance 1 jointly, not each by itself.
    parts = [e.advantages[e.response_mask].double() for e in experience[1]]
    assert torch.cat(parts).mean().abs() < 1e-6
    assert abs(torch.cat(parts).var() - 1) < 1e-5
    assert parts[0].mean().abs() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_rewards_are_whitened_over_all_ranks_and_both_models(groups, ranks):
    """With gamma = lambda = 1, no KL and no values, every token's return is its answer's whitened score."""
    chunks = [rollouts(1), rollouts(2)]
    chunk_scores = [scores(chunk, seed) for seed, chunk in enumerate(chunks)]
    for kinds in chunk_scores:
        kinds[0] = torch.zeros_like(kinds[0])
    section = SECTION.model_copy(update={"kl_coef": 0.0, "gae_lambda": 1.0, "whiten_advantages": False})
    begin(groups[ranks], UNTIED, "lm")
    calls = build(groups[ranks], chunks, chunk_scores, section)
    metrics = collect(calls, timeout_s=TIMEOUT_S)
    # The safety model rules on tagged prompts, and where its sigmoid is below 0.15 (raw: -1.7346).
    raw, gated = [], 0
    for chunk, (_, _, helpfulness, safety) in zip(chunks, chunk_scores, strict=True):
        by_safety = chunk.is_safety | (safety < GATE)
        raw.append(torch.where(by_safety, safety, helpfulness))
        gated += int(by_safety.sum())
    everything = torch.cat(raw)
    for row, experience in zip(raw, ray.get(in_order(calls, 2)), strict=True):
        expected = (row - everything.mean()) / everything.std()  # torch's std is the unbiased one
        mask = experience.response_mask
        torch.testing.assert_close(experience.returns, expected[:, None] * mask, rtol=1e-5, atol=1e-6)
    for own in metrics:
        assert own["reward_gated"] == pytest.approx(gated / (2 * ROWS))
        assert own["reward_combined"] == pytest.approx(everything.mean().item(), rel=1e-5)
        assert own["reward_whitened"] == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["score", "value", "reference"])
def test_nan_on_one_rank_is_an_error_and_hangs_nothing(groups, fault):
    group, chunks = groups[2], [rollouts(1), rollouts(2)]
    chunk_scores = [scores(chunk, seed) for seed, chunk in enumerate(chunks)]
    kind, place = {"score": (2, 0), "value": (0, (0, 7)), "reference": (1, (0, 7))}[fault]
    chunk_scores[1][kind][place] = torch.nan
    chunks[1].is_safety[0] = False
    begin(group, UNTIED, "lm")
    calls = build(group, chunks, chunk_scores)
    with pytest.raises(WorkerError, match="an advantage is not finite") as error:
        collect(calls, timeout_s=TIMEOUT_S)
    assert isinstance(error.value.cause, NonFiniteError)
    # Both ranks are done with it and take the next call.
    group.call(ScorerWorker.set_threads, 1)


def test_a_cut_off_answer_goes_on_at_the_value_after_its_own_last_token(tmp_path):
    """Values, advantages and returns against a loop over single unpadded answers."""
    model = Llama(UNTIED, head="scalar")
    model.init_weights(seed=1)
    save_checkpoint(tmp_path / "value", UNTIED, model.named_parameters(), num_labels=1)
    runtime = Runtime(precision="fp32", device="cpu")
    value, policy = ValueWorker("value", 0, 1), PolicyWorker("policy", 0, 1)
    value.load_frozen(str(tmp_path / "value"), head="scalar", runtime=runtime)
    chunk = rollouts(1)
    assert len(set(chunk.lengths[~chunk.finished].tolist())) > 1  # cut at different lengths
    _, values = value.values(chunk, micro_batch_tokens=60)
    _, reference, helpfulness, safety = scores(chunk, 2)
    logprobs = chunk.rollout_logprobs
    section = SECTION.model_copy(
        update={"truncated": "bootstrap", "gamma": 0.9, "gae_lambda": 0.8, "whiten_advantages": False}
    )
    inputs = (chunk, logprobs, values, reference, helpfulness, safety)
    _, experience = policy.build_experience(1, experience_settings(section), GATE, *inputs)
    raw = torch.where(chunk.is_safety | (safety < GATE), safety, helpfulness).double()
    for row in range(ROWS):
        length = int(chunk.lengths[row])
        with torch.no_grad():
            read = model(chunk.tokens[row : row + 1, :length])[0].double().tolist()  # after each token
        after = 0.0 if chunk.finished[row] else read[-1]
        reward = float((raw[row] - raw.mean()) / raw.std())
        advantage = 0.0
        for t in range(length - 1, 5, -1):  # prompts have six tokens
            reward -= 0.05 * float(logprobs[row, t] - reference[row, t])
            advantage = reward + 0.9 * after - read[t - 1] + 0.9 * 0.8 * advantage
            after, reward = read[t - 1], 0.0
            assert float(experience.values[row, t]) == pytest.approx(read[t - 1], abs=1e-5)
            assert float(experience.advantages[row, t]) == pytest.approx(advantage, abs=1e-5)
            assert float(experience.returns[row, t]) == pytest.approx(advantage + read[t - 1], abs=1e-5)
    outside = ~chunk.response_mask
    assert not any(tensor[outside].any() for tensor in (experience.values, experience.advantages, experience.returns))


def test_what_a_cut_off_answer_is_worth_by_hand():
    """Two tokens with values 1 and 2, and 5 after them; no other reward, gamma = 1/2, lambda = 1."""
    chunk = Rollouts(
        tokens=torch.tensor([[7, 8, 9, 0], [7, 8, 9, 0]]),
        response_mask=torch.tensor([[False, True, True, False]] * 2),
        rollout_logprobs=torch.zeros(2, 4),
        finished=torch.tensor([False, True]),
        is_safety=torch.zeros(2, dtype=torch.bool),
        prompt_ids=("0", "1"),
        messages=([], []),
        policy_version=VERSION,
    )
    values, nothing = torch.tensor([[9.0, 1.0, 2.0, 5.0, 9.0]] * 2), torch.zeros(2, 4)
    changes = {"truncated": "bootstrap", "gamma": 0.5, "gae_lambda": 1.0, "whiten_advantages": False}
    settings = experience_settings(SECTION.model_copy(update=changes))
    inputs = (chunk, nothing, values, nothing, torch.zeros(2), torch.zeros(2))  # equal scores whiten to 0
    _, experience = PolicyWorker("policy", 0, 1).build_experience(1, settings, GATE, *inputs)
    assert experience.returns.tolist() == [[0.0, 1.25, 2.5, 0.0], [0.0] * 4]  # 5 / 4 and 5 / 2; an end is worth 0
    assert experience.advantages[0].tolist() == [0.0, 0.25, 0.5, 0.0]


def test_answers_of_other_weights_are_no_experience_of_these():
    chunk, nothing = rollouts(1), torch.zeros(ROWS)
    values, reference, *_ = scores(chunk, 2)
    policy = PolicyWorker("policy", 0, 1)
    inputs = (experience_settings(SECTION), GATE, chunk, chunk.rollout_logprobs, values, reference, nothing, nothing)
    policy.build_experience(1, *inputs)
    for other in (WeightVersion("ppo-abc", 0), WeightVersion("", 1)):
        policy.set_version(other)
        with pytest.raises(StaleRolloutsError, match=r"rollouts are of .*, and experience for .* is to be built"):
            policy.build_experience(1, *inputs)


def test_a_score_that_is_not_finite_is_an_error(tmp_path):
    model = Llama(UNTIED, head="scalar")
    model.init_weights(seed=1)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    weights["score.weight"] *= torch.finfo(torch.float32).max  # weights themselves must be finite
    save_checkpoint(tmp_path / "reward", UNTIED, weights.items(), num_labels=1)
    worker = ScorerWorker("helpfulness", 0, 1)
    worker.load_frozen(str(tmp_path / "reward"), head="scalar", runtime=Runtime(precision="fp32", device="cpu"))
    with pytest.raises(NonFiniteError, match=r"helpfulness scored an answer (-?inf|nan)"):
        worker.score(rollouts(1), micro_batch_tokens=1000)


def test_scoring_may_have_larger_micro_batches_than_training():
    larger = SECTION.model_copy(update={"score_micro_batch_tokens": 40_000})
    assert scoring_settings(SECTION).micro_batch_tokens == SECTION.micro_batch_tokens
    assert scoring_settings(larger).micro_batch_tokens == 40_000
    assert update_settings(larger, seed=0).micro_batch_tokens == SECTION.micro_batch_tokens
