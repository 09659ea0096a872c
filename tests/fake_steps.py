"""Steps of a recipe that are finished without any work: the ledger's tests and those of what reads it."""

from collections.abc import Mapping
from pathlib import Path

from rlhf_ray.config import Config, config_with
from rlhf_ray.recipe.ledger import Entry, Ledger
from rlhf_ray.recipe.rounds import recipe
from rlhf_ray.recipe.stages import Node
from rlhf_ray.run_state import RunDir

SETTLED = {"run.device": "cpu", "run.precision": "fp32", "cluster.address": "local"}
"""What a config leaves to the machine."""


def ledger_of(run: Path, settings: Mapping[str, object] | None = None, nodes: list[Node] | None = None) -> Ledger:
    """Of a config's recipe as a new process sees it."""
    config = config_with(Config(), {**SETTLED, **(settings or {})})
    return Ledger(config, nodes or recipe(config), RunDir(run))


def entry_of(ledger: Ledger, name: str) -> Entry:
    return ledger.entry(next(node for node in ledger.nodes if node.name == name))


def begin(ledger: Ledger, name: str, *, steps: int) -> Entry:
    """A step under way that has a checkpoint after so many steps."""
    entry = entry_of(ledger, name)
    assert entry.step is not None, entry.missing
    entry.step.begin()
    with entry.step.new_state(steps) as directory:
        (directory / "weights").write_text(str(steps))
    return entry


def finish(ledger: Ledger, name: str, *, steps: int | None = None) -> Entry:
    """A finished step; one of training that can be made longer has done all its steps, or so many."""
    entry = entry_of(ledger, name)
    assert entry.step is not None, entry.missing
    work = entry.step.begin()
    for output, place in entry.node.makes.items():
        path = work / place
        if path.suffix:
            path.write_text(output)
        else:
            path.mkdir(parents=True)
            (path / "weights").write_text(f"{name} {output}")
    facts = {}
    if entry.step.length:
        limits = (limit for field, limit in entry.step.length.items() if field.endswith("num_steps"))
        facts["steps"] = next(limits) if steps is None else steps
        with entry.step.new_state(facts["steps"]):
            pass
    entry.step.finish(keep_state=bool(entry.step.length), **facts)
    return ledger.refresh(entry.node)


def finish_all(ledger: Ledger, *, but: tuple[str, ...] = ()) -> Ledger:
    """Finishes what is not done, in order."""
    for node in ledger.nodes:
        if node.makes and node.name not in but and not ledger.entry(node).done:
            finish(ledger, node.name)
    return ledger


def keys(ledger: Ledger) -> dict[str, str]:
    """The key of each node that is there."""
    return {entry.node.name: entry.step.key for entry in ledger.entries() if entry.step is not None}
