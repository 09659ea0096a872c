"""The forward pass against transformers, and its invariances."""

from typing import get_args

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from model.attention import lay_end_to_end, packing_mask
from model.config import PRESETS, Llama3RopeScaling, Recompute, to_hf_config
from model.llama import Llama, Transformer

TINY = PRESETS["tiny"]
SCALING = Llama3RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
VARIANTS = {
    "gqa": TINY,
    "mha": TINY.model_copy(update={"num_kv_heads": 4}),
    "mqa": TINY.model_copy(update={"num_kv_heads": 1}),
    "tied": TINY.model_copy(update={"tie_embeddings": True}),
    "llama3_rope": TINY.model_copy(update={"rope_scaling": SCALING, "rope_theta": 500000.0}),
    "usual_heads": TINY.model_copy(update={"head_dim": 16}),
}


def random_model(config, **options):
    """Weights large enough that every part of the model moves the output."""
    model = Llama(config, **options)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def random_tokens(*shape):
    return torch.randint(4, TINY.vocab_size, shape, generator=torch.Generator().manual_seed(3))


def targets_of(tokens):
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 0] = False
    return mask


def transformers_twin(model):
    hf = LlamaForCausalLM(LlamaConfig.from_dict(to_hf_config(model.config, dtype="float32"))).eval()
    state = dict(model.state_dict())
    hf.load_state_dict(state)
    return hf


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_transformers(name):
    model = random_model(VARIANTS[name])
    tokens = random_tokens(2, 100)  # longer than the original context of the scaled variant
    with torch.no_grad():
        theirs = transformers_twin(model)(tokens).logits
        ours = model.logits(tokens)
    assert theirs.std() > 0.5
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_gradients_equal_transformers():
    model = random_model(VARIANTS["tied"])
    hf = transformers_twin(model)
    tokens = random_tokens(2, 20)
    mask = targets_of(tokens)
    (-model(tokens, target_mask=mask).logprobs.sum() / mask.sum()).backward()
    hf(tokens, labels=tokens).loss.backward()
    theirs = dict(hf.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-5, rtol=1e-4, msg=name)


def test_bfloat16_is_as_close_to_float32_as_transformers():
    model = random_model(TINY)
    tokens = random_tokens(4, 64)
    with torch.no_grad():
        exact = model.logits(tokens)
        theirs = transformers_twin(model).bfloat16()(tokens).logits.float() - exact
        ours = model.bfloat16().logits(tokens) - exact
    assert ours.std() < 1.1 * theirs.std()


def test_logprobs_are_aligned_to_their_token_and_zero_elsewhere():
    model = random_model(TINY)
    tokens = random_tokens(3, 12)
    mask = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[:, 0] = False
    logprobs, entropy = model(tokens, target_mask=mask, temperature=0.7, with_entropy=True)
    log_p = (model.logits(tokens) / 0.7).log_softmax(-1)
    for row in range(3):
        for t in range(12):
            if mask[row, t]:
                expected = log_p[row, t - 1, tokens[row, t]]
                torch.testing.assert_close(logprobs[row, t], expected)
                p = log_p[row, t - 1]
                torch.testing.assert_close(entropy[row, t], -(p.exp() * p).sum())
            else:
                assert logprobs[row, t] == entropy[row, t] == 0
    assert model(tokens, target_mask=mask).entropy is None


def test_head_runs_on_wanted_positions_only():
    model = random_model(TINY)
    tokens = random_tokens(3, 12)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[1, 3] = mask[2, 5:8] = True
    rows = []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[0]))
    model(tokens, target_mask=mask)
    assert rows == [4]


def test_nothing_wanted_gives_zero_gradients_everywhere():
    # A rank with an empty micro-batch must still take part in every collective of the backward pass.
    model = random_model(TINY)
    tokens = random_tokens(2, 5)
    model(tokens, target_mask=torch.zeros_like(tokens, dtype=torch.bool)).logprobs.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_right_padding_changes_nothing(head):
    model = random_model(TINY, head=head)
    tokens = random_tokens(2, 9)
    padded = torch.cat((tokens, torch.full((2, 7), 3)), dim=1)
    if head == "lm":
        mask = targets_of(tokens)
        short = model(tokens, target_mask=mask).logprobs
        long = model(padded, target_mask=torch.nn.functional.pad(mask, (0, 7))).logprobs
    else:
        short, long = model(tokens), model(padded)
    torch.testing.assert_close(long[:, :9], short)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_rows_equal_separate_rows(dtype):
    model = random_model(TINY).to(dtype)
    lengths = [5, 8, 3]
    tokens = random_tokens(1, 20)  # the last four are padding
    segment_ids = torch.tensor([[1] * 5 + [2] * 8 + [3] * 3 + [0] * 4])
    position_ids = torch.tensor([[*range(5), *range(8), *range(3), *range(4)]])
    mask = (segment_ids > 0) & (position_ids > 0)
    packed = model(tokens, target_mask=mask, segment_ids=segment_ids, position_ids=position_ids).logprobs
    pieces = tokens[0, :16].split(lengths)
    separate = [model(piece[None], target_mask=targets_of(piece[None])).logprobs[0] for piece in pieces]
    tolerance = {"atol": 1e-5, "rtol": 0} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0}
    torch.testing.assert_close(packed[0, :16], torch.cat(separate), **tolerance)
    # Without the segments the second example would see the first.
    leaky = model(tokens, target_mask=mask, position_ids=position_ids).logprobs
    assert (leaky - packed).abs().max() > 0.1


def test_packing_mask_by_hand():
    expected = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)
    assert torch.equal(packing_mask(torch.tensor([[1, 1, 2, 0]]))[0, 0], expected)


def test_examples_end_to_end_by_hand():
    tokens = torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0]])
    found = lay_end_to_end(tokens, position_ids=None, segment_ids=None, lengths=torch.tensor([3, 2]))
    assert found.kept.tolist() == [0, 1, 2, 4, 5] and found.position_ids.tolist() == [0, 1, 2, 0, 1]
    assert found.starts.tolist() == [0, 3, 5] and found.starts.dtype == torch.int32 and found.longest == 3
    packed = {"segment_ids": torch.tensor([[1, 1, 2, 0], [1, 2, 2, 2]])}
    packed["position_ids"] = torch.tensor([[0, 1, 0, 0], [0, 0, 1, 2]])
    found = lay_end_to_end(tokens, **packed, lengths=None)
    assert found.kept.tolist() == [0, 1, 2, 4, 5, 6, 7] and found.position_ids.tolist() == [0, 1, 0, 0, 0, 1, 2]
    assert found.starts.tolist() == [0, 2, 3, 4, 7] and found.longest == 3
    whole = lay_end_to_end(tokens, position_ids=None, segment_ids=None, lengths=None)
    assert whole.starts.tolist() == [0, 4, 8] and whole.kept.tolist() == list(range(8))


DEVICES = [
    ("cpu", torch.float32, 1e-5),
    # bf16 by FlashAttention against bf16 by a mask: each rounds where it likes.
    pytest.param(
        "cuda", torch.bfloat16, 0.05, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    ),
]


@pytest.mark.parametrize(("device", "dtype", "tolerance"), DEVICES)
@pytest.mark.parametrize("name", ["gqa", "mha"])
@pytest.mark.parametrize("head", ["lm", "scalar", "none"])
@pytest.mark.parametrize("layout", ["padded", "unequal", "packed"])
def test_examples_end_to_end_compute_what_rows_do(layout, head, name, device, dtype, tolerance, monkeypatch):
    """Log-probs, scores or hidden states, and gradients; on CPU example by example, on CUDA by FlashAttention."""
    tokens = random_tokens(3, 20).to(device)
    if layout == "packed":
        segments = torch.tensor([[1] * 5 + [2] * 8 + [3] * 3 + [0] * 4, [1] * 20, [1] * 2 + [2] * 17 + [0]])
        positions = [[*range(5), *range(8), *range(3), *range(4)], [*range(20)], [*range(2), *range(17), 0]]
        options = {"segment_ids": segments.to(device), "position_ids": torch.tensor(positions, device=device)}
        real = segments > 0
    else:
        lengths = torch.tensor([20, 7, 13] if layout == "padded" else [1, 20, 2])
        options, real = {"lengths": lengths}, torch.arange(20) < lengths[:, None]
    real = real.to(device)
    wanted = real & (options.get("position_ids", torch.arange(20, device=device).expand(3, 20)) > 0)
    found = []
    for end_to_end in (False, True):
        monkeypatch.setattr(Transformer, "lays_end_to_end", lambda self, device, flat=end_to_end: flat)
        model = random_model(VARIANTS[name], head=head, recompute="selective").to(device, dtype)
        mask = {"target_mask": wanted, "with_entropy": True} if head == "lm" else {}
        result = model(tokens, **mask, **options)
        if head == "lm":
            values = torch.stack(result)
            assert not values[:, ~wanted].any()
        else:
            values = torch.where(wanted if head == "scalar" else wanted[..., None], result, 0.0)
        values.square().sum().backward()
        found.append((values.detach(), [parameter.grad.float() for parameter in model.parameters()]))
    (rows, of_rows), (flat, of_flat) = found
    torch.testing.assert_close(flat, rows, atol=tolerance, rtol=tolerance)
    for one, other in zip(of_flat, of_rows, strict=True):
        assert (one - other).norm() <= max(10 * tolerance, 1e-4) * other.norm()


@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_end_to_end_no_padding_is_as_wide_as_hidden_states(head, monkeypatch):
    """Not on the way out either: a long example beside short ones would make that larger than all activations."""
    monkeypatch.setattr(Transformer, "lays_end_to_end", lambda self, device: True)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return result

    model = random_model(TINY, head=head)
    tokens, lengths = random_tokens(30, 60), torch.tensor([60] + 29 * [2])
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[0, -3:] = mask[1, 1] = True
    with Watch():
        result = model(tokens, lengths=lengths, **({"target_mask": mask} if head == "lm" else {}))
        (result.logprobs if head == "lm" else result).square().sum().backward()
    assert largest == TINY.vocab_size * TINY.hidden_size < tokens.numel() * TINY.hidden_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize("layout", ["plain", "packed"])
def test_recomputation_gives_identical_gradients(head, layout, dtype):
    """And products of matrices are computed anew by full recomputation alone, as attention's are."""
    tokens = random_tokens(2, 16)
    packed = {"segment_ids": torch.tensor([[1] * 9 + [2] * 7, [1] * 14 + [0] * 2])}
    gradients, flops = {}, {}
    for recompute in get_args(Recompute):
        model = random_model(TINY, head=head, recompute=recompute).to(dtype)
        options = packed if layout == "packed" else {}
        if head == "lm":
            loss = model(tokens, target_mask=targets_of(tokens), **options).logprobs.sum()
        else:
            loss = model(tokens, **options).square().sum()
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        gradients[recompute] = [parameter.grad for parameter in model.parameters()]
        flops[recompute] = counter.get_total_flops()
    for recompute in ("selective", "full"):
        assert all(torch.equal(*pair) for pair in zip(gradients["none"], gradients[recompute], strict=True))
    assert flops["none"] == flops["selective"] < flops["full"]


def test_scalar_head_reads_every_position_in_float32():
    model = random_model(TINY, head="scalar").bfloat16()
    tokens = random_tokens(2, 7)
    scores = model(tokens)
    assert scores.shape == (2, 7) and scores.dtype == torch.float32
    hidden = model.hidden(tokens)
    expected = (hidden.double() @ model.score.weight.double().T).squeeze(-1)
    torch.testing.assert_close(scores.double(), expected, atol=1e-5, rtol=0)
    assert not hasattr(model, "lm_head")


def test_headless_model_returns_hidden_states():
    model = random_model(TINY, head="none")
    tokens = random_tokens(2, 7)
    assert torch.equal(model(tokens), model.hidden(tokens))


def test_fresh_weights_depend_on_the_seed_alone():
    first, again, other = Llama(TINY), Llama(TINY), Llama(TINY)
    torch.manual_seed(123)
    again.init_weights(seed=0)
    other.init_weights(seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_fresh_weights_have_the_documented_spread():
    config = PRESETS["3.8m"]
    model = Llama(config, head="scalar")
    block = model.model.layers[0]
    assert block.self_attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.02)
    # 0.02 / sqrt(2 * 4 layers) = 0.00707
    assert block.mlp.down_proj.weight.std().item() == pytest.approx(0.00707, rel=0.02)
    assert torch.equal(model.model.norm.weight, torch.ones(256))
    # Normalised hidden states have unit mean square, so scores start near unit variance.
    scores = model(torch.arange(2000).view(20, 100))
    assert 0.5 < scores.std() < 2


def test_rope_tables_stay_exact_when_the_model_is_cast():
    model = Llama(TINY).bfloat16()
    model(random_tokens(1, 4), target_mask=targets_of(random_tokens(1, 4)))
    assert model.model._tables.cos.dtype == torch.float32


def test_misuse_is_refused():
    tokens = random_tokens(1, 4)
    language_model, reward_model = Llama(TINY), Llama(TINY, head="scalar")
    with pytest.raises(ValueError, match="target_mask is missing: a model with head='lm' needs it"):
        language_model(tokens)
    with pytest.raises(ValueError, match="target_mask is given: a model with head='scalar' does not take it"):
        reward_model(tokens, target_mask=targets_of(tokens))
    with pytest.raises(ValueError, match=r"target_mask\[:, 0\] must be False"):
        language_model(tokens, target_mask=torch.ones_like(tokens, dtype=torch.bool))
    with pytest.raises(ValueError, match="rows of 257 tokens must not exceed max_seq_len=256"):
        reward_model(random_tokens(1, 257))
    with pytest.raises(ValueError, match="head='scalar' has no logits"):
        reward_model.logits(tokens)
    with pytest.raises(ValueError, match="head='value' must be"):
        Llama(TINY, head="value")
