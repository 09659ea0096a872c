"""What the scripts have in common: options, a directory to work in, medians with intervals, the file of results."""

import argparse
import json
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.hardware import cpu
from rlhf_ray.bench.report import commit

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options of every script: a directory to work in, and the file of results."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where models and runs are made and kept; by default nothing is kept")
    parser.add_argument("--result", type=Path, help="by default in benchmarks/results")
    return parser


@contextmanager
def work_directory(given: Path | None, *, prefix: str) -> Iterator[Path]:
    """The directory given, or one that goes with the block unless the block fails."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    directory = Path(tempfile.mkdtemp(prefix=prefix))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


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
    """The machine."""
    return f"cpu, {len(os.sched_getaffinity(0))} cores of {cpu()}"


def write_result(
    path: Path, measured: dict[str, Any], *, config: dict[str, Any], load: Sequence[float] | None = None
) -> None:
    """Writes what was measured with what it depends on.

    Args:
        load: `os.getloadavg()` before a measurement of speed, which is none with other work on the machine.
    """
    result = {
        **measured,
        "config": config,
        "device": device(),
        **({} if load is None else {"load_before": [round(value, 2) for value in load]}),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written: {path}", flush=True)
