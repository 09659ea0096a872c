"""A program that ends well at a signal: in good order where that is quick, at once where it is not.

Nothing is lost by ending at once, since results appear by rename; and no process stays behind.
"""

import contextlib
import ctypes
import os
import select
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

GRACE_S = 5.0
"""Seconds from a signal in which a run may end in good order."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_OVER = 0  # no signal's number: tells the watcher that its work is done
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_ROUNDS = 5  # a process may start another while it is being ended


before_last_line = ""
"""Written first where the process ends at once: what takes a live display off the terminal."""

_line = "stopped"
_scratch: list[str] = []
_leaving = threading.Lock()  # never released: one thread ends the process, and says so once


class Stopped(BaseException):
    """A signal came. Not a KeyboardInterrupt, which libraries catch and turn into other things."""


@contextmanager
def saying(line: str) -> Iterator[None]:
    """A stop in this `with` block ends with `line`, in place of "stopped"."""
    global _line
    before, _line = _line, line
    yield
    _line = before  # not where the block is left by a stop: its line is still to be said


@contextmanager
def scratch_directory(prefix: str) -> Iterator[Path]:
    """A temporary directory that is gone after the block, however a signal ends it."""
    with tempfile.TemporaryDirectory(prefix=prefix) as directory:
        _scratch.append(directory)
        yield Path(directory)
    _scratch.remove(directory)


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Ends this process and all it started with code 128 + N at signal N: SIGINT, SIGTERM or SIGHUP.

    The block is unwound by `Stopped`. A second signal, or an unwinding that takes longer than `GRACE_S`, ends
    all at once: a thread watches, because Python runs handlers only when the main thread is back from C.
    """
    global _line
    _line = "stopped"
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if _imports(frame):
            _leave(number)
        if len(received) == 1:
            raise Stopped(number)

    # One that is ignored stays so: shells start background jobs like that.
    handled = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in handled}
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    woken_before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reading, handled), daemon=True)
    watcher.start()
    try:
        yield
    except BaseException as error:
        # Code that a `Stopped` passes may make something else of it: a SystemError where it is Ray's C code. And while
        # Ray starts, its own handler of SIGTERM is in place, which exits with the signal's number.
        if isinstance(error, SystemExit) and error.code == signal.SIGTERM:
            received.append(signal.SIGTERM)
        elif isinstance(error, KeyboardInterrupt):
            received.append(signal.SIGINT)
        if received:
            _leave(received[0])
        raise
    finally:
        signal.set_wakeup_fd(woken_before)
        os.write(writing, bytes([_OVER]))
        watcher.join()
        os.close(reading)
        os.close(writing)
        for number, handler in before.items():
            signal.signal(number, handler)


def _imports(frame: FrameType | None) -> bool:
    """Whether a module is being imported: C++ libraries abort where an exception meets them in the middle of that."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def _watch(reading: int, handled: list[signal.Signals]) -> None:
    """Waits for the first signal, then for a second one or the end of the grace, and ends all."""
    number = _OVER
    while True:
        deadline = GRACE_S if number else None
        if not select.select([reading], [], [], deadline)[0]:
            _leave(number)
        [came] = os.read(reading, 1)
        if came == _OVER:
            return
        if came in handled:
            if number:
                _leave(number)
            number = came
            _adopt_orphans()


def _leave(number: int) -> None:
    """Ends this process and its descendants; exit code as shells count."""
    _leaving.acquire()
    end_descendants()
    for directory in _scratch:
        shutil.rmtree(directory, ignore_errors=True)
    with contextlib.suppress(OSError):  # the terminal may have gone
        print(before_last_line + _line, file=sys.__stderr__, flush=True)  # past what stands in for sys.stderr
    os._exit(128 + number)


def end_descendants() -> None:
    """Kills every process that descends from this one.

    Ray's agents outlive by a minute a raylet that ends while they are starting.
    """
    import psutil

    for _ in range(_ROUNDS):
        left = psutil.Process().children(recursive=True)
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        if not left:
            return
        psutil.wait_procs(left, timeout=0.5)


def _adopt_orphans() -> None:
    """From now on a descendant whose parent ends becomes this process's child (on Linux): none is missed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
