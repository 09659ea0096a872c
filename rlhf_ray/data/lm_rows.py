"""Packed rows for next-token training, from a corpus or from dialogues, with a held-out part."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_ray.data.chat import encode_dialogue, load_tokenizer
from rlhf_ray.data.packing import Packed, pack, pack_stream
from rlhf_ray.data.schemas import CORPUS, DEMONSTRATIONS, read_table
from rlhf_ray.data.shares import split_held_out
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


def dialogue_rows(path: str, tokenizer_directory: str, seq_len: int, held_out: float) -> LMData:
    """A demonstrations table as packed rows, with loss on the tokens of answers that are learnt.

    Raises:
        UserError: a dialogue is longer than `seq_len` or cannot be encoded, or a part is empty.
    """
    tokenizer = load_tokenizer(tokenizer_directory)
    rows = read_table(path, DEMONSTRATIONS, columns=["messages", "finished", "learnt"]).to_pylist()
    examples, errors = [], RowErrors(path)
    for number, row in enumerate(rows):
        with errors.of(f"row {number}"):
            tokens, mask = encode_dialogue(
                tokenizer, row["messages"], learnt=row["learnt"], finished=row["finished"] is not False
            )
            if len(tokens) > seq_len:
                raise UserError(
                    f"the dialogue has {len(tokens)} tokens, sft.seq_len={seq_len} is the limit; raise it or shorten "
                    "the row"
                )
            examples.append((tokens, mask))
    errors.raise_any()
    train, rest = split_held_out(examples, [str(row["messages"]) for row in rows], held_out, path)
    return LMData(LMRows(pack(train, seq_len=seq_len)), LMRows(pack(rest, seq_len=seq_len)))
