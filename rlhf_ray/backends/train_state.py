"""A trainer's state on disk: whole fp32 weights and AdamW moments, the same files on any ranks and ZeRO stage.

Only safetensors and JSON: nothing is unpickled.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from model.checkpoint import save_tensors

PARTS = ("weight", "exp_avg", "exp_avg_sq")
"""What is kept of a parameter, each in its shape, float32."""

MAX_FILE_BYTES = 4 * 2**30
_STEPS_FILE = "steps.json"


def write_state(
    directory: Path, parameters: Iterable[tuple[str, dict[str, Tensor]]], *, steps: int, max_bytes: int = MAX_FILE_BYTES
) -> None:
    """Writes (name, tensors by PARTS) of each parameter and the number of optimizer steps; one file is in memory."""
    directory.mkdir(parents=True, exist_ok=True)
    held: dict[str, Tensor] = {}
    num_files = 0
    for name, parts in parameters:
        held |= {f"{name}/{part}": parts[part].contiguous().cpu() for part in PARTS}
        if sum(tensor.nbytes for tensor in held.values()) >= max_bytes:
            save_tensors(held, directory / f"state-{num_files:05d}.safetensors")
            held, num_files = {}, num_files + 1
    if held:
        save_tensors(held, directory / f"state-{num_files:05d}.safetensors")
    (directory / _STEPS_FILE).write_text(json.dumps({"steps": steps}) + "\n", encoding="utf-8")


def read_steps(directory: Path) -> int:
    """Optimizer steps that the state has behind it."""
    return int(json.loads((directory / _STEPS_FILE).read_text(encoding="utf-8"))["steps"])


def read_state(directory: Path, parts: Sequence[str] = PARTS) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """What `write_state` was given, or some parts of it, a parameter at a time."""
    for file in sorted(directory.glob("state-*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names = dict.fromkeys(key.rpartition("/")[0] for key in tensors.offset_keys())
            for name in names:
                yield name, {part: tensors.get_tensor(f"{name}/{part}") for part in parts}
