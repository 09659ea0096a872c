"""What the planner says of real shapes: hand arithmetic, the model's own bytes, settings that a run accepts."""

import json
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from plan_memory import kept_by_autograd
from tiny_inputs import write_checkpoint

from cluster.plan import GIB
from model import logprobs
from model.config import PRESETS, Recompute
from model.flops import activation_bytes, forward_working_bytes
from model.llama import Llama
from rlhf_ray.cli import main as cli
from rlhf_ray.cli.plan import plan_request
from rlhf_ray.config import load_config
from rlhf_ray.errors import UserError
from rlhf_ray.planning import memory
from rlhf_ray.planning.batches import check_batches
from rlhf_ray.planning.memory import Work, lm_head_bytes, training_memory, training_work
from rlhf_ray.planning.plan import FROZEN, make_plan

SEVEN_B = 6_738_415_616
NOTHING = Work(kept=0, block=0, head=0)
TABLE = 32_000 * 4096  # the largest matrix of 7B


def request(model="llama2-7b", gpus=8, gib=80.0, **more):
    defaults = {
        "reward_model": None,
        "stage": "ppo",
        "overhead_gib": 2.0,
        "zero_stage": None,
        "batch": None,
        "prompt_tokens": None,
        "response_tokens": None,
        "config_path": None,
        "overrides": [],
    }
    return plan_request(model=model, gpus=gpus, gpu_memory_gib=gib, **defaults | more)


def plan(*arguments, **more):
    return make_plan(request(*arguments, **more))


@pytest.fixture
def call(monkeypatch, capsys):
    """`rlhf-ray plan` in this process: (code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["rlhf-ray", "plan", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    return run


# --- bytes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("zero_stage", "phase", "total", "fits"),
    [
        # bf16 weights 2, fp32 master and moments 12, bf16 gradients 2, all of them in fp32 for the step 4
        (0, "step", 20 * SEVEN_B, False),
        # 2, 12 / 8, bf16 gradients 2 and a whole fp32 accumulator 4, its flattened copy 4 and that in bf16 2
        (1, "reduction", 14 * SEVEN_B + 12 * SEVEN_B // 8, False),
        # 2, 12 / 8, 4 / 8; two buckets of 5e8 bf16 gradients and a copy; one matrix in fp32
        (2, "reduction", 4 * SEVEN_B + 3 * 10**9 + 4 * TABLE, True),
        # 2 / 8, 12 / 8, 4 / 8, the bucket, 1e9 gathered weights dropped for the step, gradients flattened 4 / 8
        (3, "step", 18 * SEVEN_B // 8 + 10**9 + 4 * SEVEN_B // 8, True),
    ],
)
def test_seven_billion_parameters_on_eight_ranks(zero_stage, phase, total, fits):
    phases = training_memory(SEVEN_B, TABLE, NOTHING, zero_stage=zero_stage, num_ranks=8)
    assert phases[phase].total == pytest.approx(total, abs=64)
    assert max(held.total for held in phases.values()) == phases[phase].total
    assert (phases[phase].total <= 80 * GIB) == fits


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_more_ranks_never_need_more_memory(zero_stage):
    def most(num_ranks):
        phases = training_memory(SEVEN_B, TABLE, NOTHING, zero_stage=zero_stage, num_ranks=num_ranks)
        return max(held.total for held in phases.values())

    totals = [most(num_ranks) for num_ranks in (1, 2, 3, 4, 8, 16, 64, 512)]
    assert totals == sorted(totals, reverse=True)


def kept_in_bf16(config, tokens, *, head, recompute):
    """Bytes that a forward pass of a model saves for the backward pass."""
    model = Llama(config, head=head, recompute=recompute).bfloat16()
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 0] = False
    return kept_by_autograd(model, lambda: model(tokens, **({"target_mask": mask} if head == "lm" else {})))


@pytest.mark.parametrize("recompute", get_args(Recompute))
@pytest.mark.parametrize("name", ["tiny", "testbed", "3.8m"])
def test_predicted_activations_are_what_is_kept(name, recompute):
    config, tokens = PRESETS[name], torch.zeros(4, 64, dtype=torch.int64)
    work = training_work(config, tokens.numel(), targets=None, recompute=recompute, cpu_kernels=True)
    kept = kept_in_bf16(config, tokens, head="none", recompute=recompute)
    assert work.kept == pytest.approx(kept, rel=0.05)


def test_a_token_and_block_keep_little_with_selective_recomputation_and_least_with_full():
    """Bytes in bf16 of 7B's block: H 4,096, N D = K D 4,096, F 11,008, N 32."""
    config, choices = PRESETS["llama2-7b"], get_args(Recompute)
    outside = 2 * 2 * 4096 + 8  # the last norm and token ids
    none, selective, full = ((activation_bytes(config, 1, recompute=r) - outside) / 32 for r in choices)
    assert none == 2 * (4 * 4096 + 4 * 4096 + 4 * 11008) + 4 * 32 + 8
    assert selective == 2 * (2 * 4096 + 4 * 4096 + 2 * 11008) + 4 * 32
    assert full == 2 * 4096
    # And so it is by what is counted on CPU, where the same tensors are kept, some of them in fp32.
    config, tokens = PRESETS["3.8m"], torch.zeros(4, 64, dtype=torch.int64)
    none, selective, full = (kept_in_bf16(config, tokens, head="none", recompute=r) for r in choices)
    assert 4 * full < selective < none / 2


def test_the_head_needs_no_less_than_it_keeps():
    config, tokens = PRESETS["3.8m"], torch.zeros(4, 64, dtype=torch.int64)
    kept = kept_in_bf16(config, tokens, head="lm", recompute="full")
    kept -= kept_in_bf16(config, tokens, head="none", recompute="full")
    chunk = 4 * 252 * config.vocab_size  # fp32 log-probs of the 4 x 63 targets, one chunk
    assert chunk < kept < lm_head_bytes(config, 252)
    # 10 bytes a logit, 6 a weight of the projection, hidden states of the targets and their gradient, indices
    assert lm_head_bytes(config, 252) == 10 * 252 * 2048 + 6 * 2048 * 256 + 252 * (4 * 256 + 28)
    # Above 64 MiB of logits the chunk stays: 16.7e6 fp32 numbers are 8,192 rows of 2,048.
    more = lm_head_bytes(config, 100_000) - lm_head_bytes(config, 50_000)
    assert more == 50_000 * (4 * 256 + 28)


def test_constants_are_those_of_the_code_they_stand_for():
    assert memory.LOGITS_CHUNK_BYTES == logprobs.LOGITS_CHUNK_BYTES
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    defaults = DeepSpeedZeroConfig()
    assert defaults.reduce_bucket_size == memory.REDUCE_BUCKET
    assert defaults.sub_group_size == memory.SUB_GROUP
    assert defaults.max_live_parameters == memory.MAX_LIVE_PARAMETERS


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "testbed, ZeRO 1, 32 x 128, full recomputation",
        "16m, ZeRO 2, 8 x 256, selective",
        "3.8m, ZeRO 2, 4 x 128, scalar head",
    ],
)
def test_a_training_step_holds_what_was_predicted(name):
    from plan_memory import in_fresh_process, predict

    predicted, measured = predict(name), in_fresh_process(name)
    for part, size in predicted.items():
        assert size == pytest.approx(measured[part], rel=0.1), part


# --- plans ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "ppo"])
@pytest.mark.parametrize(("model", "gpus", "gib"), [("llama2-7b", 8, 80), ("llama2-13b", 32, 80), ("testbed", 1, 24)])
def test_the_settings_of_a_plan_load_keep_the_batch_rules_and_plan_the_same(tmp_path, stage, model, gpus, gib):
    found = plan(model, gpus, gib, stage=stage)
    assert found.fits, found.verdict
    empty = tmp_path / "run.toml"
    empty.write_text("")
    config = load_config(empty, found.overrides)
    check_batches(config, [stage])
    again = plan(model, gpus, gib, stage=stage, overrides=found.overrides)
    assert again.fits, again.verdict
    assert again.placement.layout.seats == found.placement.layout.seats
    if stage != "ppo":  # an engine's cache is given by a share rounded to hundredths
        assert again.placement.fullest == found.placement.fullest


def test_seven_billion_on_eight_gpus():
    found = plan()
    options = found.placement.options
    # All roles on all GPUs. ZeRO 1 holds 14 whole bytes a parameter on each, so it is ZeRO 2.
    assert found.placement.gpus == [("policy", "value", "reference", "helpfulness", "safety", "rollout")] * 8
    assert {found.settings[f"roles.{name}.zero_stage"] for name in ("policy", "value")} == {2}
    policy = options["policy"].at("policy")[1]
    assert (policy.weights, policy.optimizer) == (2 * SEVEN_B, 12 * SEVEN_B // 8)
    assert policy.gradients == pytest.approx(4 * SEVEN_B // 8, abs=4)
    assert found.verdict.startswith("fits: ") and "of 80.0 GiB on the fullest GPU" in found.verdict
    # One is awake and five are asleep, with 2 GiB each; while weights are sent, two are awake, with two buckets each.
    _, phase, total = found.placement.fullest
    assert phase == "rollout" and total == options["rollout"].peak[1].total + 5 * 2 * GIB
    sync = sum(options[name].at("sync")[1].total for name in ("policy", "rollout")) + 4 * 2 * GIB
    assert sync == 2 * SEVEN_B + 2 * SEVEN_B + 4 * SEVEN_B // 8 + 12 * SEVEN_B // 8 + 6 * 2 * GIB + 2 * 2 * GIB // 2
    # 512 KiB a token, in sequences of 4,096 tokens
    cache = options["rollout"].peak[1].kv_cache
    assert any(f"holds {cache // (4096 * 524_288)} of 64 sequences" in note for note in found.notes)


@pytest.mark.parametrize(
    ("model", "gpus", "gib", "divided"),
    [("llama2-7b", 1, 141, False), ("llama2-13b", 16, 40, False), ("llama2-70b", 64, 80, True)],
)
def test_all_roles_on_all_gpus_of_other_sizes(model, gpus, gib, divided):
    found = plan(model, gpus, gib)
    assert found.fits, found.verdict
    assert found.placement.gpus == [("policy", "value", "reference", "helpfulness", "safety", "rollout")] * gpus
    assert ("roles.reference.zero_stage" in found.settings) is divided
    # Each rank of an engine that spreads is on GPUs side by side of one node.
    for seat in found.placement.layout.of("rollout"):
        assert list(seat.gpus) == list(range(seat.gpus[0], seat.gpus[0] + len(seat.gpus)))


APART = {
    "llama2-7b": [
        *("roles.policy.num_ranks=2", "roles.policy.zero_stage=2", "roles.policy.recompute=full"),
        *("roles.value.num_ranks=2", "roles.value.zero_stage=2", "roles.value.recompute=full"),
        *(f"roles.{role}.gpus=[7]" for role in ("reference", "helpfulness", "safety")),
        *("roles.rollout.num_engines=2", "roles.rollout.gpu_memory_utilization=0.9", "ppo.num_chunks=2"),
    ],
    "llama2-70b": [
        *("roles.policy.num_ranks=16", "roles.policy.zero_stage=3", "roles.policy.recompute=full"),
        *("roles.value.num_ranks=16", "roles.value.zero_stage=3", "roles.value.recompute=full"),
        *(f"roles.{role}.num_ranks=4" for role in ("reference", "helpfulness", "safety")),
        *(f"roles.{role}.zero_stage=3" for role in ("reference", "helpfulness", "safety")),
        *("roles.rollout.num_engines=2", "roles.rollout.tensor_parallel_size=8", "ppo.num_chunks=16"),
        *("roles.rollout.gpu_memory_utilization=0.9", "ppo.micro_batch_tokens=1024"),
    ],
}


@pytest.mark.parametrize(
    ("model", "gpus", "gib", "settings"),
    [
        ("llama2-7b", 8, 80, ()),
        ("llama2-7b", 8, 80, APART["llama2-7b"]),
        ("llama2-7b", 1, 141, ()),
        ("llama2-13b", 16, 40, ()),
        ("llama2-70b", 64, 80, ()),
        ("llama2-70b", 64, 80, APART["llama2-70b"]),
    ],
    ids=["7b all", "7b apart", "7b one", "13b all", "70b all", "70b apart"],
)
def test_a_rank_holds_the_bytes_that_its_tensors_have(model, gpus, gib, settings):
    """Of the model's own parameters, divided as ZeRO and tensor parallelism divide them, on every seat."""
    lengths = {"prompt_tokens": 512, "response_tokens": 512} if settings else {}
    found = plan(model, gpus, gib, overrides=list(settings), **lengths)
    assert found.fits, found.verdict
    for role, option in found.placement.options.items():
        seats = found.placement.layout.of(role)
        assert len(seats) == option.num_ranks
        stage = option.settings.get(f"roles.{role}.zero_stage", 0)
        with torch.device("meta"):
            module = Llama(PRESETS[model], head="lm" if role in ("policy", "reference", "rollout") else "scalar")
        sizes = [parameter.numel() for parameter in module.parameters()]
        if role == "rollout":  # vectors are whole on each GPU
            weights = 2 * sum(n.numel() / (len(seats[0].gpus) if n.dim() > 1 else 1) for n in module.parameters())
            states = 0.0
        else:
            ranks = len(seats)
            weights = 2 * (sum(-(-size // ranks) for size in sizes) if stage == 3 else sum(sizes))
            states = 16 * sum(-(-size // ranks) for size in sizes) if role in ("policy", "value") else 0
        memory = option.peak[1]
        assert memory.weights == pytest.approx(weights, rel=0.1)
        assert memory.gradients + memory.optimizer == pytest.approx(states, rel=0.1)


def test_a_divided_replica_is_planned_for_by_its_own_ranks():
    one, two = (
        plan("llama2-70b", 64, 80, overrides=[*APART["llama2-70b"], *more], prompt_tokens=512, response_tokens=512)
        for more in ((), ("roles.reference.num_ranks=8", "roles.reference.ranks_per_replica=4"))
    )
    assert one.fits and two.fits, (one.verdict, two.verdict)
    one, two = (found.placement.options["reference"] for found in (one, two))
    assert (one.num_ranks, two.num_ranks) == (4, 8)
    assert one.peak == two.peak
    assert two.settings == {
        "roles.reference.num_ranks": 8,
        "roles.reference.zero_stage": 3,
        "roles.reference.ranks_per_replica": 4,
    }


def test_a_role_of_zero_1_cannot_leave_its_gpu():
    found = plan("testbed", 1, 24)
    assert found.settings["roles.policy.zero_stage"] == 1
    assert any(note.startswith("policy, value: stays on its GPUs while others work there") for note in found.notes)
    asleep = found.placement.options["policy"].asleep
    assert asleep.weights and asleep.optimizer
    assert plan("testbed", 1, 24, zero_stage=2).placement.options["policy"].asleep.weights == 0


def test_rewards_that_are_given_or_functions_are_planned_for_as_they_run():
    functions = ["inputs.helpfulness=m:f", "ppo.value_init=policy"]
    planned = set(plan(overrides=functions).placement.options)
    assert planned == {"policy", "value", "reference", "safety", "rollout"}
    assert list(plan(stage="reward", overrides=functions[:1]).placement.options) == ["safety"]
    with pytest.raises(UserError, match="--stage reward: the config names both reward models; plan another stage"):
        plan(stage="reward", overrides=[functions[0], "inputs.safety=models/safety"])


def test_an_asked_for_stage_is_kept():
    found = plan(zero_stage=3)
    assert {found.settings[f"roles.{name}.zero_stage"] for name in ("policy", "value")} == {3}
    assert not plan(zero_stage=0).fits


@pytest.mark.parametrize("model", ["llama2-7b", "llama2-13b"])
def test_what_fits_still_fits_with_more_gpus_or_memory(model):
    fits = [plan(model, gpus).fits for gpus in range(1, 20)]
    assert fits == sorted(fits) and fits[-1]
    fits = [plan(model, 12, gib).fits for gib in (10, 30, 50, 60, 80, 100, 141)]
    assert fits == sorted(fits) and fits[-1]


def test_seventy_billion_does_not_fit_one_gpu_and_says_what_would():
    found = plan("llama2-70b", 1)
    assert not found.fits and "nearest fit: 32 GPUs of 80 GiB" in found.verdict
    assert plan("llama2-70b", 32).fits and not plan("llama2-70b", 31).fits
    # A row of 4,096 tokens on its way backward and gathered weights do not divide by the ranks.
    found = plan("llama2-70b", 1, 12)
    assert "no number of GPUs of 12 GiB is enough: policy needs 29.8 GiB on each (backward)" in found.verdict
    nearest = found.verdict.partition("nearest fit: ")[2]
    gpus, gib = int(nearest.split()[0]), int(nearest.split()[3])
    assert plan("llama2-70b", gpus, gib).fits
    assert not plan("llama2-70b", gpus - 1, gib).fits


def test_too_few_gpus_are_told_how_many_are_enough():
    found = plan(gpus=1)
    assert "nearest fit: 2 GPUs of 80 GiB" in found.verdict
    assert plan(gpus=2).fits and plan(gpus=3).fits and not plan(gpus=1).fits
    # 16 bytes a parameter of both trained models over two GPUs, and three frozen ones whole on each
    host = (16 + 2 * 1) * SEVEN_B + 16 * SEVEN_B + 2 * 2 * 3 * SEVEN_B
    [told] = [note for note in plan(gpus=2).notes if "host memory" in note]
    assert float(told.split()[6]) == pytest.approx(host / GIB, rel=0.05)


def test_a_given_placement_is_judged_and_the_change_that_makes_it_fit_is_named():
    found = plan(overrides=["roles.policy.num_ranks=1", "ppo.num_chunks=2"])
    assert not found.fits and found.verdict.startswith("does not fit: policy ")
    changes = found.verdict.partition("on the same GPUs with ")[2].split()
    assert "roles.policy.num_ranks=8" in changes and "roles.policy.zero_stage=2" in changes
    repaired = plan(overrides=["roles.policy.num_ranks=1", "ppo.num_chunks=2", *changes])
    assert repaired.fits, repaired.verdict


def test_micro_batches_shrink_before_a_plan_is_given_up():
    found = plan("llama2-13b", 4, 80, stage="sft", overrides=["sft.micro_batch_size=64"])
    assert found.fits and found.settings["sft.micro_batch_size"] < 64


def test_no_more_is_computed_again_than_memory_asks_for():
    found = [plan(gib=gib, stage="sft").settings for gib in (141, 60, 45, 40, 30)]
    chosen = [settings["roles.policy.recompute"] for settings in found]
    order = get_args(Recompute)
    assert set(chosen) == set(order) and chosen == sorted(chosen, key=order.index), chosen
    # Of two stages with whole models the one that sends gradients once a step, where it fits.
    assert [settings["roles.policy.zero_stage"] for settings in found[:2]] == [1, 2]
    # All of it before micro-batches shrink, and before the model is divided.
    assert len({settings["sft.micro_batch_size"] for settings in found[: chosen.index("full") + 1]}) == 1
    assert all(settings["roles.policy.zero_stage"] < 3 for settings in found[: chosen.index("full") + 1])


def test_scoring_has_micro_batches_of_its_own():
    larger = 4 * 16_384
    found = plan(gib=141.0, overrides=[f"ppo.score_micro_batch_tokens={larger}"])
    assert found.fits and f"ppo.score_micro_batch_tokens={larger}" in found.overrides
    moments = {
        role: option.phases[role]["scoring"] for role, option in found.placement.options.items() if role in FROZEN
    }
    assert {memory.activations for memory in moments.values()} == {forward_working_bytes(PRESETS["llama2-7b"], larger)}
    policy, plain = (each.placement.options["policy"].phases["policy"] for each in (found, plan(gib=141.0)))
    assert policy["scoring"].total > plain["scoring"].total and policy["backward"] == plain["backward"]
    # They shrink with the others: here 70 GiB would be on their way through.
    found = plan(gib=80.0, overrides=[f"ppo.score_micro_batch_tokens={64 * 16_384}"])
    assert found.fits and found.settings["ppo.score_micro_batch_tokens"] < 64 * 16_384


def test_sizes_left_out_are_cut_to_the_models_context_and_given_ones_are_not():
    found = plan("testbed", 1, 24)
    assert found.settings["ppo.max_new_tokens"] == 128 and found.request.prompt_tokens == 128  # of 256
    assert plan("testbed", 1, 24, response_tokens=24, prompt_tokens=40).request.prompt_tokens == 40


def test_larger_reward_models_need_more():
    small, large = plan("llama2-7b", 32), plan("llama2-7b", 32, reward_model="llama2-13b")
    options = [found.placement.options for found in (small, large)]
    weights = [{role: way.peak[1].weights for role, way in found.items()} for found in options]
    assert weights[0]["reference"] == weights[1]["reference"]
    assert all(weights[0][role] < weights[1][role] for role in ("helpfulness", "safety"))


# --- the command ------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_ends_with_0_or_1(call):
    code, out, err = call("--model", "llama2-7b", "--gpus", 8, "--gpu-memory", 80)
    assert (code, err) == (0, "")
    for word in ("policy", "rollout", "weights", "optim", "KV", "fits: ", "--set roles.policy.num_ranks=8"):
        assert word in out
    code, out, err = call("--model", "llama2-70b", "--gpus", 1, "--gpu-memory", 80)
    assert (code, err) == (1, "") and "does not fit: " in out and "nearest fit: " in out and "--set" not in out


def test_json_says_the_same(call):
    code, out, _ = call("--model", "llama2-7b", "--gpus", 8, "--gpu-memory", 80, "--json")
    content, same = json.loads(out), plan()
    assert code == 0 and content["fits"] and content["verdict"] == same.verdict
    assert content["overrides"] == same.overrides
    policy = content["roles"]["policy"]
    assert policy["bytes"]["weights"] == 2 * SEVEN_B
    assert policy["bytes"]["total"] == sum(size for part, size in policy["bytes"].items() if part != "total")
    assert set(policy["phases"]["policy"]) == {"idle", "head", "backward", "reduction", "step", "scoring"}
    assert policy["seats"] == [[0, [gpu]] for gpu in range(8)]


def test_a_checkpoint_is_planned_for_by_its_shape(call, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "chat")
    code, out, _ = call("--model", checkpoint, "--gpus", 1, "--gpu-memory", 24)
    assert code == 0 and "fits: " in out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"--model": "llama2-7"}, "--model llama2-7: neither a checkpoint directory nor a preset; did you mean"),
        ({"--gpus": 0}, "--gpus 0 must be at least 1"),
        ({"--gpu-memory": -80}, "--gpu-memory -80 must be a positive number of GiB"),
        ({"--gpu-memory": "nan"}, "--gpu-memory nan must be a positive number of GiB"),
        ({"--overhead": -1}, "--overhead -1 must be"),
        ({"--reward-model": "llama2-13"}, "--reward-model llama2-13: neither"),
        ({"--stage": "pp"}, "--stage pp is not planned for; did you mean ppo?"),
        ({"--zero-stage": 4}, "--zero-stage 4 must be 0, 1, 2 or 3"),
        ({"--batch": 0}, "--batch 0 must be at least 1"),
        ({"--prompt-tokens": 4000, "--response-tokens": 100}, "exceed the model's context of 4096 tokens"),
        ({"--response-tokens": 5000}, "--response-tokens 5000 must be at most 4095"),
        ({"--set": "ppo.num_step=3"}, "--set: ppo.num_step is not a known key"),
        ({"--set": "roles.policy.num_ranks=3"}, "must be divisible by roles.policy.num_ranks=3"),
        ({"--set": "roles.policy.num_ranks=1", "--zero-stage": 2}, "--zero-stage cannot be given beside"),
        ({"--set": "run.precision=fp32"}, "run.precision=fp32 is not planned for"),
        ({"--config": "/nowhere.toml"}, "config /nowhere.toml: cannot be read"),
        ({"--gpus": "many"}, "Invalid value for '--gpus'"),
    ],
)
def test_bad_input_is_one_line_and_code_2(call, arguments, line):
    given = {"--model": "llama2-7b", "--gpus": 8, "--gpu-memory": 80, **arguments}
    code, out, err = call(*(part for pair in given.items() for part in pair))
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert err.startswith("error: ") and line in err


def test_a_checkpoint_that_is_not_llama_is_refused(call, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    code, _, err = call("--model", tmp_path, "--gpus", 8, "--gpu-memory", 80)
    assert code == 2 and "only the Llama architecture is supported" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("model", "gpus", "gib"), [("llama2-7b", 8, 80), ("llama2-13b", 16, 80), ("llama2-70b", 64, 80)]
)
def test_the_configs_of_the_paper_fit_where_they_say(call, model, gpus, gib):
    path = Path(__file__).parent.parent / "configs" / f"{model}.toml"
    assert f"--model {model} --gpus {gpus} --gpu-memory {gib}" in path.read_text()
    code, out, _ = call("--model", model, "--gpus", gpus, "--gpu-memory", gib, "--config", path, "--json")
    assert code == 0, json.loads(out)["verdict"]
    roles = json.loads(out)["roles"]
    assert roles["policy"]["num_ranks"] == load_config(path).roles.policy.num_ranks
    for stage in ("sft", "reward"):
        code, out, _ = call(
            "--model", model, "--gpus", gpus, "--gpu-memory", gib, "--config", path, "--stage", stage, "--json"
        )
        assert code == 0, (stage, json.loads(out)["verdict"])
        assert sum(role["num_ranks"] for role in json.loads(out)["roles"].values()) == gpus
