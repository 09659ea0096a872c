"""What the scripts that measure speed have in common: medians with intervals, and the file of results."""

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kill_and_resume import ROOT, commit

RESULTS = ROOT / "benchmarks" / "results"


def median_interval(values: Sequence[float], *, confidence: float = 0.95) -> tuple[float, float] | None:
    """Order statistics between which the median lies with at least `confidence`; None below six values.

    The number of n draws below the median is binomial(n, 1/2), whatever the distribution: the k-th smallest and the
    k-th largest enclose it but with probability 2 P(X < k). Ten values: the second and the ninth, 97.9 %.
    """
    ordered, n = sorted(values), len(values)
    outside, depth = 0.0, 0
    while depth < n // 2 and outside + 2 * math.comb(n, depth) / 2**n <= 1 - confidence:
        outside += 2 * math.comb(n, depth) / 2**n
        depth += 1
    return (ordered[depth - 1], ordered[n - depth]) if depth else None


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median with its interval, mean, standard deviation, extremes and number of some repeats."""
    interval = median_interval(values)
    return {
        "median": _short(statistics.median(values)),
        "median_interval_95": None if interval is None else [_short(end) for end in interval],
        "mean": _short(statistics.fmean(values)),
        "std": _short(statistics.stdev(values)) if len(values) > 1 else None,
        "min": _short(min(values)),
        "max": _short(max(values)),
        "repeats": len(values),
    }


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def per_phase(rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """`spread` of each key of some rows."""
    return {name: spread([row[name] for row in rows]) for name in rows[0]}


def device() -> str:
    """The machine, with its load before this script's own work where the system tells."""
    model = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = f", {names[0]}" if names else ""
    return f"cpu, {len(os.sched_getaffinity(0))} cores ({platform.machine()}{model})"


def write_result(path: Path, measured: dict[str, Any], *, config: dict[str, Any], load: tuple[float, ...]) -> None:
    """Writes what was measured with what it depends on.

    Args:
        load: `os.getloadavg()` before the measurement: figures of a machine with other work on it are no figures.
    """
    result = {
        **measured,
        "config": config,
        "device": device(),
        "load_before": [round(value, 2) for value in load],
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written: {path}", flush=True)
