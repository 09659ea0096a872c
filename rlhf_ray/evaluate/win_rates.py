"""How often one model's answer beats another's, by each judge (Llama 2 Figure 11)."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
WinRates = dict[str, dict[str, dict[str, dict[str, float]]]]
"""Decoding -> judge -> model -> other model -> win rate of the first against the second."""

JUDGES: dict[str, tuple[str, bool | None]] = {
    "truth": ("utility", None),
    "helpfulness": ("reward_helpfulness", False),
    "safety": ("reward_safety", True),
    "referee": ("reward_referee", False),
}
"""Judge -> its column of answers.parquet, and whether the prompts that it judges are tagged as safety; None for all."""


def win_rates(rows: Sequence[Row], models: Sequence[str], suffixes: Sequence[str]) -> WinRates:
    """Of answers that were decoded alike; a judge that has nothing to judge is left out.

    Args:
        rows: of answers.parquet.
        models, suffixes: of whose labels those in the rows consist.
    """
    answers: dict[str, list[Row]] = {}
    for row in rows:
        answers.setdefault(row["model"], []).append(row)
    found: WinRates = {}
    for suffix in suffixes:
        by_judge = found[decoding(suffix)] = {}
        for judge, (column, tag) in JUDGES.items():
            judged = {model: scored(answers[model + suffix], column, tag) for model in models}
            if all(judged.values()):
                by_judge[judge] = {
                    model: {other: win_rate(own, judged[other], column) for other in models if other != model}
                    for model, own in judged.items()
                }
    return found


def decoding(suffix: str) -> str:
    """What a label's ending is called where it has to have a name."""
    return suffix.strip() or "T=1"


def scored(rows: Sequence[Row], column: str, tag: bool | None) -> dict[str, Row]:
    """A model's rows by prompt, of the prompts that a judge judges."""
    return {
        row["prompt_id"]: row for row in rows if row[column] is not None and (tag is None or row["is_safety"] == tag)
    }


def win_rate(own: Mapping[str, Row], theirs: Mapping[str, Row], column: str) -> float:
    """Share of prompts whose own answer has the higher value, and half of those where both have the same."""
    return statistics.fmean(outcome(row, theirs[prompt], column) for prompt, row in own.items())


def outcome(own: Row, other: Row, column: str) -> float:
    """1 for a win, 0 for a loss, 0.5 for a tie; the same answer twice is one, however its scores were rounded."""
    if own[column] == other[column] or all(own[name] == other[name] for name in ("answer", "finished")):
        return 0.5
    return float(own[column] > other[column])
