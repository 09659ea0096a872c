"""Examples of many lengths into rows of one length.

Every example keeps to itself: the model attends within a segment only, and positions restart at 0. So packing
changes neither the loss nor the gradient, only the amount of padding.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.errors import UserError

Example: TypeAlias = tuple[Sequence[int], Sequence[bool]]
"""Tokens of an example, and which of them are learnt."""
TooLong: TypeAlias = Literal["cut", "refuse"]
IntArray: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Rows of packed examples. R rows, T tokens of a row."""

    tokens: IntArray
    """(R, T) int64; 0 on padding."""
    segment_ids: IntArray
    """(R, T) int64; 0 on padding, else the number of the example in its row, from 1."""
    position_ids: IntArray
    """(R, T) int64; place in the example, from 0."""
    target_mask: NDArray[np.bool_]
    """(R, T) bool; tokens to learn, never the first of an example: nothing before it predicts it."""
    num_cut: int = 0
    """Examples that lost their end because they were longer than a row."""

    @property
    def num_rows(self) -> int:
        """R."""
        return int(self.tokens.shape[0])

    @property
    def num_targets(self) -> int:
        """Tokens to learn, over all rows."""
        return int(self.target_mask.sum())

    @property
    def padding_share(self) -> float:
        """Share of all positions that are padding; 0 without rows."""
        return float((self.segment_ids == 0).mean()) if self.segment_ids.size else 0.0

    def take(self, rows: Sequence[int]) -> "Packed":
        """These rows, in this order."""
        index = np.asarray(rows, dtype=np.int64)
        return Packed(
            tokens=self.tokens[index],
            segment_ids=self.segment_ids[index],
            position_ids=self.position_ids[index],
            target_mask=self.target_mask[index],
        )


def pack(examples: Sequence[Example], *, seq_len: int, too_long: TooLong = "refuse") -> Packed:
    """Pack whole examples, each into the first row that has room (first-fit in the given order).

    Args:
        examples: (tokens, mask) each, at least one token.
        seq_len: tokens of a row.
        too_long: what becomes of an example longer than a row: "cut" drops its end, EOS included, and counts
            it in `num_cut`; "refuse" raises.
    Returns:
        Rows of exactly seq_len tokens.
    Raises:
        UserError: an example longer than seq_len, with "refuse".
        ValueError: an example without tokens.
    Source: Llama 2 section 3.1 fills sequences with prompts and answers; separating them is ours.
    """
    kept, num_cut = _fit(examples, seq_len, too_long)
    free = np.zeros(len(kept), dtype=np.int64)  # room left per row; there are never more rows than examples
    rows: list[list[Example]] = []
    for example in kept:
        length = len(example[0])
        row = int(np.argmax(free[: len(rows)] >= length)) if rows else 0
        if row == len(rows) or free[row] < length:
            row = len(rows)
            rows.append([])
            free[row] = seq_len
        rows[row].append(example)
        free[row] -= length
    return _lay_out(rows, seq_len, num_cut)


def unpacked(examples: Sequence[Example], *, seq_len: int, too_long: TooLong = "refuse") -> Packed:
    """One example per row: the plain layout against which packing is tested. See `pack`."""
    kept, num_cut = _fit(examples, seq_len, too_long)
    return _lay_out([[example] for example in kept], seq_len, num_cut)


def pack_stream(documents: Iterable[Sequence[int]], *, seq_len: int) -> Packed:
    """Lay documents one after another into full rows; only the last row has padding.

    A document that does not fit goes on in the next row, as a segment of its own that does not see its
    beginning: its positions restart at 0 and its first token there is not learnt. Every token but the first
    of each segment is learnt.

    Args:
        documents: tokens of each, BOS and EOS included; empty ones are skipped.
        seq_len: tokens of a row, at least 2.
    """
    if seq_len < 2:
        raise ValueError(f"seq_len={seq_len} must be at least 2: one token to learn needs one before it")
    rows: list[list[Example]] = []
    free = 0
    for document in documents:
        start = 0
        while start < len(document):
            if free == 0:
                rows.append([])
                free = seq_len
            piece = document[start : start + free]
            rows[-1].append((piece, [True] * len(piece)))
            start += len(piece)
            free -= len(piece)
    return _lay_out(rows, seq_len, num_cut=0)


def _fit(examples: Sequence[Example], seq_len: int, too_long: TooLong) -> tuple[list[Example], int]:
    """The examples, none longer than a row, and how many were cut to that end."""
    kept: list[Example] = []
    num_cut = 0
    for number, (tokens, mask) in enumerate(examples):
        if len(tokens) == 0 or len(tokens) != len(mask):
            raise ValueError(
                f"example {number} has {len(tokens)} tokens and a mask of {len(mask)}; these must be equal and not 0"
            )
        if len(tokens) > seq_len:
            if too_long == "refuse":
                raise UserError(
                    f"example {number} has {len(tokens)} tokens and a row holds seq_len={seq_len}; "
                    "raise seq_len, shorten the example, or choose to cut long examples"
                )
            num_cut += 1
        kept.append((tokens[:seq_len], mask[:seq_len]))
    return kept, num_cut


def _lay_out(rows: Sequence[Sequence[Example]], seq_len: int, num_cut: int) -> Packed:
    shape = (len(rows), seq_len)
    tokens, segment_ids, position_ids = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    target_mask = np.zeros(shape, dtype=np.bool_)
    for row, examples in enumerate(rows):
        start = 0
        for segment, (example_tokens, mask) in enumerate(examples, start=1):
            end = start + len(example_tokens)
            tokens[row, start:end] = example_tokens
            segment_ids[row, start:end] = segment
            position_ids[row, start:end] = np.arange(end - start)
            target_mask[row, start:end] = mask
            target_mask[row, start] = False
            start = end
    return Packed(
        tokens=tokens,
        segment_ids=segment_ids,
        position_ids=position_ids,
        target_mask=target_mask,
        num_cut=num_cut,
    )
