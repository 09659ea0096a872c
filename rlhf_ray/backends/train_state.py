"""A trainer's state on disk: fp32 weights and AdamW moments, written by each rank as it holds them, read on any ranks.

A rank's files hold runs of flattened parameters, each under NAME/PART/START with the place of its first element. What
another number of ranks or another ZeRO stage holds is read out of them piece by piece. Only safetensors and JSON:
nothing is unpickled.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from model.checkpoint import save_tensors

PARTS = ("weight", "exp_avg", "exp_avg_sq")
"""What is kept of a parameter, float32."""

MAX_FILE_BYTES = 4 * 2**30
_STEPS_FILE = "steps.json"


def write_state(
    directory: Path,
    runs: Iterable[tuple[str, int, Mapping[str, Tensor]]],
    *,
    steps: int,
    rank: int = 0,
    max_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Writes what a rank holds; one file is in memory.

    Args:
        runs: of each parameter its name, the place in the flattened parameter, and tensors by PARTS of as many
            elements.
        steps: optimizer steps that the state has behind it; rank 0 writes them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    held: dict[str, Tensor] = {}
    num_files = 0

    def write() -> None:
        nonlocal held, num_files
        save_tensors(held, directory / f"state-{rank:05d}-{num_files:05d}.safetensors")
        held, num_files = {}, num_files + 1

    for name, start, parts in runs:
        # A copy of its own: what DeepSpeed hands out may be a view of all that a rank holds.
        held |= {f"{name}/{part}/{start}": parts[part].detach().flatten().cpu().clone() for part in PARTS}
        if sum(tensor.nbytes for tensor in held.values()) >= max_bytes:
            write()
    if held:
        write()
    if rank == 0:
        (directory / _STEPS_FILE).write_text(json.dumps({"steps": steps}) + "\n", encoding="utf-8")


class StateReader:
    """A state on disk, open for the length of a `with` block."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._files = ExitStack()
        self._runs: dict[tuple[str, str], list[tuple[int, int, Any]]] = {}
        """(name, part) -> (first element, the one behind the last, the slice that reads it) of each run, in order."""

    def __enter__(self) -> "StateReader":
        for path in sorted(self._directory.glob("state-*.safetensors")):
            file = self._files.enter_context(safe_open(path, framework="pt"))
            for key in file.keys():  # noqa: SIM118 -- no mapping
                name, part, start = _place(key)
                found = file.get_slice(key)
                shape = found.get_shape()
                if len(shape) > 1:  # an older state holds parameters whole, in their shape
                    found = file.get_tensor(key).flatten()
                    shape = found.shape
                self._runs.setdefault((name, part), []).append((start, start + shape[0], found))
        for runs in self._runs.values():
            runs.sort(key=lambda run: run[0])
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    @property
    def names(self) -> list[str]:
        """Of the parameters."""
        return list(dict.fromkeys(name for name, _ in self._runs))

    @property
    def steps(self) -> int:
        """Optimizer steps that the state has behind it."""
        return int(json.loads((self._directory / _STEPS_FILE).read_text(encoding="utf-8"))["steps"])

    def read(self, name: str, part: str, *, start: int = 0, numel: int | None = None) -> Tensor:
        """Elements of a flattened parameter, (numel,) float32; all from `start` on by default.

        Raises:
            ValueError: the files do not hold them all.
        """
        runs = self._runs.get((name, part), [])
        end = start + numel if numel is not None else max((run[1] for run in runs), default=start)
        pieces, reached = [], start
        for first, behind, found in runs:
            if first <= reached < min(behind, end):
                upto = min(behind, end)
                pieces.append(found[reached - first : upto - first])
                reached = upto
        if reached < end:
            raise ValueError(f"{self._directory}: holds no {part} of {name} from element {reached} on")
        return torch.cat(pieces) if pieces else torch.empty(0)


def _place(key: str) -> tuple[str, str, int]:
    """(name, part, first element) of a run's key; an older one has no place, and holds the whole parameter."""
    *names, last = key.split("/")
    return ("/".join(names[:-1]), names[-1], int(last)) if last.isdigit() else ("/".join(names), last, 0)
