"""Prompts as token ids, ready for an engine."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_ray.data.chat import encode_prompt
from rlhf_ray.data.schemas import PROMPTS, read_table
from rlhf_ray.errors import RowErrors, UserError
from rlhf_ray.records import PromptBatch


def load_prompts(path: str, tokenizer: Any, *, max_prompt_tokens: int) -> PromptBatch:
    """Reads and tokenises a prompts table.

    Raises:
        UserError: the table is broken, a prompt has more than `max_prompt_tokens` tokens, or one cannot be
            encoded; names file and row.
    """
    table = read_table(path, PROMPTS, columns=["prompt_id", "messages", "is_safety"])
    tokens, errors, dialogues = [], RowErrors(path), table["messages"].to_pylist()
    for row, messages in enumerate(dialogues):
        with errors.of(f"row {row}"):
            prompt = encode_prompt(tokenizer, messages)
            if len(prompt) > max_prompt_tokens:
                raise UserError(
                    f"the prompt has {len(prompt)} tokens, at most {max_prompt_tokens} fit beside the answer in the "
                    "model's context; shorten it, or lower max_new_tokens"
                )
            tokens.append(prompt)
    errors.raise_any()
    return PromptBatch(
        ids=tuple(table["prompt_id"].to_pylist()),
        tokens=tuple(tokens),
        messages=tuple(dialogues),
        is_safety=tuple(table["is_safety"].to_pylist()),
    )


def as_prompts(rows: Sequence[Mapping[str, Any]], tokenizer: Any) -> PromptBatch:
    """The prompts of rows that hold more, such as samples; one that occurs again is encoded once."""
    encoded: dict[str, list[int]] = {}
    for row in rows:
        if row["prompt_id"] not in encoded:
            encoded[row["prompt_id"]] = encode_prompt(tokenizer, row["messages"])
    return PromptBatch(
        ids=tuple(row["prompt_id"] for row in rows),
        tokens=tuple(encoded[row["prompt_id"]] for row in rows),
        messages=tuple(row["messages"] for row in rows),
        is_safety=tuple(row["is_safety"] for row in rows),
    )


def random_prompts(num: int, *, length: int, vocab_size: int, seed: int) -> PromptBatch:
    """Prompts of `length` random token ids each, no two alike in practice, for benchmarks."""
    tokens = np.random.default_rng(seed).integers(vocab_size, size=(num, length)).tolist()
    return PromptBatch(
        ids=tuple(f"random {number}" for number in range(num)),
        tokens=tuple(tokens),
        messages=([],) * num,
        is_safety=(False,) * num,
        ends_at_eos=False,
    )
