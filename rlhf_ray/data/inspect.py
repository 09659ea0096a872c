"""`rlhf-ray data check | show`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_ray.config_errors import similar
from rlhf_ray.data.light_tokenizer import LightTokenizer
from rlhf_ray.data.row_checks import refuse_broken, token_problems
from rlhf_ray.data.schemas import SCHEMAS, check_rows, read_table, unused_columns
from rlhf_ray.errors import UserError, located

ROLE_STYLES = {"system": "magenta", "user": "cyan", "assistant": "green"}


def check_table(kind: str, path: Path, *, tokenizer: Path | None = None, max_tokens: int | None = None) -> None:
    """Checks a table against its schema and row rules; of several problems each is a line on stderr.

    Args:
        tokenizer: directory of the one whose special tokens no row may spell, and whose template must take all.
        max_tokens: most tokens of a row, as training counts them.
    Raises:
        UserError: unknown kind, options that do not fit, a broken file, or any broken row.
    """
    known = next((name for name in SCHEMAS if name == kind), None)
    if known is None:
        raise UserError(f"KIND={kind} is no kind of table; {similar(kind, SCHEMAS)}")
    if max_tokens is not None and tokenizer is None:
        raise UserError(f"--max-tokens {max_tokens}: needs a tokenizer to count with; give --tokenizer DIR")
    if tokenizer is not None and known == "corpus":
        raise UserError(f"--tokenizer {tokenizer}: texts of a corpus are cut to rows, of any length; leave it out")
    table = read_table(path, SCHEMAS[known])
    problems = check_rows(known, table)
    if tokenizer is not None:
        with located(f"--tokenizer {tokenizer}"):
            reader = LightTokenizer(tokenizer)
        rule = f"--max-tokens {max_tokens}; shorten the row"
        problems += token_problems(known, table, reader, limit=max_tokens, reason=rule)
    refuse_broken(str(path), problems, table.num_rows)
    rows = "1 row" if table.num_rows == 1 else f"{table.num_rows} rows"
    unasked = "" if tokenizer is not None or known == "corpus" else "; --tokenizer DIR checks their tokens as well"
    print(f"{path}: {rows} of {known}, all well{unasked}")
    if unused := unused_columns(path, SCHEMAS[known]):
        print(f"columns that are not used: {', '.join(unused)}")


def show_table(path: Path, *, rows: int, start: int) -> None:
    """Prints some rows of any Parquet file on stdout, dialogues as dialogues.

    Raises:
        UserError: the file cannot be read, or has no row `start`.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the path of a Parquet file")
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"{path}: cannot be read as Parquet ({reason}); give a Parquet file") from error
    if start >= table.num_rows:
        raise UserError(f"--start {start}: must be less than {table.num_rows}, the rows of {path}; lower it")
    console = Console(highlight=False)
    last = min(start + rows, table.num_rows) - 1
    console.print(Text(f"{path}: rows {start} to {last} of {table.num_rows}", style="bold"))
    for number, row in enumerate(table.slice(start, rows).to_pylist(), start=start):
        console.rule(f"row {number}", align="left")
        console.print(row_table(row))


def row_table(row: Mapping[str, Any]) -> Table:
    """One row as two columns, name and value."""
    shown = Table.grid(padding=(0, 2))
    shown.add_column(style="bold", no_wrap=True)
    shown.add_column(overflow="fold")
    for name, value in row.items():
        shown.add_row(name, _messages(value) if name == "messages" and _is_dialogue(value) else _value(value))
    return shown


def _is_dialogue(value: Any) -> bool:
    return (
        bool(value)
        and isinstance(value, list)
        and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value)
    )


def _messages(messages: list[Mapping[str, Any]]) -> Text:
    lines = [
        Text.assemble((f"{message['role']}: ", ROLE_STYLES.get(str(message["role"]), "")), _value(message["content"]))
        for message in messages
    ]
    return Text("\n").join(lines)


def _value(value: Any) -> Text:
    """A value as text; null and empty are told apart."""
    if value is None:
        return Text("null", style="dim")
    if value == "":
        return Text('""', style="dim")
    return Text(f"{value:g}" if isinstance(value, float) else str(value))
