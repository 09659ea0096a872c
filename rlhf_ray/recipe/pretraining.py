"""Pretraining (Llama 2 §2.2), at small scale: packed documents, next-token loss."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.config import PRESETS, ModelConfig
from rlhf_ray.config import ModelSection
from rlhf_ray.data.batching import prompt_rows
from rlhf_ray.data.light_tokenizer import LightTokenizer
from rlhf_ray.data.lm_rows import corpus_rows
from rlhf_ray.data.special_ids import special_ids
from rlhf_ray.recipe.context import Context
from rlhf_ray.recipe.language_modeling import train_language_model
from rlhf_ray.recipe.stages import Artefact
from rlhf_ray.run_state import Step


def pretrain(context: Context, step: Step, inputs: Mapping[str, Artefact]) -> dict[str, Any]:
    """Trains a fresh model, `model` in the step's directory."""
    section, tokenizer = context.config.pretrain, inputs["tokenizer"].path
    return train_language_model(
        context,
        step,
        section,
        model_config(context.config.model, tokenizer),
        num_steps=lambda sizes: section.num_steps,
        draw=prompt_rows,
        checkpoints=lambda total: {total: "model"},
        builder=corpus_rows,
        builder_args=(str(inputs["corpus"].path), str(tokenizer), section.seq_len, section.held_out),
        tokenizer=tokenizer,
    )


def model_config(section: ModelSection, tokenizer: Path) -> ModelConfig:
    """The preset with the tokenizer's vocabulary and special tokens."""
    files = LightTokenizer(tokenizer)
    ids = special_ids(files)
    changes: dict[str, Any] = {
        "vocab_size": max(files.vocabulary.values()) + 1,
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos,
        "pad_token_id": ids.pad,
    }
    if section.max_seq_len is not None:
        changes["max_seq_len"] = section.max_seq_len
    return PRESETS[section.preset].model_copy(update=changes)
