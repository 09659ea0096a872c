"""Supervised fine-tuning (Llama 2 §3.1): packed dialogues, loss on answer tokens only.

The paper starts with public instruction data and goes on with its own, fewer and better: two nodes of this stage where
`data.public_demonstrations` names the first. In rejection sampling the chosen answers are learnt in the same way.
"""

from collections.abc import Callable, Mapping
from typing import Any

from rlhf_ray.data.batching import epoch_rows, steps_per_epoch
from rlhf_ray.data.lm_rows import dialogue_rows
from rlhf_ray.recipe.context import Context
from rlhf_ray.recipe.language_modeling import train_language_model
from rlhf_ray.recipe.stages import Artefact
from rlhf_ray.run_state import Step


def sft(context: Context, step: Step, inputs: Mapping[str, Artefact]) -> dict[str, Any]:
    """Fine-tunes the base model on demonstrations, selections or both: `model` in the step's directory, and, where it
    learns demonstrations alone, `epoch-N` after each earlier pass.
    """
    section, tokenizer = context.config.sft, inputs["tokenizer"].path
    tables = {name: str(inputs[name].path) for name in ("demonstrations", "selections") if name in inputs}
    return train_language_model(
        context,
        step,
        section,
        str(inputs["base"].path),
        num_steps=lambda sizes: section.epochs * steps_per_epoch(sizes["train"], section.batch_size),
        draw=epoch_rows,
        checkpoints=epoch_names(1 if "selections" in inputs else section.epochs),
        builder=dialogue_rows,
        builder_args=(tables, str(tokenizer), section.seq_len, section.held_out, section.demonstration_share),
        tokenizer=tokenizer,
    )


def epoch_names(epochs: int) -> Callable[[int], dict[int, str]]:
    """Names of the checkpoints to keep: epoch-1, epoch-2, ..., and `model` for the last."""

    def names(total: int) -> dict[int, str]:
        per_epoch = total // epochs
        return {per_epoch * e: f"epoch-{e}" for e in range(1, epochs)} | {total: "model"}

    return names
