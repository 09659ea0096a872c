"""Packed rows for next-token training, from a corpus or from dialogues, with a held-out part."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from rlhf_ray.data.chat import encode_dialogue, encode_prompt, load_tokenizer
from rlhf_ray.data.packing import Packed, pack, pack_stream
from rlhf_ray.data.schemas import CORPUS, DEMONSTRATIONS, SAMPLES, read_table
from rlhf_ray.data.shares import hash_share, split_held_out
from rlhf_ray.errors import RowErrors, UserError


@dataclass(frozen=True)
class LMBatch:
    """Some packed rows on a device; all (B, T)."""

    tokens: Tensor
    """int64."""
    segment_ids: Tensor
    """int64, 0 on padding."""
    position_ids: Tensor
    """int64, restarting in each segment."""
    target_mask: Tensor
    """bool, tokens to learn."""


class LMRows:
    """Packed rows, selected by number."""

    def __init__(self, packed: Packed):
        self._packed = packed

    def __len__(self) -> int:
        return self._packed.num_rows

    def select(self, rows: Sequence[int], device: str) -> LMBatch:
        """The rows as tensors, cut to the longest of them; an empty selection gives one row with nothing to learn."""
        part = self._packed.take(rows or [0])
        longest = int((part.segment_ids > 0).sum(axis=1).max())
        arrays = (part.tokens, part.segment_ids, part.position_ids, part.target_mask & bool(rows))
        return LMBatch(*(torch.from_numpy(array[:, :longest]).to(device) for array in arrays))

    def num_targets(self, rows: Sequence[int]) -> int:
        """Tokens to learn in the rows."""
        return self._packed.take(rows).num_targets

    def num_tokens(self, rows: Sequence[int]) -> int:
        """Tokens in the rows, padding apart."""
        return int((self._packed.take(rows).segment_ids > 0).sum())


@dataclass(frozen=True)
class LMData:
    """Rows to train on and rows to measure on."""

    train: LMRows
    held_out: LMRows

    def sizes(self) -> dict[str, int]:
        """Rows of each part."""
        return {"train": len(self.train), "held_out": len(self.held_out)}


def corpus_rows(path: str, tokenizer_directory: str, seq_len: int, held_out: float) -> LMData:
    """A corpus table as full rows; each document stands between BOS and EOS, or before EOS alone where the tokenizer
    has no BOS of its own.

    Raises:
        UserError: the table is broken, or a part is empty.
    """
    tokenizer = load_tokenizer(tokenizer_directory)
    texts = read_table(path, CORPUS)["text"].to_pylist()
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token not in (None, tokenizer.eos_token) else []
    documents = [[*begin, *tokens, tokenizer.eos_token_id] for tokens in encoded]
    train, rest = split_held_out(documents, texts, held_out, path)
    return LMData(LMRows(pack_stream(train, seq_len=seq_len)), LMRows(pack_stream(rest, seq_len=seq_len)))


Example = tuple[list[int], list[bool]]
"""Tokens of a dialogue, and which of them are learnt."""


def dialogue_rows(
    tables: Mapping[str, str], tokenizer_directory: str, seq_len: int, held_out: float, demonstration_share: float = 0.0
) -> LMData:
    """Dialogues as packed rows, with loss on the tokens of answers that are learnt.

    Args:
        tables: of "demonstrations", of "selections" (samples, learnt by their token ids), or both.
        demonstration_share: share of demonstrations among the dialogues where there are both, as far as they suffice.
    Raises:
        UserError: a dialogue is longer than `seq_len` or cannot be encoded, or a part is empty.
    """
    tokenizer = load_tokenizer(tokenizer_directory)
    selected = _read(tables, "selections", SAMPLES, ["messages", "tokens", "text"])
    shown = _read(tables, "demonstrations", DEMONSTRATIONS, ["messages", "finished", "learnt"])
    if selected:
        wanted = round(len(selected) * demonstration_share / (1 - demonstration_share))
        shown = sorted(shown, key=lambda row: hash_share(f"mix {row['messages']}"))[:wanted]
    encoded = _encode(
        shown,
        tables.get("demonstrations", ""),
        lambda row: encode_dialogue(
            tokenizer, row["messages"], learnt=row["learnt"], finished=row["finished"] is not False
        ),
        seq_len,
    )
    encoded += _encode(selected, tables.get("selections", ""), lambda row: _as_sampled(tokenizer, row), seq_len)
    texts = [str(row["messages"]) for row in shown]
    texts += [str([*row["messages"], {"role": "assistant", "content": row["text"]}]) for row in selected]
    train, rest = split_held_out(encoded, texts, held_out, " and ".join(tables.values()))
    return LMData(LMRows(pack(train, seq_len=seq_len)), LMRows(pack(rest, seq_len=seq_len)))


def _read(tables: Mapping[str, str], kind: str, schema: pa.Schema, columns: Sequence[str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_table(tables[kind], schema, columns=columns).to_pylist() if kind in tables else []
    return rows


def _encode(
    rows: Sequence[dict[str, Any]], path: str, encode: Callable[[dict[str, Any]], Example], seq_len: int
) -> list[Example]:
    examples, errors = [], RowErrors(path)
    for number, row in enumerate(rows):
        with errors.of(f"row {number}"):
            example = encode(row)
            if len(example[0]) > seq_len:
                raise UserError(
                    f"the dialogue has {len(example[0])} tokens, sft.seq_len={seq_len} is the limit; raise it or "
                    "shorten the row"
                )
            examples.append(example)
    errors.raise_any()
    return examples


def _as_sampled(tokenizer: Any, row: Mapping[str, Any]) -> Example:
    """The answer's own tokens: one that was cut off gains no EOS."""
    prompt = encode_prompt(tokenizer, row["messages"])
    return prompt + row["tokens"], [False] * len(prompt) + [True] * len(row["tokens"])
