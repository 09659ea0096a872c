"""The columns of a row of someone else's file: what they are called, what they say of it, and which nobody read."""

import ast
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

_OTHER_NAMES = {
    "messages": ("conversations", "conversation", "dialogue"),
    "prompt": ("instruction", "question", "query", "input"),
    "completion": ("output", "response", "answer"),
    "system": ("system_prompt", "system_message"),
}
"""Names of a column elsewhere (Alpaca, ShareGPT, DPO data), looked for where a row lacks ours."""
_LISTS = ("chosen", "rejected", "prompt", "completion", "messages")
# Messages written as text, by json.dumps or str.
_LIST_AS_TEXT = re.compile(r"""\s*\[?\s*\{\s*["'](?:role|content|from|value)["']\s*:""")

_LABELS = (
    *("label", "labels", "kto_tag", "is_chosen", "accepted", "is_accepted", "approved", "preferred", "is_preferred"),
    *("desirable", "is_desirable", "good", "is_good", "correct", "is_correct"),
)
_OPPOSITES = ("rejected", "is_rejected", "bad", "is_bad", "undesirable", "is_undesirable")
_GRADES = ("rating", "score", "quality", "feedback", "verdict", "vote", "thumbs", "preference")
"""Columns whose words may be a verdict; their numbers are of an unknown scale."""
_LEARNT = ("weight", "train", "trainable", "learn", "loss")
"""Keys of a message that say whether an answer is to be learnt from."""
_GOOD = {"true", "t", "yes", "y", "good", "chosen", "accepted", "accept", "approved", "preferred", "desirable"}
_GOOD |= {"desired", "positive", "correct", "right", "liked", "like", "up", "thumbs_up", "upvote"}
_BAD = {"false", "f", "no", "n", "bad", "rejected", "reject", "unpreferred", "dispreferred", "undesirable", "undesired"}
_BAD |= {"negative", "incorrect", "wrong", "disliked", "dislike", "down", "thumbs_down", "downvote"}


class BrokenRow(Exception):
    """A row that cannot be imported."""

    def __init__(self, reason: str, detail: str):
        """Args: a reason to count by, and one line that names field, value, rule and remedy."""
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class Columns(dict[str, Any]):
    """A row under the names that the readers know, which notes the columns that they `get`.

    Raises:
        BrokenRow: a text looks like a list of messages and cannot be read as one.
    """

    def __init__(self, row: Mapping[str, Any], *, lists: bool = True):
        """Args: lists: whether texts that are written lists of messages are read as such."""
        super().__init__(row)
        self._row = row
        self._read: set[str] = set()
        self._own_names: dict[str, tuple[str, ...]] = {}
        for name, others in _OTHER_NAMES.items():
            is_text = name in ("prompt", "completion")
            other = next((other for other in others if not _is_empty(row.get(other))), None)
            if other is not None and _is_empty(row.get(name)) and not (is_text and "messages" in self):
                self[name], self._own_names[name] = row[other], (other,)
        parts = [row.get(name) for name in ("instruction", "input")]
        if self._own_names.get("prompt") == ("instruction",) and all(isinstance(p, str) and p.strip() for p in parts):
            self["prompt"], self._own_names["prompt"] = "\n\n".join(map(str, parts)), ("instruction", "input")
        for name in _LISTS if lists else ():
            if name in self:
                self[name] = _messages_written_as_text(self[name], name)

    def get(self, name: str, default: Any = None) -> Any:
        """The value, which from then on counts as read."""
        self._read.update(self._own_names.get(name, (name,)))
        return super().get(name, default)

    def refuse_bad_answers(self) -> None:
        """Reads the labels of a demonstration and of its answers.

        Raises:
            BrokenRow: one says that an answer is not to be learnt from, or says neither that nor the opposite.
        """
        for name in (*_LABELS, *_OPPOSITES, *_GRADES):
            value = super().get(name)
            is_grade = name in _GRADES and re.fullmatch(r"\s*[-+.\d]+\s*", str(value)) is not None
            is_answer = name in _LISTS and not isinstance(value, bool)
            good = None if is_grade or is_answer else verdict(value)
            if good is not None:
                self._read.add(name)
                if good == (name in _OPPOSITES):
                    raise BrokenRow("labelled bad", f"{name}={short(value)} marks an answer not to be learnt from")
            elif name in _LABELS and not _is_empty(value):
                rule = "must say true or false; map it to these, or drop the column"
                raise BrokenRow("unknown label", f"{name}={short(value)} {rule}")
        for name in ("prompt", "completion", "messages"):
            for place, message in enumerate(_mappings(super().get(name))):
                if message.get("role", message.get("from")) not in ("system", "user", "human"):
                    self._refuse_unlearnt(message, self._shown(name), place)

    def _refuse_unlearnt(self, message: Mapping[str, Any], column: str, place: int) -> None:
        for key in _LEARNT:
            if (good := verdict(message.get(key))) is not None:
                self._read.add(f"{column}[].{key}")
            if good is False:
                raise BrokenRow(
                    "labelled bad",
                    f"{column}[{place}].{key}={message[key]!r} marks an answer not to be learnt from, and training "
                    "learns every answer of a dialogue; cut the dialogue before it",
                )

    def unused(self) -> Iterator[str]:
        """Names of the columns that hold something and were not read, and of the like among the keys of messages."""
        yield from (name for name, value in self._row.items() if name not in self._read and not _is_empty(value))
        for name in _LISTS:
            if self._read.issuperset(self._own_names.get(name, (name,))):
                messages = _mappings(super().get(name))
                held = {key for message in messages for key, value in message.items() if not _is_empty(value)}
                keys = {f"{self._shown(name)}[].{key}" for key in held - {"role", "content", "from", "value"}}
                yield from sorted(keys - self._read)

    def _shown(self, name: str) -> str:
        return self._own_names.get(name, (name,))[0]


def verdict(value: Any) -> bool | None:
    """Whether a label says good, in any of its usual spellings; None where it says neither good nor bad."""
    word = str(value).strip().lower()
    try:
        return {1.0: True, 0.0: False, -1.0: False}.get(float(word))
    except ValueError:
        word = re.sub("[ -]", "_", word)
        return True if word in _GOOD else False if word in _BAD else None


def short(value: Any) -> str:
    """A value as one short line."""
    text = repr(value[:60] if isinstance(value, str) else value)
    return text if len(text) <= 60 else text[:57] + "..."


def _messages_written_as_text(value: Any, name: str) -> Any:
    """Messages, whether they come as a list, as one mapping, or as a text that is either; other values as they are."""
    if isinstance(value, str) and _LIST_AS_TEXT.match(value):
        text = value
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            try:
                value = ast.literal_eval(text)
            except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
                raise BrokenRow(
                    "not JSON",
                    f"{name}={short(text)} looks like a list of messages and is none; write it as JSON, or "
                    "choose --format strings",
                ) from error
    return [value] if isinstance(value, Mapping) else value


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [each for each in value if isinstance(each, Mapping)] if isinstance(value, list) else []


def _is_empty(value: Any) -> bool:
    is_nan = value != value  # what pandas writes for a missing value
    return value is None or is_nan or value in ([], {}) or (isinstance(value, str) and not value.strip())
