"""Reward modeling (Llama 2 §3.2.2): a helpfulness and a safety model, trained at the same time on two mixes."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.worker_group import collect
from rlhf_ray.config import RewardSection
from rlhf_ray.data.batching import steps_per_epoch
from rlhf_ray.data.reward_pairs import reward_pairs
from rlhf_ray.data.shares import mix
from rlhf_ray.metrics import MetricsWriter, console, progress_bar
from rlhf_ray.recipe.context import Context, add_tokenizer
from rlhf_ray.recipe.stages import Artefact
from rlhf_ray.run_state import Due, StateWriter, Step, newest_state, write_json
from rlhf_ray.workers.reward import RewardWorker
from rlhf_ray.workers.trainer import TrainerWorker

GUIDELINES = ("helpfulness", "safety")
HELD_OUT = "comparisons_held_out"


def train_reward_models(context: Context, step: Step, inputs: Mapping[str, Artefact]) -> dict[str, Any]:
    """Trains those that are asked for side by side, each in a directory of its name (the checkpoint: `model`)."""
    section, names = context.config.reward, step.inputs.get("makes", GUIDELINES)
    roles, timeout_s = context.roles, context.roles.timeout_s
    begun = step.begin()
    works = {name: begun / name for name in names}
    for work in works.values():
        work.mkdir(exist_ok=True)
    states = {name: newest_state(work) for name, work in works.items()}
    with console.status("reward: starting workers, reading comparisons"):
        roles.work_together(*names)
        sizes = _begin(context, inputs, states)
    progress = {name: steps_done for name, (steps_done, _) in states.items()}
    totals = {name: num_steps(sizes[name]["train"], section) for name in names}
    writers = {name: MetricsWriter(work, steps_done=progress[name]) for name, work in works.items()}
    due = {name: Due(section.save_every, context.config.run.save_every_s) for name in names}
    with progress_bar("reward", total=sum(totals.values()), done=sum(progress.values())) as bar:
        for index in range(max(totals.values())):
            # Both models take a step at the same time, each on its own ranks.
            active = [name for name in names if progress[name] <= index < totals[name]]
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
                    with due[name].writing(), StateWriter(works[name] / "state", index + 1) as directory:
                        roles[name].call(
                            TrainerWorker.save_state, str(directory), step=f"reward checkpoint {index + 1}"
                        )
    tested = {
        name: roles[name].submit(RewardWorker.evaluate_reward, micro_batch_tokens=section.micro_batch_tokens)
        for name in names
    }
    accuracies = {}
    for name, work in works.items():
        writers[name].close()
        accuracies[name] = collect(tested[name], timeout_s=timeout_s, step="reward accuracy")[0]
        write_json(work / "accuracy.json", accuracies[name])
        if not (work / "model").exists():  # one from before an interruption is the same and stays
            roles[name].call(TrainerWorker.save_model, str(work / "model"), num_labels=1, step="reward end")
        add_tokenizer(inputs["tokenizer"].path, work / "model")
        console.print(f"reward {name}: held-out accuracy {accuracy_line(accuracies[name], name)}")
    return {"sizes": sizes, "accuracy": accuracies}


def _begin(
    context: Context, inputs: Mapping[str, Artefact], states: Mapping[str, tuple[int, Path | None]]
) -> dict[str, dict[str, int]]:
    """Builds the models, opens their data and starts DeepSpeed, the roles side by side; returns the data's sizes."""
    roles, config, section = context.roles, context.config, context.config.reward
    timeout_s, sizes = roles.timeout_s, {}
    built = [
        call
        for name in states
        for call in roles[name].submit(
            TrainerWorker.build,
            str(inputs["chat"].path),
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
            str(inputs["comparisons"].path),
            str(inputs["tokenizer"].path),
            model=name,
            shares=mix(name, section),
            margin=section.margin,
            epochs=section.epochs,
            # A table of its own, or a share of the table trained on.
            held_out=str(inputs[HELD_OUT].path) if HELD_OUT in inputs else section.held_out,
            max_length=section.max_length,
            seed=config.run.seed,
        )
        for name in states
    }
    for name, calls in opened.items():
        sizes[name] = collect(calls, timeout_s=timeout_s, step="reward data")[0]
    begun: list[Any] = []
    for name, (_, state) in states.items():
        total = num_steps(sizes[name]["train"], section)
        begun += roles.begin_training(name, optim=section.optim, num_steps=total, state=state)
    collect(begun, timeout_s=timeout_s, step="reward start")
    return sizes


def accuracy_line(accuracy: dict[str, float], name: str) -> str:
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
