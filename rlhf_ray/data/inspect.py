"""`rlhf-ray data check | show`."""

from pathlib import Path

import pyarrow.parquet as pq
from rich.console import Console
from rich.pretty import Pretty

from rlhf_ray.data.schemas import SCHEMAS, check_rows, read_table
from rlhf_ray.errors import UserError

SHOWN_PROBLEMS = 20


def check_table(kind: str, path: Path) -> None:
    """Checks a table against its schema and row rules; prints each problem.

    Raises:
        UserError: unknown kind, a broken file, or any broken row.
    """
    for known in SCHEMAS:
        if known == kind:
            table = read_table(path, SCHEMAS[known])
            problems = check_rows(known, table)
            break
    else:
        raise UserError(f"kind={kind}: must be one of {', '.join(SCHEMAS)}")
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    for problem in problems[:SHOWN_PROBLEMS]:
        console.print(f"{path} {problem}", markup=False)
    if problems:
        more = len(problems) - SHOWN_PROBLEMS
        raise UserError(
            f"{path}: {len(problems)} broken rows of {table.num_rows}"
            + (f", {more} not shown" if more > 0 else "")
        )
    print(f"{path}: {table.num_rows} {kind}, all well")


def show_table(path: Path, *, rows: int, start: int) -> None:
    """Prints some rows of any Parquet file.

    Raises:
        UserError: the file cannot be read, or has no row `start`.
    """
    try:
        table = pq.read_table(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read as Parquet ({error}); give a table written by rlhf-ray"
        ) from error
    if start >= table.num_rows:
        raise UserError(f"--start {start}: {path} has {table.num_rows} rows; choose a smaller one")
    console = Console()
    console.print(f"{path}: {table.num_rows} rows", highlight=False)
    for number, row in enumerate(table.slice(start, rows).to_pylist(), start=start):
        console.rule(f"row {number}")
        console.print(Pretty(row, expand_all=True))
