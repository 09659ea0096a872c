"""Load and save checkpoints in Hugging Face's layout, a tensor at a time.

transformers and vLLM open what is written here as it is, and Llama checkpoints of others load here. Only
safetensors is read: nothing is ever unpickled.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.checkpoint_files import (
    CONFIG_FILE,
    GENERATION_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    CheckpointError,
    CheckpointInfo,
    check_checkpoint,
    expected_shapes,
    is_reward_model,
    read_config,
    sync_files,
)
from model.checkpoint_redundant import LM_HEAD
from model.checkpoint_values import not_finite
from model.config import TOKEN_ID_FIELDS, ModelConfig, to_hf_config
from model.llama import Head, Llama, fill

__all__ = [
    "CheckpointError",
    "check_checkpoint",
    "is_reward_model",
    "iterate_tensors",
    "load_checkpoint",
    "load_model",
    "meta_model",
    "read_config",
    "save_checkpoint",
    "weights_of",
]

# Fields in which a model may differ from the checkpoint that it loads: they change no computation.
_FREE_FIELDS = {"max_seq_len", *TOKEN_ID_FIELDS}


def load_model(
    directory: str | Path,
    *,
    head: Head,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    fresh_head: bool = False,
    seed: int = 0,
) -> Llama:
    """Build the model of a checkpoint directory and load it, without initialising weights in vain.

    Args and Raises: see `load_checkpoint`.
    """
    model = meta_model(read_config(directory), head=head, dtype=dtype).to_empty(device=device)
    model.tie_weights()
    load_checkpoint(model, directory, fresh_head=fresh_head, seed=seed)
    return model


def meta_model(config: ModelConfig, *, head: Head, dtype: torch.dtype) -> Llama:
    """A model that has shapes and no weights."""
    with torch.device("meta"):
        return Llama(config, head=head).to(dtype)


def load_checkpoint(model: Llama, directory: str | Path, *, fresh_head: bool = False, seed: int = 0) -> None:
    """Copy a checkpoint's tensors into a model, cast to the dtype and moved to the device of its parameters.

    Args and Raises: see `weights_of`.
    """
    fill(model.parameters(), weights_of(model, directory, fresh_head=fresh_head, seed=seed))


def weights_of(
    model: Llama, directory: str | Path, *, fresh_head: bool = False, seed: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor (on CPU, in the stored dtype) of each parameter of a model, in their order, one at a time.

    A model without a head takes the body of either kind of checkpoint.

    Args:
        model: Built with the checkpoint's shape; may be on the meta device.
        fresh_head: The model has a scalar head and the checkpoint is a language model: initialise the head.
        seed: Of the fresh head.
    Raises:
        CheckpointError: As `check_checkpoint`; or the checkpoint has another shape or head than the model, both before
            the first tensor; or a tensor holds NaN or infinity.
        UnsupportedModelError: As `read_config`.
    """
    info = check_checkpoint(directory)
    _check_match(model, info, Path(directory), fresh_head)
    names = [name for name, _ in model.named_parameters()]
    head = {"score.weight": model.fresh_score(seed=seed)} if fresh_head else {}
    return _in_order(info, names, head)


def _in_order(info: CheckpointInfo, names: Sequence[str], fresh: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    paths = {name: path for path, stored in info.files.items() for name in stored}
    with ExitStack() as stack:
        files = {path: stack.enter_context(_opened(path)) for path in info.files}
        for name in names:
            yield name, fresh[name] if name in fresh else _read(files[paths[name]], paths[name], name)


def iterate_tensors(directory: str | Path, *, but: str | None = None) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor (on CPU, in the stored dtype) of a checked checkpoint, one at a time.

    Args:
        but: a dtype in safetensors' words ("BF16") whose tensors are left out, and not read.

    Raises:
        CheckpointError, UnsupportedModelError: As `check_checkpoint`, before the first tensor; or a tensor holds NaN
            or infinity.
    """
    return _iterate(check_checkpoint(directory), but)


def _iterate(info: CheckpointInfo, but: str | None = None) -> Iterator[tuple[str, Tensor]]:
    for path, names in info.files.items():
        with _opened(path) as file:
            for name in names:
                if but is None or file.get_slice(name).get_dtype() != but:
                    yield name, _read(file, path, name)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _read(file: Any, path: Path, name: str) -> Tensor:
    tensor: Tensor = file.get_tensor(name)
    if tensor.numel() and not torch.isfinite(torch.stack(tensor.aminmax())).all():
        raise not_finite(path, name)
    return tensor


def _check_match(model: Llama, info: CheckpointInfo, directory: Path, fresh_head: bool) -> None:
    if fresh_head and model.head != "scalar":
        raise CheckpointError(f"fresh_head=True needs a model with head='scalar', not {model.head!r}")
    if fresh_head and info.is_reward_model:
        raise CheckpointError(f"{directory}: has a score head of its own; load it with fresh_head=False")
    if model.head == "scalar" and not info.is_reward_model and not fresh_head:
        raise CheckpointError(f"{directory}: is a language model without a score head; ask for a fresh one")
    if model.head == "lm" and info.is_reward_model:
        raise CheckpointError(
            f"{directory}: is a reward model (LlamaForSequenceClassification) without a language head"
        )
    differing = [
        f"{field}={getattr(info.config, field)!r} (model: {getattr(model.config, field)!r})"
        for field in ModelConfig.model_fields
        if field not in _FREE_FIELDS and getattr(info.config, field) != getattr(model.config, field)
    ]
    if differing:
        raise CheckpointError(f"{directory}: does not fit the model: {', '.join(differing)}")


def save_checkpoint(
    directory: str | Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    num_labels: int | None = None,
    max_shard_bytes: int = 5_000_000_000,
    extra_files: Sequence[Path] = (),
) -> None:
    """Write a checkpoint directory that transformers and vLLM open; it appears whole or not at all.

    Tensors are consumed one at a time and written shard by shard into a directory beside the target, which is
    renamed into place at the end; memory holds one shard at most.

    Args:
        directory: Must not exist yet.
        config: Shape of the model.
        tensors: Name and tensor of every parameter, e.g. model.state_dict().items(). A tied lm_head.weight is
            left out.
        num_labels: 1 for a scalar-head model, None for a language model.
        max_shard_bytes: Largest file, unless one tensor is larger.
        extra_files: Copied beside the weights, e.g. the tokenizer's.
    Raises:
        CheckpointError: The directory exists, or the tensors are not exactly the model's.
    """
    directory = Path(directory)
    if directory.exists():
        raise CheckpointError(f"{directory}: already exists; remove it or save elsewhere")
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        writer = _ShardWriter(partial, max_shard_bytes)
        missing = expected_shapes(config, reward_model=num_labels == 1)
        for name, tensor in tensors:
            if name == LM_HEAD and config.tie_embeddings:
                continue
            if missing.pop(name, None) != tuple(tensor.shape):
                raise CheckpointError(f"{name} of shape {list(tensor.shape)} is unexpected or comes twice")
            writer.add(name, tensor)
        if missing:
            raise CheckpointError(f"missing tensors: {', '.join(missing)}")
        writer.finish()
        _write_json(partial / CONFIG_FILE, to_hf_config(config, num_labels=num_labels, dtype=writer.dtype))
        if num_labels is None:
            _write_json(partial / GENERATION_FILE, _generation_config(config))
        for path in extra_files:
            shutil.copyfile(path, partial / path.name)
        sync_files(partial)
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already when all went well
    sync_files(directory.parent, below=False)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file with the mode that the umask gives; safetensors' own is for its owner alone."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata=metadata)
    path.chmod(mode)


class _ShardWriter:
    """Collects tensors and writes a shard whenever the next tensor would make it too large."""

    def __init__(self, directory: Path, max_shard_bytes: int) -> None:
        self.dtype = "bfloat16"
        self._directory = directory
        self._max_shard_bytes = max_shard_bytes
        self._shard: dict[str, Tensor] = {}
        self._shard_bytes = 0
        self._written: list[list[str]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self._shard and self._shard_bytes + tensor.nbytes > self._max_shard_bytes:
            self._flush()
        # A copy: the caller may reuse or release the memory, as ZeRO-3 does.
        self._shard[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self._shard_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes
        self.dtype = str(tensor.dtype).removeprefix("torch.")

    def finish(self) -> None:
        """Write the last shard, give the files their final names, and the index if there are several."""
        self._flush()
        count = len(self._written)
        if count == 1:
            self._part(0).rename(self._directory / WEIGHTS_FILE)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._written):
            file_name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self._directory / file_name)
            weight_map |= dict.fromkeys(names, file_name)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        _write_json(self._directory / INDEX_FILE, index)

    def _flush(self) -> None:
        save_tensors(self._shard, self._part(len(self._written)), metadata={"format": "pt"})
        self._written.append(list(self._shard))
        self._shard, self._shard_bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self._directory / f"part-{number}.safetensors"


def _generation_config(config: ModelConfig) -> dict[str, int | list[int]]:
    ends = [token_id for token_id in (config.eos_token_id, *config.other_eos_token_ids) if token_id is not None]
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": ends if len(ends) > 1 else config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    return {name: value for name, value in ids.items() if value is not None}


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
