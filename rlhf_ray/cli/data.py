"""The commands around tables: `rlhf-ray data fetch | import | check | show`."""

from pathlib import Path
from typing import Annotated

import typer

from rlhf_ray.data.import_formats import Format, Guideline, ImportKind, TooLong

data_app = typer.Typer(help="Fetch, import, check and look at data.", no_args_is_help=True)


@data_app.command("import")
def data_import(
    sources: Annotated[
        list[Path],
        typer.Argument(metavar="SOURCE", help="Files (.jsonl, .json, either as .gz, .parquet), or directories."),
    ],
    to: Annotated[Path, typer.Option("--to", metavar="OUT.parquet", help="The table to write.")],
    kind: Annotated[ImportKind, typer.Option(help="What to make of the rows.")],
    format_: Annotated[Format, typer.Option("--format", help="How the rows are written; auto tells by columns.")] = (
        "auto"
    ),
    guideline: Annotated[
        Guideline | None, typer.Option(help="Of all rows; else the source's own column, or helpfulness.")
    ] = None,
    max_chars: Annotated[
        int | None, typer.Option(min=1, help="Most characters of a dialogue with its longer answer.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of it, as training counts them; needs --tokenizer.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A Hugging Face tokenizer, for --max-tokens.")
    ] = None,
    too_long: Annotated[
        TooLong, typer.Option(help="Longer rows: leave out, or cut their oldest pairs of turns.")
    ] = "skip",
    held_out: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of prompts that goes to OUT.held_out.parquet.")
    ] = 0.0,
    split: Annotated[str | None, typer.Option(help="Which split of a directory, such as train.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.parquet.")] = False,
) -> None:
    """Turn HH-RLHF, chosen/rejected, messages, ShareGPT, Alpaca or prompt files into a table."""
    from rlhf_ray.data.importers import import_table

    import_table(
        sources,
        to,
        kind=kind,
        form=format_,
        guideline=guideline,
        max_chars=max_chars,
        max_tokens=max_tokens,
        tokenizer=tokenizer,
        too_long=too_long,
        held_out=held_out,
        split=split,
        overwrite=overwrite,
    )


@data_app.command("fetch")
def data_fetch(
    name: Annotated[str, typer.Argument(help="hh-rlhf.")],
    to: Annotated[Path, typer.Option("--to", help="A directory for its files.")],
) -> None:
    """Download public preference data from the hub, for `data import`."""
    from rlhf_ray.data.fetch import fetch

    for path in fetch(name, to):
        print(path)


@data_app.command("check")
def data_check(
    kind: Annotated[str, typer.Argument(help="prompts, demonstrations, corpus, pairs, comparisons or samples.")],
    path: Annotated[Path, typer.Argument(help="A Parquet file.")],
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also checks rows against this tokenizer and its template.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens of a row; needs --tokenizer.")] = None,
) -> None:
    """Check a table's columns and rows; lists broken rows."""
    from rlhf_ray.data.inspect import check_table

    check_table(kind, path, tokenizer=tokenizer, max_tokens=max_tokens)


@data_app.command("show")
def data_show(
    path: Annotated[Path, typer.Argument(help="A Parquet file.")],
    rows: Annotated[int, typer.Option(min=1, help="How many rows.")] = 5,
    start: Annotated[int, typer.Option(min=0, help="First row.")] = 0,
) -> None:
    """Print some rows of a table."""
    from rlhf_ray.data.inspect import show_table

    show_table(path, rows=rows, start=start)
