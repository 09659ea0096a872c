"""`rlhf-ray show` and `rlhf-ray clean`: what a recipe is, what of it is done, and what lies on disk."""

import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from model.checkpoint_files import read_config
from model.flops import num_parameters
from rlhf_ray.config import Config, load_config, parse_config
from rlhf_ray.errors import UserError
from rlhf_ray.machine import settled
from rlhf_ray.preflight.memory import model_shape
from rlhf_ray.recipe.ledger import Entry, Ledger, length_of, to_run, waiting, why
from rlhf_ray.recipe.rounds import recipe
from rlhf_ray.recipe.stages import MODELS, Given, Source, wanted_stages
from rlhf_ray.run_state import RunDir, drop_state, source_hash

STATE_BYTES = 12
"""Of a parameter in a training state: fp32 weight and two moments."""


def recipe_facts(what: Path, *, out: Path | None, overrides: Sequence[str]) -> dict[str, Any]:
    """A recipe as JSON values: `nodes` in their order, and `disk`.

    Args:
        what: a config, or the directory of a run, whose last config counts.
        out: the run directory of a config; none for one that is not there.
    Raises:
        UserError: there is no such thing.
    """
    if what.is_dir():
        if out is not None or overrides:
            raise UserError(
                f"{what}: is a run's directory, which has a config of its own; give a CONFIG with --out or --set"
            )
        out = what
        if (recorded := RunDir(what).manifest().get("config")) is None:
            raise UserError(
                f"{what}: holds no run (no config in manifest.json); give the directory of a run, or a CONFIG"
            )
        config = parse_config(recorded, source=str(what / "manifest.json"))
    else:
        config = settled(load_config(what, overrides))
    run = RunDir(out if out is not None else "/nonexistent")
    wanted = wanted_stages(config)
    entries = Ledger(config, recipe(config, wanted), run).entries()
    running = to_run(entries, wanted)
    names = [entry.node.name for entry in running]
    stop = waiting(entries)
    waits = {} if stop is None else {e.node.name: f"for {stop[1].field}" for e in entries[entries.index(stop[0]) :]}
    nodes = [_node(e, names, waits.get(e.node.name, "") if e.node.stage.name in wanted else "") for e in entries]
    return {
        "config": str(what),
        "out": None if out is None else str(out),
        "nodes": nodes,
        "disk": {
            "now_bytes": sum(node["disk_bytes"] for node in nodes),
            "still_needed_bytes": still_needed(config, running),
            "keep": list(config.run.keep),
        },
    }


def _node(entry: Entry, running: Sequence[str], waits: str) -> dict[str, Any]:
    node, step = entry.node, entry.step
    if not node.makes:
        state, reason = "given", "the config names what it would make"
    elif node.name in running:
        state, reason = "to do", why(entry, running)
    elif entry.done:
        state, reason = "done", ""
    elif waits:
        state, reason = "waits", waits
    else:
        state, reason = "not asked for", ""
    facts = step.facts() if step is not None and entry.done else {}
    return {
        "node": node.name,
        "stage": node.stage.name,
        "scope": node.scope,
        "inputs": {name: _source(source) for name, source in node.inputs.items()},
        "state": state,
        "why": reason,
        "step": entry.directory or None,
        "steps_done": facts.get("steps"),
        "seconds": facts.get("seconds"),
        "disk_bytes": _size(step.path if entry.done else step.partial) if step is not None else 0,
        "other_source": bool(facts) and facts.get("source") != source_hash(),
        "makes": {
            output: {
                "path": str(entry.outputs[output].path) if output in entry.outputs else None,
                "kept": output in entry.outputs and entry.outputs[output].path.exists(),
                "parents": dict(entry.outputs[output].parents) if output in entry.outputs else {},
            }
            for output in node.makes
        },
    }


def _source(source: Source) -> str:
    return f"{source.field}={source.path}" if isinstance(source, Given) else f"{source.node}/{source.output}"


def still_needed(config: Config, running: Sequence[Entry]) -> int | None:
    """Bytes that models and training states will add, as far as `run.keep` leaves them; None where no shape is known.

    Tables, and what a stage holds only while it is under way, are not counted.
    """
    shape = model_shape(config, {})
    if config.inputs.chat or config.inputs.base:
        try:
            shape = read_config(config.inputs.chat or config.inputs.base or "")
        except ValueError:  # what is wrong with it is for a run to say
            shape = None
    if shape is None:
        return None
    weight = 2 if config.run.precision == "bf16" else 4
    total = 0
    for entry in running:
        node = entry.node
        for output in node.makes:
            if output in MODELS and (output in config.run.keep or output == "policy"):
                total += weight * num_parameters(shape, scalar_head=output in ("helpfulness", "safety"))
        if "states" in config.run.keep and length_of(entry.config, node.stage):
            total += sum(
                STATE_BYTES * num_parameters(shape, scalar_head=role != "policy") for role in node.stage.trains
            )
    return total


def print_recipe(found: Mapping[str, Any]) -> None:
    """As a table, the models' lineage, and the disk."""
    console = Console(width=130)
    table = Table(box=SIMPLE_HEAD)
    for name, justify in (
        ("stage", "left"),
        ("works on", "left"),
        ("state", "left"),
        ("time", "right"),
        ("disk", "right"),
    ):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for node in found["nodes"]:
        inputs = ", ".join(dict.fromkeys(_short(value) for value in node["inputs"].values()))
        state = node["state"] + (f": {node['why']}" if node["why"] else "")
        state += " (other source)" * node["other_source"]
        seconds = "" if node["seconds"] is None else _time(node["seconds"])
        table.add_row(node["node"], escape(inputs), escape(state), seconds, _bytes(node["disk_bytes"]))
    console.print(table)
    for line in lineage(found["nodes"]):
        console.print(escape(line), highlight=False, soft_wrap=True)
    disk = found["disk"]
    more = disk["still_needed_bytes"]
    console.print(
        f"disk: {_bytes(disk['now_bytes']) or '0'} now; models and training states to come: "
        f"{'not known' if more is None else _bytes(more) or '0'}",
        highlight=False,
    )


def lineage(nodes: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Each model that there is, with what it comes from."""
    made_by = {node["node"]: node for node in nodes}
    for node in nodes:
        for output, made in node["makes"].items():
            if output in MODELS and made["path"]:
                kept = "" if made["kept"] else " (not kept)"
                yield f"{output}: {node['step']}{kept} <- " + " <- ".join(_ancestors(node, made_by))


def _ancestors(node: Mapping[str, Any], made_by: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The line of models, or of the table at its beginning, that a node's models come from."""
    for name in ("chat", "base", "corpus"):
        if name in node["inputs"]:
            source = node["inputs"][name]
            maker = made_by.get(source.partition("/")[0])
            yield maker["step"] or source if maker is not None and "=" not in source else source
            if maker is not None and "=" not in source:
                yield from _ancestors(maker, made_by)
            return


def _short(source: str) -> str:
    """An input as a table shows it: a path by its last part, an output by its name where that is enough."""
    field, equals, path = source.partition("=")
    node, _, output = source.partition("/")
    return f"{field}={Path(path).name}" if equals else source if "@" in node else output


def _size(directory: Path) -> int:
    """Bytes of a directory's files, each once whatever names it has."""
    sizes = {}
    for file in directory.rglob("*") if directory.is_dir() else ():
        with suppress(FileNotFoundError):  # a run may be at work there
            if stat.S_ISREG((found := file.lstat()).st_mode):
                sizes[found.st_dev, found.st_ino] = found.st_size
    return sum(sizes.values())


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            return f"{number:.3g} {unit}" if number else ""
        number /= 1000
    raise AssertionError


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def clean_run(directory: Path, *, unfinished: bool) -> None:
    """Removes training states of finished steps, and on demand all that is not finished; says what.

    Raises:
        UserError: there is no run, or a process works in it.
    """
    run = RunDir(directory)
    if not run.steps.is_dir():
        raise UserError(f"{directory}: holds no run (no steps/); give the directory of a run")
    with run.locked():
        freed = 0
        for step in sorted(run.steps.iterdir()):
            before = _size(step)
            if step.suffix == ".partial":
                if unfinished:
                    shutil.rmtree(step)
            else:
                drop_state(step)
            if less := before - _size(step):
                print(f"{step.name}: {_bytes(less)}")
                freed += less
        print(f"{_bytes(freed) or 'nothing'} removed")
