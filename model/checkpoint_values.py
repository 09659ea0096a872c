"""Whether the numbers in a checkpoint are numbers: read from its files without torch, before any worker starts."""

from pathlib import Path

import numpy as np

from model.checkpoint_files import CheckpointError, CheckpointInfo, read_safetensors_header

# Of each dtype its bits as an integer, and where infinity lies among them once the sign is shifted out; NaNs lie above.
_INFINITY = {"F32": (np.uint32, 0xFF000000), "BF16": (np.uint16, 0xFF00), "F16": (np.uint16, 0xF800)}
_CHUNK = 2**24  # numbers looked at together


def check_finite(info: CheckpointInfo, *, at_most: int) -> None:
    """Every tensor of a checked checkpoint is free of NaN and infinity, which one reads in a second a GiB or two.

    Args:
        at_most: bytes; a larger checkpoint is left to whoever loads it (`model.checkpoint` looks at each tensor).
    Raises:
        CheckpointError: names the first tensor that is not.
    """
    if sum(path.stat().st_size for path in info.files) > at_most:
        return
    for path, names in info.files.items():
        header = read_safetensors_header(path)
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
        data = np.memmap(path, mode="r", offset=start) if path.stat().st_size > start else np.empty(0, np.uint8)
        for name in names:
            integer, infinity = _INFINITY[header[name]["dtype"]]
            begin, end = header[name]["data_offsets"]
            numbers = data[begin:end].view(integer)
            if any((numbers[i : i + _CHUNK] << 1).max() >= infinity for i in range(0, len(numbers), _CHUNK)):
                raise not_finite(path, name)


def not_finite(path: Path, name: str) -> CheckpointError:
    """The error for a tensor that holds NaN or infinity."""
    return CheckpointError(
        f"{path}: {name} holds NaN or infinity, with which a model computes nothing; copy or download the file again, "
        "or give another checkpoint"
    )
