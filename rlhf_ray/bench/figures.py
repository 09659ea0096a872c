"""From laps to figures: rates, utilisation, idle share, spread. Pure arithmetic."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_ray.workers.roles import Turn

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Lap:
    """One measured repeat."""

    seconds: float
    """Wall seconds."""
    phases: Mapping[str, float]
    """Wall seconds by phase; they sum to `seconds`. Empty where a benchmark has no phases."""
    busy_s: Mapping[str, Sequence[float]]
    """Role -> seconds that each rank was in calls."""
    turns: Sequence[Turn] = ()
    """Roles that left GPUs to others."""


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles (linear between neighbours) and all values."""
    ordered = [values[0]] * 2 if len(values) == 1 else values  # one value is its own quartiles
    q1, median, q3 = statistics.quantiles(ordered, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3, "all": list(values)}


def phase_spread(laps: Sequence[Lap]) -> dict[str, dict[str, Any]]:
    """`spread` of each phase."""
    return {name: spread([lap.phases[name] for lap in laps]) for name in laps[0].phases}


def turn_spread(laps: Sequence[Lap]) -> dict[str, dict[str, Any]]:
    """Of each kind of turn, as "-rollout +reference": how many a lap has, seconds of one, the most GiB taken by it."""
    found: dict[str, list[Turn]] = {}
    for turn in (turn for lap in laps for turn in lap.turns):
        name = " ".join([*(f"-{role}" for role in turn.leave), *(f"+{role}" for role in turn.wake)])
        found.setdefault(name, []).append(turn)
    return {
        name: {
            "per_lap": len(turns) / len(laps),
            "seconds": spread([turn.seconds for turn in turns]),
            "used_gib": [max(turn.used_gib[side] for turn in turns) for side in (0, 1)],
        }
        for name, turns in found.items()
    }


def idle_share(laps: Sequence[Lap]) -> dict[str, float]:
    """1 - busy seconds / (ranks x wall seconds), over all laps: of each role, and "all" of all ranks together."""
    busy = {role: sum(sum(lap.busy_s[role]) for lap in laps) for role in laps[0].busy_s}
    held = {role: sum(len(lap.busy_s[role]) * lap.seconds for lap in laps) for role in laps[0].busy_s}
    return {
        "all": 1 - sum(busy.values()) / sum(held.values()),
        **{role: 1 - busy[role] / held[role] for role in busy},
    }


def utilisation(flops: float, seconds: float, *, peak: float | None, devices: int) -> float | str:
    """Model FLOPs utilisation: FLOPs a second over the peak of all devices; "unknown" where the peak is."""
    return UNKNOWN if peak is None else flops / seconds / (peak * devices)


def rates(seconds: float, *, answers: int, prompt_tokens: int, response_tokens: int) -> dict[str, float]:
    """Tokens and answers a second, of a repeat that takes `seconds` for so many of each."""
    return {
        "prompt_tokens_per_s": prompt_tokens / seconds,
        "response_tokens_per_s": response_tokens / seconds,
        "tokens_per_s": (prompt_tokens + response_tokens) / seconds,
        "samples_per_s": answers / seconds,
    }
