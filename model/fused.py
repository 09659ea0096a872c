"""Elementwise work of a block: on CUDA one kernel each, since it waits for memory; on CPU plain operations of torch.

torch.compile makes the kernels when they are first used, in seconds, and keeps them on disk. It is given functions of
tensors alone, with no module, parameter or hook inside, so that ZeRO and recomputation see nothing of it. With
TORCH_COMPILE_DISABLE=1 in the environment, or without a C compiler, CUDA has the plain operations too.

Letters: B rows, T positions, N heads, D head size, F feed-forward size.
"""

import os
import shutil
from collections.abc import Callable
from functools import cache, wraps

import torch
import torch.nn.functional as F
from torch import Tensor

Elementwise = Callable[..., Tensor]


def in_one_kernel(device: torch.device) -> bool:
    """Whether a kernel is made: not on CPU, where results are those of torch's operations to the bit."""
    return device.type == "cuda" and _has_compiler()


@cache
def _has_compiler() -> bool:
    """Of C, which Triton needs for what starts a kernel."""
    return any(map(shutil.which, (os.environ.get("CC", "gcc"), "clang")))


@cache
def _compiled(function: Elementwise) -> Elementwise:
    # One kernel for all micro-batches, whatever their lengths; for so few torch need not start 32 processes.
    return torch.compile(function, dynamic=True, options={"compile_threads": 1})


def _fused(function: Elementwise) -> Elementwise:
    @wraps(function)
    def call(*tensors: Tensor) -> Tensor:
        return (_compiled(function) if in_one_kernel(tensors[0].device) else function)(*tensors)

    return call


@_fused
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys x (B, T, N, D) turned by their positions: x cos + roll(x, D / 2) sin.

    Args:
        cos: (T, 1, D) or (B, T, 1, D), of x's dtype.
        sin: likewise, negated in the first half.
    """
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


@_fused
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, each (B, T, F) (arXiv 2002.05202)."""
    return F.silu(gate) * up
