"""The whole recipe: the stages in the paper's order, each done once for its inputs."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.worker_group import WorkerError
from rlhf_ray.config import STAGES, Config
from rlhf_ray.errors import RunFailure
from rlhf_ray.evaluate.policies import evaluate
from rlhf_ray.machine import opening_lines
from rlhf_ray.metrics import console
from rlhf_ray.recipe.context import Context, MissingOutputError, NotDoneError
from rlhf_ray.recipe.ppo import ppo
from rlhf_ray.recipe.preference_collection import collect
from rlhf_ray.recipe.pretraining import pretrain
from rlhf_ray.recipe.remedies import what_helps
from rlhf_ray.recipe.reward_modeling import train_reward_models
from rlhf_ray.recipe.sft import sft
from rlhf_ray.recipe.testbed import make_testbed
from rlhf_ray.recipe.tokenizer import make_tokenizer
from rlhf_ray.run_state import RunDir, fingerprint, package_versions, sweep, write_json

Outputs = Mapping[str, Path]

TABLES = (
    "corpus",
    "demonstrations",
    "prompts_train",
    "prompts_annotation",
    "prompts_early_stop",
    "prompts_test",
)

RUNNERS: dict[str, Callable[[Context], Outputs]] = {
    "testbed": lambda c: (lambda path: {name: path / f"{name}.parquet" for name in TABLES})(make_testbed(c)),
    "tokenizer": lambda c: {"tokenizer": make_tokenizer(c)},
    "pretrain": lambda c: {"base": pretrain(c) / "model"},
    "sft": lambda c: {"chat": sft(c) / "model"},
    "collect": lambda c: {"comparisons": collect(c) / "comparisons.parquet"},
    "reward": lambda c: {name: path / "model" for name, path in train_reward_models(c).items()},
    "ppo": lambda c: {"policy": ppo(c) / "model"},
    "evaluate": lambda c: {"evaluation": evaluate(c) / "evaluation.json"},
}
"""Stage -> what runs it and the outputs it gives."""

MAKES = {
    "testbed": TABLES,
    "tokenizer": ("tokenizer",),
    "pretrain": ("base",),
    "sft": ("chat",),
    "collect": ("comparisons",),
    "reward": ("helpfulness", "safety"),
    "ppo": ("policy",),
    "evaluate": ("evaluation",),
}


def run_stage(context: Context, stage: str) -> Outputs:
    """Runs one stage. Where a worker dies its group is rebuilt, and the stage goes on from its last checkpoint.

    Raises:
        WorkerError: a worker failed without dying, or workers died more often than `cluster.max_repairs`.
        RunFailure: workers died a second time at the same place, and nothing was done in between.
    """
    repairs, limit = 0, context.config.cluster.max_repairs
    places: list[tuple[Any, ...]] = []
    while True:
        try:
            outputs = RUNNERS[stage](context)
            context.unload()
            return outputs
        except WorkerError as error:
            if repairs == limit or not (dead := context.roles.drop_dead()):
                raise
            place = (dead, error.step, progress(context.run))
            if place in places:
                raise RunFailure(
                    f"{error}; it is the second time at the same place with no checkpoint between, so it is not tried "
                    f"again; {what_helps(error, again=True)}"
                ) from error
            places.append(place)
            repairs += 1
            console.print(f"{error}\n{stage}: rebuilding {' and '.join(dead)}, repair {repairs} of {limit}")


def progress(run: RunDir) -> list[Path]:
    """What a run has to go on from: finished steps, checkpoints, parts of results."""
    patterns = ("*", "*.partial/state/*", "*.partial/parts/*")
    return sorted(path for pattern in patterns for path in (run.path / "steps").glob(pattern))


def dump_failure(run: RunDir, error: WorkerError) -> None:
    """Writes what a worker knew of the step that it stopped at (a NaN's surroundings) to OUT/failure.json."""
    details = getattr(error.cause, "details", None)
    if details:
        facts = {"role": error.role, "rank": error.rank, "step": error.step, "message": str(error)}
        write_json(run.path / "failure.json", {**facts, "details": details})


def run_recipe(config: Config, out: str | Path, *, stages: Sequence[str] | None = None) -> dict[str, Path]:
    """Runs the given stages (by default those the config lists) in the recipe's order.

    What other stages made in `out` with the same inputs is used; what the config names in `inputs` or `data` takes
    the place of what a stage would make.

    Returns:
        paths by output name: "chat", "policy", "evaluation", ...
    Raises:
        UserError: a stage needs what neither the run nor the config has, or another process works in `out`.
    """
    run = RunDir(out)
    with run.locked():
        return _run_recipe(config, run, tuple(stages or config.run.stages))


def _run_recipe(config: Config, run: RunDir, wanted: Sequence[str]) -> dict[str, Path]:
    context = Context(config, run)
    config = context.config
    run.record(config=config.model_dump(mode="json"), machine=run.machine, packages=package_versions())
    for line in opening_lines(config):
        console.print(line, highlight=False, soft_wrap=True)
    made: dict[str, Path] = {}
    try:
        for stage in STAGES:
            if all(name in context.outputs for name in MAKES[stage]):
                if stage in wanted:
                    names = ", ".join(MAKES[stage])
                    console.print(f"{stage}: nothing to do, the config names what it would make ({names})")
                continue
            context.may_run = stage in wanted
            try:
                outputs = run_stage(context, stage)
            except (NotDoneError, MissingOutputError, FileNotFoundError):  # the last: a file that only this stage reads
                if context.may_run:
                    raise
                continue
            for name, path in outputs.items():
                # Tables of the testbed go by content, so that a longer one leaves what uses the others alone.
                key = fingerprint(path) if stage == "testbed" else f"{path.parent.name}/{path.name}"
                context.outputs.add(name, path, key=key)
                made[name] = context.outputs[name]
    except WorkerError as error:
        dump_failure(run, error)
        raise
    finally:
        context.close()
        for partial in run.path.glob("steps/*.partial"):  # no worker writes there any more
            sweep(partial)
    return made
