"""The Llama transformer: pre-norm RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Modules carry Hugging Face's names, so that a checkpoint's tensors are this model's parameters, unrenamed.
Everything trainable is reached through `Llama.forward`: DeepSpeed's engine and ZeRO-3 hook nothing else.
Shapes come from the released Llama 2 files, since the paper does not print them (Llama 2 §2.2).

Letters: B rows, T positions, H hidden size, N query heads, K key/value heads, D head size, V vocabulary.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import Examples, attend, lay_end_to_end, packing_mask
from model.config import Llama3RopeScaling, ModelConfig, Recompute
from model.fused import rotate, swiglu
from model.heads import LMHead, ScalarHead
from model.logprobs import TokenLogprobs, fp32_logits
from model.recompute import through

Head = Literal["lm", "scalar", "none"]


class RotaryTables(NamedTuple):
    """Cosines and signed sines of the rotation angles, each (T, 1, D) or (B, T, 1, D)."""

    cos: Tensor
    sin: Tensor
    """Negated in the first half, so that the rotation needs only a roll."""


def rotary_tables(config: ModelConfig, device: torch.device) -> RotaryTables:
    """Tables for all positions, (max_seq_len, 1, D) float32, in Hugging Face's half-split layout.

    Element i is paired with element i + D/2 and turned by position * theta^(-2i/D). Meta's own files pair
    neighbours instead; converted checkpoints have their projection rows permuted to match.
    Source: arXiv 2104.09864.
    """
    exponents = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_scaling is not None:
        frequencies = _stretch(frequencies, config.rope_scaling)
    positions = torch.arange(config.max_seq_len, device=device, dtype=torch.float32)
    angles = torch.outer(positions, frequencies)[:, None, :]  # (max_seq_len, 1, D/2)
    cos, sin = angles.cos(), angles.sin()
    return RotaryTables(torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1))


def _stretch(frequencies: Tensor, scaling: Llama3RopeScaling) -> Tensor:
    """Llama 3.1's scaling: slow rotations slowed by `factor`, fast ones kept, a linear blend between."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = ((turns - scaling.low_freq_factor) / span).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / scaling.factor)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32 inside."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # One fused kernel on GPU; torch computes it in float32 for half-precision inputs.
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class _Linear(nn.Linear):
    """Linear without bias, whose weights are left to Llama.init_weights or to a checkpoint."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        pass


class Attention(nn.Module):
    """Causal self-attention; each key/value head serves a group of query heads (arXiv 2305.13245)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = _Linear(config.hidden_size, config.num_heads * config.head_dim)
        self.k_proj = _Linear(config.hidden_size, config.num_kv_heads * config.head_dim)
        self.v_proj = _Linear(config.hidden_size, config.num_kv_heads * config.head_dim)
        self.o_proj = _Linear(config.num_heads * config.head_dim, config.hidden_size)

    def forward(self, x: Tensor, rotary: RotaryTables, mask: Tensor | Examples | None) -> Tensor:
        heads = (*x.shape[:2], -1, self.head_dim)
        q = rotate(self.q_proj(x).view(heads), *rotary)  # (B, T, N, D)
        k = rotate(self.k_proj(x).view(heads), *rotary)  # (B, T, K, D)
        return self.o_proj(attend(q, k, self.v_proj(x).view(heads), mask).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = _Linear(config.hidden_size, config.ffn_size)
        self.up_proj = _Linear(config.hidden_size, config.ffn_size)
        self.down_proj = _Linear(config.ffn_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """Attention and feed-forward layer, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, rotary: RotaryTables, mask: Tensor | Examples | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """Tokens to final normalised hidden states; everything below the head.

    Of rows, or of examples laid end to end, as one row: hidden states are where the tokens are.
    """

    def __init__(self, config: ModelConfig, *, recompute: Recompute) -> None:
        super().__init__()
        self.config = config
        self.recompute = recompute
        embedding = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=embedding)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        # Not a buffer: casting the model to bfloat16 must not round the tables, nor `to_empty` wipe them.
        self._tables: RotaryTables | None = None

    def forward(self, tokens: Tensor, position_ids: Tensor | None, mask: Tensor | Examples | None) -> Tensor:
        rotary = self._rotary(tokens, position_ids)
        return self.norm(self._through_blocks(self.embed_tokens(tokens), rotary, mask))

    def lays_end_to_end(self, device: torch.device) -> bool:
        """Whether examples pass through the blocks without padding: FlashAttention takes device, dtype and heads."""
        if device.type != "cuda" or self.embed_tokens.weight.dtype not in (torch.bfloat16, torch.float16):
            return False
        takes_heads = self.config.head_dim % 8 == 0 and self.config.head_dim <= 256
        return takes_heads and torch.cuda.get_device_capability(device) >= (8, 0)

    def _through_blocks(self, x: Tensor, rotary: RotaryTables, mask: Tensor | Examples | None) -> Tensor:
        recompute = self.recompute if torch.is_grad_enabled() else "none"
        for block in self.layers:
            x = through(block, x, rotary, mask, recompute=recompute, ffn_size=self.config.ffn_size)
        return x

    def _rotary(self, tokens: Tensor, position_ids: Tensor | None) -> RotaryTables:
        dtype = self.embed_tokens.weight.dtype
        if self._tables is None or self._tables.cos.device != tokens.device:
            self._tables = rotary_tables(self.config, tokens.device)
        if position_ids is None:
            return RotaryTables(*(table[: tokens.shape[1]].to(dtype) for table in self._tables))
        return RotaryTables(*(table[position_ids].to(dtype) for table in self._tables))


class Llama(nn.Module):
    """A Llama model with a language-model head, a scalar head (reward, value), or none.

    Rows are right-padded, or packed with `segment_ids`. Attention being causal, right padding needs no
    mask: what padding positions hold is never read by the others.
    """

    def __init__(self, config: ModelConfig, *, head: Head = "lm", recompute: Recompute = "none") -> None:
        """Build and, except on the meta device, initialise with seed 0.

        Args:
            config: Shape.
            head: "lm", "scalar" or "none".
            recompute: What the backward pass computes again: nothing; what is cheap (`model.recompute`); each block.
        """
        super().__init__()
        self.config = config
        self.head = head
        self.model = Transformer(config, recompute=recompute)
        if head == "lm":
            tied_to = self.model.embed_tokens.weight if config.tie_embeddings else None
            self.lm_head = LMHead(config.hidden_size, config.vocab_size, tied_to=tied_to)
        elif head == "scalar":
            self.score = ScalarHead(config.hidden_size)
        elif head != "none":
            raise ValueError(f"head={head!r} must be 'lm', 'scalar' or 'none'")
        if not self.model.embed_tokens.weight.is_meta:
            self.init_weights(seed=0)

    def forward(
        self,
        tokens: Tensor,
        *,
        target_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        lengths: Tensor | None = None,
        temperature: float = 1.0,
        with_entropy: bool = False,
        num_ids: int | None = None,
    ) -> TokenLogprobs | Tensor:
        """Run the model and its head.

        Args:
            tokens: (B, T) int64.
            target_mask: (B, T) bool, required by the language-model head and by no other: the tokens whose
                log-probability is wanted. Only they pass through the head. False at index 0 of a row and at
                the first token of a packed example, which nothing precedes.
            position_ids: (B, T) int64, restarting at 0 in each packed example; by default 0..T-1.
            segment_ids: (B, T) int, 0 for padding, 1.. for the examples packed into a row; by default each
                row is one example.
            lengths: (B,) int64, tokens of each row, where a row is one example; what lies behind them is padding, which
                need not be computed, and of which nothing is wanted. By default T.
            temperature: Divides the logits before the softmax.
            with_entropy: Also return entropies.
            num_ids: The softmax is over the first so many ids; None for all.
        Returns:
            head "lm": TokenLogprobs, (B, T) float32 each, zero where target_mask is False; index t speaks of
                token t given the tokens before it.
            head "scalar": (B, T) float32, the raw score at each position; of padding it means nothing.
            head "none": (B, T, H) hidden states after the last norm; likewise.
        Raises:
            ValueError: target_mask is missing, superfluous or True at index 0; rows are too long.
        """
        if (target_mask is not None) != (self.head == "lm"):
            state = "missing" if target_mask is None else "given"
            raise ValueError(
                f"target_mask is {state}: a model with head={self.head!r} "
                f"{'needs' if target_mask is None else 'does not take'} it"
            )
        hidden, kept = self._transform(tokens, position_ids, segment_ids, lengths)
        if target_mask is not None:
            return self._token_logprobs(hidden, kept, tokens, target_mask, temperature, with_entropy, num_ids)
        # Where padding was left out, nothing as wide as hidden states is made of it on the way out.
        return _in_rows(self.score(hidden) if self.head == "scalar" else hidden, kept, tokens)

    def _transform(
        self,
        tokens: Tensor,
        position_ids: Tensor | None,
        segment_ids: Tensor | None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states (B, T, H) of rows and None, or (1, E, H) of the examples' tokens and their places (E,).

        Raises:
            ValueError: rows are too long.
        """
        if position_ids is None and tokens.shape[1] > self.config.max_seq_len:
            raise ValueError(f"rows of {tokens.shape[1]} tokens must not exceed max_seq_len={self.config.max_seq_len}")
        if not self.model.lays_end_to_end(tokens.device):
            mask = None if segment_ids is None else packing_mask(segment_ids)
            return self.model(tokens, position_ids, mask), None
        examples = lay_end_to_end(tokens, position_ids=position_ids, segment_ids=segment_ids, lengths=lengths)
        own = tokens.flatten().index_select(0, examples.kept)
        return self.model(own[None], examples.position_ids[None], examples), examples.kept

    def _token_logprobs(
        self,
        hidden: Tensor,
        kept: Tensor | None,
        tokens: Tensor,
        target_mask: Tensor,
        temperature: float,
        with_entropy: bool,
        num_ids: int | None,
    ) -> TokenLogprobs:
        """Send the hidden states before the wanted tokens, and no others, through the head."""
        wanted = target_mask.flatten().nonzero().squeeze(1)  # (n,) flat positions of the targets
        if (wanted % tokens.shape[1] == 0).any():
            raise ValueError("target_mask[:, 0] must be False: nothing precedes the first token of a row")
        places = wanted - 1 if kept is None else torch.searchsorted(kept, wanted - 1)
        # An empty selection still goes through the head: under ZeRO every rank must gather it.
        before = hidden.flatten(0, 1).index_select(0, places)
        targets = tokens.flatten().index_select(0, wanted)
        logprobs, entropy = self.lm_head(
            before, targets, temperature=temperature, with_entropy=with_entropy, num_ids=num_ids
        )
        spread = _in_rows(logprobs[None], wanted, tokens)
        return TokenLogprobs(spread, None if entropy is None else _in_rows(entropy[None], wanted, tokens))

    def hidden(
        self, tokens: Tensor, *, position_ids: Tensor | None = None, segment_ids: Tensor | None = None
    ) -> Tensor:
        """(B, T, H) hidden states after the last norm. For inspection: bypasses `forward` and its hooks."""
        return _in_rows(*self._transform(tokens, position_ids, segment_ids), tokens)

    def logits(
        self, tokens: Tensor, *, position_ids: Tensor | None = None, segment_ids: Tensor | None = None
    ) -> Tensor:
        """(B, T, V) float32 logits of the next token. For inspection: bypasses `forward` and its hooks."""
        if self.head != "lm":
            raise ValueError(f"head={self.head!r} has no logits; build the model with head='lm'")
        hidden = self.hidden(tokens, position_ids=position_ids, segment_ids=segment_ids)
        return fp32_logits(hidden.flatten(0, 1), self.lm_head.weight).unflatten(0, tokens.shape)

    def tie_weights(self) -> None:
        """Make tied embeddings one parameter again, after `to_empty` on a meta-device model split them."""
        if self.head == "lm" and self.config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def parts(self) -> list[nn.Module]:
        """Embedding, each block, last norm and head: between them they have all parameters, in their order."""
        heads = [head for name in ("lm_head", "score") if (head := getattr(self, name, None)) is not None]
        return [self.model.embed_tokens, *self.model.layers, self.model.norm, *heads]

    def init_weights(self, *, seed: int) -> None:
        """Takes `fresh_weights`."""
        fill(self.parameters(), self.fresh_weights(seed=seed))

    def fresh_weights(self, *, seed: int) -> Iterator[tuple[str, Tensor]]:
        """Name and float32 value of each parameter, in their order: the same for every rank and device under one seed.

        The paper is silent; these are our choices. Matrices are normal with deviation 0.02, those that write
        into the residual stream divided by sqrt(2 * num_layers), so that its variance does not grow with
        depth. Norm weights are 1. The scalar head: see `fresh_score`.
        """
        generator = torch.Generator().manual_seed(seed)
        residual_std = 0.02 / math.sqrt(2 * self.config.num_layers)
        for name, shape in [(name, parameter.shape) for name, parameter in self.named_parameters()]:
            if name == "score.weight":
                yield name, self.fresh_score(seed=seed)
            elif len(shape) == 1:
                yield name, torch.ones(shape)
            else:
                std = residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
                yield name, torch.randn(shape, generator=generator) * std

    def fresh_score(self, *, seed: int) -> Tensor:
        """(1, H) float32 weights of a new scalar head, under which first scores have variance about 1.

        Normal with deviation 1 / sqrt(H + 1). The paper is silent; this follows arXiv 1909.08593.
        """
        hidden_size = self.config.hidden_size
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(1, hidden_size, generator=generator) / math.sqrt(hidden_size + 1)


@torch.no_grad()
def fill(parameters: Iterable[nn.Parameter], weights: Iterator[tuple[str, Tensor]]) -> None:
    """Copies into each parameter the next of the weights, whose rest is left for others."""
    for parameter in parameters:
        parameter.copy_(next(weights)[1])


def _in_rows(values: Tensor, places: Tensor | None, tokens: Tensor) -> Tensor:
    """What is (1, n, ...) of `places` (n,) in rows like `tokens` (B, T), zero elsewhere; with None it is in rows."""
    if places is None:
        return values
    rows = values.new_zeros(tokens.numel(), *values.shape[2:]).index_copy(0, places, values[0])
    return rows.view(*tokens.shape, *values.shape[2:])
