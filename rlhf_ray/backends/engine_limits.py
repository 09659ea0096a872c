"""What vLLM takes and what it needs: asked of a config before anything starts, and used to start the engine.

Read in the sources of vLLM 0.32. Imports no torch.
"""

import sys
from collections.abc import Mapping

from cluster.hardware import memory_limit_bytes
from model.config import ModelConfig
from model.flops import kv_cache_bytes_per_token
from rlhf_ray.config import RolloutRole
from rlhf_ray.errors import UserError

GIB = 2**30
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Those of v1/attention/backends/cpu_attn.py. On GPUs one backend or another takes every head size that RoPE does."""
GPU_BUCKET_BYTES = 512 * 2**20
"""Of a bucket of weights from GPU to GPU; a larger tensor has one of its own size."""
CPU_BLOCK = 128
"""Tokens of a cache block on CPU."""
VOCABULARY_UNIT = 64
"""Rows of embedding and head are padded to a multiple of this before tensor-parallel ranks divide them."""


def kv_cache_bytes(
    model: ModelConfig, *, sequences: int, precision: str, tensor_parallel_size: int = 1, at_most: int = GIB
) -> int:
    """KV cache on CPU, over all of an engine's ranks: of so many sequences of the whole context.

    vLLM fills it with zeros when it starts, so that every byte is resident.

    Args:
        sequences: that are decoded together.
        at_most: bytes; more only where a single context takes more, without which vLLM does not start.
    """
    # Ranks beyond the key/value heads each hold a copy of one.
    heads = max(model.num_kv_heads, tensor_parallel_size)
    per_token = kv_cache_bytes_per_token(model, bytes_per_element=4 if precision == "fp32" else 2)
    block = CPU_BLOCK * per_token * heads // model.num_kv_heads
    of_one = -(-model.max_seq_len // CPU_BLOCK)
    # vLLM keeps a block for itself.
    return block * max(of_one + 1, min(sequences * of_one + 1, at_most // block))


def check_engine(
    rollout: RolloutRole, models: Mapping[str, ModelConfig], *, precision: str, on_gpu: bool, elsewhere: bool = False
) -> None:
    """The models that an engine of these settings will generate with can run in it.

    Args:
        models: the field that names each -> its shape.
        elsewhere: this machine's memory says nothing: others will run the engine.
    Raises:
        UserError: the first thing that vLLM would refuse.
    """
    for field, model in models.items():
        _check_divides(field, model, rollout.tensor_parallel_size)
        if not on_gpu:
            _check_on_cpu(field, model, rollout, precision, sys.maxsize if elsewhere else memory_limit_bytes())


def _check_on_cpu(field: str, model: ModelConfig, rollout: RolloutRole, precision: str, limit: int) -> None:
    """On CPU: there is attention for the model's heads, and the cache holds one whole context."""
    if model.head_dim not in CPU_HEAD_SIZES:
        raise UserError(
            f"{field}: the model's heads are {model.head_dim} wide, and vLLM's attention on CPU takes "
            f"{', '.join(map(str, CPU_HEAD_SIZES))} only; give another model, or run on a GPU"
        )
    size = rollout.tensor_parallel_size
    needed = kv_cache_bytes(model, sequences=1, precision=precision, tensor_parallel_size=size)
    context = f"one whole context of {field}, {model.max_seq_len} tokens, takes as much"
    if limit < needed:
        raise UserError(
            f"roles.rollout.kv_cache_gib must be at least {_gib_up(needed)} ({context}), and this machine may use "
            f"{limit / GIB:.1f} GiB; lower max_position_embeddings in the model's config.json, or give a smaller model"
        )
    if rollout.kv_cache_gib is not None and rollout.kv_cache_gib * GIB < needed:
        raise UserError(
            f"roles.rollout.kv_cache_gib={rollout.kv_cache_gib:g} must be at least {_gib_up(needed)}: {context}; "
            "raise it, or leave it out: the cache is then as large as it must be"
        )


def _check_divides(field: str, model: ModelConfig, size: int) -> None:
    """Tensor-parallel ranks divide the model."""
    if undivided := _undivided(model, size):
        fitting = max(n for n in range(1, size) if not _undivided(model, n))
        raise UserError(
            f"roles.rollout.tensor_parallel_size={size} does not divide the {undivided} of {field}; set it to {fitting}"
        )


def _undivided(model: ModelConfig, size: int) -> str | None:
    """What so many tensor-parallel ranks cannot divide."""
    padded = -(-model.vocab_size // VOCABULARY_UNIT) * VOCABULARY_UNIT
    parts = {
        "attention heads": model.num_heads,
        "feed-forward units": model.ffn_size,
        f"rows of the vocabulary (padded to a multiple of {VOCABULARY_UNIT})": padded,
    }
    if size % model.num_kv_heads:  # else each rank holds a copy of one
        parts["key/value heads"] = model.num_kv_heads
    return next((f"{number} {name}" for name, number in parts.items() if number % size), None)


def _gib_up(num_bytes: int) -> str:
    """GiB, rounded up to what a config can give with few digits."""
    for digits in range(1, 9):
        scale = 10**digits
        value = -(-num_bytes * scale // GIB) / scale
        if value * GIB <= 1.05 * num_bytes:
            break
    return f"{value:g}"
