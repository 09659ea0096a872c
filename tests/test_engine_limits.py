"""What vLLM would refuse is told before anything starts; the KV cache is as large as it must be."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from tiny_inputs import write_checkpoint, write_tokenizer

from model.config import PRESETS
from rlhf_ray.backends import engine_limits, rollout
from rlhf_ray.backends.engine_limits import CPU_HEAD_SIZES, GIB, check_engine, kv_cache_bytes
from rlhf_ray.config import RolloutRole, parse_config
from rlhf_ray.errors import UserError
from rlhf_ray.preflight.inputs import check_chat_checkpoint
from rlhf_ray.preflight.run import check_run

TINY = PRESETS["tiny"]  # 2 layers, 2 key/value heads of 32, 256 tokens of context: 1 KiB a token in fp32
LLAMA_1B = TINY.model_copy(
    update={"num_layers": 16, "num_heads": 32, "num_kv_heads": 8, "head_dim": 64, "max_seq_len": 131_072}
)


def test_kv_cache_bytes_by_hand():
    block = 128 * 1024
    assert kv_cache_bytes(TINY, sequences=1, precision="fp32") == 3 * block  # two, and the one that vLLM keeps
    assert kv_cache_bytes(TINY, sequences=64, precision="fp32") == (64 * 2 + 1) * block
    assert kv_cache_bytes(TINY, sequences=64, precision="bf16") == (64 * 2 + 1) * block // 2
    odd = TINY.model_copy(update={"max_seq_len": 129})
    assert kv_cache_bytes(odd, sequences=1, precision="fp32") == 3 * block
    # Four ranks share two heads: each of them is held twice.
    assert kv_cache_bytes(TINY, sequences=1, precision="fp32", tensor_parallel_size=4) == 2 * 3 * block
    assert kv_cache_bytes(TINY, sequences=1, precision="fp32", tensor_parallel_size=2) == 3 * block
    # 8 x 64 x 2 x 16 layers x 2 bytes = 32 KiB a token: 4 GiB, and one block.
    assert kv_cache_bytes(LLAMA_1B, sequences=256, precision="bf16") == 4 * GIB + 128 * 2**15
    short = LLAMA_1B.model_copy(update={"max_seq_len": 4096})
    assert kv_cache_bytes(short, sequences=256, precision="bf16") == GIB  # 32 would hold all


def refusal(rollout, model, **options):
    with pytest.raises(UserError) as caught:
        check_engine(rollout, {"inputs.chat": model}, **{"precision": "bf16", "on_gpu": False, **options})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_cache_that_holds_no_whole_context_is_refused_and_the_remedy_helps():
    line = refusal(RolloutRole(kv_cache_gib=1.0), LLAMA_1B)
    assert line.startswith(
        "roles.rollout.kv_cache_gib=1 must be at least 4.1: one whole context of inputs.chat, 131072 tokens"
    )
    check_engine(RolloutRole(kv_cache_gib=4.1), {"inputs.chat": LLAMA_1B}, precision="bf16", on_gpu=False)
    check_engine(RolloutRole(), {"inputs.chat": LLAMA_1B}, precision="bf16", on_gpu=False)
    check_engine(RolloutRole(kv_cache_gib=1.0), {"inputs.chat": LLAMA_1B}, precision="bf16", on_gpu=True)
    small = refusal(RolloutRole(kv_cache_gib=1e-4), TINY)
    remedy = float(small.split("at least ")[1].split(":")[0])
    check_engine(RolloutRole(kv_cache_gib=remedy), {"inputs.chat": TINY}, precision="bf16", on_gpu=False)
    assert remedy * GIB < 1.1 * kv_cache_bytes(TINY, sequences=1, precision="bf16")


def test_a_context_that_this_machine_cannot_hold_is_refused(monkeypatch):
    monkeypatch.setattr(engine_limits, "memory_limit_bytes", lambda: 3 * GIB)
    assert "this machine may use 3.0 GiB; lower max_position_embeddings" in refusal(RolloutRole(), LLAMA_1B)
    check_engine(RolloutRole(), {"inputs.chat": TINY}, precision="bf16", on_gpu=False)
    check_engine(RolloutRole(), {"inputs.chat": LLAMA_1B}, precision="bf16", on_gpu=False, elsewhere=True)


def test_head_sizes_are_those_of_vllm():
    assert f"        return {list(CPU_HEAD_SIZES)}" in source("v1/attention/backends/cpu_attn.py")
    narrow = TINY.model_copy(update={"head_dim": 16})
    assert refusal(RolloutRole(), narrow).startswith("inputs.chat: the model's heads are 16 wide, and vLLM's attention")
    check_engine(RolloutRole(), {"inputs.chat": narrow}, precision="bf16", on_gpu=True)


@pytest.mark.parametrize(
    ("changes", "size", "line"),
    [
        ({"num_heads": 9, "num_kv_heads": 3}, 2, "9 attention heads of inputs.chat; set it to 1"),
        ({"num_heads": 12, "num_kv_heads": 3}, 6, "176 feed-forward units of inputs.chat; set it to 1"),
        ({"num_heads": 12, "num_kv_heads": 3, "ffn_size": 180}, 4, "3 key/value heads of inputs.chat; set it to 1"),
        (
            {"num_heads": 12, "num_kv_heads": 12, "ffn_size": 180},
            3,
            "512 rows of the vocabulary (padded to a multiple of 64) of inputs.chat; set it to 2",
        ),
    ],
)
def test_ranks_of_an_engine_divide_the_model(changes, size, line):
    rollout = RolloutRole(tensor_parallel_size=size)
    assert refusal(rollout, TINY.model_copy(update=changes)).endswith(f"does not divide the {line}")


@pytest.mark.parametrize("value", [1e-06, 0.0099, 2.01, 50.5])
def test_temperatures_that_vllm_does_not_sample_at(value):
    for section in ("pairs", "evaluate"):
        with pytest.raises(
            UserError, match=rf"{section}.temperatures={value:g} must be 0 \(greedy\) or from 0.01 to 2"
        ):
            parse_config({section: {"temperatures": [1.0, value]}})
    with pytest.raises(UserError, match=rf"ppo.temperature={value:g} must be (greater|less) than or equal to"):
        parse_config({"ppo": {"temperature": value}})


def test_temperatures_that_it_does_sample_at():
    parse_config({"ppo": {"temperature": 0.01}, "pairs": {"temperatures": [0.0, 2.0]}})
    rules = source("sampling_params.py")
    assert "_MAX_TEMP = 1e-2" in rules and "self.temperature = max(self.temperature, _MAX_TEMP)" in rules
    assert "if self.temperature > 2.0:" in rules


def source(name):
    """A source file of vLLM: importing it takes many seconds."""
    [directory] = importlib.util.find_spec("vllm").submodule_search_locations
    return (Path(directory) / name).read_text()


def broken(path, name, number, *, dtype):
    """A checkpoint of zeros in which one number of a tensor is another."""
    from safetensors.torch import load_file, save_file

    write_checkpoint(path)
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(path / "model.safetensors").items()}
    tensors[name].view(-1)[-1] = number
    save_file(tensors, path / "model.safetensors")
    write_tokenizer(path)
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("number", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_tensor_that_is_not_finite_is_named(tmp_path, dtype, number):
    import torch

    from model.checkpoint import CheckpointError, load_model

    dtype, name = getattr(torch, dtype), "model.layers.1.mlp.up_proj.weight"
    chat = broken(tmp_path / "chat", name, number, dtype=dtype)
    line = rf"model.safetensors: {name} holds NaN or infinity, .* copy or download"
    with pytest.raises(UserError, match=rf"^inputs.chat=.*{line}"):
        check_run(parse_config({"run": {"device": "cpu"}, "inputs": {"chat": str(chat)}}), tmp_path / "new", ("ppo",))
    with pytest.raises(UserError, match=rf"^CHECKPOINT=.*{line}"):
        check_chat_checkpoint(chat, temperature=1.0, max_new_tokens=4, on_gpu=False, precision="bf16")
    with pytest.raises(CheckpointError, match=line):
        load_model(chat, head="lm")
    with pytest.raises(CheckpointError, match=line):
        load_model(chat, head="none")
    # The largest number there is stays one.
    largest = broken(tmp_path / "largest", name, torch.finfo(dtype).max, dtype=dtype)
    check_chat_checkpoint(largest, temperature=1.0, max_new_tokens=4, on_gpu=False, precision="bf16")
    load_model(largest, head="lm", dtype=dtype)


def test_large_checkpoints_are_left_to_the_workers(tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr("rlhf_ray.preflight.inputs.READ_THROUGH_BYTES", 1000)
    chat = broken(tmp_path / "chat", "model.norm.weight", np.nan, dtype=torch.float32)
    check_chat_checkpoint(chat, temperature=1.0, max_new_tokens=4, on_gpu=False, precision="bf16")


def test_chat_refuses_what_the_engine_would(tmp_path):
    chat = write_checkpoint(tmp_path / "chat")
    write_tokenizer(chat)
    with pytest.raises(UserError, match=r"--temperature 0.001 must be 0 \(greedy\) or from 0.01 to 2"):
        check_chat_checkpoint(chat, temperature=0.001, max_new_tokens=4, on_gpu=False, precision="bf16")
    config = json.loads((chat / "config.json").read_text())
    (chat / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2**40}))
    with pytest.raises(UserError, match=r"one whole context of CHECKPOINT=.* lower max_position_embeddings"):
        check_chat_checkpoint(chat, temperature=1.0, max_new_tokens=4, on_gpu=False, precision="bf16")


def test_a_scrambled_tensor_is_another_in_every_row():
    import torch

    for tensor in (torch.zeros(6, 3), torch.ones(4), torch.full((6, 2, 2), 0.5, dtype=torch.bfloat16)):
        scrambled = rollout.scramble(tensor)
        assert scrambled.dtype == tensor.dtype and scrambled.shape == tensor.shape
    # Row r becomes -16 x row + (r mod 5 - 2) / 8.
    assert rollout.scramble(torch.ones(6, 1)).flatten().tolist() == [-16.25, -16.125, -16, -15.875, -15.75, -16.25]
