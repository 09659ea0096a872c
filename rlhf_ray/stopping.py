"""A program that ends well at a signal: in good order where that is quick, at once where it is not.

Nothing is lost by ending at once, since results appear by rename; and no process stays behind.
"""

import ctypes
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

GRACE_S = 5.0
"""Seconds from a signal in which a run may end in good order."""
STOPPED = "stopped; the same command goes on from the last checkpoint"

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_OVER = 0  # no signal's number: tells the watcher that its work is done
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_ROUNDS = 5  # a process may start another while it is being ended


class Stopped(BaseException):
    """SIGINT or SIGTERM came. Not a KeyboardInterrupt, which libraries catch and turn into other things."""


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Ends this process and all it started with code 128 + N at signal N, SIGINT or SIGTERM.

    The block is unwound by `Stopped`. A second signal, or an unwinding that takes longer than `GRACE_S`, ends
    all at once: a thread watches, because Python runs handlers only when the main thread is back from C.
    """
    received: list[int] = []

    def stop(number: int, frame: object) -> None:
        received.append(number)
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
    except Stopped as stopped:
        _leave(*stopped.args)
    except SystemExit as error:
        # Ray replaces the handler of SIGTERM by one that exits with the signal's number.
        if error.code == signal.SIGTERM:
            _leave(signal.SIGTERM)
        raise
    finally:
        signal.set_wakeup_fd(woken_before)
        os.write(writing, bytes([_OVER]))
        watcher.join()
        os.close(reading)
        os.close(writing)
        for number, handler in before.items():
            signal.signal(number, handler)


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


def _leave(number: int, said: str = STOPPED) -> None:
    """Ends this process and its descendants; exit code as shells count."""
    end_descendants()
    print(said, file=sys.stderr, flush=True)
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
