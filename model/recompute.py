"""What a block's forward pass keeps for its backward pass, and what it computes again there.

Selective recomputation keeps what takes tensor cores to compute and computes again what waits for memory (arXiv
2205.05198 §5): norms, rotary positions, SwiGLU and residual sums, and by it the inputs that matrices keep for their
gradients. Nothing is random in a block, so there is no random state to replay.

Letters: E tokens, H hidden size, N query heads, D head size, F feed-forward size.
"""

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from model.config import Recompute

_ATTENTION = {
    "torch_attn::_varlen_attn",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
}


def through(block: nn.Module, x: Tensor, *inputs: Any, recompute: Recompute, ffn_size: int) -> Tensor:
    """The block's output, (B, T, H) as `x`; `ffn_size` is F."""
    if recompute == "none":
        return block(x, *inputs)
    kept = partial(create_selective_checkpoint_contexts, partial(_policy, ffn_size))
    contexts = kept if recompute == "selective" else noop_context_fn
    return checkpoint(block, x, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _policy(ffn_size: int, context: Any, operation: Any, *inputs: Any, **options: Any) -> CheckpointPolicy:
    """Whether the result of an operation of torch is kept."""
    name = operation.name()
    # The block's last product (E, F) x (F, H) is read by nothing that is computed again.
    last = name == "aten::mm" and inputs[1].shape[0] == ffn_size
    keep = name in _ATTENTION or (name == "aten::mm" and not last)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
