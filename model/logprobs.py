"""Log-probabilities and entropies of tokens without ever holding all logits.

For N tokens and vocabulary V the fp32 logits take 4 * N * V bytes: 2 GiB for 16k tokens of Llama 2, and
autograd would keep several copies. Here rows go through the head a chunk at a time, and the backward
pass recomputes each chunk's logits from the hidden states. When everything fits in one chunk the
log-probabilities are kept instead, so that small models do not pay for the recomputation.

Letters: N tokens, H hidden size, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

LOGITS_CHUNK_BYTES = 64 * 2**20
"""Most bytes of fp32 logits in one chunk."""


class TokenLogprobs(NamedTuple):
    """What the language-model head says about chosen tokens; both float32 and of one shape."""

    logprobs: Tensor
    """log p(token)."""
    entropy: Tensor | None
    """Entropy in nats of the distribution the token was drawn from; None unless asked for."""


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    num_ids: int | None = None,
    chunk_bytes: int = LOGITS_CHUNK_BYTES,
) -> TokenLogprobs:
    """Log-probability of each target under softmax(hidden @ weight^T / temperature), differentiable.

    The matrix product takes operands of the dtype of `weight`; logits, softmax and entropy are float32.

    Args:
        hidden: (N, H) hidden states from which the targets are predicted.
        weight: (V, H) output projection, same dtype.
        targets: (N,) int64 token ids.
        temperature: Divides the logits; the one that the tokens were sampled with.
        with_entropy: Also return the entropy of each distribution.
        num_ids: Only the first so many rows of the projection count, as if the others had no probability.
        chunk_bytes: Most bytes of fp32 logits that exist at once (at least one row).
    Returns:
        logprobs (N,) float32 and entropy (N,) float32 or None.
    Raises:
        ValueError: temperature is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")
    chunk_rows = max(1, chunk_bytes // (4 * weight.shape[0]))
    logprobs, entropy = _ChunkedLogprobs.apply(hidden, weight, targets, temperature, with_entropy, chunk_rows, num_ids)
    return TokenLogprobs(logprobs, entropy)


class _ChunkedLogprobs(torch.autograd.Function):
    """token_logprobs; its own backward because checkpointing chunks would call the head once per chunk.

    The weight comes in as an argument from a module that owns it, so ZeRO-3 gathers it once for the
    forward and once for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        with_entropy: bool,
        chunk_rows: int,
        num_ids: int | None,
    ) -> tuple[Tensor, Tensor | None]:
        num_rows = hidden.shape[0]
        logprobs = hidden.new_empty(num_rows, dtype=torch.float32)
        entropy = hidden.new_empty(num_rows, dtype=torch.float32) if with_entropy else None
        kept = None
        for start in range(0, num_rows, chunk_rows):
            rows = slice(start, start + chunk_rows)
            log_p = _log_softmax(hidden[rows], weight[:num_ids], temperature)  # (n, V)
            logprobs[rows] = log_p.gather(1, targets[rows, None]).squeeze(1)
            if entropy is not None:
                entropy[rows] = log_p.exp().mul_(log_p).sum(dim=1).neg_()
            if num_rows <= chunk_rows and any(ctx.needs_input_grad):
                kept = log_p
        ctx.save_for_backward(hidden, weight, targets, entropy, kept)
        ctx.temperature, ctx.chunk_rows, ctx.num_ids = temperature, chunk_rows, num_ids
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, entropy, kept = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # Chunks are added up in float32: bfloat16 would lose the small ones.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        for start in range(0, hidden.shape[0], ctx.chunk_rows):
            rows = slice(start, start + ctx.chunk_rows)
            log_p = kept if kept is not None else _log_softmax(hidden[rows], weight[: ctx.num_ids], ctx.temperature)
            grad_logits = _grad_logits(
                log_p,
                targets[rows],
                None if grad_logprobs is None else grad_logprobs[rows],
                None if grad_entropy is None else grad_entropy[rows],
                None if grad_entropy is None else entropy[rows],
            )
            grad_logits = grad_logits.div_(ctx.temperature).to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight[: ctx.num_ids], out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight[: ctx.num_ids] += grad_logits.t() @ hidden[rows]
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None,
            None,
            None,
            None,
            None,
        )


def fp32_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits hidden (n, H) @ weight (V, H)^T as (n, V) float32, in bfloat16 too never rounded to it."""
    if weight.dtype != torch.bfloat16:
        return (hidden @ weight.t()).float()
    if weight.is_cuda:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    # oneDNN may multiply float32 operands as bfloat16, adding up in float32. That loses nothing of operands that were
    # bfloat16, and takes half the time of a float32 product; a CPU without the units multiplies in float32 after all.
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        return hidden.float() @ weight.float().t()
    finally:
        matmul.fp32_precision = before


def _log_softmax(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """(n, V) float32 log-probabilities."""
    logits = fp32_logits(hidden, weight)
    if temperature != 1.0:
        logits = logits.div_(temperature)
    return torch.log_softmax(logits, dim=-1)


def _grad_logits(
    log_p: Tensor,
    targets: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    entropy: Tensor | None,
) -> Tensor:
    """(n, V) float32 gradient with respect to the logits divided by temperature.

    d log p_y / d x_j = 1[j = y] - p_j
    d H / d x_j       = -p_j (log p_j + H)
    """
    p = log_p.exp()
    if grad_entropy is None or entropy is None:
        grad = p if grad_logprobs is None else p.mul_(grad_logprobs[:, None]).neg_()
        if grad_logprobs is None:
            return grad.zero_()
    else:
        grad = (log_p + entropy[:, None]).mul_(grad_entropy[:, None])
        if grad_logprobs is not None:
            grad += grad_logprobs[:, None]
        grad = grad.mul_(p).neg_()
    if grad_logprobs is not None:
        grad.scatter_add_(1, targets[:, None], grad_logprobs[:, None])
    return grad
