"""What of a recipe is done: the key of each node, and the artefacts that there are. Imports no torch.

A key holds the fields of the config that change a result, the keys of what it is made from, the stage's version, and
how often the stage was asked for anew. The source's hash stands beside it: a difference is told, not acted on.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from rlhf_ray.config import LENGTH, Config, Keepable, config_with, settings_of
from rlhf_ray.config_errors import similar
from rlhf_ray.data.reward_function import function_version, is_function
from rlhf_ray.errors import UserError
from rlhf_ray.recipe.stages import Artefact, Given, Made, Node, Stage, field_of
from rlhf_ray.run_state import RunDir, Step, digest, fingerprint, newest_state, read_facts, source_hash


class MissingInputError(UserError):
    """A stage needs what neither the run nor the config has."""


@dataclass(frozen=True)
class Entry:
    """One node, and what there is of it."""

    node: Node
    config: Config
    """As it holds for this node."""
    inputs: Mapping[str, Artefact]
    """Those that there are."""
    missing: tuple[str, ...]
    """Those that nothing has made yet."""
    step: Step | None
    """Where the output is or will be; None while an input is missing."""
    outputs: Mapping[str, Artefact]
    """Of a finished step. A model that was not kept has no directory any more."""

    @property
    def done(self) -> bool:
        """Whether the output is there."""
        return self.step is not None and self.step.done

    @property
    def directory(self) -> str:
        """Name of the finished step's; "" without one."""
        return self.step.path.name if self.step is not None and self.step.done else ""


class Ledger:
    """Looks up what a run directory holds of a recipe."""

    def __init__(self, config: Config, nodes: Sequence[Node], run: RunDir):
        """`config` is settled (`rlhf_ray.machine`): precision stands in keys."""
        self.nodes, self.run = nodes, run
        self._config = config
        self._by_name = {node.name: node for node in nodes}
        self._entries: dict[str, Entry] = {}
        self._given: dict[Given, Artefact | None] = {}
        manifest = run.manifest()
        self._redone: Mapping[str, int] = manifest.get("redone", {})
        self._redo_under_way: Sequence[str] = manifest.get("redo_under_way", ())

    def entry(self, node: Node) -> Entry:
        """Of one node; what was not done is looked up anew."""
        self._forget()
        return self._entry(node)

    def refresh(self, node: Node) -> Entry:
        """Of a node that has just been run."""
        self._entries.pop(node.name, None)
        return self.entry(node)

    def entries(self) -> list[Entry]:
        """Of all nodes."""
        self._forget()
        return [self._entry(node) for node in self.nodes]

    def _forget(self) -> None:
        """What was not done may be by now."""
        self._entries = {name: entry for name, entry in self._entries.items() if entry.done}

    def _entry(self, node: Node) -> Entry:
        """As it was at the last `_forget`: nodes that many others work on are looked up once."""
        if node.name not in self._entries:
            self._entries[node.name] = self._look_up(node)
        return self._entries[node.name]

    def made(self, source: Made) -> Artefact | None:
        """What a node has made; None before that."""
        return self._entry(self._by_name[source.node]).outputs.get(source.output)

    def redo(self, names: Sequence[str]) -> None:
        """Asks for nodes anew: from now on they are filed under other keys, and so is what depends on them.

        Where a command that asked for one did not come to its end, the same one goes on.
        """
        new = [name for name in dict.fromkeys(names) if name not in self._redo_under_way]
        done = [name for name in new if self.entry(self._by_name[name]).done]
        if done:
            self._redone = {**self._redone, **{name: self._redone.get(name, 0) + 1 for name in done}}
            self._redo_under_way = [*self._redo_under_way, *done]
            self.run.record(redone=self._redone, redo_under_way=self._redo_under_way)
            self._entries.clear()

    def redo_is_over(self) -> None:
        """To be called when a command has come to its end: what is asked for anew from now on is made once more."""
        if self._redo_under_way:
            self._redo_under_way = ()
            self.run.record(redo_under_way=[])

    def _look_up(self, node: Node) -> Entry:
        config = config_with(self._config, node.changes) if node.changes else self._config
        found = {name: self._artefact(source) for name, source in node.inputs.items()}
        inputs = {name: artefact for name, artefact in found.items() if artefact is not None}
        missing = tuple(name for name in found if name not in inputs)
        if missing or not node.makes:
            return Entry(node, config, inputs, missing, None, {})
        step = self._step(node, config, inputs)
        outputs = dict(self._outputs(node, step, inputs)) if step.done else {}
        return Entry(node, config, inputs, (), step, outputs)

    def _step(self, node: Node, config: Config, inputs: Mapping[str, Artefact]) -> Step:
        stage = node.stage
        length = length_of(config, stage)
        is_part = stage.in_part and set(node.makes) != set(stage.makes)
        fixed = {} if length else settings_of(config, stage.settings, marks=(LENGTH,))
        key = {
            "stage": stage.name,
            "version": stage.version,
            "config": settings_of(config, stage.settings, marks=("",)) | fixed,
            "parents": {name: inputs[name].key for name in sorted(inputs)},
            **({"makes": sorted(node.makes)} if is_part else {}),
            **({"redo": self._redone[node.name]} if self._redone.get(node.name) else {}),
        }
        return self.run.step(node.name, key, length=length)

    def _outputs(self, node: Node, step: Step, inputs: Mapping[str, Artefact]) -> Iterator[tuple[str, Artefact]]:
        parents = {name: artefact.key for name, artefact in inputs.items()}
        for output, place in node.makes.items():
            path = step.path / place
            # Tables of the testbed go by content, so that a longer one leaves what uses the others alone.
            key = fingerprint(path) if node.stage.name == "testbed" else f"{step.path.name}/{place}"
            yield output, Artefact(output, path, key, step.path.name, node.scope, parents)

    def _artefact(self, source: Given | Made) -> Artefact | None:
        if isinstance(source, Made):
            return self.made(source)
        if source not in self._given:
            self._given[source] = _given(source)
        return self._given[source]


def _given(source: Given) -> Artefact | None:
    kind = source.field.rpartition(".")[2]
    if source.field.startswith("inputs.") and is_function(source.path):
        return Artefact(kind, Path(source.path), function_version(source.path, root=os.getcwd()), source.field)
    if not Path(source.path).exists():
        return None
    return Artefact(kind, Path(source.path), fingerprint(source.path), source.field)


def length_of(config: Config, stage: Stage) -> dict[str, int]:
    """What says how far a stage's training goes; empty where that is a part of its trajectory, or there is none.

    A schedule that ends with the last step makes the length a part of the way there.
    """
    if any(_scheduled(config, field) for field in stage.settings):
        return {}
    return settings_of(config, stage.settings, marks=(LENGTH,))


def _scheduled(config: Config, field: str) -> bool:
    """Whether a section has an optimizer whose learning rate depends on the number of steps."""
    section: Any = getattr(config, field, None)
    optimizers = [getattr(section, name, None) for name in ("optim", "value_optim")]
    return any(o is not None and (o.schedule != "constant" or o.warmup_ratio > 0) for o in optimizers)


def check_redo(nodes: Sequence[Node], wanted: Sequence[str], redo: Sequence[str]) -> None:
    """What is asked for anew is a part of the recipe, and this command makes it.

    Raises:
        UserError: not so.
    """
    stages = {node.name: node.stage.name for node in nodes if node.makes}
    for name in redo:
        if name not in stages:
            raise UserError(f"--redo {name}: the recipe makes no such thing; {similar(name, stages)}")
        if stages[name] not in wanted:
            raise UserError(
                f"--redo {name}: this command runs {', '.join(wanted)} alone; give it to `rlhf-ray {stages[name]}` or "
                "`rlhf-ray run`"
            )


def waiting(entries: Sequence[Entry]) -> tuple[Entry, Given] | None:
    """The first node that lacks what people are to write, and that; None where there is no such node."""
    for entry in entries:
        for name in entry.missing:
            source = entry.node.inputs[name]
            if isinstance(source, Given) and source.answers is not None:
                return entry, source
    return None


def to_run(entries: Sequence[Entry], wanted: Sequence[str]) -> list[Entry]:
    """Those of the wanted stages that are not done, and those done before whose models were dropped and are needed; up
    to the first that waits for people.
    """
    if (stop := waiting(entries)) is not None:
        entries = entries[: entries.index(stop[0])]
    by_name = {entry.node.name: entry for entry in entries}
    running = {e.node.name for e in entries if e.node.stage.name in wanted and e.node.makes and not e.done}
    for entry in reversed(entries):
        if entry.node.name not in running:
            continue
        for name, source in entry.node.inputs.items():
            given = entry.inputs.get(name)
            if isinstance(source, Made) and given is not None and not given.path.exists():
                running.add(by_name[source.node].node.name)
    return [entry for entry in entries if entry.node.name in running]


def why(entry: Entry, running: Sequence[str]) -> str:
    """Why a node that is not done would be run, in a few words."""
    if changed := [s.node for s in entry.node.inputs.values() if isinstance(s, Made) and s.node in running]:
        return f"after {', '.join(dict.fromkeys(changed))}"
    if entry.missing:
        return f"waits for {', '.join(entry.missing)}"
    assert entry.step is not None
    if entry.done:
        return "its model was not kept"
    steps_done, state = entry.step.latest_state()
    if state is not None:
        return f"goes on from step {steps_done}"
    if entry.step.partial.exists():
        return "was begun"
    return difference(entry.step) or "never made"


def difference(step: Step) -> str:
    """In what a step differs from the finished one of its name that is most like it; "" without any."""
    closest: list[str] = []
    for path in sorted(step.partial.parent.glob(f"{step.name}-*")):
        facts = read_facts(path)
        if path.suffix != ".partial" and facts.get("name") == step.name and "stage" in facts["inputs"]:
            found = list(_differences(facts["inputs"], step.inputs))
            found += [
                f"{name} was {facts['length'].get(name)} and is {value}"
                for name, value in step.length.items()
                if facts["length"].get(name) != value
            ]
            closest = found if not closest or len(found) < len(closest) else closest
    return "; ".join(closest[:3]) + (f"; {len(closest) - 3} more" if len(closest) > 3 else "")


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for key in sorted({*before["config"], *now["config"]}):
        was, value = before["config"].get(key), now["config"].get(key)
        if digest(was) != digest(value):
            yield f"{key} was {was} and is {value}"
    yield from (
        f"{name} is another"
        for name in sorted({*before["parents"], *now["parents"]})
        if before["parents"].get(name) != now["parents"].get(name)
    )
    if before["version"] != now["version"]:
        yield f"the stage's version was {before['version']} and is {now['version']}"
    if before.get("redo", 0) != now.get("redo", 0):
        yield "asked for anew"


def of_other_source(entries: Sequence[Entry]) -> list[str]:
    """Names of finished steps that other source than this has made."""
    return [e.node.name for e in entries if e.done and e.step is not None and e.step.facts()["source"] != source_hash()]


def cannot_go_on(entry: Entry) -> str:
    """Why a step that is under way cannot be finished at its length; "" where it can.

    It has come further than is asked for now. What it has must not be lost in silence.
    """
    step = entry.step
    if step is None or not step.length or step.done:
        return ""
    steps, state = newest_state(step.partial)
    if state is None:
        return ""
    begun = read_facts(step.partial).get("length", {})
    for name, limit in step.length.items():
        least = steps if name.endswith("num_steps") else begun.get(name, limit)
        if limit < least:
            what = f"has {steps} steps done" if name.endswith("num_steps") else f"was begun with {least}"
            return (
                f"{name}={limit} is too low for {step.partial}, which {what}; set it to {least} or more, or remove "
                "that directory"
            )
    return ""


def missing_inputs(entry: Entry, run: RunDir, names: Sequence[str] = ()) -> str:
    """What a node that cannot run is told by; `names` are of the inputs that it lacks, by default all missing ones."""
    lacking = {name: entry.node.inputs[name] for name in names or entry.missing}
    made = [source for source in lacking.values() if isinstance(source, Made)]
    lost = [f"{s.field}={s.path}: is not there" for s in lacking.values() if isinstance(s, Given)]
    if not made:
        return f"{entry.node.name} needs {', '.join(lacking)}; {'; '.join(lost)}"
    makers = list(dict.fromkeys(source.node.partition("@")[0] for source in made))
    others = [maker for maker in makers if any(run.steps.glob(f"{maker}-*/step.json"))]
    stale = f" (what {' and '.join(others)} left in {run.path} was made under other settings)" if others else ""
    fields = dict.fromkeys(field for source in made if (field := field_of(source.output)))
    remedy = f"run {', '.join(makers)} first" + (f", or set {', '.join(fields)}" if fields else "")
    outputs = ", ".join(dict.fromkeys(source.output for source in made))
    none = f"{entry.node.name} needs {outputs}, which neither the config names nor {run.path} holds{stale}"
    return "; ".join([none, remedy, *lost])


def droppable(entries: Sequence[Entry], keep: Sequence[str]) -> list[Artefact]:
    """Models that need not be kept and that no node works on which is not done, whether it is asked for now or not.

    What nothing in the recipe works on is what it is for, and stays; so does the last model that it evaluates.
    """
    spare = set(get_args(Keepable)) - set(keep)
    used = {(s.node, s.output) for e in entries for s in e.node.inputs.values() if isinstance(s, Made)}
    to_do = [entry for entry in entries if entry.node.makes and not entry.done]
    needed = {(s.node, s.output) for e in to_do for s in e.node.inputs.values() if isinstance(s, Made)}
    compared = [e.node.inputs for e in entries if e.node.stage.name == "evaluate"]
    made = [s for inputs in compared for n, s in inputs.items() if n.startswith("model.") and isinstance(s, Made)]
    needed |= {(s.node, s.output) for s in made[-1:]}
    return [
        artefact
        for entry in entries
        for output, artefact in entry.outputs.items()
        if output in spare and artefact.path.exists()
        if (entry.node.name, output) not in needed
        and ((entry.node.name, output) in used or output in ("previous", "last"))
    ]
