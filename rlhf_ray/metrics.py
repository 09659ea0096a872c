"""Metrics of a stage: one JSON line a step, and TensorBoard scalars. Keys: docs/metrics.md."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_ray.run_state import write_text


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
        threading.excepthook = _ended
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


def _ended(thread: threading.ExceptHookArgs) -> None:
    """TensorBoard writes in a thread. A disk that fails it fails the run as well, which says so in one line."""
    if not isinstance(thread.exc_value, OSError):
        threading.__excepthook__(thread)


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The rows of DIR/metrics.jsonl."""
    path = directory / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def latest(directory: Path, key: str) -> float:
    """The newest value of a metric in DIR/metrics.jsonl, NaN without one."""
    return next((float(row[key]) for row in reversed(read_metrics(directory)) if key in row), float("nan"))


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
