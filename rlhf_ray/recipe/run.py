"""Goes through a recipe: what is there is skipped, the rest is run or gone on with, dead workers are replaced."""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cluster.worker_group import START_UP, WorkerError
from rlhf_ray.config import Config
from rlhf_ray.errors import RunFailure, UserError
from rlhf_ray.machine import opening_lines
from rlhf_ray.progress import console, shown
from rlhf_ray.recipe.context import Context
from rlhf_ray.recipe.ledger import (
    Entry,
    Ledger,
    MissingInputError,
    cannot_go_on,
    check_redo,
    difference,
    droppable,
    missing_inputs,
    of_other_source,
    to_run,
    waiting,
)
from rlhf_ray.recipe.remedies import what_helps
from rlhf_ray.recipe.rounds import recipe
from rlhf_ray.recipe.stages import Artefact, Given, Node, Stage, wanted_stages
from rlhf_ray.run_state import RunDir, package_versions, read_facts, remove, source_hash, sweep, write_json


def runner(stage: Stage) -> Callable[..., dict[str, Any]]:
    """The function of a stage."""
    module, _, function = stage.runner.partition(":")
    found: Callable[..., dict[str, Any]] = getattr(importlib.import_module(module), function)
    return found


def run_recipe(
    config: Config, out: str | Path, *, stages: Sequence[str] | None = None, redo: Sequence[str] = ()
) -> dict[str, Artefact]:
    """Runs the given stages (by default those the config lists) in the recipe's order.

    What other stages made in `out` with the same inputs is used; what the config names in `inputs` or `data` takes
    the place of what a stage would make.

    Args:
        redo: nodes to be made anew, with what depends on them.
    Returns:
        artefacts by output name: "chat", "policy", "evaluation", ...
    Raises:
        UserError: a stage needs what neither the run nor the config has, or another process works in `out`.
    """
    context = Context(config, RunDir(out))
    wanted = wanted_stages(context.config, stages)
    with context.run.locked():
        return run_nodes(context, recipe(context.config, wanted), wanted, redo=redo)


def run_nodes(
    context: Context, nodes: Sequence[Node], wanted: Sequence[str], *, redo: Sequence[str] = ()
) -> dict[str, Artefact]:
    """Runs the nodes of the wanted stages, each after those it works on; the run directory is locked.

    Raises:
        As `run_recipe`.
    """
    check_redo(nodes, wanted, redo)
    config, run = context.config, context.run
    run.record(config=config.model_dump(mode="json"), machine=run.machine, packages=package_versions())
    for line in opening_lines(config):
        console.print(line, highlight=False, soft_wrap=True)
    ledger = Ledger(config, nodes, run)
    ledger.redo(redo)
    tell_other_source(ledger.entries())
    made: dict[str, Artefact] = {}
    ran = 0
    try:
        for place, node in enumerate(nodes):
            entries = ledger.entries()
            entry, running = entries[place], {e.node.name for e in to_run(entries, wanted)}
            if (stop := waiting(entries)) is not None and stop[0] is entry:
                console.print(why_it_waits(ledger, *stop), highlight=False, soft_wrap=True)
                break
            if not node.makes:
                if node.stage.name in wanted:
                    names = ", ".join(node.stage.makes)
                    console.print(f"{node.name}: nothing to do, the config names what it would make ({names})")
            elif node.name in running:
                with shown(node.name, ran + 1, of=ran + len(running)):
                    run_node(context, entry)
                ran += 1
                entry = ledger.refresh(node)
                later = [e for e in to_run(ledger.entries(), wanted) if e.node.name != node.name]
                context.release({role for e in later for role in e.node.roles})
                drop_unneeded(ledger, config.run.keep)
            elif entry.done and node.stage.name in wanted:
                console.print(f"{node.name}: done before with the same inputs ({entry.directory}), skipped")
            made.update(entry.outputs)
            run.record(artefacts={str(a.path.relative_to(run.path)): record_of(a) for a in entry.outputs.values()})
        drop_unneeded(ledger, config.run.keep)  # what an earlier command did not come to
        ledger.redo_is_over()
    except WorkerError as error:
        dump_failure(run, error)
        raise
    finally:
        context.close()
        for step in run.steps.iterdir():  # no worker writes there any more
            sweep(step)
    return made


def run_node(context: Context, entry: Entry) -> None:
    """Runs one node. Where a worker dies, its group is rebuilt, and the node goes on from its last checkpoint.

    Raises:
        MissingInputError: something that it works on is not there.
        WorkerError: a worker failed without dying, or workers died more often than `cluster.max_repairs`.
        RunFailure: workers died a second time at the same place, and nothing was done in between.
    """
    name, stage, step = entry.node.name, entry.node.stage, entry.step
    if step is None:
        raise MissingInputError(missing_inputs(entry, context.run))
    if problem := cannot_go_on(entry):
        raise UserError(problem)
    tell_start(entry)
    step.start_clock()
    context.work_at(name, entry.config, entry.node.roles)
    repairs, limit = 0, entry.config.cluster.max_repairs
    places: list[tuple[Any, ...]] = []
    while True:
        try:
            facts = runner(stage)(context, step, entry.inputs)
            step.finish(keep_state="states" in entry.config.run.keep and bool(step.length), **facts)
            return
        except WorkerError as error:
            never_up = [error.role] if error.step == START_UP and not error.late else []
            dead = context.roles.drop_dead() + never_up
            if repairs == limit or not dead:
                raise
            place = (dead, error.step, progress(context.run))
            if place in places:
                raise RunFailure(
                    f"{error}; it is the second time at the same place with no checkpoint between, so it is not tried "
                    f"again; {what_helps(error, again=True)}"
                ) from error
            places.append(place)
            repairs += 1
            console.print(f"{error}\n{name}: rebuilding {' and '.join(dead)}, repair {repairs} of {limit}")


def tell_start(entry: Entry) -> None:
    """Says how a node begins, and why it is not done."""
    step = entry.step
    assert step is not None
    steps_done, state = step.latest_state()
    begun = read_facts(step.continued() or step.partial).get("source", source_hash())
    if begun != source_hash():
        console.print(f"{step.name}: was begun by other source than this; --redo {step.name} makes it all anew")
    if state is not None:
        console.print(f"{step.name}: going on from step {steps_done} ({step.key})")
    elif step.partial.exists():
        console.print(f"{step.name}: going on ({step.key})")
    else:
        changed = difference(step)
        console.print(f"{step.name}: starting ({step.key}){f': {changed}' if changed else ''}", highlight=False)
        if "num_steps was" in changed and not step.length:
            console.print(
                f"{step.name}: its learning rate follows a schedule over all steps, so it does not go on from the "
                "shorter training; one that is constant does",
                highlight=False,
            )


def tell_other_source(entries: Sequence[Entry]) -> None:
    """Says in one line what other source than this has made."""
    if names := of_other_source(entries):
        console.print(
            f"{', '.join(names)}: made by other source than this, and used as it is; --redo {names[0]} makes it anew, "
            "with what depends on it",
            highlight=False,
            soft_wrap=True,
        )


def why_it_waits(ledger: Ledger, entry: Entry, source: Given) -> str:
    """What people are to do before a run goes on.

    Raises:
        UserError: there are no pairs yet that they could compare.
    """
    assert source.answers is not None
    waits = f"{entry.node.name} waits for {source.field}={source.path}"
    if (pairs := ledger.made(source.answers)) is None:
        raise UserError(f"{waits}, and the pairs to be compared are not made; run pairs first")
    return (
        f"{waits}; the pairs to be compared are {pairs.path}; write the comparisons there, and the same command goes on"
    )


def record_of(artefact: Artefact) -> dict[str, Any]:
    """What the manifest says of an artefact."""
    return {"kind": artefact.kind, "scope": artefact.scope, "key": artefact.key, "parents": dict(artefact.parents)}


def drop_unneeded(ledger: Ledger, keep: Sequence[str]) -> None:
    """Removes models that `run.keep` does not name and that no node needs which is not done yet."""
    for artefact in droppable(ledger.entries(), keep):
        remove(artefact.path)
        console.print(f"{artefact.label}: removed, run.keep does not name {artefact.kind}", highlight=False)


def progress(run: RunDir) -> list[Path]:
    """What a run has to go on from: finished steps, checkpoints, parts of results."""
    patterns = ("*", "*.partial/state/*", "*.partial/*/state/*", "*.partial/parts/*")
    return sorted(path for pattern in patterns for path in run.steps.glob(pattern))


def dump_failure(run: RunDir, error: WorkerError) -> None:
    """Writes what a worker knew of the step that it stopped at (a NaN's surroundings) to OUT/failure.json."""
    details = getattr(error.cause, "details", None)
    if details:
        facts = {"role": error.role, "rank": error.rank, "step": error.step, "message": str(error)}
        write_json(run.path / "failure.json", {**facts, "details": details})
