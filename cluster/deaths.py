"""What became of a worker's process: its signal or exit code, its last words, its memory.

Ray says of most deaths "connection error code 2. End of file". What is known of one lies on the machine that it ran on:
in the kernel (the exit status, to whoever holds a handle of the process) and in the session's logs.
"""

import contextlib
import fcntl
import os
import re
import signal
import struct
import time
from pathlib import Path

import ray
from ray.exceptions import RayError

from cluster.hardware import memory_limit_bytes, oom_kills, resident_bytes
from cluster.session import log_directory

MEMORY_FULL = "because the memory"  # in a death's words: of the container, or of the machine
_LAST_WORDS = 3  # lines
_LONGEST = 400  # characters of them
_REAPED_S = 2.0  # until its parent has taken note of a process that ended
# linux/pidfd.h, 6.15 and later: an ioctl that fills struct pidfd_info.
_INFO = struct.Struct("=QQ11Ii4x")
_GET_INFO = (3 << 30) | (_INFO.size << 16) | (0xFF << 8) | 11
_INFO_EXIT = 1 << 3
# What Ray and Python's fault handler print around the lines that say something.
_NOISE = re.compile(
    r":\w+:|\*\*\* |PC: @|@ +(0x|\.\.\.)|\[\d{4}-.* logging\.cc|\[failure_signal|Extension modules|Stack |"
    r"Current thread|\(total|\^+$"
)


class Process:
    """The process of a rank, looked at now and then while it lives. One on another machine shows nothing."""

    def __init__(self, pid: int):
        self.pid = pid
        self._resident: int | None = None
        self._oom_kills = oom_kills()
        self._handle: int | None = None
        with contextlib.suppress(OSError, AttributeError):  # Linux has it
            self._handle = os.pidfd_open(pid)

    def look(self) -> None:
        """Takes note of its memory, and of how many processes had been ended for want of it."""
        if resident := resident_bytes(self.pid):
            self._resident, self._oom_kills = resident, oom_kills()

    def close(self) -> None:
        """Gives back the handle."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def end(self) -> str:
        """How it ended, for people; "" where nobody can tell."""
        code, words = self._exit_code(), _words(self.pid)
        if code is None and words is None:
            return ""
        if code is not None:
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"it left with exit code {code}"
        else:
            crash = re.search(r"\*\*\* (SIG[A-Z]+) received", words or "")
            how = f"killed by {crash[1]}" if crash else "it says nothing of why, as a process that SIGKILL ends"
        if "SIGKILL" in how and oom_kills() > self._oom_kills:
            how = f"killed by SIGKILL, {MEMORY_FULL} limit of {memory_limit_bytes() / 2**30:.1f} GiB was full"
        if self._resident:
            how += f"; it held {self._resident / 2**30:.1f} GiB when last seen"
        return how + last_words(words or "")

    def _exit_code(self) -> int | None:
        """As `subprocess` has it, negative for signals; None where the kernel does not tell others than its parent."""
        deadline = time.monotonic() + _REAPED_S
        while self._handle is not None and time.monotonic() < deadline:
            request = bytearray(_INFO.pack(_INFO_EXIT, *[0] * 13))
            try:
                fcntl.ioctl(self._handle, _GET_INFO, request)
            except OSError:  # an older kernel
                return None
            known, *_, status = _INFO.unpack(request)
            if known & _INFO_EXIT:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
        return None


class Starts:
    """Watches this machine's raylet for workers that end before they have come up, of which Ray tells nobody.

    It starts another one in place of such a process, after a minute or more, again and again.
    """

    def __init__(self) -> None:
        self._logs = Path(log_directory() or "/nonexistent")
        self._seen = {name: _size(self._logs / name) for name in ("raylet.out", "raylet.err")}

    def failure(self) -> str:
        """What is known of one that ended; "" without any."""
        started = re.findall(r"Started worker process with pid (\d+)", self._news("raylet.out"))
        for pid in started:
            if not Path("/proc", pid).exists() and not any(self._logs.glob(f"worker-*-{pid}.err")):
                return "its process ended while it started" + last_words(self._news("raylet.err"))
        return ""

    def _news(self, name: str) -> str:
        return _read(self._logs / name, self._seen[name])


def why_dead(error: RayError, process: Process | None) -> str:
    """What is known of the end that Ray reports: how the process ended, or what Ray says, less its guesses."""
    text = re.sub(r"\x1b\[\d+m", "", str(error))
    if "running low on memory" in text:
        return f"Ray ended it, {MEMORY_FULL} of its machine was nearly full"
    if '\n  File "' in text:  # an exception in the constructor or of Ray's own: what stands behind its last frame
        behind = text.rpartition('\n  File "')[2].splitlines()[1:]
        return next((line for line in behind if line[:1].strip()), text.splitlines()[0])
    pid, ip = re.search(r"\bpid: (\d+)", text), re.search(r"\bip: (\S+)", text)
    is_here = ip is None or ip[1] == ray.util.get_node_ip_address()
    lines = [line.strip() for line in text.splitlines() if line.strip() and "never ran" not in line]
    said = (
        (lines or [type(error).__name__])[-1].partition(" Some common causes")[0].rpartition("Worker exit detail: ")[2]
    )
    if not is_here and ip is not None:
        return f"{said} It ran on {ip[1]}, whose logs may say more"
    if process is None and pid is not None:
        process = Process(int(pid[1]))
    if process is None:
        return said
    if "exit code" in said:
        return said.rstrip(".") + last_words(_words(process.pid) or "")
    return process.end() or said


def last_words(text: str) -> str:
    """ "; its last words: ..." of what a process wrote to stderr, or nothing."""
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not _NOISE.match(line)]
    fatal = next((i for i, line in enumerate(lines) if line.startswith("Fatal Python error")), len(lines))
    behind = lines[fatal + 1 :]
    frames = [line for line in behind if line.startswith('File "')]  # the innermost first
    words = " | ".join((lines[: fatal + 1] + (frames[:1] or behind))[-_LAST_WORDS:])
    return f"; its last words: {words[-_LONGEST:]}" if words else ""


def _words(pid: int) -> str | None:
    """The last of what a worker wrote to stderr; None where its log is not on this machine."""
    found = sorted(Path(log_directory() or "/nonexistent").glob(f"worker-*-{pid}.err"))
    return _read(found[-1], max(0, _size(found[-1]) - 2**16)) if found else None


def _read(path: Path, start: int) -> str:
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
