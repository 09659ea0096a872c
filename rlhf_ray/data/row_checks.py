"""What a tokenizer says against the rows of a table, and how broken rows are told. Needs no torch."""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_ray.data.chat import check_template, encode_answer, encode_dialogue, encode_prompt
from rlhf_ray.data.light_tokenizer import LightTokenizer
from rlhf_ray.data.schemas import Kind, row_problems
from rlhf_ray.data.template import control_tokens
from rlhf_ray.errors import SHOWN_PROBLEMS, UserError

if TYPE_CHECKING:
    import pyarrow as pa


def refuse_broken(place: str, problems: Sequence[str], num_rows: int) -> None:
    """Tells broken rows, if there are any: one in the error itself, several on stderr before it.

    Raises:
        UserError: there are some.
    """
    if not problems:
        return
    if len(problems) == 1:
        raise UserError(f"{place} {problems[0]}")
    for problem in problems[:SHOWN_PROBLEMS]:
        print(problem, file=sys.stderr)
    more = len(problems) - SHOWN_PROBLEMS
    not_shown = f", {more} of them not shown" if more > 0 else ""
    raise UserError(f"{place} {problems[0]} (the first of {len(problems)} problems in {num_rows} rows{not_shown})")


def token_problems(
    kind: Kind,
    table: "pa.Table",
    tokenizer: LightTokenizer,
    *,
    limit: int | None,
    reason: str = "",
    patience: int | None = None,
) -> list[str]:
    """Rows that spell a special token, that the chat template refuses, or that are too long; in row order.

    Args:
        limit: most tokens of a row, and none for no limit.
        reason: why it is the limit, and the remedy.
        patience: rows are measured from the longest text down until this many in turn are well, and then the first of
            each order of roles, which a template may refuse; None measures all.
    """
    spelt = re.compile("|".join(map(re.escape, control_tokens(tokenizer))) or r"(?!)")
    rows = [row for row in enumerate(table.to_pylist()) if not any(row_problems(kind, row[1]))]
    texts = {number: "\0".join(_texts(row)) for number, row in rows}
    problems: dict[int, str] = {}
    as_real: Any = tokenizer  # it has what encoding needs
    shapes, well = set[tuple[str, ...]](), 0
    for number, row in sorted(rows, key=lambda row: -len(texts[row[0]])):
        if found := spelt.search(texts[number]):
            problems[number] = f" holds the special token {found[0]!r}, which would end or fake a turn; remove it"
            continue
        roles = tuple(message["role"] for message in row["messages"])
        if patience is None or well < patience or roles not in shapes:
            try:
                if roles not in shapes:
                    shapes.add(roles)
                    check_template(as_real, roles)  # on texts that cannot be mistaken for each other
                length = _num_tokens(tokenizer, row)
                if limit is not None and length > limit:
                    problems[number] = f": has {length} tokens, at most {limit} fit: {reason}"
            except UserError as error:
                if str(error).startswith(tokenizer.name_or_path):  # about the template: once is enough
                    return [f"row {number}: {error}"]
                problems[number] = f": {error}"
            well = 0 if number in problems else well + 1
    return [f"row {number}{problem}" for number, problem in sorted(problems.items())]


def _num_tokens(tokenizer: Any, row: Mapping[str, Any]) -> int:
    """Tokens of the row with its answer, the longer of two."""
    if "tokens" in row:
        return len(encode_prompt(tokenizer, row["messages"])) + len(row["tokens"])
    if sides := _sides(row):
        answers = (encode_answer(tokenizer, row[side], finished=row[f"{side}_finished"]) for side in sides)
        return len(encode_prompt(tokenizer, row["messages"])) + max(map(len, answers))
    if row["messages"][-1]["role"] == "assistant":
        return len(encode_dialogue(tokenizer, row["messages"])[0])
    return len(encode_prompt(tokenizer, row["messages"]))


def _texts(row: Mapping[str, Any]) -> Iterator[str]:
    yield from (message["content"] for message in row["messages"])
    yield from (row[side] for side in _sides(row))


def _sides(row: Mapping[str, Any]) -> Sequence[str]:
    """The columns of a row's two answers, if it has any."""
    return next((sides for sides in (("chosen", "rejected"), ("first", "second")) if sides[0] in row), ())
