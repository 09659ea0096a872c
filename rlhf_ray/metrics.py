"""Metrics of a stage: one JSON line a step, TensorBoard scalars, and a progress bar. Keys: docs/metrics.md."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from rlhf_ray.run_state import write_text

console = Console(stderr=True)

LINE_EVERY_S = 30.0
"""Seconds between lines of progress in a log file."""


class MetricsWriter:
    """Appends to DIR/metrics.jsonl and DIR/tensorboard."""

    def __init__(self, directory: Path, *, steps_done: int = 0):
        """Opens the files; rows at or after `steps_done`, left by an interrupted attempt, are dropped."""
        from torch.utils.tensorboard import SummaryWriter

        self._path = directory / "metrics.jsonl"
        kept = []
        if self._path.exists():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the line that a kill cut short
                if row["step"] < steps_done:
                    kept.append(line)
        write_text(self._path, "".join(line + "\n" for line in kept))
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=steps_done)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Records one step's metrics (0-based step)."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        for name, value in metrics.items():
            if isinstance(value, int | float):
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes TensorBoard."""
        self._board.close()


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The rows of DIR/metrics.jsonl."""
    path = directory / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def latest(directory: Path, key: str) -> float:
    """The newest value of a metric in DIR/metrics.jsonl, NaN without one."""
    return next((float(row[key]) for row in reversed(read_metrics(directory)) if key in row), float("nan"))


class Bar:
    """A progress bar's handle."""

    def __init__(self, progress: Progress, task: Any):
        self._progress, self._task = progress, task
        self._said = time.monotonic()

    def advance(self, note: str = "") -> None:
        """One step further, with a few figures behind the bar."""
        self._progress.update(self._task, advance=1, note=note)
        if not console.is_terminal and time.monotonic() - self._said >= LINE_EVERY_S:
            self._said = time.monotonic()
            state = next(task for task in self._progress.tasks if task.id == self._task)
            console.print(f"{state.description} {state.completed:.0f}/{state.total:.0f} {note}", highlight=False)


@contextmanager
def progress_bar(title: str, *, total: int, done: int = 0) -> Iterator[Bar]:
    """A bar for long work on stderr; where that is no terminal, a line now and then and one at the end."""
    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, refresh_per_second=4) as progress:
        yield Bar(progress, progress.add_task(title, total=total, completed=done, note=""))


@dataclass
class PhaseClock:
    """Wall seconds of each phase of an iteration."""

    times: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a `with` block."""
        start = time.perf_counter()
        yield
        self.times[name] = time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        """As metrics, with their sum."""
        return {
            **{f"time/{name}_s": value for name, value in self.times.items()},
            "time/step_s": sum(self.times.values()),
        }
