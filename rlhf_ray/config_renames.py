"""Names that settings had in earlier versions: read as today's, and told."""

import sys
from collections.abc import Mapping
from typing import Any

from rlhf_ray.errors import UserError

RENAMED = {
    "collect.versions": "pairs.models",
    "collect.temperatures": "pairs.temperatures",
    "collect.pairs_per_prompt": "pairs.pairs_per_prompt",
    "collect.max_new_tokens": "pairs.max_new_tokens",
    "collect.annotator_noise": "label.noise",
    "collect.held_out": "reward.held_out",
}
STAGES = {"collect": ("pairs", "label")}
"""A stage of earlier versions -> those that do its work."""


def with_todays_names(raw: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """The tables with settings under the names that they have now; says which were read so.

    Raises:
        UserError: a setting is given under both names.
    """
    tables = {name: dict(table) if isinstance(table, Mapping) else table for name, table in raw.items()}
    told = []
    for old, new in RENAMED.items():
        (section, key), (to, name) = old.split("."), new.split(".")
        if isinstance(table := tables.get(section), dict) and key in table:
            target = tables.setdefault(to, {})
            if not isinstance(target, dict):
                continue  # validation says what is wrong with it
            if name in target:
                raise UserError(f"{source}: {old} is {new} now, and both are given; leave out {old}")
            target[name] = table.pop(key)
            told.append(f"{old} is {new} now")
    for section in {old.partition(".")[0] for old in RENAMED}:
        if tables.get(section) == {}:
            del tables[section]
    if isinstance(run := tables.get("run"), dict) and isinstance(stages := run.get("stages"), list | tuple):
        run["stages"] = [name for s in stages for name in (STAGES.get(s, (s,)) if isinstance(s, str) else (s,))]
        told += [f"the stage {old} is {' and '.join(new)} now" for old, new in STAGES.items() if old in stages]
    if told:
        print(f"{source}: {'; '.join(told)}", file=sys.stderr)
    return tables
