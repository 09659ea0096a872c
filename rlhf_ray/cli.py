"""The command line. Imports nothing heavy at the top, so that --help and bad input answer at once."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rlhf_ray.cli_jobs import ConfigPath, Overrides, jobs_app
from rlhf_ray.data.import_formats import Format, Guideline, ImportKind, TooLong
from rlhf_ray.errors import RunFailure, UserError
from rlhf_ray.stopping import Stopped, stopping_on_signals

if TYPE_CHECKING:
    from rlhf_ray.config import Config

Benchmark = Literal["rollout", "score", "train", "sync", "round"]

app = typer.Typer(
    name="rlhf-ray",
    help="The Llama 2-Chat recipe on Ray, vLLM and DeepSpeed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Import, check and look at data.", no_args_is_help=True)
app.add_typer(data_app, name="data")

Out = Annotated[Path, typer.Option("--out", help="Run directory; the same one resumes.")]


def _run(config_path: Path, out: Path, overrides: list[str] | None, stages: tuple[str, ...] | None) -> None:
    from rlhf_ray.config import load_config
    from rlhf_ray.preflight import check_run

    config = load_config(config_path, overrides)
    check_run(config, out, stages)

    made = _run_recipe(config, out, stages)
    if "evaluation" in made:
        from rlhf_ray.evaluate.policies import print_evaluation

        print_evaluation(made["evaluation"])


def _run_recipe(config: "Config", out: Path, stages: tuple[str, ...] | None) -> dict[str, Path]:
    """`run_recipe`, with its failures as those that `main` prints."""
    from rlhf_ray.recipe.run import run_recipe

    with _cluster_failures("the same command goes on from the last checkpoint"):
        try:
            return run_recipe(config, out, stages=stages)
        except OSError as error:  # the disk is full, or the run directory has gone
            raise RunFailure(
                f"{error.filename or out}: {error.strerror or error}; the last whole checkpoint is untouched, and the "
                "same command goes on from it once the disk is in order"
            ) from error


@contextmanager
def _cluster_failures(remedy: str) -> Iterator[None]:
    """The cluster's exceptions as those that `main` prints."""
    from cluster.placement import PlacementError
    from cluster.session import log_directory
    from cluster.worker_group import WorkerError

    try:
        yield
    except WorkerError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from error
        raise RunFailure(f"{error}; the workers' logs are in {log_directory()}, and {remedy}") from error
    except PlacementError as error:
        raise RunFailure(str(error)) from error


@app.command()
def run(config: ConfigPath, out: Out, set_: Overrides = None) -> None:
    """The whole recipe, or the stages the config lists; run again to resume."""
    _run(config, out, set_, None)


def _stage_command(name: str, text: str) -> None:
    def command(config: ConfigPath, out: Out, set_: Overrides = None) -> None:
        _run(config, out, set_, (name,))

    command.__doc__ = text
    app.command(name)(command)


_stage_command("testbed", "Generate the testbed's data.")
_stage_command("tokenizer", "Train the tokenizer.")
_stage_command("pretrain", "Pretrain a model.")
_stage_command("sft", "Supervised fine-tuning.")
_stage_command("collect", "Sample pairs of answers and have them compared.")
_stage_command("reward", "Train the helpfulness and the safety reward model.")
_stage_command("ppo", "PPO against both reward models.")
_stage_command("evaluate", "Compare the SFT model and the PPO policy.")


@app.command()
def chat(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint directory with its tokenizer.")],
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.7,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
) -> None:
    """Talk to a checkpoint; an empty line ends the dialogue."""
    from rlhf_ray.preflight_inputs import check_chat_checkpoint

    check_chat_checkpoint(checkpoint, max_new_tokens=max_new_tokens)

    from rlhf_ray.chat import talk

    talk(checkpoint, system=system, temperature=temperature, max_new_tokens=max_new_tokens)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, one per seed.")],
    against: Annotated[str, typer.Option(help="The other model: SFT, or a label of evaluate.controls.")] = "SFT",
) -> None:
    """Compare PPO with SFT, or with a control, over several finished runs of one config."""
    from rlhf_ray.evaluate.seeds import print_comparison

    print_comparison(runs, against=against)


@app.command()
def bench(
    what: Annotated[Benchmark, typer.Argument(metavar="WHAT", help="rollout, score, train, sync or round.")],
    config: ConfigPath,
    set_: Overrides = None,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats that are measured.")] = 10,
    warmup: Annotated[int, typer.Option(min=0, help="Repeats before them.")] = 2,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of each prompt.")] = 32,
    response_tokens: Annotated[int, typer.Option(min=1, help="Of each answer.")] = 64,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE.json", help="Writes the report there.")] = None,
) -> None:
    """Measure rollout, scoring, training, weight sync, or whole PPO iterations (round)."""
    from rlhf_ray.bench.workload import check_bench
    from rlhf_ray.config import load_config

    work = check_bench(
        what,
        load_config(config, set_),
        repeats=repeats,
        warmup=warmup,
        prompt_tokens=prompt_tokens,
        response_tokens=response_tokens,
        out=out,
    )

    from rlhf_ray.bench.measure import run_bench
    from rlhf_ray.bench.report import print_report
    from rlhf_ray.run_state import write_json

    with _cluster_failures("the same command starts anew"):
        try:
            found = run_bench(work)
        except Stopped as stopped:
            raise Stopped(stopped.args[0], "stopped; a benchmark keeps nothing, and starts anew") from None
        except OSError as error:
            raise RunFailure(
                f"{error.filename or 'the temporary directory'}: {error.strerror or error}; set TMPDIR to a directory "
                "with room for the models"
            ) from error
    print_report(found)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, found)


app.add_typer(jobs_app)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    to: Annotated[Path, typer.Option("--to", help="Where the checkpoint goes; must not exist.")],
    model: Annotated[
        Literal["policy", "chat", "base", "helpfulness", "safety"],
        typer.Option(help="Which model, from its newest finished step."),
    ] = "policy",
) -> None:
    """Copy a model out of a run, for transformers and vLLM."""
    from rlhf_ray.export import export_model

    source = export_model(run, to, what=model)
    print(f"{source} -> {to}")


@data_app.command("import")
def data_import(
    sources: Annotated[
        list[Path], typer.Argument(metavar="SOURCE", help="Files (.jsonl, .jsonl.gz, .parquet), or directories.")
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
    too_long: Annotated[
        TooLong, typer.Option(help="Longer rows: leave out, or cut their oldest pairs of turns.")
    ] = "skip",
    held_out: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of prompts that goes to OUT.held_out.parquet.")
    ] = 0.0,
    split: Annotated[str | None, typer.Option(help="Which split of a directory, such as train.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.parquet.")] = False,
) -> None:
    """Turn HH-RLHF, chosen/rejected, messages or prompt files into a table."""
    from rlhf_ray.data.importers import import_table

    import_table(
        sources,
        to,
        kind=kind,
        form=format_,
        guideline=guideline,
        max_chars=max_chars,
        too_long=too_long,
        held_out=held_out,
        split=split,
        overwrite=overwrite,
    )


@data_app.command("check")
def data_check(
    kind: Annotated[str, typer.Argument(help="prompts, demonstrations, corpus or comparisons.")],
    path: Annotated[Path, typer.Argument(help="A Parquet file.")],
) -> None:
    """Check a table's columns and rows; lists every broken row."""
    from rlhf_ray.data.inspect import check_table

    check_table(kind, path)


@data_app.command("show")
def data_show(
    path: Annotated[Path, typer.Argument(help="A Parquet file.")],
    rows: Annotated[int, typer.Option(min=1, help="How many rows.")] = 5,
    start: Annotated[int, typer.Option(min=0, help="First row.")] = 0,
) -> None:
    """Print some rows of a table."""
    from rlhf_ray.data.inspect import show_table

    show_table(path, rows=rows, start=start)


def main() -> None:
    """Entry point: bad input is one line and exit code 2, a failed run one line and 1, signals end well."""
    try:
        with stopping_on_signals():
            code = app(prog_name="rlhf-ray", standalone_mode=False) or 0
    except typer.TyperException as error:
        code = _explain_usage(error)
    except UserError as error:
        code = _say(f"error: {error}", 2)
    except RunFailure as error:
        code = _say(f"failed: {error}", 1)
    sys.exit(code)


def _say(line: str, code: int) -> int:
    print(line, file=sys.stderr)
    return code


def _explain_usage(error: typer.TyperException) -> int:
    """One line for a wrong command line; the help where there was no command at all."""
    context = getattr(error, "ctx", None)
    lines = [line.strip() for line in error.format_message().splitlines() if line.strip()]
    if type(error).__name__ == "NoArgsIsHelpError":  # making it has printed the help
        return 2
    see = f"; see {context.command_path} --help" if context is not None else ""
    return _say(f"error: {' '.join(lines).rstrip('.')}{see}", 2)


if __name__ == "__main__":
    main()
