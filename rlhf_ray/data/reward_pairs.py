"""Comparisons as token pairs for the reward models: the mix to train on, and held-out pairs by group."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_ray.algo.ranking import safety_labels, strength_margin
from rlhf_ray.data.batching import mixture_rows
from rlhf_ray.data.chat import encode_answer, encode_prompt, load_tokenizer
from rlhf_ray.data.schemas import COMPARISONS, read_table
from rlhf_ray.data.shares import Rows, check_mix, split_comparisons
from rlhf_ray.errors import RowErrors, UserError


@dataclass(frozen=True)
class PairBatch:
    """B pairs: 2B right-padded rows of T tokens, the chosen answers first."""

    tokens: Tensor
    """(2B, T) int64."""
    lengths: Tensor
    """(2B,) int64."""
    margin: Tensor
    """(B,) float32."""
    chosen_safe: Tensor
    """(B,) bool."""
    rejected_safe: Tensor
    """(B,) bool."""
    labelled: Tensor
    """(B,) bool, whether the pair has safety labels."""
    mask: Tensor
    """(B,) bool, False on the stand-in of an empty selection."""


class Pairs:
    """Encoded comparisons."""

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        tokenizer: Any,
        *,
        margin: Literal["none", "small", "large"],
        max_length: int,
        path: str,
    ):
        """Encodes comparison rows.

        Raises:
            UserError: an answer with its dialogue is longer than `max_length`, or a margin is asked for and a
                row has no strength.
        """
        self.guidelines = [row["guideline"] for row in rows]
        self._weeks = [row.get("week", "") for row in rows]
        self._strengths = [row["strength"] for row in rows]
        self._sides: list[tuple[list[int], list[int]]] = []
        errors = RowErrors(path)
        for row in rows:
            with errors.of(row["comparison_id"]):
                prompt = encode_prompt(tokenizer, row["messages"])
                sides = [
                    prompt + encode_answer(tokenizer, row[side], finished=row[f"{side}_finished"])
                    for side in ("chosen", "rejected")
                ]
                longest = max(len(tokens) for tokens in sides)
                if longest > max_length:
                    raise UserError(
                        f"dialogue and answer have {longest} tokens, reward.max_length={max_length} is the limit; "
                        "raise it or shorten the row"
                    )
                self._sides.append((sides[0], sides[1]))
                if margin != "none" and row["strength"] is None:
                    raise UserError(
                        f"strength is missing and reward.margin={margin} needs it; fill the column in, or set "
                        "reward.margin=none"
                    )
        errors.raise_any()
        self._margin = strength_margin(self._strengths, kind=margin)
        self._labels = safety_labels([row["safety_bin"] for row in rows])

    def __len__(self) -> int:
        return len(self._sides)

    def lengths(self, row: int) -> tuple[int, int]:
        """Tokens of the chosen and of the rejected side."""
        chosen, rejected = self._sides[row]
        return len(chosen), len(rejected)

    def is_labelled(self, row: int) -> bool:
        """Whether the pair has safety labels."""
        return bool(self._labels[2][row])

    def groups(self, row: int) -> list[str]:
        """The accuracy groups the pair counts in."""
        guideline, strength, week = self.guidelines[row], self._strengths[row], self._weeks[row]
        return ["all", guideline, *(f"{guideline}/{part}" for part in (strength, week) if part)]

    def select(self, rows: Sequence[int], device: str) -> PairBatch:
        """The pairs as tensors; an empty selection gives one pair under a False mask."""
        sides = [self._sides[row][side] for side in (0, 1) for row in rows] or [[0, 0], [0, 0]]
        tokens = torch.zeros(len(sides), max(len(side) for side in sides), dtype=torch.int64)
        for row, side in enumerate(sides):
            tokens[row, : len(side)] = torch.tensor(side)
        index = torch.tensor(list(rows) or [0])
        real = torch.full((len(index),), bool(rows))
        chosen_safe, rejected_safe, labelled = (label[index] & real for label in self._labels)
        batch = (
            tokens,
            torch.tensor([len(side) for side in sides]),
            self._margin[index],
            chosen_safe,
            rejected_safe,
            labelled,
            real,
        )
        return PairBatch(*(tensor.to(device) for tensor in batch))


@dataclass(frozen=True)
class RewardData:
    """Pairs to train on in a fixed order, and pairs to measure on."""

    train: Pairs
    order: list[list[int]]
    """Numbers of `train` pairs, epoch by epoch; each has as many."""
    held_out: Pairs

    def sizes(self) -> dict[str, int]:
        """Pairs of each part; a pair repeated by the mix or by epochs counts each time."""
        return {"train": sum(map(len, self.order)), "held_out": len(self.held_out)}


def reward_pairs(
    tables: Mapping[str, str],
    tokenizer_directory: str,
    *,
    model: str,
    shares: Mapping[str, float],
    margin: Literal["none", "small", "large"],
    epochs: int,
    held_out: float | str,
    max_length: int,
    seed: int,
) -> RewardData:
    """Reads tables of comparisons, holds out by prompt (a share, or a table of its own), and mixes guidelines by share.

    The guideline with the largest share gives all its rows once an epoch; the other is drawn to fill its share, and
    repeated where it has too few (§3.2.2: all of one's own data, and a part of the other's).

    Args:
        tables: by the name of their week, "" for one that is of none.
    Raises:
        UserError: a part is empty, a row is too long, or a margin is asked for without strengths.
    """
    tokenizer, path = load_tokenizer(tokenizer_directory), " and ".join(tables.values())
    kept, rest = read_comparisons(tables, held_out)
    check_mix(model, shares, kept, rest, path)
    by_guideline = {name: [i for i, row in enumerate(kept) if row["guideline"] == name] for name in shares}
    main = max(shares, key=lambda name: shares[name])
    used = {name: share for name, share in shares.items() if share > 0 and by_guideline[name]}
    options: dict[str, Any] = {"margin": margin, "max_length": max_length, "path": path}
    order = []
    for epoch in range(epochs):
        num = round(len(by_guideline[main]) / (used[main] / sum(used.values())))
        mix = mixture_rows([len(by_guideline[n]) for n in used], list(used.values()), num, seed * 1000 + epoch)
        names = list(used)
        order.append([by_guideline[names[source]][row] for source, row in mix])
    return RewardData(Pairs(kept, tokenizer, **options), order, Pairs(rest, tokenizer, **options))


def held_out_pairs(
    tables: Mapping[str, str], tokenizer_directory: str, *, held_out: float | str, max_length: int
) -> RewardData:
    """The held-out comparisons alone, of all weeks; see `reward_pairs`."""
    options: dict[str, Any] = {"margin": "none", "max_length": max_length, "path": " and ".join(tables.values())}
    tokenizer, rest = load_tokenizer(tokenizer_directory), read_comparisons(tables, held_out)[1]
    return RewardData(Pairs([], tokenizer, **options), [], Pairs(rest, tokenizer, **options))


def read_comparisons(tables: Mapping[str, str], held_out: float | str) -> tuple[Rows, Rows]:
    """(train, held out) rows of all weeks, each with its "week"."""
    rows = [{**r, "week": week} for week, path in tables.items() for r in read_table(path, COMPARISONS).to_pylist()]
    elsewhere = read_table(held_out, COMPARISONS).to_pylist() if isinstance(held_out, str) else held_out
    return split_comparisons(rows, elsewhere)
