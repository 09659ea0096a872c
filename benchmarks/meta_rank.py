"""What one rank of a role holds, counted on tensors that have shapes and no data.

    RANK=3 WORLD_SIZE=64 LOCAL_RANK=0 python benchmarks/meta_rank.py \
        '{"role": "policy", "model": "llama2-70b", "zero_stage": 3}'

Models are built on torch's meta device. DeepSpeed itself divides those of trained roles and of frozen ones that are
divided, through rlhf_ray/backends, in a process group that talks to nobody; trained ones take a step, so that gradients
and moments are there to be counted. Engines are divided by the rules of vLLM's layers. Prints bytes as JSON.
"""

import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from plan_memory import state_bytes, storage_bytes
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from model.checkpoint import meta_model
from model.config import PRESETS, ModelConfig
from model.llama import Head, Llama
from rlhf_ray.backends import train as train_module
from rlhf_ray.backends.frozen import FrozenEngine
from rlhf_ray.backends.train import TrainEngine, sample_forward
from rlhf_ray.config import OptimSection

META = torch.device("meta")
BF16 = 2
VOCAB_MULTIPLE = 64
"""vLLM pads the vocabulary to a multiple of this before it divides it."""


class MetaAccelerator(CPU_Accelerator):
    """The meta device, for DeepSpeed: it has room for everything."""

    def device_name(self, device_index: int | None = None) -> str:
        return "meta"

    def current_device_name(self) -> str:
        return "meta"

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        return tensor.is_meta

    def available_memory(self, device_index: int | None = None) -> int:
        return 2**50


class ValuesAreZero(TorchDispatchMode):
    """Has whoever asks for the values of a meta tensor find zeros, and copies to the host copy nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten, options = torch.ops.aten, kwargs or {}
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            return 0
        if func is aten.copy_.default and args[1].is_meta:
            return args[0]
        if func is aten._to_copy.default and args[0].is_meta and options.get("device") not in (None, META):
            return torch.zeros(args[0].shape, dtype=options.get("dtype") or args[0].dtype)
        return func(*args, **options)


def rank_bytes(
    role: str, model: str, *, zero_stage: int | None = None, shards: int = 1, tensor_parallel_size: int = 1
) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer (fp32 master weights and moments) on a GPU of this rank.

    Args:
        model: a preset.
        zero_stage: of trained roles.
        shards: ranks that a frozen model is divided over.
        tensor_parallel_size: GPUs of an engine.
    """
    head: Head = "lm" if role in ("policy", "reference", "rollout") else "scalar"
    module = meta_model(PRESETS[model], head=head, dtype=torch.bfloat16)
    if role == "rollout":
        held = BF16 * engine_elements(module, PRESETS[model], tensor_parallel_size)
        return {"weights": held, "gradients": 0, "optimizer": 0}
    join()
    with ValuesAreZero():
        if role in ("policy", "value"):
            assert zero_stage is not None
            return trained_bytes(module, zero_stage)
        frozen = FrozenEngine(module, device="meta", ranks=shards)
        held = storage_bytes(getattr(p, "ds_tensor", p) for p in frozen.module.parameters())
        return {"weights": held, "gradients": 0, "optimizer": 0}


def join() -> None:
    """A process group of WORLD_SIZE ranks of which this is RANK, and whose others are not there."""
    set_accelerator(MetaAccelerator())
    train_module._take_weights = lambda *parts: None  # of a model on the meta device: it stays there
    FrozenEngine.forward_nothing = lambda self: None  # type: ignore[method-assign]  # it has ranks compare values
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_ranks)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as rlhf_ray.backends.train.init_distributed
    deepspeed.init_distributed(dist_backend="fake", verbose=False)
    # The tokens that go through the head are picked out by value: all are.
    torch.fx.experimental._config.meta_nonzero_assume_all_nonzero = True


def trained_bytes(module: Llama, zero_stage: int) -> dict[str, int]:
    """As `rank_bytes`, with gradients as they are between the backward pass and the step."""
    adamw, linear = torch.optim.AdamW, F.linear
    # The fused one does not know the meta device; it holds the same.
    torch.optim.AdamW = lambda groups, **options: adamw(groups, **options | {"fused": False})  # type: ignore[assignment,misc]
    engine = TrainEngine(module, optim=OptimSection(), num_steps=1, zero_stage=zero_stage, precision="bf16")
    F.linear = linear  # stage 3 has one of its own, which asks for the device's autocast
    wrapped = engine._engine
    wrapped.set_gradient_accumulation_boundary(True)
    wrapped.backward(sample_forward(wrapped.module, wrapped, META))
    gradients = storage_bytes(_gradients(wrapped))
    wrapped.step()
    return {**state_bytes(engine), "gradients": gradients}


def _gradients(wrapped: Any) -> Iterator[torch.Tensor]:
    """Wherever the stages keep them."""
    yield from (p.grad for p in wrapped.module.parameters() if p.grad is not None)
    yield from getattr(wrapped.optimizer, "fp32_groups_gradients_flat", ())
    for group in getattr(wrapped.optimizer, "averaged_gradients", {}).values():
        yield from [group] if isinstance(group, torch.Tensor) else group


def engine_elements(module: Llama, config: ModelConfig, size: int) -> int:
    """Parameters on each GPU of an engine that is spread over `size` of them.

    All matrices are divided, those of the vocabulary padded before; keys' and values' by heads, of which a GPU has one
    whole where there are fewer than GPUs. Norms are on all.
    """
    elements = 0
    for name, parameter in module.named_parameters():
        kind, parts = name.split(".")[-2], size
        padding = 0
        if kind in ("embed_tokens", "lm_head"):
            padding = -len(parameter) % VOCAB_MULTIPLE * parameter.shape[1]
        elif kind in ("k_proj", "v_proj"):
            parts = min(config.num_kv_heads, size)
        elif parameter.dim() == 1:
            parts = 1
        elements += (parameter.numel() + padding) // parts
    return elements


if __name__ == "__main__":
    print(json.dumps(rank_bytes(**json.loads(sys.argv[1]))))
