"""Chunked log-probabilities and entropies against the naive log-softmax."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.logprobs import token_logprobs

N, H, V = 37, 16, 50
ONE_CHUNK = 4 * V * N
CHUNKS_OF_8 = 4 * V * 8  # 37 rows: four chunks of 8 and one of 5


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=generator)
    grads = torch.randn(2, N, generator=generator).to(dtype)
    return hidden, weight, targets, *grads


def naive(hidden, weight, targets, temperature):
    log_p = ((hidden @ weight.t()) / temperature).log_softmax(-1)
    return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("chunk_bytes", [1, CHUNKS_OF_8, ONE_CHUNK])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("used", ["logprobs", "entropy", "both"])
def test_values_and_gradients_equal_the_naive_form(chunk_bytes, temperature, used):
    hidden, weight, targets, grad_logprobs, grad_entropy = inputs()

    def loss(logprobs, entropy):
        total = (logprobs * grad_logprobs).sum() if used != "entropy" else 0.0
        return total + ((entropy * grad_entropy).sum() if used != "logprobs" else 0.0)

    expected = naive(hidden, weight, targets, temperature)
    expected_grads = torch.autograd.grad(loss(*expected), (hidden, weight))
    actual = token_logprobs(
        hidden, weight, targets, temperature=temperature, with_entropy=True, chunk_bytes=chunk_bytes
    )
    actual_grads = torch.autograd.grad(loss(*actual), (hidden, weight))
    torch.testing.assert_close(tuple(actual), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(actual_grads, expected_grads, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk_bytes", [1, CHUNKS_OF_8, ONE_CHUNK])
def test_rows_beyond_the_ids_count_as_if_they_were_not_there(chunk_bytes):
    hidden, weight, _, grad_logprobs, grad_entropy = inputs()
    targets = torch.arange(N) % 40
    # Masked logits, in the naive form: no probability, no entropy, no gradient.
    masked = (hidden @ weight.t()).masked_fill(torch.arange(V) >= 40, -1e30)
    log_p = (masked / 0.7).log_softmax(-1)
    expected = log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)
    actual = token_logprobs(
        hidden, weight, targets, temperature=0.7, with_entropy=True, num_ids=40, chunk_bytes=chunk_bytes
    )
    torch.testing.assert_close(tuple(actual), expected, atol=1e-5, rtol=1e-5)
    upstream = (grad_logprobs, grad_entropy)
    expected_grads = torch.autograd.grad(expected, (hidden, weight), upstream)
    actual_grads = torch.autograd.grad(tuple(actual), (hidden, weight), upstream)
    torch.testing.assert_close(actual_grads, expected_grads, atol=1e-5, rtol=1e-5)
    assert not actual_grads[1][40:].any()


def test_chunking_does_not_cost_bfloat16_precision():
    # 400 chunks of one row that all push the same way: a bfloat16 sum would stop growing after 256 of them.
    generator = torch.Generator().manual_seed(0)
    hidden = torch.rand(400, H, generator=generator).bfloat16()
    weight = torch.randn(V, H, generator=generator).bfloat16().requires_grad_()
    targets = torch.zeros(400, dtype=torch.int64)
    exact = naive(hidden.double(), weight.double(), targets, 1.0)[0].sum()
    exact_grad = torch.autograd.grad(exact, weight)[0].double()
    logprobs = token_logprobs(hidden, weight, targets, chunk_bytes=1).logprobs
    assert logprobs.dtype == torch.float32
    grad = torch.autograd.grad(logprobs.sum(), weight)[0]
    assert grad.dtype == torch.bfloat16
    assert (grad.double() - exact_grad).norm() < 0.005 * exact_grad.norm()


@pytest.mark.parametrize("chunk_bytes", [CHUNKS_OF_8, ONE_CHUNK])
def test_bfloat16_operands_give_float32_logits(chunk_bytes):
    # Logits near 8 rounded to bfloat16 would be off by up to 1/64, and log-probs with them.
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(V, H, generator=generator).bfloat16().requires_grad_()
    targets = torch.randint(0, V, (N,), generator=generator)
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    exact, exact_entropy = naive(*wide, targets, 0.7)
    before = torch.backends.mkldnn.matmul.fp32_precision
    out = token_logprobs(hidden, weight, targets, temperature=0.7, with_entropy=True, chunk_bytes=chunk_bytes)
    torch.testing.assert_close(out.logprobs.double(), exact, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.entropy.double(), exact_entropy, atol=1e-5, rtol=1e-5)
    for grad, expected in zip(
        torch.autograd.grad(out.logprobs.sum(), (hidden, weight)), torch.autograd.grad(exact.sum(), wide), strict=True
    ):
        assert (grad.double() - expected).norm() < 0.005 * expected.norm()  # rounded once, to bfloat16
    assert torch.backends.mkldnn.matmul.fp32_precision == before


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation's output had."""

    def __init__(self):
        super().__init__()
        self.elements = 0
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.products += func._overloadpacket is torch.ops.aten.mm
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.parametrize(("rows", "products"), [(8, 5 * 4), (N, 3)])
def test_never_more_logits_than_a_chunk_forward_or_backward(rows, products):
    generator = torch.Generator().manual_seed(0)
    vocabulary = 400  # so that a chunk of logits is larger than hidden, weight and their gradients
    hidden = torch.randn(N, 4, generator=generator, requires_grad=True)
    weight = torch.randn(vocabulary, 4, generator=generator, requires_grad=True)
    targets = torch.randint(0, vocabulary, (N,), generator=generator)
    with LargestTensor() as largest:
        out = token_logprobs(hidden, weight, targets, with_entropy=True, chunk_bytes=4 * vocabulary * rows)
        (out.logprobs.sum() + out.entropy.sum()).backward()
    assert largest.elements == rows * vocabulary
    # Per chunk: logits forward, logits again, two gradients. In a single chunk nothing is recomputed.
    assert largest.products == products


def test_no_gradient_keeps_nothing():
    hidden, weight, targets, *_ = inputs()
    with torch.no_grad():
        assert not token_logprobs(hidden, weight, targets).logprobs.requires_grad
    # A frozen head: only the hidden states get a gradient.
    token_logprobs(hidden, weight.detach(), targets).logprobs.sum().backward()
    assert hidden.grad.abs().sum() > 0


def test_no_rows():
    hidden, weight, _, *_ = inputs()
    out = token_logprobs(hidden[:0], weight, torch.empty(0, dtype=torch.int64), with_entropy=True)
    assert out.logprobs.shape == out.entropy.shape == (0,)
    out.logprobs.sum().backward()
    assert torch.equal(weight.grad, torch.zeros(V, H))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperature_must_be_positive(temperature):
    hidden, weight, targets, *_ = inputs()
    with pytest.raises(ValueError, match="must be positive"):
        token_logprobs(hidden, weight, targets, temperature=temperature)
