"""A row of someone else's file as a dialogue: HH-RLHF texts, lists of messages, or plain strings."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from rlhf_ray.data.import_columns import BrokenRow, Columns, short

ImportKind = Literal["comparisons", "demonstrations", "prompts"]
Format = Literal["auto", "hh", "messages", "strings"]
"""How a row's texts are read; auto goes by their types: lists are messages, texts with a prompt are strings,
texts without one are HH."""
Guideline = Literal["helpfulness", "safety"]
TooLong = Literal["skip", "drop-turns"]
"""What becomes of a dialogue that is too long."""

Message: TypeAlias = dict[str, str]

_HH_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_HH_DIALOGUE = re.compile(r"\s*Human:.*\r?\n\r?\nAssistant:", re.DOTALL)
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}
_ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}
_ROLES |= {role: role for role in ("system", "user", "assistant")}
"""Roles as they are called elsewhere, in small letters."""
# Columns that hold an answer or a whole dialogue, in the order in which they are looked for.
_DIALOGUE_COLUMNS = ("chosen", "completion", "messages")


@dataclass(frozen=True)
class Dialogue:
    """A dialogue up to where it is answered, and its answers."""

    context: list[Message]
    """An optional system message, then user and assistant in turn; ends in user."""
    answers: tuple[str, ...]
    """Chosen and rejected of a comparison, the answer of a demonstration, none of a prompt."""

    def num_chars(self) -> int:
        """Characters of the context and of the longest answer."""
        return sum(len(message["content"]) for message in self.context) + max(map(len, self.answers), default=0)

    def without_oldest_pair(self) -> "Dialogue | None":
        """The dialogue less its first user message and the answer to it, or None where that is all there is."""
        start = 1 if self.context[0]["role"] == "system" else 0
        if len(self.context) - start < 3:
            return None
        return replace(self, context=self.context[:start] + self.context[start + 2 :])


def read_dialogue(kind: ImportKind, row: Columns, form: Format) -> Dialogue:
    """What a row says, whatever its format.

    A comparison needs `chosen` and `rejected`: whole dialogues that differ in the last answer, or answers beside a
    `prompt` (or beside `messages` that end in user). A demonstration is `chosen`, `completion`, `messages` or `text`,
    whichever comes first; a prompt is the same less its last answer, or `prompt` alone. A `system` column becomes the
    dialogue's system message.

    Raises:
        BrokenRow: a column is missing or of the wrong type, a text is empty, turns are out of order, the
            dialogues of two answers differ, the answers are equal, or the answer is labelled as a bad one.
    """
    if form == "strings":
        _find_prompt(row)
    if kind == "comparisons":
        sides = [_checked(_with_system(row, _dialogue(row, side, form)), side) for side in ("chosen", "rejected")]
        (context, chosen), (other, rejected) = [(turns[:-1], turns[-1]["content"]) for turns in sides]
        if context != other:
            raise BrokenRow(
                "dialogues differ",
                f"chosen and rejected differ before their last answers, {_first_difference(context, other)}; "
                "both must answer the same dialogue",
            )
        if chosen.strip() == rejected.strip():
            raise BrokenRow("equal answers", f"rejected={short(rejected)} must differ from chosen; it teaches nothing")
        return Dialogue(context, (chosen, rejected))
    turns = _with_system(row, _only_dialogue(row, form, prompts=kind == "prompts"))
    if kind == "demonstrations":
        return Dialogue(_checked(turns, "the dialogue")[:-1], (turns[-1]["content"],))
    if turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    return Dialogue(_checked(turns, "the prompt", last="user"), ())


def _only_dialogue(row: Columns, form: Format, *, prompts: bool) -> list[Message]:
    for column in _DIALOGUE_COLUMNS:
        if row.get(column) is not None:
            if not prompts and column != "chosen":
                row.refuse_bad_answers()
            return _dialogue(row, column, form)
    if prompts and row.get("prompt") is not None:
        return _prompt(row["prompt"], form)
    if row.get("text") is not None:
        if not prompts:
            row.refuse_bad_answers()
        return _dialogue(row, "text", form)
    wanted = (*_DIALOGUE_COLUMNS, *(("prompt",) if prompts else ()), "text")
    raise BrokenRow("missing key", f"one of {', '.join(wanted)} must be there; {_keys(row)}")


def _dialogue(row: Columns, column: str, form: Format) -> list[Message]:
    """The turns that a column holds, behind those of the prompt where the column is only an answer."""
    value = row.get(column)
    prompt = row.get("prompt") if column not in ("messages", "text") else None
    if value is None:
        raise BrokenRow("missing key", f"{column!r} must be there and not null; {_keys(row)}")
    if isinstance(value, list) and form in ("auto", "messages"):
        turns = _messages(value, column)
        if prompt is None and column != "messages" and turns and turns[0]["role"] == "assistant":
            prompt = row.get("messages")
        if prompt is None or (isinstance(prompt, str) and turns and turns[0]["role"] != "assistant"):
            return turns
        before = _prompt(prompt, form)
        return turns if turns[: len(before)] == before else before + turns
    if not isinstance(value, str) or form == "messages":
        rule = {"auto": "text or a list of messages", "messages": "a list of messages"}.get(form, "text")
        raise BrokenRow("wrong type", f"{column}={short(value)} must be {rule}; convert it or choose another --format")
    if prompt is None and column not in ("messages", "text"):
        prompt = row.get("messages")
    text = _text(value, column)
    if form != "strings" and (prompt is None or _HH_DIALOGUE.match(text)):
        return _hh_turns(text, column)
    if prompt is None:
        raise BrokenRow("missing key", f"'prompt' must be there beside {column!r}; {_keys(row)}")
    return [*_prompt(prompt, form), {"role": "assistant", "content": text.strip()}]


def _prompt(prompt: Any, form: Format) -> list[Message]:
    if isinstance(prompt, list) and form in ("auto", "messages"):
        return _messages(prompt, "prompt")
    text = _text(prompt, "prompt")
    if form == "hh" or (form == "auto" and _HH_DIALOGUE.match(text)):
        turns = _hh_turns(text, "prompt")
        # "\n\nAssistant:" at the end asks for the answer.
        return turns[:-1] if turns and not turns[-1]["content"] else turns
    return [{"role": "user", "content": text.strip()}]


def _find_prompt(row: Columns) -> None:
    """Two texts without a prompt: what they begin with alike, up to the last white space, becomes their prompt."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if row.get("prompt") is not None or not (isinstance(chosen, str) and isinstance(rejected, str)):
        return
    length = 0
    for place, (one, other) in enumerate(zip(chosen, rejected, strict=False)):
        if one != other:
            break
        if one.isspace():
            length = place + 1
    row.update(prompt=chosen[:length], chosen=chosen[length:], rejected=rejected[length:])


def _with_system(row: Columns, turns: list[Message]) -> list[Message]:
    """The turns behind what the row's `system` column says."""
    system = row.get("system")
    if system is None or not _text(system, "system").strip():
        return turns
    if not turns or turns[0]["role"] != "system":
        return [{"role": "system", "content": system}, *turns]
    if turns[0]["content"].strip() != system.strip():
        raise BrokenRow(
            "two system messages",
            f"system={short(system)} and the dialogue's own, {short(turns[0]['content'])}, differ; keep one of them",
        )
    return turns


def _hh_turns(text: str, column: str) -> list[Message]:
    before, *pieces = _HH_TURN.split(text.replace("\r\n", "\n"))
    if "Assistant" not in pieces[::2] and column != "prompt":
        raise BrokenRow(
            "no 'Assistant:'",
            f"{column}={short(text)} must be HH text with 'Human:' and 'Assistant:' turns; "
            "mend it, or give the prompt in a column of its own",
        )
    if before:
        raise BrokenRow("turns out of order", f"{column}={short(text)} must begin with 'Human:'")
    pairs = zip(pieces[::2], pieces[1::2], strict=True)
    return [{"role": _HH_ROLES[name], "content": content.strip()} for name, content in pairs]


def _messages(value: Sequence[Any], column: str) -> list[Message]:
    """Messages of role and content, or of ShareGPT's from and value. An empty system message is none."""
    turns = []
    for place, message in enumerate(value):
        where = f"{column}[{place}]"
        if not isinstance(message, Mapping):
            raise BrokenRow("wrong type", f"{where}={short(message)} must have role and content")
        own = {
            "role": message.get("role", message.get("from")),
            "content": message.get("content", message.get("value")),
        }
        if own["role"] == "system" and (own["content"] is None or not _text(own["content"], where).strip()):
            continue
        for key, found in own.items():
            if found is None:
                raise BrokenRow("missing key", f"{where}.{key} must be there and not null; {_keys(message)}")
        role = _ROLES.get(_text(own["role"], f"{where}.role").lower())
        if role is None:
            raise BrokenRow(
                "other role",
                f"{where}.role={short(own['role'])} must be system, user or assistant; rename it, or leave the row out",
            )
        turns.append({"role": role, "content": _text(own["content"], f"{where}.content")})
    return turns


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise BrokenRow("wrong type", f"{field}={short(value)} must be text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BrokenRow("wrong type", f"{field} must be valid Unicode; it has half a character pair") from error
    return value


def _checked(turns: list[Message], name: str, *, last: str = "assistant") -> list[Message]:
    """The turns, if they alternate after an optional system message, are not empty and end as they must."""
    if not turns:
        raise BrokenRow("turns out of order", f"{name} has no message and must end in {last}")
    start = 1 if turns[0]["role"] == "system" else 0
    for place, turn in enumerate(turns):
        expected = ("user", "assistant")[(place - start) % 2]
        if place >= start and turn["role"] != expected:
            raise BrokenRow(
                "turns out of order", f"{name}: message {place} has role {turn['role']!r} and must have {expected!r}"
            )
    if turns[-1]["role"] != last:
        raise BrokenRow("turns out of order", f"{name} ends in {turns[-1]['role']!r} and must end in {last!r}")
    for place, turn in enumerate(turns):
        if not turn["content"].strip():
            answer = place == len(turns) - 1 and last == "assistant"
            reason = "empty answer" if answer else "empty message"
            raise BrokenRow(reason, f"{name}: message {place} ({turn['role']}) must not be empty")
    return turns


def _first_difference(one: Sequence[Message], other: Sequence[Message]) -> str:
    if len(one) != len(other):
        return f"which have {len(one)} and {len(other)} messages before them"
    place = next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
    return f"at message {place}"


def _keys(row: Mapping[str, Any]) -> str:
    keys = [str(key) for key, value in row.items() if value is not None]
    return f"there is {short(', '.join(keys) or 'nothing')}"
