"""What is wrong with a config value, in one line: field, value, rule, remedy."""

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import NoneType
from typing import Any, get_args

from pydantic import BaseModel


def similar(name: str, known: Iterable[str]) -> str:
    """A remedy for a name that is not known: the one that was probably meant, or all there are."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}"


def explain(problem: Mapping[str, Any], defaults: BaseModel) -> str:
    """One of pydantic's complaints as field, value, rule and remedy.

    Args:
        problem: an entry of `ValidationError.errors()`.
        defaults: the whole config as it is without any value given.
    """
    path, value = key_path(problem), problem["input"]
    field = ".".join(path)
    if problem["type"] == "extra_forbidden":
        return f"{field} is not a known key; {_remedy_for_key(path, type(defaults))}"
    if problem["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"{field}={value!r} must be a section of keys; write [{field}] and its keys below"
    default = _default(path, defaults)
    if problem["type"] in ("tuple_type", "list_type"):
        return f"{field}={value!r} must be a list, for example [{_toml(value)}]"
    rule = problem["msg"].replace("Input should be", "must be").replace("valid ", "").replace("a integer", "an integer")
    if problem["type"] == "too_short":
        rule = "must hold at least one value"
    elif problem["type"] in ("missing", "too_long"):
        rule = "must hold two values"  # pairs are the only lists of a fixed length
    if problem["type"] == "literal_error" and isinstance(value, str):
        close = difflib.get_close_matches(value, re.findall(r"'([^']*)'", rule), n=1)
        if close:
            return f"{field}={value!r} {rule}; did you mean {close[0]}?"
    if not isinstance(default, dict) and _may_be_none(path, type(defaults)):
        rule += ', or "none"'
    return f"{field}={value!r} {rule}; correct it, or leave it out for the default, {_toml(default)}"


def key_path(problem: Mapping[str, Any]) -> list[str]:
    """The keys that lead to a complaint's field; a place in a list is left out."""
    return [part for part in problem["loc"] if isinstance(part, str)]


def _remedy_for_key(path: Sequence[str], root: type[BaseModel]) -> str:
    """What an unknown key may have meant: a similar one beside it, or one of this name in another section."""
    known = list(_section(path[:-1], root).model_fields)
    close = difflib.get_close_matches(path[-1], known, n=1)
    if close:
        return f"did you mean {'.'.join([*path[:-1], close[0]])}?"
    elsewhere = [key for key in _all_keys(root) if key.split(".")[-1] == path[-1]]
    same_section = [key for key in elsewhere if key.split(".")[0] == path[0]]
    if elsewhere:
        return f"did you mean {' or '.join((same_section or elsewhere)[:3])}?"
    return f"known here: {', '.join(known)}"


def _section(path: Sequence[str], section: type[BaseModel]) -> type[BaseModel]:
    for name in path:
        found = _section_in(section.model_fields[name].annotation)
        assert found is not None
        section = found
    return section


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds: itself, one that may be missing, or a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section_in(part)) is not None), None)


def _may_be_none(path: Sequence[str], root: type[BaseModel]) -> bool:
    return NoneType in get_args(_section(path[:-1], root).model_fields[path[-1]].annotation)


def _all_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        if (below := _section_in(field.annotation)) is not None:
            yield from _all_keys(below, f"{prefix}{name}.")


def _default(path: Sequence[str], value: Any) -> Any:
    """The default of a key; of the whole list for a place in one."""
    for place, name in enumerate(path):
        if not isinstance(value, BaseModel):
            break
        below = _section_in(type(value).model_fields[name].annotation)
        value = getattr(value, name)
        if value is None and below is not None and place + 1 < len(path):
            value = below()
    return value


def _toml(value: Any) -> str:
    """A value as one writes it in TOML."""
    if value is None:
        return "none"
    if isinstance(value, tuple) and any(isinstance(item, BaseModel) for item in value):
        value = tuple(item.model_dump(exclude_defaults=True) for item in value)
    return json.dumps(list(value) if isinstance(value, tuple) else value, default=str)
