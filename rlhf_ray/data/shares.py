"""Which rows are held out, and which comparisons a reward model learns from. Needs no torch: preflight asks too."""

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from rlhf_ray.config import RewardSection
from rlhf_ray.errors import UserError

T = TypeVar("T")
Rows = Sequence[Mapping[str, Any]]


def hash_share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def split_held_out(items: Sequence[T], texts: Sequence[str], share: float, path: str) -> tuple[list[T], list[T]]:
    """(train, held out) by a hash of each text, so that the same text never stands on both sides.

    Raises:
        UserError: one of the two parts is empty.
    """
    train: list[T] = []
    rest: list[T] = []
    for item, text in zip(items, texts, strict=True):
        (rest if hash_share(text) < share else train).append(item)
    if not train or not rest:
        raise UserError(
            f"{path}: {len(items)} rows leave {len(train)} to train on and {len(rest)} held out at "
            f"held_out={share:g}; give more rows or another share"
        )
    return train, rest


def part_of_round(total: int, wanted: int | None, *, number: int, seed: int) -> list[int]:
    """Rows of a table that a round works on: each round takes the next ones in a drawn order, from the start again at
    its end.

    Args:
        wanted: rows of a round; all of them, in the table's order, where it is None or more than there are.
        number: of the round, from 0.
    """
    if wanted is None or wanted >= total:
        return list(range(total))
    order = random.Random(f"{seed} rounds").sample(range(total), total)
    return [order[(number * wanted + place) % total] for place in range(wanted)]


def mix(name: str, section: RewardSection) -> dict[str, float]:
    """Share of each guideline's comparisons in a model's training data (§3.2.2)."""
    if name == "helpfulness":
        return {"helpfulness": section.helpfulness_share, "safety": 1 - section.helpfulness_share}
    return {"safety": section.safety_share, "helpfulness": 1 - section.safety_share}


def split_comparisons(rows: Rows, held_out: float | Rows) -> tuple[Rows, Rows]:
    """(train, held out) by a hash of each dialogue, or all rows and those of another table."""
    if not isinstance(held_out, float):
        return rows, held_out
    shares = [hash_share(str(row["messages"])) for row in rows]
    kept = [row for row, share in zip(rows, shares, strict=True) if share >= held_out]
    return kept, [row for row, share in zip(rows, shares, strict=True) if share < held_out]


def check_mix(model: str, shares: Mapping[str, float], train: Rows, held_out: Rows, path: str) -> None:
    """There are comparisons to train a reward model on, of the guideline with the largest share, and some to measure.

    Raises:
        UserError: there are none.
    """
    main = max(shares, key=lambda name: shares[name])
    if not held_out:
        raise UserError(
            f"{path}: none of its {len(train)} comparisons is held out; give more, raise reward.held_out, or name a "
            "table in data.comparisons_held_out"
        )
    if any(row["guideline"] == main for row in train):
        return
    if any(row["guideline"] == main for row in held_out):
        raise UserError(
            f"{path}: all its {main} comparisons are held out, and the {model} model trains on them; give more of "
            "them, or lower reward.held_out"
        )
    raise UserError(
        f"{path}: has 0 {main} comparisons to train on, and the {model} model is made of them; import some with "
        f"--guideline {main}, name a model or a function in inputs.{model}, or set reward.{model}_share="
        f"{int(model != main)} to train it on the {len(train)} others"
    )
