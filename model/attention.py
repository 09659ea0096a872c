"""Softmax attention of grouped heads: over padded rows with or without a mask, or over examples laid end to end.

On CUDA in half precision the model lays examples end to end (`lay_end_to_end`): no padding passes through it, and no
mask of T x T positions is made. Elsewhere rows stay as they are, and torch's scaled dot product takes a mask. Both
compute the same; a test holds them together.

Letters: B rows, T positions, E tokens of all examples, N query heads, K key/value heads, D head size.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Examples(NamedTuple):
    """Where the examples of a micro-batch begin, once they are laid end to end."""

    kept: Tensor
    """(E,) int64, flat positions in the (B, T) rows of the tokens that are no padding, in order."""
    position_ids: Tensor
    """(E,) int64, each token's position in its example."""
    starts: Tensor
    """(examples + 1,) int32, where each begins; then E."""
    longest: int
    """Tokens of the longest example."""


def lay_end_to_end(
    tokens: Tensor, *, position_ids: Tensor | None, segment_ids: Tensor | None, lengths: Tensor | None
) -> Examples:
    """The examples of a micro-batch without what pads them.

    Args:
        tokens: (B, T) int64.
        position_ids: (B, T) int64, restarting at 0 in each packed example; by default 0..T-1.
        segment_ids: (B, T) int, 0 for padding; None where each row is one example.
        lengths: (B,) int64, tokens of each row where it is one example; by default T.
    """
    columns = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    positions = columns if position_ids is None else position_ids
    if segment_ids is not None:
        real = segment_ids > 0
    elif lengths is not None:
        real = columns < lengths[:, None].to(tokens.device)
    else:
        real = torch.ones_like(tokens, dtype=torch.bool)
    kept = real.flatten().nonzero().squeeze(1)
    positions = positions.flatten().index_select(0, kept)
    firsts = (positions == 0).nonzero().squeeze(1)
    starts = F.pad(firsts, (0, 1), value=len(kept)).to(torch.int32)
    return Examples(kept, positions, starts, int(starts.diff().max()) if len(firsts) else 0)


def packing_mask(segment_ids: Tensor) -> Tensor:
    """(B, 1, T, T) bool: position t may look at s <= t of its own example.

    Padding (segment 0) sees padding, so that no row of the softmax is empty.

    Args:
        segment_ids: (B, T) int, 0 for padding, 1.. for the examples packed into the row.
    """
    length = segment_ids.shape[1]
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return same & torch.ones(length, length, dtype=torch.bool, device=segment_ids.device).tril()


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Examples | None) -> Tensor:
    """Causal attention of q (B, T, N, D) over k, v (B, T, K, D); the result is as q.

    Args:
        mask: what may be looked at beside causality; with examples end to end B is 1 and T is E.
    """
    if isinstance(mask, Examples):
        return _attend_examples(q[0], k[0], v[0], mask)[None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, N or K, T, D)
    dtype = q.dtype
    if q.device.type == "cpu":
        # torch's bfloat16 CPU kernel runs backward 3x slower than float32 at 96 tokens and no faster at
        # 1,024; its forward is level. Both passes upcast, so that scoring and training agree exactly.
        q, k, v = q.float(), k.float(), v.float()
    elif mask is not None and k.shape[1] != q.shape[1]:
        # Among CUDA kernels that take a mask, only the one that holds all T x T scores groups heads itself.
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    grouped = k.shape[1] != q.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    return out.to(dtype).transpose(1, 2)


def _attend_examples(q: Tensor, k: Tensor, v: Tensor, examples: Examples) -> Tensor:
    """Of q (E, N, D) over k, v (E, K, D), each example for itself: FlashAttention, and on CPU one after another."""
    if q.device.type == "cpu":
        bounds = zip(examples.starts[:-1].tolist(), examples.starts[1:].tolist(), strict=True)
        parts = [attend(q[None, i:j], k[None, i:j], v[None, i:j], None)[0] for i, j in bounds]
        return torch.cat(parts) if parts else q
    from torch.nn.attention.varlen import varlen_attn

    starts, longest, grouped = examples.starts, examples.longest, q.shape[1] != k.shape[1]
    causal = (-1, 0)
    out = varlen_attn(q, k, v, starts, starts, longest, longest, window_size=causal, enable_gqa=grouped)
    assert isinstance(out, Tensor)
    return out
