"""Pretraining (Llama 2 §2.2), at small scale: packed documents, next-token loss."""

from pathlib import Path
from typing import Any

from model.config import PRESETS, ModelConfig
from rlhf_ray.data.batching import prompt_rows
from rlhf_ray.data.light_tokenizer import LightTokenizer
from rlhf_ray.data.lm_rows import corpus_rows
from rlhf_ray.data.special_ids import special_ids
from rlhf_ray.recipe.context import Context
from rlhf_ray.recipe.language_modeling import train_language_model


def pretrain(context: Context) -> Path:
    """Trains a fresh model; returns the step's directory, in which `model` is the checkpoint."""
    section = context.config.pretrain
    step = context.step(
        "pretrain",
        sections=("pretrain", "model"),
        parents=("corpus", "tokenizer"),
        code=("rlhf_ray.recipe.pretraining", "rlhf_ray.recipe.language_modeling"),
    )
    if not context.skip(step):
        facts = train_language_model(
            context,
            step,
            section,
            model_config(context),
            num_steps=lambda sizes: section.num_steps,
            draw=prompt_rows,
            versions=lambda total: {total: "model"},
            builder=corpus_rows,
            builder_args=(
                str(context.outputs["corpus"]),
                str(context.outputs["tokenizer"]),
                section.seq_len,
                section.held_out,
            ),
        )
        step.finish(**facts)
    return step.path


def model_config(context: Context) -> ModelConfig:
    """The preset with the tokenizer's vocabulary and special tokens."""
    section = context.config.model
    tokenizer = LightTokenizer(context.outputs["tokenizer"])
    ids = special_ids(tokenizer)
    changes: dict[str, Any] = {
        "vocab_size": max(tokenizer.vocabulary.values()) + 1,
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos,
        "pad_token_id": ids.pad,
    }
    if section.max_seq_len is not None:
        changes["max_seq_len"] = section.max_seq_len
    return PRESETS[section.preset].model_copy(update=changes)
