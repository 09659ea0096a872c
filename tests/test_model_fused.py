"""Fused elementwise work against plain operations: results, gradients, and inside a model that recomputes."""

import pytest
import torch

from model import fused
from model.config import PRESETS
from model.llama import Llama

TINY = PRESETS["tiny"]
LENGTHS = (9, 13)
DEVICES = [
    ("cpu", torch.float32, 1e-6),
    # In bf16 a kernel keeps float32 between operations that round one by one.
    pytest.param(
        "cuda", torch.bfloat16, 0.05, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    ),
]


def results_and_gradients(function, *inputs):
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    result = function(*leaves)
    result.square().sum().backward()
    return [result.detach(), *(leaf.grad for leaf in leaves)]


# Dynamo asks whatever it is given for its gradient, and hides what torch says to that; made an error, it is not hidden.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.slow
@pytest.mark.parametrize(("device", "dtype", "tolerance"), DEVICES)
def test_one_kernel_computes_what_operations_do(device, dtype, tolerance, monkeypatch):
    """Of any length by the same kernel; and gradients of a model in which both lie behind recomputation."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    compiled = [0]
    make = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **options: compiled.append(1) or make(*args, **options))
    fused._compiled.cache_clear()
    for length in LENGTHS:
        gate, up = random(1, length, 24), random(1, length, 24)
        x, cos, sin = random(1, length, 3, 8), random(1, length, 1, 8), random(1, length, 1, 8)
        found = []
        for one_kernel in (False, True):
            monkeypatch.setattr(fused, "in_one_kernel", lambda device, flag=one_kernel: flag)
            found.append([*results_and_gradients(fused.swiglu, gate, up)])
            rotated = results_and_gradients(lambda x, cos=cos, sin=sin: fused.rotate(x, cos, sin), x)
            found[-1] += rotated
        for plain, kernel in zip(*found, strict=True):
            torch.testing.assert_close(kernel, plain, atol=tolerance, rtol=tolerance)
    assert sum(compiled) == 2

    tokens = torch.randint(4, TINY.vocab_size, (2, 11), generator=generator).to(device)
    gradients = []
    for one_kernel, recompute in ((False, "none"), (True, "full"), (True, "selective")):
        monkeypatch.setattr(fused, "in_one_kernel", lambda device, flag=one_kernel: flag)
        model = Llama(TINY, head="scalar", recompute=recompute).to(device, dtype)
        model(tokens).square().sum().backward()
        gradients.append([parameter.grad.float() for parameter in model.parameters()])
    for plain, *kernels in zip(*gradients, strict=True):
        assert all((plain - k).norm() <= max(10 * tolerance, 1e-5) * plain.norm() for k in kernels)


@pytest.mark.slow
def test_the_kernel_of_swiglu_keeps_its_inputs_alone(monkeypatch):
    """Two tensors, where plain operations keep silu(gate) as well: what is planned for is an upper bound."""
    kept = {}
    for one_kernel in (False, True):
        monkeypatch.setattr(fused, "in_one_kernel", lambda device, flag=one_kernel: flag)
        gate, up = (torch.randn(1, 9, 24, requires_grad=True) for _ in range(2))
        saved: set[int] = set()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.add(t.data_ptr()) or t, lambda t: t):
            fused.swiglu(gate, up)
        kept[one_kernel] = len(saved)
    assert kept == {False: 3, True: 2}
