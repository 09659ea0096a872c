"""Reward modeling (Llama 2 §3.2.2): a helpfulness and a safety model, trained at the same time on two mixes."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.worker_group import collect
from rlhf_ray.config import RewardSection
from rlhf_ray.data.batching import steps_per_epoch
from rlhf_ray.data.reward_pairs import reward_pairs
from rlhf_ray.data.shares import mix
from rlhf_ray.metrics import MetricsWriter, console, progress_bar
from rlhf_ray.recipe.context import Context
from rlhf_ray.run_state import Due, Step, write_json
from rlhf_ray.workers.reward import RewardWorker
from rlhf_ray.workers.trainer import TrainerWorker

GUIDELINES = ("helpfulness", "safety")
HELD_OUT = "comparisons_held_out"


def train_reward_models(context: Context) -> dict[str, Path]:
    """Trains those that are not given, side by side; returns the step directories (the checkpoint: `model`)."""
    section = context.config.reward
    steps = {
        name: context.step(
            f"reward-{name}",
            sections=("reward",),
            parents=("comparisons", "tokenizer", "chat", *([HELD_OUT] if HELD_OUT in context.outputs else [])),
            code=("rlhf_ray.recipe.reward_modeling",),
            held_out=context.config.collect.held_out,
        )
        for name in GUIDELINES
        if name not in context.outputs
    }
    missing = {name: step for name, step in steps.items() if not context.skip(step)}
    if missing:
        _train(context, section, missing, among=tuple(steps))
    return {name: step.path for name, step in steps.items()}


def _train(context: Context, section: RewardSection, steps: dict[str, Step], *, among: Sequence[str]) -> None:
    """Trains the models of `steps`, side by side; `among` are those too that an earlier attempt has finished."""
    roles, timeout_s = context.roles, context.roles.timeout_s
    with console.status("reward: starting workers, reading comparisons"):
        roles.work_together(*steps, among=among)
        sizes = _begin(context, section, steps)
    progress = {name: step.latest_state()[0] for name, step in steps.items()}
    totals = {name: num_steps(sizes[name]["train"], section) for name in steps}
    writers = {name: MetricsWriter(step.begin(), steps_done=progress[name]) for name, step in steps.items()}
    due = {name: Due(section.save_every, context.config.run.save_every_s) for name in steps}
    with progress_bar("reward", total=sum(totals.values()), done=sum(progress.values())) as bar:
        for index in range(max(totals.values())):
            # Both models take a step at the same time, each on its own ranks.
            active = [name for name in steps if progress[name] <= index < totals[name]]
            calls = {
                name: roles[name].submit(
                    RewardWorker.train_reward,
                    index,
                    batch_size=section.batch_size,
                    micro_batch_tokens=section.micro_batch_tokens,
                    safety_loss_coef=section.safety_loss_coef if name == "safety" else 0.0,
                )
                for name in active
            }
            for name, call in calls.items():
                row = collect(call, timeout_s=timeout_s, step=f"reward step {index}")[0]
                writers[name].write(index, row)
                bar.advance(f"{name} accuracy {row['accuracy']:.3f}")
                if due[name].now(index + 1, totals[name]):
                    with due[name].writing(), steps[name].new_state(index + 1) as directory:
                        roles[name].call(
                            TrainerWorker.save_state, str(directory), step=f"reward checkpoint {index + 1}"
                        )
    tested = {
        name: roles[name].submit(RewardWorker.evaluate_reward, micro_batch_tokens=section.micro_batch_tokens)
        for name in steps
    }
    for name, step in steps.items():
        writers[name].close()
        accuracy = collect(tested[name], timeout_s=timeout_s, step="reward accuracy")[0]
        work = step.begin()
        write_json(work / "accuracy.json", accuracy)
        if not (work / "model").exists():  # one from before an interruption is the same and stays
            roles[name].call(TrainerWorker.save_model, str(work / "model"), num_labels=1, step="reward end")
        context.add_tokenizer(work / "model")
        step.finish(sizes=sizes[name], accuracy=accuracy)
        console.print(f"reward-{name}: held-out accuracy {told(accuracy, name)}")


def _begin(context: Context, section: RewardSection, steps: dict[str, Step]) -> dict[str, dict[str, int]]:
    """Builds the models, opens their data and starts DeepSpeed, the roles side by side; returns the data's sizes."""
    roles, config = context.roles, context.config
    timeout_s, sizes = roles.timeout_s, {}
    built = [
        call
        for name in steps
        for call in roles[name].submit(
            TrainerWorker.build,
            str(context.outputs["chat"]),
            head="scalar",
            seed=config.run.seed,
            runtime=roles.runtime,
            fresh_head=True,
        )
    ]
    collect(built, timeout_s=timeout_s, step="reward start")
    opened = {
        name: roles[name].submit(
            TrainerWorker.open_data,
            reward_pairs,
            str(context.outputs["comparisons"]),
            str(context.outputs["tokenizer"]),
            model=name,
            shares=mix(name, section),
            margin=section.margin,
            epochs=section.epochs,
            held_out=held_out(context),
            max_length=section.max_length,
            seed=config.run.seed,
        )
        for name in steps
    }
    for name, calls in opened.items():
        sizes[name] = collect(calls, timeout_s=timeout_s, step="reward data")[0]
    begun: list[Any] = []
    for name, step in steps.items():
        total = num_steps(sizes[name]["train"], section)
        begun += roles.begin_training(name, optim=section.optim, num_steps=total, state=step.latest_state()[1])
    collect(begun, timeout_s=timeout_s, step="reward start")
    return sizes


def held_out(context: Context) -> str | float:
    """What accuracy is measured on: a table of its own, or a share of the table trained on."""
    return str(context.outputs[HELD_OUT]) if HELD_OUT in context.outputs else context.config.collect.held_out


def told(accuracy: dict[str, float], name: str) -> str:
    """Accuracies for people: by guideline, the model's own first, for the two pull in different directions (§3.2.2)."""
    groups = sorted(GUIDELINES, key=lambda group: group != name)
    return ", ".join(f"{with_interval(accuracy, g)} on {g}" for g in groups if f"accuracy/{g}" in accuracy)


def with_interval(accuracy: dict[str, float], group: str) -> str:
    """An accuracy with half its 95% interval (normal approximation), for people."""
    share, count = accuracy[f"accuracy/{group}"], accuracy[f"count/{group}"]
    return f"{share:.3f} ± {1.96 * math.sqrt(share * (1 - share) / count):.3f} ({count:.0f} pairs)"


def num_steps(pairs: int, section: RewardSection) -> int:
    """Optimizer steps over `pairs` training pairs, all epochs counted in."""
    return section.epochs * steps_per_epoch(pairs // section.epochs, section.batch_size)
