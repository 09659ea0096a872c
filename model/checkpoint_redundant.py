"""Tensors of a checkpoint that follow from others, and that must not say otherwise.

Writers add a tied output head, rotary frequencies, or the same tensor in two shards. Readers differ in which they
take: where the copies differ, one of them computes another model.
"""

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

from model.config import ModelConfig

LM_HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_INV_FREQ = ".rotary_emb.inv_freq"
_INV_FREQ_TOLERANCE = 0.01  # relative; bfloat16 keeps 8 bits
_CHUNK_BYTES = 1 << 24


class Stored(NamedTuple):
    """Where a tensor's data lies."""

    path: Path
    entry: dict[str, Any]
    """Of the file's header: dtype, shape, data_offsets."""

    def read(self, start: int, size: int) -> bytes:
        """Up to `size` bytes of the tensor's data from `start`."""
        begin, end = self.entry["data_offsets"]
        with self.path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            file.seek(8 + header_bytes + begin + start)
            return file.read(max(0, min(size, end - begin - start)))


def is_redundant(name: str, config: ModelConfig) -> bool:
    """Whether some writers add this tensor though it follows from others: RoPE frequencies, a tied head."""
    return name.endswith(_INV_FREQ) or (name == LM_HEAD and config.tie_embeddings)


def contradiction(name: str, copy: Stored, original: Stored | None, config: ModelConfig) -> str | None:
    """What is wrong with a redundant tensor, or None.

    Args:
        original: the tensor that it repeats; None for rotary frequencies.
    """
    if name.endswith(_INV_FREQ):
        if config.rope_scaling is None and not _is_inv_freq(copy, config):
            return (
                f"{copy.path}: {name} holds other frequencies than config.json's rope_theta={config.rope_theta:g} gives"
            )
        return None
    if original is None or _same(copy, original):
        return None
    if name == LM_HEAD:
        return (
            f"{copy.path}: {LM_HEAD} differs from {EMBEDDING}, and tie_word_embeddings=true in config.json makes "
            "them one; set it to false, or remove the tensor that the model was not trained with"
        )
    return f"{copy.path}: {name} differs from the tensor of that name in {original.path.name}; remove one of the files"


def _same(one: Stored, other: Stored) -> bool:
    if any(one.entry.get(key) != other.entry.get(key) for key in ("dtype", "shape")):
        return False
    start, end = one.entry["data_offsets"]
    return all(
        one.read(place, _CHUNK_BYTES) == other.read(place, _CHUNK_BYTES)
        for place in range(0, end - start, _CHUNK_BYTES)
    )


def _is_inv_freq(stored: Stored, config: ModelConfig) -> bool:
    count = config.head_dim // 2
    raw = stored.read(0, 8 * count)
    if stored.entry.get("dtype") == "BF16":  # the upper half of a float32
        raw = b"".join(b"\0\0" + raw[place : place + 2] for place in range(0, len(raw), 2))
    code = {"F64": "d", "F32": "f", "BF16": "f", "F16": "e"}.get(stored.entry.get("dtype", ""))
    if code is None or len(raw) != count * struct.calcsize(code):
        return False
    found = struct.unpack(f"<{count}{code}", raw)
    expected = (config.rope_theta ** (-2 * pair / config.head_dim) for pair in range(count))
    return all(
        math.isclose(value, wanted, rel_tol=_INV_FREQ_TOLERANCE, abs_tol=1e-6)  # float16 has nothing finer near 0
        for value, wanted in zip(found, expected, strict=True)
    )
