"""From laps to figures: rates, utilisation, idle share, spread. Pure arithmetic, and the table for people."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

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


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles (linear between neighbours) and all values."""
    ordered = [values[0]] * 2 if len(values) == 1 else values  # one value is its own quartiles
    q1, median, q3 = statistics.quantiles(ordered, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3, "all": list(values)}


def phase_spread(laps: Sequence[Lap]) -> dict[str, dict[str, Any]]:
    """`spread` of each phase."""
    return {name: spread([lap.phases[name] for lap in laps]) for name in laps[0].phases}


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


def print_report(report: Mapping[str, Any]) -> None:
    """The figures as a table on stdout."""
    device, work = report["device"], report["workload"]
    table = Table("figure", "median", "quartiles", title=f"rlhf-ray bench {report['benchmark']}", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, values in {"a repeat": report["seconds"], **report["phases"]}.items():
        table.add_row(f"{name}, s", f"{values['median']:.4g}", f"{values['q1']:.4g} to {values['q3']:.4g}")
    for name, value in report["rates"].items():
        text = f"{value:,.0f}" if value >= 1e4 else f"{value:,.4g}"
        table.add_row(name.replace("gb", "GB").replace("_per_s", "/s").replace("_", " "), text)
    if "mfu" in report:
        table.add_row("model FLOPs utilisation", report["mfu"] if report["mfu"] == UNKNOWN else f"{report['mfu']:.1%}")
    for role, share in report["idle_share"].items():
        table.add_row(f"idle, {role}" if role != "all" else "idle, all roles", f"{share:.1%}")
    for role, gib in report["peak_memory_gib"].items():
        table.add_row(f"peak memory of {role}, GiB", f"{gib:.2f}")
    batch = f"{work['batch_size']} answers of {work['prompt_tokens']} + {work['response_tokens']} tokens"
    console = Console()
    console.print(table)
    for line in (
        f"{report['model']['source']}, {report['model']['parameters']:,} parameters",
        f"{device['count']} x {device['name']}, commit {report['commit']}",
        f"{report['repeats']} repeats after {report['warmup']} to warm up"
        + ("" if report["benchmark"] == "sync" else f", each of {batch}"),
    ):
        console.print(line, highlight=False, markup=False)
