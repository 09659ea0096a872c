"""Bytes that a worker holds on its device, phase by phase: pure arithmetic, without torch.

Follows what rlhf_ray/backends/train.py, model/llama.py, model/heads.py and model/logprobs.py allocate, in
bfloat16. docs/planning.md explains the formulas and holds them against measurements.

Letters: P parameters, M those of the largest matrix, R data-parallel ranks, V vocabulary, H hidden size.
"""

from dataclasses import dataclass, replace
from typing import Any

from cluster.plan import Memory
from model.config import ModelConfig, Recompute
from model.flops import (
    activation_bytes,
    backward_working_bytes,
    forward_working_bytes,
    recomputed_bytes,
    weight_bytes,
)

# DeepSpeed's defaults, which rlhf_ray/backends/train.py leaves alone (deepspeed/runtime/zero/config.py), elements.
REDUCE_BUCKET = 500_000_000
SUB_GROUP = 1_000_000_000
MAX_LIVE_PARAMETERS = 1_000_000_000
LOGITS_CHUNK_BYTES = 64 * 2**20  # model.logprobs.LOGITS_CHUNK_BYTES; that module imports torch


@dataclass(frozen=True, kw_only=True)
class Work:
    """What passes through a trained model at once, and the bytes it keeps on the way."""

    kept: int
    """Activations kept by the forward pass."""
    block: int
    """What a block that goes backward needs beside them: gradients in flight, and what it computes again."""
    head: int
    """Logits of a chunk, and the head's share of the backward pass."""


def training_memory(
    parameters: int, largest: int, work: Work, *, zero_stage: int, num_ranks: int, overhead: int = 0
) -> dict[str, Memory]:
    """What a rank of a role under DeepSpeed holds, phase by phase, in bfloat16 with fp32 master weights.

    As `rlhf_ray.backends.train` sets DeepSpeed up. Models are loaded in host memory and reach the device in bf16,
    at stage 3 already divided, so that loading is never the largest phase:

    idle: nothing passes through the model.
    head: all activations are kept and the head goes backward.
    backward: all activations are kept and the last block goes backward.
    reduction: gradients of a bucket have gathered and are reduced.
    step: the optimizer runs.

    Args:
        parameters: P.
        largest: M.
        num_ranks: R.
    """
    shard = -(-parameters // num_ranks)
    weights = 2 * (shard if zero_stage == 3 else parameters)
    # fp32 master weights and two fp32 moments
    optimizer = 12 * (shard if zero_stage > 0 else parameters)
    bucket = min(parameters, REDUCE_BUCKET)
    standing = reduction = step = 0
    if zero_stage == 0:
        # bf16 gradients; AdamW's step turns all of them to fp32 (FP16_UnfusedOptimizer)
        gradients, step = 2 * parameters, 4 * parameters
    elif zero_stage == 1:
        # BF16_Optimizer: bf16 gradients and a whole fp32 accumulator on every rank, which is flattened (4 P) and
        # cast to bf16 (2 P) as one piece for the all-reduce
        gradients, reduction = 6 * parameters, 6 * parameters
    elif zero_stage == 2:
        # DeepSpeedZeroOptimizer: this rank's fp32 share, a bucket of bf16 gradients and one that fills while it is
        # reduced, its flattened copy, and the reduced gradient of a matrix in fp32
        gradients, standing = 4 * shard, 2 * REDUCE_BUCKET * min(2, num_ranks)
        reduction, step = 2 * bucket + 4 * largest, -standing  # the buckets are freed before the step
    else:
        # DeepSpeedZeroOptimizer_Stage3: likewise; reduced shares to fp32; a flattened fp32 copy of a sub-group;
        # weights that are gathered and not yet released
        gathered = 0 if num_ranks == 1 else 2 * min(parameters, MAX_LIVE_PARAMETERS)
        gradients, standing = 4 * shard, 2 * REDUCE_BUCKET + gathered
        reduction = 2 * bucket + 4 * -(-bucket // num_ranks)
        step = 4 * min(shard, SUB_GROUP) - gathered
    held = Memory(weights=weights, gradients=gradients, optimizer=optimizer, buffers=standing, overhead=overhead)
    # Buckets fill on the way, when the activations of what they hold are gone.
    still_kept = work.kept * (parameters - bucket) // parameters if zero_stage > 1 else 0
    return {
        "idle": replace(held, buffers=standing if zero_stage == 3 else 0),
        # ZeRO 2 allocates its bucket at the first gradient, after the head's own work.
        "head": replace(
            held,
            activations=work.kept,
            logits=work.head,
            buffers=standing if zero_stage == 3 else 0,
        ),
        "backward": replace(held, activations=work.kept + work.block),
        "reduction": replace(held, activations=still_kept, buffers=standing + reduction),
        "step": replace(held, buffers=standing + step),
    }


def lm_head_bytes(config: ModelConfig, targets: int) -> int:
    """Bytes of model/logprobs.py in the backward pass, by chunks of at most 64 MiB of fp32 logits.

    Of a chunk: log-probs and probabilities (4 bytes each) and their bf16 gradient (2); the output projection's
    gradient in fp32 and a chunk's part of it (4 V H + 2 V H); hidden states of the targets and their gradient (4 H
    each); indices and log-probs (28 each). Entropies are metrics, without gradient, and cost nothing more.
    """
    projection = 6 * config.vocab_size * config.hidden_size
    return 10 * _chunk_rows(config, targets) * config.vocab_size + projection + targets * (4 * config.hidden_size + 28)


def _chunk_rows(config: ModelConfig, targets: int) -> int:
    return min(targets, max(1, LOGITS_CHUNK_BYTES // (4 * config.vocab_size)))


def scalar_head_bytes(config: ModelConfig, tokens: int) -> int:
    """Bytes of the scalar head in the backward pass: fp32 hidden states and their gradient."""
    return 8 * config.hidden_size * tokens


def training_work(
    config: ModelConfig,
    tokens: int,
    *,
    targets: int | None,
    recompute: Recompute,
    packed_row_length: int | None = None,
    cpu_kernels: bool = False,
) -> Work:
    """Bytes of a micro-batch; with the language-model head over `targets` tokens, or the scalar one (None)."""
    kernels: dict[str, Any] = {"packed_row_length": packed_row_length, "cpu_kernels": cpu_kernels}
    kept = activation_bytes(config, tokens, recompute=recompute, **kernels)
    block = backward_working_bytes(config, tokens) + recomputed_bytes(config, tokens, recompute=recompute, **kernels)
    if targets is None:
        head = scalar_head_bytes(config, tokens)
    else:
        head = lm_head_bytes(config, targets)
    return Work(kept=kept, block=block, head=head)


def scoring_memory(config: ModelConfig, tokens: int, *, targets: int | None, held: Memory) -> Memory:
    """What a role holds that scores: what it has at rest, and a micro-batch on its way through."""
    head = 4 * config.hidden_size * tokens
    if targets is not None:
        head = 8 * _chunk_rows(config, targets) * config.vocab_size + 2 * config.hidden_size * targets
    return replace(held, activations=forward_working_bytes(config, tokens), logits=head)


def frozen_memory(config: ModelConfig, *, scalar_head: bool, shards: int, overhead: int) -> Memory:
    """What a frozen role holds at rest: the model, or this rank's share of it and what is gathered on the way."""
    weights = weight_bytes(config, scalar_head=scalar_head)
    gathered = 0 if shards == 1 else min(weights, 2 * MAX_LIVE_PARAMETERS)
    return Memory(weights=-(-weights // shards), buffers=gathered, overhead=overhead)


def largest_matrix(config: ModelConfig) -> int:
    """Parameters of the largest matrix."""
    widest = max(config.vocab_size, config.ffn_size, config.num_heads * config.head_dim)
    return widest * config.hidden_size
