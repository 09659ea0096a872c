"""Supervised fine-tuning (Llama 2 §3.1): packed dialogues, loss on answer tokens only.

The paper starts with public instruction data and goes on with its own, fewer and better: two steps where
`data.public_demonstrations` names the first.
"""

from collections.abc import Callable
from pathlib import Path

from rlhf_ray.data.batching import epoch_rows, steps_per_epoch
from rlhf_ray.data.lm_rows import dialogue_rows
from rlhf_ray.recipe.context import Context
from rlhf_ray.recipe.language_modeling import train_language_model


def sft(context: Context) -> Path:
    """Fine-tunes the base model; returns the step's directory: `model`, and `epoch-N` after each earlier pass."""
    start = "base"
    if "public_demonstrations" in context.outputs:
        path = fine_tune(context, "sft-public", demonstrations="public_demonstrations", start="base")
        start = "public_chat"
        context.outputs.add(start, path / "model", key=f"{path.name}/model")
    return fine_tune(context, "sft", demonstrations="demonstrations", start=start)


def fine_tune(context: Context, name: str, *, demonstrations: str, start: str) -> Path:
    """One step of fine-tuning: the output `start` on the table `demonstrations`; returns the step's directory."""
    section = context.config.sft
    step = context.step(
        name,
        sections=("sft",),
        parents=(demonstrations, "tokenizer", start),
        code=("rlhf_ray.recipe.sft", "rlhf_ray.recipe.language_modeling"),
    )
    if not context.skip(step):
        facts = train_language_model(
            context,
            step,
            section,
            str(context.outputs[start]),
            num_steps=lambda sizes: section.epochs * steps_per_epoch(sizes["train"], section.batch_size),
            draw=epoch_rows,
            versions=epoch_names(section.epochs),
            builder=dialogue_rows,
            builder_args=(
                str(context.outputs[demonstrations]),
                str(context.outputs["tokenizer"]),
                section.seq_len,
                section.held_out,
            ),
        )
        step.finish(**facts)
    return step.path


def epoch_names(epochs: int) -> Callable[[int], dict[int, str]]:
    """Names of the checkpoints to keep: epoch-1, epoch-2, ..., and `model` for the last."""

    def names(total: int) -> dict[int, str]:
        per_epoch = total // epochs
        return {per_epoch * e: f"epoch-{e}" for e in range(1, epochs)} | {total: "model"}

    return names
