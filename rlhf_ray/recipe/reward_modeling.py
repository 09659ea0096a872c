"""Reward modeling (Llama 2 §3.2.2): a helpfulness and a safety model, trained at the same time on two mixes."""

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from cluster.worker_group import collect
from rlhf_ray.config import RewardSection
from rlhf_ray.data.batching import steps_per_epoch
from rlhf_ray.data.reward_pairs import held_out_pairs, reward_pairs
from rlhf_ray.data.schemas import GUIDELINES, STRENGTHS
from rlhf_ray.data.shares import mix
from rlhf_ray.metrics import MetricsWriter
from rlhf_ray.progress import console, doing, progress_bar
from rlhf_ray.recipe.context import Context, add_tokenizer
from rlhf_ray.recipe.stages import Artefact
from rlhf_ray.run_state import Due, StateWriter, Step, newest_state, write_json
from rlhf_ray.workers.reward import RewardWorker
from rlhf_ray.workers.scorer import ScorerWorker
from rlhf_ray.workers.trainer import TrainerWorker

HELD_OUT = "comparisons_held_out"


def train_reward_models(context: Context, step: Step, inputs: Mapping[str, Artefact]) -> dict[str, Any]:
    """Trains those that are asked for, each in a directory of its name (the checkpoint: `model`)."""
    begun, roles = step.begin(), context.roles
    facts: dict[str, Any] = {"sizes": {}, "accuracy": {}}
    for place, turn in enumerate(roles.turns(*step.inputs.get("makes", GUIDELINES))):
        if place:  # the one before has done its work
            roles.unload()
        facts["sizes"] |= train_side_by_side(context, step, inputs, turn, begun)
        for name in turn:
            facts["accuracy"][name] = json.loads((begun / name / "accuracy.json").read_text(encoding="utf-8"))
    return facts


def train_side_by_side(
    context: Context, step: Step, inputs: Mapping[str, Artefact], names: Sequence[str], begun: Path
) -> dict[str, dict[str, int]]:
    """Both models, or the one whose turn it is, in their directories below `begun`; returns the data's sizes."""
    section, roles, timeout_s = context.config.reward, context.roles, context.roles.timeout_s
    works = {name: begun / name for name in names}
    for work in works.values():
        work.mkdir(exist_ok=True)
    states = {name: newest_state(work) for name, work in works.items()}
    with doing(step.name, "starting workers, reading comparisons"):
        roles.make_resident(*names)
        sizes = _begin(context, inputs, states)
    progress = {name: steps_done for name, (steps_done, _) in states.items()}
    totals = {name: num_steps(sizes[name]["train"], section) for name in names}
    writers = {name: MetricsWriter(work, steps_done=progress[name]) for name, work in works.items()}
    due = {name: Due(section.save_every, context.config.run.save_every_s) for name in names}
    newest: dict[str, str] = {}
    with progress_bar(step.name, total=sum(totals.values()), done=sum(progress.values())) as bar:
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
                newest[name] = f"{name} accuracy {row['accuracy']:.3f}"
                bar.advance("  ".join(newest.values()))
                if due[name].now(index + 1, totals[name]):
                    with due[name].writing(), StateWriter(works[name] / "state", index + 1) as directory:
                        roles[name].call(
                            TrainerWorker.save_state, str(directory), step=f"reward checkpoint {index + 1}"
                        )
    tested = {
        name: roles[name].submit(RewardWorker.evaluate_reward, micro_batch_tokens=section.tokens_to_score)
        for name in names
    }
    for name, work in works.items():
        writers[name].close()
        accuracy = collect(tested[name], timeout_s=timeout_s, step="reward accuracy")[0]
        write_json(work / "accuracy.json", accuracy)
        if not (work / "model").exists():  # one from before an interruption is the same and stays
            roles[name].call(TrainerWorker.save_model, str(work / "model"), num_labels=1, step="reward end")
        add_tokenizer(inputs["tokenizer"].path, work / "model")
        console.print(f"reward {name}: held-out accuracy {accuracy_line(accuracy, name)}")
    return sizes


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
            tables_of(inputs),
            str(inputs["tokenizer"].path),
            model=name,
            shares=mix(name, section),
            margin=section.margin,
            epochs=section.epochs,
            held_out=held_out(inputs, section),
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


def tables_of(inputs: Mapping[str, Artefact]) -> dict[str, str]:
    """Tables of comparisons by week; "" for one outside rounds."""
    weeks = [name for name in inputs if name.partition(".")[0] == "comparisons"]
    return {name.partition(".")[2]: str(inputs[name].path) for name in weeks}


def held_out(inputs: Mapping[str, Artefact], section: RewardSection) -> float | str:
    """A table of its own, or the share of each week's."""
    return str(inputs[HELD_OUT].path) if HELD_OUT in inputs else section.held_out


def measure_reward_models(context: Context, step: Step, inputs: Mapping[str, Artefact]) -> dict[str, Any]:
    """Every version of both reward models on every week's held-out comparisons: reward_accuracy.json.

    Models are renewed because older ones err on what newer chat models answer (§3.2.1).
    """
    work = step.begin()
    versions: dict[str, dict[str, str]] = {}
    for name in inputs:
        if name.startswith(tuple(f"{guideline}." for guideline in GUIDELINES)):
            guideline, _, version = name.partition(".")
            versions.setdefault(version, {})[guideline] = str(inputs[name].path)
    results: dict[str, dict[str, float]] = {}
    with progress_bar(step.name, total=len(versions)) as bar:
        for version, models in versions.items():
            measured = step.kept(version, partial(held_out_accuracies, context, step.name, inputs, models))
            results |= {f"{guideline}.{version}": accuracy for guideline, accuracy in measured.items()}
            bar.advance(version)
    write_json(work / "reward_accuracy.json", results)
    for guideline in GUIDELINES:
        print_accuracies(results, guideline)
    return {"accuracy": results}


def held_out_accuracies(
    context: Context, name: str, inputs: Mapping[str, Artefact], models: Mapping[str, str]
) -> dict[str, dict[str, float]]:
    """Of one version's models (by guideline, as paths) on all held-out comparisons."""
    roles, section = context.roles, context.config.reward
    found: dict[str, dict[str, float]] = {}
    for turn in roles.turns(*models):
        roles.make_resident(*turn)

        def all_of(method: Any, *args: Any, turn: Sequence[str] = turn, **options: Any) -> dict[str, list[Any]]:
            calls = {model: roles[model].submit(method, *args, **options) for model in turn}
            return {model: collect(made, timeout_s=roles.timeout_s, step=name) for model, made in calls.items()}

        loading = [
            call
            for model in turn
            for call in roles[model].submit(
                ScorerWorker.load_frozen, models[model], head="scalar", **roles.frozen(model)
            )
        ]
        collect(loading, timeout_s=roles.timeout_s, step=name)
        all_of(
            TrainerWorker.open_data,
            held_out_pairs,
            tables_of(inputs),
            str(inputs["tokenizer"].path),
            held_out=held_out(inputs, section),
            max_length=section.max_length,
        )
        tested = all_of(RewardWorker.evaluate_reward, micro_batch_tokens=section.tokens_to_score)
        found |= {model: ranks[0] for model, ranks in tested.items()}
    return found


def print_accuracies(results: Mapping[str, Mapping[str, float]], guideline: str) -> None:
    """A table for people: a guideline's own models by version, on its comparisons by week."""
    prefix = f"accuracy/{guideline}/"
    models = [name for name in results if name.partition(".")[0] == guideline]
    groups = [key.removeprefix(prefix) for name in models[:1] for key in results[name] if key.startswith(prefix)]
    weeks = [group for group in groups if group not in STRENGTHS]
    table = Table(title=f"{guideline}: held-out accuracy by week")
    for column in ("reward model", *weeks, STRENGTHS[0], "all"):
        table.add_column(column, justify="left" if column == "reward model" else "right")
    for name in models:
        row = results[name]
        cells = [row.get(f"{prefix}{group}") for group in (*weeks, STRENGTHS[0])] + [row.get(prefix.rstrip("/"))]
        table.add_row(name.partition(".")[2], *("-" if cell is None else f"{cell:.3f}" for cell in cells))
    console.print(table)


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
