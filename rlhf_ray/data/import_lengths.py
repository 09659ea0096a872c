"""How long an imported dialogue may be, and what becomes of one that is longer."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from rlhf_ray.data.chat import encode_dialogue, encode_prompt, load_tokenizer
from rlhf_ray.data.import_columns import BrokenRow
from rlhf_ray.data.import_formats import Dialogue
from rlhf_ray.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Limit: TypeAlias = tuple[int, Callable[[Dialogue], int]]
"""The most of something, and how much of it a dialogue has."""


def length_limits(max_chars: int | None, max_tokens: int | None, tokenizer: Path | None) -> list[Limit]:
    """The limits that are asked for.

    Raises:
        UserError: one of `max_tokens` and `tokenizer` without the other, or no tokenizer can be read.
    """
    limits: list[Limit] = []
    if max_chars is not None:
        limits.append((max_chars, Dialogue.num_chars))
    if max_tokens is not None:
        if tokenizer is None:
            raise UserError(f"--max-tokens {max_tokens}: needs a tokenizer to count with; give --tokenizer DIR")
        counting = load_tokenizer(tokenizer)
        limits.append((max_tokens, lambda dialogue: num_tokens(counting, dialogue)))
    elif tokenizer is not None:
        raise UserError(f"--tokenizer {tokenizer}: has no limit to count for; give --max-tokens, or leave it out")
    return limits


def num_tokens(tokenizer: "PreTrainedTokenizerBase", dialogue: Dialogue) -> int:
    """Tokens of the rendered dialogue with its longest answer, EOS included, as training counts them.

    Raises:
        BrokenRow: the chat template does not take the dialogue.
    """
    try:
        if not dialogue.answers:
            return len(encode_prompt(tokenizer, dialogue.context))
        whole = ([*dialogue.context, {"role": "assistant", "content": answer}] for answer in dialogue.answers)
        return max(len(encode_dialogue(tokenizer, messages)[0]) for messages in whole)
    except UserError as error:
        raise BrokenRow("no tokens", str(error)) from error


def fit(dialogue: Dialogue, limits: Sequence[Limit], *, drop_turns: bool) -> Dialogue | None:
    """The dialogue, shortened by whole pairs of turns if it must be and may be; None if it does not fit."""
    shorter: Dialogue | None = dialogue
    while shorter is not None and any(length(shorter) > most for most, length in limits):
        shorter = shorter.without_oldest_pair() if drop_turns else None
    return shorter
