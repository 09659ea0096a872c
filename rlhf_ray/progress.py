"""Shows long work: at a terminal in its last line, elsewhere in a line now and then. One line stays of each piece.

A node of a run has its place in front, as in "3 of 9  sft  120/240  0:01:05 left  loss 1.203": so `rlhf-ray status`
finds it in a job's log.
"""

import math
import re
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from rlhf_ray import stopping

console = Console(stderr=True)
clock = time.monotonic

LINE_EVERY_S = 30.0
"""Seconds between lines where there is no terminal."""

_PLACED = re.compile(r"^\d+ of \d+  \S+  .+$", re.MULTILINE)
_BAR_WIDTH = 24
_CLEAR = "\r\x1b[K\x1b[?25h"  # the line, and the cursor that a live display hides


def last_progress(log: str) -> str | None:
    """The newest line of a run's log that says how far it is."""
    lines = _PLACED.findall(log)
    return lines[-1] if lines else None


class Work:
    """A piece of long work as it is shown; a stage's handle of its progress."""

    def __init__(self, name: str, number: int, of: int):
        self._head = f"{number} of {of}  {name}" if of else name
        self._start = clock()
        self._doing, self._since = "", self._start
        self.begin(total=0, done=0)

    def begin(self, *, total: int, done: int) -> None:
        """Counts steps from here on, `done` of them done before."""
        self.total, self._done, self._note = total, done, ""
        self._steps, self._begun, self._newest = 0, clock(), 0.0
        self._said = -math.inf  # the first step is told at once: it is waited for no more

    def advance(self, note: str = "") -> None:
        """One step further, with its figures in a few words."""
        self._newest = clock()
        self._steps, self._done, self._note = self._steps + 1, self._done + 1, note
        if not _at_terminal() and self._newest - self._said >= LINE_EVERY_S:
            self.say()

    def turn_to(self, doing: str) -> None:
        """Names what is waited for; "" where it has come."""
        self._doing, self._since = doing, clock()
        if doing and not _at_terminal():
            self.say()

    def say(self, ended: str = "") -> None:
        """Prints a line: how far the work is, or how it `ended` and after how long."""
        self._said = clock()
        if ended:
            ended += f" {_duration(clock() - self._start)}"
        parts = [*self._parts(), ended or self._left(), self._doing or self._note]
        console.print("  ".join(filter(None, parts)), highlight=False, markup=False, soft_wrap=True)

    def __rich__(self) -> Text:
        """The line at the terminal, cut where the terminal ends."""
        parts = [Text(part) for part in self._parts()]
        if self.total:
            filled = _BAR_WIDTH * self._done // self.total
            parts.insert(1, Text("━" * filled, "bar.complete").append("─" * (_BAR_WIDTH - filled), "bar.back"))
        waited = _duration(clock() - self._since) if self._doing or not self.total else ""
        parts += [Text(part) for part in (self._left(), self._doing or self._note, waited) if part]
        return Text("  ", no_wrap=True, overflow="ellipsis").join(parts)

    def _parts(self) -> list[str]:
        return [self._head, *([f"{self._done}/{self.total}"] if self.total else [])]

    def _left(self) -> str:
        """By the mean time of the steps here."""
        if not self._steps or self._done >= self.total:
            return ""
        step_s = (self._newest - self._begun) / self._steps
        left_s = step_s * (self.total - self._done) - (clock() - self._newest)
        return f"{_duration(max(0.0, left_s))} left"


_shown: Work | None = None


@contextmanager
def shown(name: str, number: int = 0, of: int = 0) -> Iterator[Work]:
    """Shows the work of a `with` block, `number` `of` so many; such a block within it is a part of the same work."""
    global _shown
    if _shown is not None:
        yield _shown
        return
    work = _shown = Work(name, number, of)
    live = _at_terminal()
    display: AbstractContextManager[Any] = Live(work, console=console, transient=True) if live else nullcontext()
    stopping.before_last_line = _CLEAR if live else ""
    try:
        with display:
            yield work
    except BaseException:
        if work.total:  # else the error says it all
            work.say("broke off after")
        raise
    else:
        work.say("done in")
    finally:
        _shown, stopping.before_last_line = None, ""


@contextmanager
def doing(name: str, what: str) -> Iterator[None]:
    """Shows what the work `name` waits for in a `with` block."""
    with shown(name) as work:
        work.turn_to(what)
        yield
        work.turn_to("")


@contextmanager
def progress_bar(name: str, *, total: int, done: int = 0) -> Iterator[Work]:
    """Shows how many steps of the work `name` are done."""
    with shown(name) as work:
        work.begin(total=total, done=done)
        yield work


def _at_terminal() -> bool:
    return console.is_interactive and console.file.isatty()  # FORCE_COLOR alone makes no terminal


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
