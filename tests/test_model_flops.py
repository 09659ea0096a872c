"""Parameter counts, FLOPs and bytes against published figures, hand arithmetic and the model itself."""

import pytest
import torch
from plan_memory import kept_by_autograd

from model.config import PRESETS
from model.flops import (
    activation_bytes,
    forward_flops_per_token,
    kv_cache_bytes_per_token,
    num_non_embedding_parameters,
    num_parameters,
    peak_flops,
    recomputed_bytes,
    weight_bytes,
)
from model.llama import Llama

# name: parameters, non-embedding parameters, KV-cache bytes per token in 16 bit
LLAMA2 = {
    "llama2-7b": (6_738_415_616, 6_476_271_616, 524_288),
    "llama2-13b": (13_015_864_320, 12_688_184_320, 819_200),
    "llama2-34b": (33_743_970_304, 33_219_682_304, 196_608),
    "llama2-70b": (68_976_648_192, 68_452_360_192, 327_680),
}


@pytest.mark.parametrize("name", LLAMA2)
def test_llama2_sizes_are_exact(name):
    parameters, non_embedding, kv_bytes = LLAMA2[name]
    assert num_parameters(PRESETS[name]) == parameters
    assert num_non_embedding_parameters(PRESETS[name]) == non_embedding
    assert kv_cache_bytes_per_token(PRESETS[name]) == kv_bytes
    assert weight_bytes(PRESETS[name]) == 2 * parameters


def test_small_presets_are_as_small_as_promised():
    assert num_parameters(PRESETS["testbed"]) == 803_968
    assert num_parameters(PRESETS["3.8m"]) == 3_819_776


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_counts_equal_the_model(name, head):
    with torch.device("meta"):
        model = Llama(PRESETS[name], head=head)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert num_parameters(PRESETS[name], scalar_head=head == "scalar") == counted


def test_flops_by_hand():
    # tiny: H=64, 2 layers, N=4, K=2, D=32, F=176, V=512
    # matrices of a block: 64 * (128 + 64 + 64 + 128) + 3 * 64 * 176 = 24576 + 33792 = 58368
    # attention at 9 tokens: mean keys 5; scores and mixing: 4 * 128 * 5 = 2560
    # two blocks: 2 * (2 * 58368 + 2560) = 238592; head: 2 * 64 * 512 = 65536
    tiny = PRESETS["tiny"]
    assert forward_flops_per_token(tiny, 9, with_head=False) == 238_592
    assert forward_flops_per_token(tiny, 9) == 304_128


def test_matrix_flops_equal_what_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    tiny = PRESETS["tiny"]
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    model = Llama(tiny, head="none")
    with FlopCounterMode(display=False) as counter:
        model(tokens)
    flops = counter.get_flop_counts()["Global"]
    matrices = flops[torch.ops.aten.mm]
    without_attention = forward_flops_per_token(tiny, 0, with_head=False) - 2 * 4 * 128 * 0.5
    assert matrices == tokens.numel() * without_attention


def test_activation_bytes_bound_what_autograd_keeps():
    config = PRESETS["testbed"]
    tokens = torch.zeros(4, 64, dtype=torch.int64)

    def kept(recompute):
        model = Llama(config, head="none", recompute=recompute)
        return kept_by_autograd(model, lambda: model(tokens))

    predicted = activation_bytes(config, tokens.numel(), bytes_per_element=4)
    # CPU: the norms are not fused and keep two copies more.
    assert predicted <= kept("none") <= 1.5 * predicted
    for recompute in ("selective", "full"):
        less = activation_bytes(config, tokens.numel(), recompute=recompute, bytes_per_element=4)
        again = recomputed_bytes(config, tokens.numel(), recompute=recompute, bytes_per_element=4)
        assert less <= kept(recompute) <= 1.5 * less
        assert less + config.num_layers * again == pytest.approx(predicted, rel=0.2)


def test_peaks():
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("AMD EPYC") is None
