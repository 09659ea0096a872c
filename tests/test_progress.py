"""What long work shows of itself: lines where there is no terminal, one line at the bottom where there is."""

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from rlhf_ray import progress
from rlhf_ray.progress import doing, last_progress, progress_bar, shown

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on when it is told to, by so many seconds."""
    now = [1000.0]
    monkeypatch.setattr(progress, "clock", lambda: now[0])

    def go_on(seconds):
        now[0] += seconds

    return go_on


def test_where_there_is_no_terminal_a_node_leaves_a_line_now_and_then_and_one_at_its_end(clock, capsys):
    with shown("sft@v2", 3, of=27):
        with doing("sft@v2", "starting workers, reading data"):
            clock(20)
        with progress_bar("sft@v2", total=240, done=100) as bar:
            for index in range(140):
                clock(1)
                bar.advance(f"loss {3 - index / 100:.3f}  held-out [1.310]")
    assert capsys.readouterr().err.splitlines() == [
        "3 of 27  sft@v2  starting workers, reading data",
        "3 of 27  sft@v2  101/240  0:02:19 left  loss 3.000  held-out [1.310]",
        "3 of 27  sft@v2  131/240  0:01:49 left  loss 2.700  held-out [1.310]",
        "3 of 27  sft@v2  161/240  0:01:19 left  loss 2.400  held-out [1.310]",
        "3 of 27  sft@v2  191/240  0:00:49 left  loss 2.100  held-out [1.310]",
        "3 of 27  sft@v2  221/240  0:00:19 left  loss 1.800  held-out [1.310]",
        "3 of 27  sft@v2  240/240  done in 0:02:40  loss 1.610  held-out [1.310]",
    ]


def test_work_outside_of_a_run_has_no_place(clock, capsys):
    with progress_bar("bench sync", total=2) as bar:
        clock(31)
        bar.advance("31 s")
    assert capsys.readouterr().err.splitlines() == [
        "bench sync  1/2  0:00:31 left  31 s",
        "bench sync  1/2  done in 0:00:31  31 s",
    ]


def test_what_is_waited_for_stands_in_place_of_figures(clock, capsys):
    with shown("evaluate", 9, of=9), progress_bar("evaluate", total=4) as bar:
        for model in ("SFT", "PPO"):
            with doing("evaluate", model):
                clock(10)
            bar.advance(f"{model} reward +1.00")
    assert capsys.readouterr().err.splitlines() == [
        "9 of 9  evaluate  0/4  SFT",
        "9 of 9  evaluate  1/4  0:00:30 left  PPO",
        "9 of 9  evaluate  2/4  done in 0:00:20  PPO reward +1.00",
    ]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_work_that_is_broken_off_says_how_far_it_came(clock, capsys, error):
    with pytest.raises(error), shown("ppo", 8, of=9), progress_bar("ppo", total=40, done=3) as bar:
        clock(9)
        bar.advance("reward +1.25")
        raise error
    assert capsys.readouterr().err.splitlines()[1:] == ["8 of 9  ppo  4/40  broke off after 0:00:09  reward +1.25"]
    with pytest.raises(error), shown("ppo", 8, of=9):
        raise error  # it has not begun: the error says it all
    assert capsys.readouterr().err == ""


def test_work_goes_on_after_a_failure_that_is_repaired(clock, capsys):
    with shown("ppo", 8, of=9):
        with pytest.raises(ValueError), progress_bar("ppo", total=40) as bar:
            bar.advance()
            raise ValueError
        with progress_bar("ppo", total=40, done=1) as bar:
            bar.advance("reward +1.25")
    assert capsys.readouterr().err.splitlines()[2:] == ["8 of 9  ppo  2/40  done in 0:00:00  reward +1.25"]


def test_the_newest_line_of_progress_is_found_in_a_log(clock, capsys):
    assert last_progress("") is last_progress("sft: starting (1a2b)\n2 of 3 rows  were\n1 of them  fell\n") is None
    with shown("sft@v2", 3, of=27), progress_bar("sft@v2", total=2) as bar:
        clock(31)
        bar.advance(figures := "  ".join(12 * ["loss 1.203"]))  # wider than a console of unknown width is taken to be
        log = "Job starts\n" + capsys.readouterr().err + "sft@v2: rank 0 died\n"
        assert last_progress(log) == f"3 of 27  sft@v2  1/2  0:00:31 left  {figures}"
    assert last_progress(log + capsys.readouterr().err) == f"3 of 27  sft@v2  1/2  done in 0:00:31  {figures}"


# --- at a terminal -----------------------------------------------------------------------------------------------

RUN = """
import contextlib, time
from rlhf_ray import stopping
from rlhf_ray.cli import main as cli
from rlhf_ray.errors import RunFailure
from rlhf_ray.progress import console, progress_bar, shown, doing

def come_half():
    console.print("half")

def fail():
    come_half()
    raise RunFailure("no")

def wait():
    come_half()
    time.sleep(60)

def be_stuck():
    stopping.GRACE_S = 0.3
    with contextlib.suppress(stopping.Stopped):
        wait()
    time.sleep(60)

def run(words, **_):
    with shown("testbed", 1, of=2):
        pass
    with shown("sft", 2, of=2):
        with doing("sft", "reading data"):
            time.sleep(0.6)
        with progress_bar("sft", total=4) as bar:
            bar.advance()
            bar.advance("loss 1.203  held-out 1.310  some more")
            END()

cli.app = run
cli.main()
"""


def screen(output):
    """(lines that a terminal of any height shows after these characters, whether the cursor is seen)."""
    lines, row, column, cursor = [""], 0, 0, True
    for part in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", output):
        if part == "\r":
            column = 0
        elif part == "\n":
            row, lines = row + 1, [*lines, ""] if row + 1 == len(lines) else lines
        elif not part.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
        elif part in ("\x1b[?25l", "\x1b[?25h"):
            cursor = part.endswith("h")
        elif part == "\x1b[1A":
            row -= 1
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part == "\x1b[K":
            lines[row] = lines[row][:column]
        else:
            assert part.endswith("m"), part
    return lines, cursor


def at_terminal(end, number=None):
    """What a terminal of 60 columns gets of a run that comes half its way to an end, at a signal; the exit code."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 60, 0, 0))
    command = [sys.executable, "-c", RUN.replace("END", end)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=follower, env=env, start_new_session=True)
    os.close(follower)
    output = b""
    try:
        with contextlib.suppress(OSError):  # the other end is closed
            while True:
                output += os.read(leader, 100_000)
                if number is not None and output.partition(b"half")[2].count(b"2/4") > 1:  # it stands still
                    process.send_signal(number)
                    number = None
        assert process.stdout.read() == b""
        return output.decode(), process.wait(60)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        os.close(leader)


FIGURES = "loss 1.203  held-out 1.310  some more"


@pytest.mark.parametrize(
    ("end", "number", "code", "last"),
    [
        ("come_half", None, 0, [f"2 of 2  sft  2/4  done in TIME  {FIGURES}"]),
        ("fail", None, 1, [f"2 of 2  sft  2/4  broke off after TIME  {FIGURES}", "failed: no"]),
        ("wait", signal.SIGINT, 130, [f"2 of 2  sft  2/4  broke off after TIME  {FIGURES}", "stopped"]),
        ("be_stuck", signal.SIGINT, 130, ["stopped"]),
    ],
)
def test_at_a_terminal_one_line_at_the_bottom_is_live_and_gone_at_the_end(end, number, code, last):
    output, ended = at_terminal(end, number)
    before = "1 of 2  testbed  done in TIME"
    lines, cursor = screen(output)
    assert ([timeless(line) for line in lines], cursor, ended) == ([before, "half", *last, ""], True, code)
    # What was seen before, each time that the last line was written anew.
    seen = [screen(output[: erased.start()])[0] for erased in re.finditer(r"\r\x1b\[2K", output)]
    assert all(len(line) <= 60 for lines in seen for line in lines)
    told = [[timeless(line) for line in lines] for lines in seen]
    assert [before, "2 of 2  sft  reading data  TIME"] in told
    assert [before, "half", f"2 of 2  sft  {12 * '━'}{12 * '─'}  2/4  TIME left  l…"] in told
    assert {tuple(lines[:-1]) for lines in told} <= {(), (before,), (before, "half")}


def timeless(line):
    return re.sub(r"\d:\d\d:\d\d", "TIME", line)
