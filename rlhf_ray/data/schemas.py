"""The Parquet tables of the recipe: columns, reading and writing, and the rules of their rows."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from rlhf_ray.errors import UserError

Kind = Literal["prompts", "demonstrations", "corpus", "pairs", "comparisons", "samples"]

STRENGTHS = ("significantly", "better", "slightly", "negligibly")
"""How much better the chosen answer is, strongest first."""
SAFETY_BINS = ("chosen_safe", "both_safe", "both_unsafe")
"""Which of two answers are safe; in "chosen_safe" the rejected one is not."""
GUIDELINES = ("helpfulness", "safety")
"""What the annotator was asked to judge by."""

_TEXT = pa.string()
MESSAGES = pa.list_(pa.struct([("role", _TEXT), ("content", _TEXT)]))
"""A dialogue: an optional system message, then user and assistant in turn."""


def _field(name: str, kind: pa.DataType = _TEXT, *, nullable: bool = False, optional: bool = False) -> pa.Field:
    """A column; an optional one may be null or not there at all, which is the same."""
    return pa.field(name, kind, nullable=nullable or optional, metadata={"optional": ""} if optional else None)


def _is_optional(field: pa.Field) -> bool:
    return b"optional" in (field.metadata or {})


PROMPTS = pa.schema(
    [
        _field("prompt_id"),
        _field("messages", MESSAGES),  # ends in a user message
        _field("is_safety", pa.bool_()),  # tagged in advance as likely to draw unsafe answers
        _field("kind"),
        _field("truth"),  # JSON for the testbed's judge, "" elsewhere
    ]
)
DEMONSTRATIONS = pa.schema(
    [
        _field("messages", MESSAGES),  # ends in an assistant message
        _field("kind"),
        _field("finished", pa.bool_(), optional=True),  # False: the last answer was cut off without EOS
        _field("learnt", pa.list_(pa.bool_()), optional=True),  # of each answer, in order; null: all are
    ]
)
CORPUS = pa.schema([_field("text")])
PAIRS = pa.schema(
    [
        _field("pair_id"),
        _field("prompt_id"),
        _field("messages", MESSAGES),  # the dialogue that both answers reply to; ends in a user message
        _field("is_safety", pa.bool_()),
        _field("guideline"),
        _field("first"),  # which answer stands first is drawn: the side tells nothing of the model
        _field("second"),
        _field("first_finished", pa.bool_()),  # False: cut off without EOS
        _field("second_finished", pa.bool_()),
        _field("first_model"),
        _field("second_model"),
        _field("first_temperature", pa.float32()),
        _field("second_temperature", pa.float32()),
        _field("batch", pa.int32()),  # the week, from 0
    ]
)
COMPARISONS = pa.schema(
    [
        _field("comparison_id"),
        _field("prompt_id"),
        _field("messages", MESSAGES),  # the dialogue that both answers reply to; ends in a user message
        _field("is_safety", pa.bool_()),
        _field("guideline"),
        _field("chosen"),
        _field("rejected"),
        _field("chosen_finished", pa.bool_()),  # False: cut off without EOS
        _field("rejected_finished", pa.bool_()),
        _field("chosen_model"),
        _field("rejected_model"),
        _field("chosen_temperature", pa.float32(), nullable=True),  # null: not known
        _field("rejected_temperature", pa.float32(), nullable=True),
        _field("strength", nullable=True),
        _field("safety_bin", nullable=True),
        _field("annotator"),
        _field("batch", pa.int32()),
        _field("time"),  # ISO 8601, "" if not known
    ]
)
SAMPLES = pa.schema(
    [
        _field("prompt_id"),
        _field("messages", MESSAGES),  # the dialogue that is answered; ends in a user message
        _field("is_safety", pa.bool_()),
        _field("sample", pa.int32()),  # number among the answers to the prompt, from 0
        _field("tokens", pa.list_(pa.int32())),  # of the answer as sampled, EOS included: what is trained on
        _field("text"),  # for people
        _field("finished", pa.bool_()),  # False: cut off without EOS
        _field("model"),
        _field("temperature", pa.float32()),
        _field("helpfulness", pa.float32(), nullable=True),  # raw scores; null: not scored
        _field("safety", pa.float32(), nullable=True),
        _field("combined", pa.float32(), nullable=True),  # by the gate
        _field("scope"),  # of the round that sampled it, e.g. "v2"; "" outside rounds
    ]
)
SCHEMAS: dict[Kind, pa.Schema] = {
    "prompts": PROMPTS,
    "demonstrations": DEMONSTRATIONS,
    "corpus": CORPUS,
    "pairs": PAIRS,
    "comparisons": COMPARISONS,
    "samples": SAMPLES,
}
IDENTIFIERS: dict[Kind, tuple[str, ...]] = {
    "prompts": ("prompt_id",),
    "pairs": ("pair_id",),
    "comparisons": ("comparison_id",),
    "samples": ("scope", "model", "temperature", "prompt_id", "sample"),
}
"""Columns that name a row."""


def write_table(path: str | Path, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> None:
    """Write rows as one Parquet file, which appears by rename: whole or not at all.

    Args:
        rows: one mapping per row; a nullable column may be missing. An optional one that no row has is not written.
    Raises:
        ValueError: a row has a column that the schema lacks, lacks one that must not be null, or
            holds a value of another type.
    """
    path = Path(path)
    for number, row in enumerate(rows):
        if unknown := sorted(set(row) - set(schema.names)):
            known = ", ".join(schema.names)
            raise ValueError(f"{path}: row {number} has unknown column {unknown[0]!r}; the schema has {known}")
    try:
        written = pa.schema(
            [f for f in schema if not _is_optional(f) or any(row.get(f.name) is not None for row in rows)]
        )
        table = pa.Table.from_pylist(list(rows), schema=written)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"{path}: a value is not of its column's type ({error})") from error
    _refuse_nulls(table, written, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        pq.write_table(table, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_table(path: str | Path, schema: pa.Schema, *, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet file with the schema's columns; other columns of the file are ignored.

    Widths and layouts may differ (large_string, dictionary, list view, int64, double), kinds of type may not.

    Args:
        columns: read only these, a subset of the schema's; by default all, optional ones where the file has them.
    Returns:
        A table of exactly the asked columns, in the schema's order and types.
    Raises:
        UserError: the file is missing, unreadable or without rows, or a column is missing, of the
            wrong type or null where it must not be.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the path of a Parquet file")
    try:
        with pq.ParquetFile(path) as file:
            held = file.schema_arrow
            there = {field.name for field in schema if field.name in held.names or not _is_optional(field)}
            wanted = pa.schema([field for field in schema if field.name in (there if columns is None else columns)])
            _check_columns(held, pa.schema([field for field in wanted if field.name in there]), path)
            table = file.read(columns=[field.name for field in wanted if field.name in there])
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be read as Parquet ({reason}); is it whole? Write it again") from error
    if table.num_rows == 0:
        raise UserError(f"{path}: has 0 rows and must have at least one; check the step that wrote it")
    for field in wanted:
        if field.name not in there:
            table = table.append_column(field, pa.nulls(table.num_rows, field.type))
    _refuse_nulls(table, wanted, path)
    try:
        found = [_converted(table.column(field.name), field.type) for field in wanted]
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"{path}: does not fit its schema ({error}); convert the values") from error
    return pa.table(found, schema=wanted)


def read_groups(path: str | Path, schema: pa.Schema, *, rows: int = 1024) -> Iterator[list[dict[str, Any]]]:
    """The rows of a table that `write_table` wrote, so many at a time: memory does not grow with the table."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(rows, columns=schema.names):
            yield batch.to_pylist()


def join_tables(parts: Sequence[Path], path: Path, schema: pa.Schema) -> None:
    """Puts tables that `write_table` wrote one behind the other, one in memory at a time."""
    temporary = path.with_name(f".{path.name}.tmp")
    with pq.ParquetWriter(temporary, schema) as writer:
        for part in parts:
            writer.write_table(pq.read_table(part, schema=schema))
    temporary.replace(path)


def unused_columns(path: str | Path, schema: pa.Schema) -> list[str]:
    """Columns of a Parquet file, and fields of its messages, that the schema has no place for."""
    found = pq.read_schema(path)
    names = [name for name in found.names if name not in schema.names]
    if "messages" in schema.names:
        fields = {field.name for field in MESSAGES.value_type}
        names += [f"messages[].{f.name}" for f in found.field("messages").type.value_type if f.name not in fields]
    return names


def check_rows(kind: Kind, table: pa.Table) -> list[str]:
    """The rules that a schema cannot express, one message per broken rule and row, in row order.

    Prompts and comparisons end in a user message, demonstrations in an assistant one; roles alternate after
    an optional system message; no message is empty. Identifiers are unique. The answers of a pair differ, and its
    guideline and temperatures are as those of a comparison. What is learnt of a demonstration is said of each answer or
    not at all. A comparison has a chosen answer that differs from the rejected one (an empty rejected answer is fine: a
    model may stop at once), a known guideline, strength and safety bin, and temperatures that are finite and not
    negative (all but the guideline may be null). A sample has a prompt as above, tokens (no negative ones), a number
    that no other sample of its prompt, model, temperature and scope has, and scores that are finite or null.

    Args:
        kind: which rules.
        table: as `read_table` returns it, all columns.
    Returns:
        Messages that name kind and row, field, value, rule and remedy; empty if all is well.
    """
    problems: list[str] = []
    seen: dict[tuple[Any, ...], int] = {}
    identifier = IDENTIFIERS.get(kind, ())
    for number, row in enumerate(_rows(table)):
        found = list(row_problems(kind, row))
        if identifier:
            values = tuple(row[name] for name in identifier)
            first = seen.setdefault(values, number)
            if first != number:
                same = ", ".join(f"{name}={value!r}" for name, value in zip(identifier, values, strict=True))
                found.append(f"{same} is that of row {first} too; make it unique")
        problems.extend(f"{kind} row {number}: {problem}" for problem in found)
    return problems


def row_problems(kind: Kind, row: Mapping[str, Any]) -> Iterator[str]:
    """The broken rules of one row by itself, as in `check_rows` but without kind and row in front.

    Args:
        row: all columns of the kind's schema, of the schema's types.
    """
    rules = {
        "prompts": _prompt_problems,
        "demonstrations": _demonstration_problems,
        "corpus": _corpus_problems,
        "pairs": _pair_problems,
        "comparisons": _comparison_problems,
        "samples": _sample_problems,
    }
    return rules[kind](row)


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    for batch in table.to_batches(max_chunksize=1024):
        yield from batch.to_pylist()


def _prompt_problems(row: Mapping[str, Any]) -> Iterator[str]:
    return _message_problems(row["messages"], last="user")


def _demonstration_problems(row: Mapping[str, Any]) -> Iterator[str]:
    yield from _message_problems(row["messages"], last="assistant")
    answers = sum(message is not None and message["role"] == "assistant" for message in row["messages"])
    if (learnt := row.get("learnt")) is not None:
        if len(learnt) != answers or None in learnt:
            yield f"learnt={learnt} must be true or false for each of the {answers} answers; correct it or leave it out"
        elif not any(learnt):
            yield f"learnt={learnt} leaves nothing to learn; drop the row"


def _corpus_problems(row: Mapping[str, Any]) -> Iterator[str]:
    if not row["text"].strip():
        yield f"text={row['text']!r} must not be empty; drop the row"


def _pair_problems(row: Mapping[str, Any]) -> Iterator[str]:
    yield from _message_problems(row["messages"], last="user")
    if row["first"] == row["second"] and row["first_finished"] == row["second_finished"]:
        yield f"second={_short(row['second'])} must differ from first; drop the row, there is nothing to compare"
    yield from _unknown_words(row, [("guideline", GUIDELINES)])
    yield from _bad_temperatures(row, ("first_temperature", "second_temperature"))


def _comparison_problems(row: Mapping[str, Any]) -> Iterator[str]:
    yield from _message_problems(row["messages"], last="user")
    if not row["chosen"].strip():
        yield f"chosen={row['chosen']!r} must not be empty; give the chosen answer or drop the row"
    elif row["chosen"] == row["rejected"] and row["chosen_finished"] == row["rejected_finished"]:
        answer = _short(row["chosen"])
        yield f"rejected={answer} must differ from chosen; drop the row, it teaches nothing"
    yield from _unknown_words(row, [("guideline", GUIDELINES), ("strength", STRENGTHS), ("safety_bin", SAFETY_BINS)])
    yield from _bad_temperatures(row, ("chosen_temperature", "rejected_temperature"))


def _sample_problems(row: Mapping[str, Any]) -> Iterator[str]:
    yield from _message_problems(row["messages"], last="user")
    if row["sample"] < 0:
        yield f"sample={row['sample']} must not be negative; number the answers to a prompt from 0"
    if not row["tokens"]:
        yield "tokens=[] must hold the answer's token ids; drop the row"
    elif any(token is None or token < 0 for token in row["tokens"]):
        yield f"tokens={row['tokens'][:8]} must be token ids, none of them null or negative; correct it"
    yield from _bad_temperatures(row, ("temperature",))
    for field in ("helpfulness", "safety", "combined"):
        if row[field] is not None and not math.isfinite(row[field]):
            yield f"{field}={row[field]} must be finite, or null; score the answer again"


def _unknown_words(row: Mapping[str, Any], fields: Sequence[tuple[str, Sequence[str]]]) -> Iterator[str]:
    for field, known in fields:
        value = row[field]
        if value not in known and not (value is None and field != "guideline"):
            or_null = "" if field == "guideline" else ", or null"
            yield f"{field}={value!r} must be one of {', '.join(known)}{or_null}; correct it"


def _bad_temperatures(row: Mapping[str, Any], fields: Sequence[str]) -> Iterator[str]:
    for field in fields:
        if row[field] is not None and not (math.isfinite(row[field]) and row[field] >= 0):
            yield f"{field}={row[field]} must be finite and not negative, or null; correct it"


def _message_problems(found: Sequence[Mapping[str, str | None] | None], *, last: str) -> Iterator[str]:
    messages = [message for message in found if message is not None]
    if not found:
        yield f"messages=[] must hold at least one message; give a dialogue that ends in {last}"
        return
    if len(messages) < len(found):
        yield f"messages[{found.index(None)}] must not be null; give it a role and content, or drop the row"
        return
    has_system = messages[0]["role"] == "system"
    for place, message in enumerate(messages):
        content = message["content"]
        if content is None or not content.strip():
            yield f"messages[{place}].content={content!r} must not be empty; fill it or drop the row"
        if place == 0 and has_system:
            continue
        expected = ("user", "assistant")[(place - has_system) % 2]
        if message["role"] != expected:
            yield (
                f"messages[{place}].role={message['role']!r} must be {expected!r}: after an optional system "
                "message, user and assistant alternate; reorder or merge the messages"
            )
            return
    if messages[-1]["role"] != last:
        role = messages[-1]["role"]
        yield f"messages[-1].role={role!r} must be {last!r}; add the missing message or cut one"


def _check_columns(found: pa.Schema, wanted: pa.Schema, path: Path) -> None:
    for field in wanted:
        if field.name not in found.names:
            raise UserError(
                f"{path}: column {field.name!r} ({field.type}) is missing, the file has "
                f"{', '.join(found.names) or 'none'}; add it or rename one"
            )
        actual = found.field(field.name).type
        if not _compatible(actual, field.type):
            raise UserError(f"{path}: column {field.name!r} has type {actual} and must have {field.type}; convert it")


def _compatible(actual: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether values keep their meaning: another width or layout of the same kind, at any depth."""
    types = pa.types
    if types.is_dictionary(actual):
        actual = actual.value_type
    if types.is_list(wanted):
        lists = (types.is_list, types.is_large_list, types.is_list_view, types.is_large_list_view)
        is_list = types.is_fixed_size_list(actual) or any(is_one(actual) for is_one in lists)
        return is_list and _compatible(actual.value_type, wanted.value_type)
    if types.is_struct(wanted):
        held = {field.name: field.type for field in actual} if types.is_struct(actual) else {}
        return all(field.name in held and _compatible(held[field.name], field.type) for field in wanted)
    if types.is_string(wanted):
        texts = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
        return any(is_text(actual) for is_text in texts)
    if types.is_integer(wanted):
        return bool(types.is_integer(actual))
    if types.is_floating(wanted):
        return bool(types.is_floating(actual))
    return bool(actual == wanted)


def _converted(column: pa.ChunkedArray, wanted: pa.DataType) -> pa.ChunkedArray:
    if column.type == wanted or not pa.types.is_nested(wanted):
        return column.cast(wanted)
    # Arrow's own cast scrambles list views (version 26) and took the fields of a struct by their order (before 19).
    return pa.chunked_array([pa.array(chunk.to_pylist(), wanted) for chunk in column.chunks], wanted)


def _refuse_nulls(table: pa.Table, schema: pa.Schema, path: Path) -> None:
    for field in schema:
        column = table.column(field.name)
        if column.null_count and not field.nullable:
            row = column.is_null().index(True).as_py()
            raise UserError(f"{path}: row {row} has no {field.name}, which must not be null; fill it or drop the row")


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
