"""What a checkpoint directory holds, read from file headers alone: no torch, no tensor data.

A directory in Hugging Face's layout has config.json and either model.safetensors or shards listed by
model.safetensors.index.json. A safetensors file is 8 bytes of header length (little-endian), a JSON header
{name: {dtype, shape, data_offsets}}, then the data; so a missing, truncated or mismatched checkpoint is found
in milliseconds, before any worker starts.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from model.checkpoint_redundant import EMBEDDING, LM_HEAD, Stored, contradiction, is_redundant
from model.config import ModelConfig, UnsupportedModelError, eos_token_ids, from_hf_config

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SCORE = "score.weight"

_LANGUAGE_MODELS, _CLASSIFIER = ("LlamaForCausalLM", "LLaMAForCausalLM"), "LlamaForSequenceClassification"
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2}


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or not what was asked for."""


class CheckpointInfo(NamedTuple):
    """A checkpoint whose files are complete and fit its config."""

    config: ModelConfig
    is_reward_model: bool
    """It has a scalar `score` head (LlamaForSequenceClassification)."""
    files: dict[Path, list[str]]
    """Names of the tensors to read from each safetensors file."""


def read_config(directory: str | Path) -> ModelConfig:
    """Shape of the model in a checkpoint directory, and its special tokens.

    Where generation_config.json lists several tokens that end an answer, as Llama 3's does, they count too.

    Raises:
        CheckpointError: No directory, or no readable config.json in it.
        UnsupportedModelError: Its config.json describes something else than a plain Llama model.
    """
    directory = Path(directory)
    hf = dict(_read_hf_config(directory))
    generation = directory / GENERATION_FILE
    try:
        more = eos_token_ids(_read_json(generation).get("eos_token_id")) if generation.exists() else ()
        if len(more) > 1:
            own = eos_token_ids(hf.get("eos_token_id", 2))
            hf["eos_token_id"] = [*more, *(own if len(own) > 1 else ())]
        return from_hf_config(hf)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{directory}: {error}") from error


def is_reward_model(directory: str | Path) -> bool:
    """Whether a checkpoint directory holds a scalar-head model, by its config.json.

    Raises:
        CheckpointError: As read_config; or a classifier with more than one label, or another class of model.
    """
    directory = Path(directory)
    hf = _read_hf_config(directory)
    architecture = (hf.get("architectures") or [_LANGUAGE_MODELS[0]])[0]
    if architecture in _LANGUAGE_MODELS:
        return False
    if architecture != _CLASSIFIER:
        raise CheckpointError(
            f"{directory}: {CONFIG_FILE}: architectures names {architecture!r}; it must be {_LANGUAGE_MODELS[0]} or "
            f"{_CLASSIFIER}"
        )
    labels = len(hf["id2label"]) if isinstance(hf.get("id2label"), dict) else hf.get("num_labels", 2)
    if labels != 1:
        raise CheckpointError(f"{directory}: {architecture} has {labels} labels; a reward model has exactly 1")
    return True


def expected_shapes(config: ModelConfig, *, reward_model: bool) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a checkpoint, in the order of the model's parameters."""
    hidden, ffn = config.hidden_size, config.ffn_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    block = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
    }
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    shapes["model.norm.weight"] = (hidden,)
    if reward_model:
        shapes[SCORE] = (1, hidden)
    elif not config.tie_embeddings:
        shapes[LM_HEAD] = (config.vocab_size, hidden)
    return shapes


def check_checkpoint(directory: str | Path) -> CheckpointInfo:
    """Check that a checkpoint is complete, whole and fits its config; data is read of redundant tensors only.

    Raises:
        CheckpointError: A file is missing, truncated or not safetensors; a tensor is missing, unknown, of the
            wrong shape, in a dtype other than float32, bfloat16 or float16, or contradicts one that it repeats.
        UnsupportedModelError: As read_config.
    """
    directory = Path(directory)
    config, reward_model = read_config(directory), is_reward_model(directory)
    expected = expected_shapes(config, reward_model=reward_model)
    files: dict[Path, list[str]] = {}
    found: dict[str, Stored] = {}
    redundant: list[tuple[str, Stored]] = []
    for path, names in _weight_files(directory).items():
        header = read_safetensors_header(path)
        if names is not None and (absent := names - header.keys()):
            raise CheckpointError(f"{path}: {_listed(absent)} should be here, says {INDEX_FILE}")
        redundant += [
            (name, Stored(path, entry)) for name, entry in header.items() if name in found or is_redundant(name, config)
        ]
        wanted = [name for name in header if name not in found and not is_redundant(name, config)]
        if unknown := [name for name in wanted if name not in expected]:
            raise CheckpointError(
                f"{path}: unknown tensors {_listed(unknown)} for the model that config.json describes"
            )
        for name in wanted:
            _check_tensor(path, name, header[name], expected[name])
        files[path] = wanted
        found |= {name: Stored(path, header[name]) for name in wanted}
    if missing := [name for name in expected if name not in found]:
        raise CheckpointError(f"{directory}: missing tensors {_listed(missing)}")
    for name, copy in redundant:
        original = found.get(EMBEDDING if name == LM_HEAD and config.tie_embeddings else name)
        if fault := contradiction(name, copy, original, config):
            raise CheckpointError(fault)
    return CheckpointInfo(config, reward_model, files)


def stray_files(directory: str | Path) -> set[Path]:
    """Safetensors that are none of the checkpoint's: an adapter, a copy in another format.

    Raises:
        CheckpointError: As `check_checkpoint`, of the index.
    """
    directory = Path(directory)
    named = {*_weight_files(directory), directory / INDEX_FILE}
    return {path for path in directory.glob("*.safetensors*") if path not in named}


def read_safetensors_header(path: Path) -> dict[str, Any]:
    """Header of a safetensors file, checked against the file's size; metadata left out.

    Raises:
        CheckpointError: The file is missing, is not safetensors, or is shorter than its header says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if size < 8 or header_bytes > min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(f"{path}: not a safetensors file, or truncated in its header ({size} bytes)")
            header = json.loads(file.read(header_bytes))
        header.pop("__metadata__", None)
        data_bytes = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, AttributeError, TypeError, LookupError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: its safetensors header is damaged") from error
    expected_size = 8 + header_bytes + data_bytes
    if size != expected_size:
        state = "truncated" if size < expected_size else "longer than its header says"
        raise CheckpointError(f"{path}: {state}: {size} bytes, should be {expected_size}; copy or download it again")
    return dict(header)


def _read_hf_config(directory: Path) -> Mapping[str, Any]:
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such checkpoint directory")
    return _read_json(directory / CONFIG_FILE)


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return content


def _weight_files(directory: Path) -> dict[Path, set[str] | None]:
    """Safetensors files of a checkpoint, each with the tensors the index promises (None without an index)."""
    if not (directory / INDEX_FILE).exists():
        if not (directory / WEIGHTS_FILE).exists():
            raise CheckpointError(
                f"{directory}: has neither {WEIGHTS_FILE} nor {INDEX_FILE}; other formats are not read"
            )
        return {directory / WEIGHTS_FILE: None}
    weight_map = _read_json(directory / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{directory / INDEX_FILE}: has no weight_map")
    files: dict[Path, set[str] | None] = {}
    for name, file_name in weight_map.items():
        # A downloaded index must not point outside its own directory.
        if not isinstance(file_name, str) or file_name != Path(file_name).name:
            raise CheckpointError(
                f"{directory / INDEX_FILE}: weight_map[{name!r}]={file_name!r} must be a plain file name"
            )
        names = files.setdefault(directory / file_name, set())
        if names is not None:
            names.add(name)
    if (directory / WEIGHTS_FILE).exists() and directory / WEIGHTS_FILE not in files:
        raise CheckpointError(
            f"{directory}: has both {WEIGHTS_FILE} and {INDEX_FILE}, which names other files, and readers differ in "
            "which they take; remove the one that is not the model"
        )
    return files


def _check_tensor(path: Path, name: str, entry: Any, expected: tuple[int, ...]) -> None:
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the header entry of {name} is damaged") from error
    if shape != expected:
        raise CheckpointError(f"{path}: {name} has shape {list(shape)}; config.json implies {list(expected)}")
    if dtype not in _ITEM_BYTES:
        raise CheckpointError(f"{path}: {name} has dtype {dtype}; must be one of {', '.join(_ITEM_BYTES)}")
    if end - start != _ITEM_BYTES[dtype] * math.prod(shape):
        raise CheckpointError(f"{path}: the header gives {name} {end - start} bytes, which is not its shape's size")


def _listed(names: Any) -> str:
    """The first few of many names."""
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def sync_files(directory: Path, *, below: bool = True) -> None:
    """Pushes a directory to disk, with all below it: after a power cut nothing that was renamed may be empty."""
    for path in [*(directory.rglob("*") if below else ()), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
