"""Next-token training, the loop that pretraining and supervised fine-tuning share."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.worker_group import collect
from model.config import ModelConfig
from rlhf_ray.config import PretrainSection, SFTSection
from rlhf_ray.data.batching import DrawRows
from rlhf_ray.metrics import MetricsWriter, latest
from rlhf_ray.progress import doing, progress_bar
from rlhf_ray.recipe.context import Context, add_tokenizer
from rlhf_ray.run_state import Due, Step
from rlhf_ray.workers.policy import PolicyWorker
from rlhf_ray.workers.trainer import TrainerWorker

EVALUATIONS = 10  # of the held-out loss in a stage


def train_language_model(
    context: Context,
    step: Step,
    section: PretrainSection | SFTSection,
    source: str | ModelConfig,
    *,
    num_steps: Callable[[dict[str, int]], int],
    draw: DrawRows,
    checkpoints: Callable[[int], dict[int, str]],
    builder: Callable[..., Any],
    builder_args: tuple[Any, ...],
    tokenizer: Path,
) -> dict[str, Any]:
    """Trains the policy's model on packed rows.

    Args:
        source: a checkpoint, or a config for fresh weights.
        num_steps: optimizer steps, from the sizes of the data.
        draw: the rows of a step.
        checkpoints: steps done -> name of a checkpoint to keep, from the number of steps; the last is the result.
        builder: makes the rows, on every rank.
        tokenizer: goes with every checkpoint.
    Returns:
        facts for the manifest: steps, tokens, held-out loss.
    """
    config, name = context.config, step.name
    work = step.begin()
    steps_done, state = step.latest_state()
    with doing(name, "starting workers, reading data"):
        policy = context.roles["policy"]
        context.roles.make_resident("policy")
        policy.call(
            TrainerWorker.build,
            source,
            head="lm",
            seed=config.run.seed,
            runtime=context.roles.runtime,
            step=f"{name} start",
        )
        sizes = policy.call(TrainerWorker.open_data, builder, *builder_args, step=f"{name} data")[0]
        total = num_steps(sizes)
        begun = context.roles.begin_training("policy", optim=section.optim, num_steps=total, state=state)
        collect(begun, timeout_s=context.roles.timeout_s, step=f"{name} start")
    kept, due = checkpoints(total), Due(section.save_every, config.run.save_every_s)

    def keep(done: int) -> None:
        if done in kept:
            directory = work / kept[done]
            if not directory.exists():  # one from before an interruption is the same and stays
                policy.call(TrainerWorker.save_model, str(directory), step=f"{name} step {done - 1}")
            add_tokenizer(tokenizer, directory)

    metrics = MetricsWriter(work, steps_done=steps_done)
    held_out, num_tokens = latest(work, "held_out_loss"), 0.0
    keep(steps_done)  # it may have failed right after the checkpoint
    with progress_bar(name, total=total, done=steps_done) as bar:
        for index in range(steps_done, total):
            row = policy.call(
                PolicyWorker.train_lm,
                index,
                batch_size=section.batch_size,
                micro_batch_size=section.micro_batch_size,
                seed=config.run.seed,
                draw=draw,
                step=f"{name} step {index}",
            )[0]
            num_tokens += row["tokens"]
            if (index + 1) % max(1, total // EVALUATIONS) == 0 or index + 1 == total:
                held_out = policy.call(
                    PolicyWorker.evaluate_lm,
                    micro_batch_size=section.micro_batch_size,
                    step=f"{name} step {index}",
                )[0]
                row["held_out_loss"] = held_out
            metrics.write(index, row)
            measured = "" if math.isnan(held_out) else f"  held-out {held_out:.3f}"
            bar.advance(f"loss {row['loss']:.3f}{measured}")
            if due.now(index + 1, total) or index + 1 in kept:
                with due.writing(), step.new_state(index + 1) as directory:
                    policy.call(TrainerWorker.save_state, str(directory), step=f"{name} checkpoint {index + 1}")
            keep(index + 1)
    metrics.close()
    return {"steps": total, "sizes": sizes, "held_out_loss": held_out, "tokens_this_time": num_tokens}
