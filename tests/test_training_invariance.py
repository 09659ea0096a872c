"""ZeRO stage, ranks, micro-batches, padding and packing change nothing: 20 steps against a plain loop.

fp32, rtol 1e-5. `benchmarks/invariance_band.py` measures the same pairs in bf16.
"""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from training_world import (
    BATCH,
    NUM_ANSWERS,
    OPTIM,
    PPO_SETTINGS,
    RTOL,
    TIED,
    UNTIED,
    Trained,
    TrainingWorker,
    assert_same,
    begin,
    launch,
    lm_data,
    plain_lm,
    plain_ppo,
    plain_reward,
    reward_data,
    train_lm,
    train_ppo,
    train_reward,
)

from cluster.session import session
from model.config import Recompute
from model.flops import num_parameters
from model.llama import Llama
from rlhf_ray.backends.train import learning_rate_scale
from rlhf_ray.data.batching import epoch_rows
from rlhf_ray.workers.policy import PolicyWorker
from rlhf_ray.workers.reward import RewardWorker
from rlhf_ray.workers.trainer import TrainerWorker

NUM_EXAMPLES = 16  # of the full-batch runs, in which a packed step holds the same examples as an unpacked one


@pytest.fixture(scope="module")
def groups():
    """{ranks: worker group}"""
    with session(num_cpus=2):
        yield {ranks: launch(f"trainer-{ranks}", ranks) for ranks in (1, 2)}


@pytest.fixture(scope="module")
def plain():
    """The plain loops' results, each computed when first asked for."""
    loops = {
        "lm": plain_lm,
        "lm-tied": lambda: plain_lm(TIED),
        "lm-full-batch": lambda: plain_lm(count=NUM_EXAMPLES, batch_size=NUM_EXAMPLES),
        "lm-passes": lambda: plain_lm(count=2 * BATCH + 1, draw=epoch_rows),
        "policy": lambda: plain_ppo("lm"),
        "value": lambda: plain_ppo("scalar"),
        "reward": plain_reward,
    }
    done: dict[str, Trained] = {}
    return lambda name: done.setdefault(name, loops[name]()) if name not in done else done[name]


@pytest.mark.slow
def test_the_comparison_is_sharp(plain):
    # Every parameter moves by more than 100 times what is tolerated...
    start = Llama(UNTIED)
    start.init_weights(seed=1)
    for name, weight in start.named_parameters():
        moved = (plain("lm").weights[name] - weight).abs().max()
        assert moved > 100 * RTOL * weight.square().mean().sqrt(), name
    # ... and gradients wrong by one part in a thousand are found out.
    with pytest.raises(AssertionError):
        assert_same(plain_lm(scale=1.001), plain("lm"))
    # Some steps are clipped (limit 1.7) and some are not.
    clipped = [norm > 1.7 for norm in plain("lm").series("grad_norm")]
    assert 0 < sum(clipped) < len(clipped)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_zero_stages_and_ranks_train_as_the_plain_loop_does(groups, plain, ranks, zero_stage):
    assert_same(train_lm(groups[ranks], zero_stage=zero_stage), plain("lm"))


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_bf16_goes_the_way_of_fp32(groups, zero_stage):
    """At the recipe's epsilon, to whose small steps Adam's bias correction matters."""
    optim = OPTIM.model_copy(update={"eps": 1e-5})
    start = Llama(UNTIED)
    start.init_weights(seed=1)
    runs = [
        train_lm(groups[1], zero_stage=stage, precision=precision, optim=optim)
        for stage, precision in ((1, "fp32"), (zero_stage, "bf16"))
    ]
    exact, rounded = (torch.cat([w.float().flatten() for w in run.weights.values()]) for run in runs)
    way = exact - torch.cat([p.detach().flatten() for p in start.parameters()])
    # Rounding to bf16 leaves the runs 1.1 % of the way apart; one update counted twice, 4.9 %.
    assert (rounded - exact).abs().mean() < 0.02 * way.abs().mean()
    np.testing.assert_allclose(runs[1].series("loss"), runs[0].series("loss"), rtol=1e-3)
    np.testing.assert_allclose(runs[1].series("lr"), runs[0].series("lr"), rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_tied_embeddings_train_as_the_plain_loop_does(groups, plain, zero_stage):
    assert_same(train_lm(groups[2], TIED, zero_stage=zero_stage), plain("lm-tied"))


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "zero_stage"), [(1, 1), (2, 1), (2, 3)])
def test_what_a_pass_leaves_over_is_a_step_with_its_own_mean(groups, plain, ranks, zero_stage):
    # Steps of 8, 8 and 1 rows: the last leaves a second rank with nothing.
    run = train_lm(groups[ranks], count=2 * BATCH + 1, draw=epoch_rows, zero_stage=zero_stage)
    assert_same(run, plain("lm-passes"))


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [1, 3])
def test_what_is_computed_again_changes_no_bit(groups, zero_stage):
    """Of two ranks; at stage 3 weights are gathered for what is computed again."""
    runs = [train_lm(groups[2], zero_stage=zero_stage, recompute=recompute) for recompute in get_args(Recompute)]
    for run in runs[1:]:
        assert run.metrics == runs[0].metrics
        assert all(torch.equal(run.weights[name], weight) for name, weight in runs[0].weights.items())


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("bf16", 2)])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_gradients_are_reduced_once_a_step_unless_they_are_divided(groups, zero_stage, precision, size):
    begin(groups[2], UNTIED, "lm", zero_stage=zero_stage, precision=precision)
    groups[2].call(TrainingWorker.sent, 1)  # in its first step stage 3 gathers weights that it then keeps
    all_bytes = size * num_parameters(UNTIED)
    reduces = "_reduce_scatter_base_" if zero_stage == 3 else "allreduce_"
    for counts in groups[2].call(TrainingWorker.sent, 3):
        between = [{name: n for name, n in count.items() if "reduce" in name} for count in counts[:-1]]
        last = counts[-1]
        assert between == 2 * [{reduces: all_bytes} if zero_stage >= 2 else {}]
        # Metrics and the gradient norm are a few numbers.
        assert all_bytes <= last[reduces] < all_bytes + 100
        # Weights come back where the optimizer is divided. This model is too small for stage 3 to divide its weights.
        assert last.get("_allgather_base_", 0) == (all_bytes if zero_stage else 0)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch_size", [1, 8])
def test_micro_batches_change_nothing(groups, plain, micro_batch_size):
    # Micro-batches of one row hold no padding, larger ones do.
    assert_same(train_lm(groups[1], micro_batch_size=micro_batch_size), plain("lm"))


@pytest.mark.slow
def test_rows_twice_as_wide_change_nothing(groups, plain):
    assert_same(train_lm(groups[1], layout="wide"), plain("lm"))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["unpacked", "packed"])
def test_packing_changes_nothing(groups, plain, layout):
    # Every step takes all examples, so that the batches are the same however they are laid out.
    batch_size = len(lm_data(NUM_EXAMPLES, UNTIED.vocab_size, layout).train)
    assert layout == "unpacked" or batch_size <= NUM_EXAMPLES // 2
    run = train_lm(groups[1], count=NUM_EXAMPLES, layout=layout, batch_size=batch_size)
    assert_same(run, plain("lm-full-batch"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "zero_stage", "micro_batch_tokens"), [(1, 1, 1), (1, 0, 1000), (2, 1, 100), (2, 3, 1)]
)
@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_ppo_updates_are_those_of_the_plain_loop(groups, plain, head, ranks, zero_stage, micro_batch_tokens):
    # 1 token a micro-batch is one row each; 1000 is a minibatch at once.
    settings = replace(PPO_SETTINGS, micro_batch_tokens=micro_batch_tokens)
    run = train_ppo(groups[ranks], head, settings, zero_stage=zero_stage)
    assert_same(run, plain("policy" if head == "lm" else "value"))
    # The clip is at work on some tokens.
    assert 0.01 < run.metrics[0]["clipfrac" if head == "lm" else "value_clipfrac"] < 0.99


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [1, 3])
def test_a_rank_without_rows_of_a_minibatch_changes_nothing(groups, zero_stage):
    # 16 answers in minibatches of 5 leave one answer for the last, and one rank with nothing.
    assert NUM_ANSWERS % 5 == 1
    settings = replace(PPO_SETTINGS, minibatch_size=5)
    for head in ("lm", "scalar"):
        one = train_ppo(groups[1], head, settings, zero_stage=zero_stage)
        two = train_ppo(groups[2], head, settings, zero_stage=zero_stage)
        assert_same(two, one)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "zero_stage", "micro_batch_tokens"), [(1, 1, 1), (1, 0, 10_000), (2, 1, 150), (2, 3, 150)]
)
def test_reward_training_is_that_of_the_plain_loop(groups, plain, ranks, zero_stage, micro_batch_tokens):
    run = train_reward(groups[ranks], zero_stage=zero_stage, micro_batch_tokens=micro_batch_tokens)
    assert_same(run, plain("reward"))


@pytest.mark.slow
def test_a_rank_without_pairs_changes_nothing(groups):
    # One pair a step leaves the second rank with nothing; three quarters of the pairs have safety labels.
    one, two = (train_reward(groups[ranks], zero_stage=stage, batch_size=1) for ranks, stage in ((1, 1), (2, 3)))
    assert_same(two, one)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 3])
def test_evaluation_does_not_depend_on_ranks_or_micro_batches(groups, zero_stage):
    losses = []
    for ranks in (1, 2):
        begin(groups[ranks], UNTIED, "lm", zero_stage=zero_stage)
        # An odd number of rows: the second rank has one less, and a micro-batch less where they are single.
        groups[ranks].call(TrainerWorker.open_data, lm_data, BATCH + 1, UNTIED.vocab_size, "unpacked")
        for size in (1, 5):
            losses += groups[ranks].call(PolicyWorker.evaluate_lm, micro_batch_size=size)
    assert losses[0] > 5  # ln(512) = 6.24 before training
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 3])
def test_accuracy_does_not_depend_on_ranks_or_micro_batches(groups, zero_stage):
    found = []
    for ranks in (1, 2):
        begin(groups[ranks], UNTIED, "scalar", zero_stage=zero_stage)
        groups[ranks].call(TrainerWorker.open_data, reward_data, 1)
        for tokens in (1, 300, 10_000):  # at 10,000 all pairs are one micro-batch, and are split for two ranks
            found += groups[ranks].call(RewardWorker.evaluate_reward, micro_batch_tokens=tokens)
    # One pair at a time through the model itself.
    model = Llama(UNTIED, head="scalar")
    model.init_weights(seed=1)
    pairs = reward_data(1).held_out
    hits = []
    for sides in pairs._sides:
        chosen, rejected = (model(torch.tensor([side]))[0, -1].item() for side in sides)
        hits.append(float(chosen > rejected))
    for accuracy in found:
        assert accuracy == found[0]
    assert found[0]["accuracy/all"] == pytest.approx(np.mean(hits)) and found[0]["count/all"] == len(pairs)


def test_learning_rate_schedule():
    def share(step, schedule="cosine", warmup_steps=2, warmup_ratio=0.0):
        return learning_rate_scale(
            step,
            num_steps=10,
            warmup_steps=warmup_steps,
            warmup_ratio=warmup_ratio,
            schedule=schedule,
            min_lr_ratio=0.1,
        )

    assert [share(0), share(1), share(2)] == [0.5, 1.0, 1.0]
    # Half-way from step 2 to step 10 the cosine is at its mean: (1 + 0.1) / 2.
    assert share(6) == pytest.approx(0.55)
    assert share(10) == share(12) == pytest.approx(0.1)
    assert [share(step, schedule="constant") for step in (0, 5, 50)] == [0.5, 1.0, 1.0]
    # A warm-up of 35 % of 10 steps is 4 steps, and the larger of the two rules holds.
    assert [share(step, warmup_ratio=0.35) for step in (0, 3)] == [0.25, 1.0]
    assert share(0, warmup_steps=0) == 1.0
