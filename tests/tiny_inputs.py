"""Small inputs of a run, written to disk: checkpoints of zeros, a tokenizer, tables."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from model.checkpoint_files import expected_shapes
from model.config import PRESETS, to_hf_config
from rlhf_ray.data.schemas import SCHEMAS, write_table
from rlhf_ray.recipe.tokenizer import save_tokenizer, train_tokenizer

TEXTS = ["the cat sat on the mat.", "which is a fish: carp or hen?", "sure: carp is a fish."] * 9
VOCABULARY = 300
PRETRAINING_RUN = """
[run]
stages = ["testbed", "tokenizer", "pretrain"]
device = "cpu"
[testbed]
num_corpus = 400
num_demonstrations = 20
num_prompts_train = 20
num_prompts_early_stop = 20
num_prompts_annotation = 20
num_prompts_test = 20
[tokenizer]
vocab_size = 400
[model]
preset = "tiny"
[pretrain]
seq_len = 64
batch_size = 2
micro_batch_size = 2
num_steps = {num_steps}
save_every = {save_every}
"""
"""A config that pretrains a tiny model for `num_steps`."""
USER, ANSWER = {"role": "user", "content": "which is a fish?"}, {"role": "assistant", "content": "carp."}


def write_checkpoint(
    directory: Path, *, reward_model: bool = False, vocab_size: int = VOCABULARY, max_seq_len: int = 64
) -> Path:
    """A whole Llama checkpoint with all weights zero."""
    config = PRESETS["tiny"].model_copy(update={"vocab_size": vocab_size, "max_seq_len": max_seq_len})
    directory.mkdir(parents=True)
    hf = to_hf_config(config, num_labels=1 if reward_model else None, dtype="float16")
    (directory / "config.json").write_text(json.dumps(hf))
    shapes = expected_shapes(config, reward_model=reward_model)
    save_file({n: np.zeros(s, dtype=np.float16) for n, s in shapes.items()}, directory / "model.safetensors")
    return directory


def write_tokenizer(directory: Path, *, vocab_size: int = VOCABULARY, texts: Sequence[str] = TEXTS) -> Path:
    """A tokenizer learnt from a few lines."""
    directory.mkdir(parents=True, exist_ok=True)
    save_tokenizer(train_tokenizer(texts, vocab_size=vocab_size), directory)
    return directory


def prompt(number: int, text: str = "which is a fish?", **more: Any) -> dict[str, Any]:
    """A row of a prompts table."""
    row = {"prompt_id": f"p{number}", "messages": [{"role": "user", "content": text}], "is_safety": False}
    return {**row, "kind": "k", "truth": "", **more}


def comparison(number: int, **more: Any) -> dict[str, Any]:
    """A row of a comparisons table; each has another prompt."""
    return {
        "comparison_id": f"c{number}",
        "prompt_id": f"p{number}",
        "messages": [{"role": "user", "content": f"which is a fish {number}?"}],
        "is_safety": False,
        "guideline": "helpfulness",
        "chosen": "carp.",
        "rejected": "the hen.",
        "chosen_finished": True,
        "rejected_finished": True,
        "chosen_model": "a",
        "rejected_model": "b",
        "chosen_temperature": 1.0,
        "rejected_temperature": 1.0,
        "strength": "better",
        "safety_bin": None,
        "annotator": "x",
        "batch": 0,
        "time": "2023-07-18T00:00:00+00:00",
        **more,
    }


def write_rows(path: Path, kind: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of the kind's schema; returns its path as a config names it."""
    write_table(path, rows, SCHEMAS[kind])  # type: ignore[index]
    return str(path)
