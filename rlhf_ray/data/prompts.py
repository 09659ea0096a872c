"""Prompts as token ids, ready for an engine."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_ray.data.chat import encode_prompt
from rlhf_ray.data.schemas import PROMPTS, read_table
from rlhf_ray.errors import RowErrors, UserError


@dataclass(frozen=True)
class PromptSet:
    """A prompts table, tokenised."""

    tokens: list[list[int]]
    """Token ids of each prompt, up to where the answer begins."""
    path: str
    """Of the table."""
    is_safety: list[bool]
    """Whether the prompt is tagged as likely to draw unsafe answers."""
    ends_at_eos: bool = True
    """Whether EOS ends an answer; not so in a benchmark, whose answers all have one length."""


def load_prompts(path: str, tokenizer: Any, *, max_prompt_tokens: int) -> PromptSet:
    """Reads and tokenises a prompts table.

    Raises:
        UserError: the table is broken, a prompt has more than `max_prompt_tokens` tokens, or one cannot be
            encoded; names file and row.
    """
    table = read_table(path, PROMPTS, columns=["messages", "is_safety"])
    tokens, errors = [], RowErrors(path)
    for row, messages in enumerate(table["messages"].to_pylist()):
        with errors.of(f"row {row}"):
            prompt = encode_prompt(tokenizer, messages)
            if len(prompt) > max_prompt_tokens:
                raise UserError(
                    f"the prompt has {len(prompt)} tokens, at most {max_prompt_tokens} fit beside the answer in the "
                    "model's context; shorten it, or lower max_new_tokens"
                )
            tokens.append(prompt)
    errors.raise_any()
    return PromptSet(path=path, tokens=tokens, is_safety=table["is_safety"].to_pylist())


def random_prompts(num: int, *, length: int, vocab_size: int, seed: int) -> PromptSet:
    """Prompts of `length` random token ids each, no two alike in practice, for benchmarks."""
    tokens = np.random.default_rng(seed).integers(vocab_size, size=(num, length)).tolist()
    return PromptSet(path="random tokens", tokens=tokens, is_safety=[False] * num, ends_at_eos=False)
