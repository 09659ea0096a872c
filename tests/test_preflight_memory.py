"""The memory check: refuses what cannot fit with a remedy that helps, and nothing that was seen to fit."""

import re

import pytest

from model.config import PRESETS, ModelConfig
from model.flops import num_parameters
from rlhf_ray.config import load_config
from rlhf_ray.errors import UserError
from rlhf_ray.preflight import memory as preflight_memory
from rlhf_ray.preflight.inputs import Model
from rlhf_ray.preflight.memory import check_memory, held, trained_bytes

GIB = 2**30
ALL = ("pretrain", "sft", "pairs", "label", "reward", "ppo", "evaluate")
SMOLLM2 = ModelConfig(
    vocab_size=49_152,
    hidden_size=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    ffn_size=1536,
    max_seq_len=2048,
    tie_embeddings=True,
)


@pytest.fixture
def check(monkeypatch, capsys):
    """Checks a config under a limit of so many GiB; returns what was said: a refusal, a line, or nothing."""

    def run(gib, overrides=(), *, file="demo", stages=ALL, chat=None):
        monkeypatch.setattr(preflight_memory, "memory_limit_bytes", lambda: int(gib * GIB))
        models = {} if chat is None else {"inputs.chat": Model("models/chat", chat)}
        config = load_config(f"configs/{file}.toml", ["roles.rollout.kv_cache_gib=0.1", *overrides])
        try:
            check_memory(config, stages, models)
        except UserError as error:
            assert "\n" not in str(error)
            return str(error)
        said = capsys.readouterr()
        return said.err + said.out

    return run


def test_a_7b_model_on_24_gib_is_told_what_it_needs_and_what_would_fit(check):
    roles = ("policy", "value", "reference", "helpfulness", "safety")
    given = ["run.precision=bf16", "roles.rollout.num_engines=1", *(f"roles.{role}.num_ranks=1" for role in roles)]
    said = check(24, given, file="llama2-7b", stages=["ppo"], chat=PRESETS["llama2-7b"])
    # 6.74 billion parameters, ZeRO 2: weights 2, gradients 4, masters and moments 12 bytes each; 113.0 GiB.
    assert "policy 113.0" in said and "may use 24.0 here" in said
    assert "inputs.chat has 6,738 million parameters" in said
    most = float(re.search(r"take a model of ([\d,]+) million", said)[1].replace(",", ""))
    smaller = PRESETS["llama2-7b"].model_copy(update={"num_layers": 1, "hidden_size": 2048, "ffn_size": 5504})
    assert num_parameters(smaller) < most * 1e6
    assert "needs" not in check(24, given, file="llama2-7b", stages=["ppo"], chat=smaller)


def test_what_was_seen_to_fit_is_let_through(check):
    assert check(5, ["run.precision=fp32"]) == ""  # the demo, 3.7 GiB at its highest
    stages = ["reward", "ppo", "evaluate"]  # 13.9 GiB with the operating system
    assert check(14, ["run.precision=bf16"], file="smollm2", stages=stages, chat=SMOLLM2) == ""


def test_where_only_a_micro_batch_may_be_too_much_there_is_a_line(check):
    said = check(3, ["run.precision=fp32"])
    assert said.count("\n") == 1 and said.startswith("ppo may need 3.") and "lower ppo.micro_batch_tokens=4096" in said
    assert check(3, ["run.precision=fp32", "ppo.micro_batch_tokens=64"]) == ""
    said = check(3, ["run.precision=fp32", "ppo.micro_batch_tokens=64", "ppo.score_micro_batch_tokens=100000"])
    assert "lower ppo.micro_batch_tokens=64 and ppo.score_micro_batch_tokens=100000" in said


@pytest.mark.parametrize(
    ("gib", "given", "stages", "remedy", "then"),
    [
        (6, ["kv_cache_gib=9"], ALL, "lower roles.rollout.kv_cache_gib=9 to 3.", ["kv_cache_gib=3"]),
        (1.5, ["num_ranks=4"], ["sft"], "set roles.policy.num_ranks to 1", ["num_ranks=1"]),
    ],
)
def test_the_remedy_helps(check, gib, given, stages, remedy, then):
    def full(settings):
        return ["roles." + ("rollout." if "kv" in each else "policy.") + each for each in settings]

    assert remedy in check(gib, full(given), stages=stages)
    assert "needs" not in check(gib, full(then), stages=stages)


def test_processes_count_as_long_as_a_later_stage_needs_them(check):
    # 1.3 GiB for the reward models alone; 2.3 with the processes of policy and engine, which end before.
    assert "needs" not in check(1.9, stages=["sft", "pairs", "label", "reward"])
    assert "needs" in check(1.2, stages=["sft", "pairs", "label", "reward"])


def test_stages_in_commands_of_their_own_need_less(check):
    # 6.3 GiB for the reward models; 6.6 with the process of the policy, which stays for the evaluation.
    def refusal(*stages):
        return check(6.5, ["run.precision=fp32"], stages=stages, chat=SMOLLM2)

    assert "run `rlhf-ray reward` in a command of its own" in refusal("sft", "reward", "evaluate")
    for stages in (["sft"], ["reward"], ["evaluate"], ["sft", "reward"]):
        assert "needs" not in refusal(*stages)
    assert "its processes alone need 2.8; give it more memory" in check(1.9, stages=["ppo"])


def test_every_replica_of_a_frozen_model_counts():
    def copies(**settings):
        overrides = [f"roles.reference.{key}={value}" for key, value in settings.items()]
        config = load_config("configs/demo.toml", ["run.precision=fp32", *overrides])
        return held(config, "ppo", SMOLLM2, {})["reference"] / (4 * num_parameters(SMOLLM2))

    assert copies(num_ranks=4) == 4
    assert copies(num_ranks=4, zero_stage=3) == 1
    assert copies(num_ranks=4, zero_stage=3, ranks_per_replica=2) == 2


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_bytes_of_a_trained_rank(zero_stage):
    def of(precision):
        overrides = [f"roles.policy.zero_stage={zero_stage}", "roles.policy.num_ranks=2"]
        config = load_config("configs/demo.toml", overrides)
        return trained_bytes(config, "policy", SMOLLM2, {"bf16": 2, "fp32": 4}[precision]) / num_parameters(SMOLLM2)

    # Bytes a parameter, on one of two ranks. fp32: weights, gradients 4 each, moments 8; ZeRO 1 to 3 add masters of 4.
    fp32 = {0: 4 + 4 + 8, 1: 4 + 4 + 12 / 2, 2: 4 + 4 / 2 + 12 / 2, 3: (4 + 4 + 12) / 2}
    bf16 = {0: 2 + 2 + 12, 1: 2 + 6 + 12 / 2, 2: 2 + 4 / 2 + 12 / 2, 3: (2 + 4 + 12) / 2}
    assert of("fp32") == pytest.approx(fp32[zero_stage], rel=1e-6)
    assert of("bf16") == pytest.approx(bf16[zero_stage], rel=1e-6)
