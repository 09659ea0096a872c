"""What sits on top of the transformer: token log-probabilities, or one scalar per position.

Letters: B rows, T positions, N selected tokens, H hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.logprobs import TokenLogprobs, token_logprobs


class LMHead(nn.Module):
    """Output projection. One call per forward pass, whatever the number of chunks inside.

    ZeRO-3 gathers a parameter around the call of the module that owns it, so the projection must never
    be read from outside.
    """

    def __init__(self, hidden_size: int, vocab_size: int, *, tied_to: Tensor | None = None) -> None:
        """With `tied_to`, that Parameter (the input embedding) is the projection."""
        super().__init__()
        self.weight: Tensor = tied_to if tied_to is not None else nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor,
        *,
        temperature: float = 1.0,
        with_entropy: bool = False,
        num_ids: int | None = None,
    ) -> TokenLogprobs:
        """Log-probabilities of targets (N,) from hidden (N, H): see `token_logprobs`."""
        return token_logprobs(
            hidden, self.weight, targets, temperature=temperature, with_entropy=with_entropy, num_ids=num_ids
        )


class ScalarHead(nn.Linear):
    """One score per position: a reward model's, or a value model's.

    Replaces the language-model head (Llama 2 §3.2.2). Computed in float32, since bfloat16 leaves a score
    near 4 with steps of 1/32 and rankings turn on less.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, 1, bias=False)

    def reset_parameters(self) -> None:
        """Left to Llama.init_weights."""

    def forward(self, input: Tensor) -> Tensor:
        """Hidden (B, T, H) -> scores (B, T) float32."""
        return F.linear(input.float(), self.weight.float()).squeeze(-1)


def last_token_scores(scores: Tensor, lengths: Tensor) -> Tensor:
    """A reward model's score of each right-padded row: the one at its last token.

    Args:
        scores: (B, T) float32, as a scalar-head model returns them.
        lengths: (B,) int64, tokens in each row, 1..T.
    Returns:
        (B,) float32.
    """
    return scores.gather(1, (lengths - 1)[:, None]).squeeze(1)


def scored_lengths(tokens: Tensor, lengths: Tensor, pad_token_id: int | None) -> Tensor:
    """Tokens of each right-padded row up to the one that a reward model is read at, by the rule of transformers.

    That is the last token which is not the model's padding token: a row's last, unless the model pads with EOS. Models
    that transformers trained so have learned to score at the token before EOS.

    Args:
        tokens: (B, T) int64.
        lengths: (B,) int64, tokens in each row, 1..T.
        pad_token_id: of the model's config.
    Returns:
        (B,) int64, 1..T.
    """
    if pad_token_id is None:
        return lengths
    positions = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    counted = (tokens != pad_token_id) & (positions <= lengths[:, None])
    return (counted * positions).amax(dim=1).clamp(min=1)


def state_values(scores: Tensor) -> Tensor:
    """Per-position scores of a value model, aligned to the token that each state leads to.

    values[:, t] is the value of the state before token t was emitted, read from the hidden state at
    t - 1; values[:, 0] is 0, since nothing precedes the first token.

    Args:
        scores: (B, T) float32, as a scalar-head model returns them.
    Returns:
        (B, T) float32.
    """
    return F.pad(scores[:, :-1], (1, 0))
