"""The command line. Imports nothing heavy at the top, so that --help and bad input answer at once."""

import io
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rlhf_ray.cli.data import data_app
from rlhf_ray.cli.jobs import ConfigPath, Overrides, jobs_app
from rlhf_ray.errors import RunFailure, UserError
from rlhf_ray.recipe.stages import STAGES, Stage
from rlhf_ray.stopping import saying, stopping_on_signals

if TYPE_CHECKING:
    from rlhf_ray.config import Config
    from rlhf_ray.recipe.stages import Artefact

Benchmark = Literal["rollout", "score", "train", "sync", "round"]

app = typer.Typer(
    name="rlhf-ray",
    help="The Llama 2-Chat recipe on Ray, vLLM and DeepSpeed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")

Out = Annotated[Path, typer.Option("--out", help="Run directory; the same one resumes.")]


Redo = Annotated[
    list[str] | None,
    typer.Option("--redo", metavar="STAGE[@SCOPE]", help="Make it anew, with what depends on it; may be repeated."),
]


def _run(
    config_path: Path, out: Path, overrides: list[str] | None, stages: tuple[str, ...] | None, redo: list[str] | None
) -> None:
    from rlhf_ray.config import load_config
    from rlhf_ray.preflight.run import check_run

    with saying("stopped; the same command goes on from the last checkpoint"):
        config = load_config(config_path, overrides)
        check_run(config, out, stages, redo=redo or [])
        _mend_environment()
        made = _run_recipe(config, out, stages, redo or [])
    if "evaluation" in made:
        from rlhf_ray.evaluate.tables import print_evaluation

        print_evaluation(made["evaluation"].path)


def _mend_environment() -> None:
    """Before libraries are imported, which read where their caches are."""
    from rlhf_ray.preflight.machine import mend_environment

    if line := mend_environment():
        print(line, file=sys.stderr)


def _run_recipe(config: "Config", out: Path, stages: tuple[str, ...] | None, redo: list[str]) -> dict[str, "Artefact"]:
    """`run_recipe`, with its failures as those that `main` prints."""
    from rlhf_ray.recipe.remedies import GOES_ON, disk_remedy
    from rlhf_ray.recipe.run import run_recipe

    with _cluster_failures(GOES_ON):
        try:
            return run_recipe(config, out, stages=stages, redo=redo)
        except OSError as error:  # the disk is full, or the run directory has gone
            told = (f"{error.filename or out}: {error.strerror or error}", disk_remedy(error))
            raise RunFailure("; ".join(filter(None, told))) from error


@contextmanager
def _cluster_failures(goes_on: str) -> Iterator[None]:
    """The cluster's exceptions as those that `main` prints."""
    from ray.exceptions import RayError

    from cluster.deaths import why_dead
    from cluster.layout import PlacementError
    from cluster.worker_group import WorkerError
    from rlhf_ray.recipe.remedies import what_helps

    try:
        yield
    except WorkerError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from error
        raise RunFailure(f"{error}; {what_helps(error, goes_on=goes_on)}") from error
    except PlacementError as error:
        raise RunFailure(str(error)) from error
    except RayError as error:  # Ray itself: its node or its store has gone
        raise RunFailure(f"{type(error).__name__}: {why_dead(error, None)}") from error


@app.command()
def run(config: ConfigPath, out: Out, set_: Overrides = None, redo: Redo = None) -> None:
    """The whole recipe, or the stages the config lists; run again to resume."""
    _run(config, out, set_, None, redo)


def _stage_command(stage: Stage) -> None:
    def command(config: ConfigPath, out: Out, set_: Overrides = None, redo: Redo = None) -> None:
        _run(config, out, set_, (stage.name,), redo)

    command.__doc__ = stage.does
    app.command(stage.name)(command)


def _rejection_sample(
    config: ConfigPath,
    out: Out,
    set_: Overrides = None,
    redo: Redo = None,
    teacher: Annotated[
        Path | None, typer.Option(help="A larger model that answers; the one that learns is fine-tuned on its answers.")
    ] = None,
) -> None:
    given = [f"rejection_sampling.teacher={json.dumps(str(teacher))}"] if teacher is not None else []
    _run(config, out, [*(set_ or []), *given], ("rejection-sample",), redo)


for _stage in STAGES.values():
    if _stage.name == "rejection-sample":
        app.command(_stage.name, help=_stage.does)(_rejection_sample)
    else:
        _stage_command(_stage)


@app.command()
def show(
    what: Annotated[Path, typer.Argument(metavar="CONFIG|DIR", help="A TOML file, or the directory of a run.")],
    out: Annotated[Path | None, typer.Option("--out", help="The run directory that a CONFIG is for.")] = None,
    set_: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Show a recipe: its stages, what is done, what would be done and why, where models come from, time and disk."""
    from rlhf_ray.cli.show import print_recipe, recipe_facts

    found = recipe_facts(what, out=out, overrides=set_ or [])
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        print_recipe(found)


@app.command()
def clean(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    unfinished: Annotated[bool, typer.Option("--unfinished", help="Steps that are not finished, too.")] = False,
) -> None:
    """Remove what finished training could be made longer from; results stay."""
    from rlhf_ray.cli.show import clean_run

    clean_run(run, unfinished=unfinished)


@app.command()
def chat(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint directory with its tokenizer.")],
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: float = 0.7,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
) -> None:
    """Talk to a checkpoint; an empty line ends the dialogue."""
    from rlhf_ray.config import Config
    from rlhf_ray.machine import settled
    from rlhf_ray.preflight.inputs import check_chat_checkpoint

    run = settled(Config()).run
    check_chat_checkpoint(
        checkpoint,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        on_gpu=run.device == "cuda",
        precision=run.precision,
    )
    _mend_environment()

    from rlhf_ray.cli.chat import talk

    talk(checkpoint, run, system=system, temperature=temperature, max_new_tokens=max_new_tokens)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, one per seed.")],
    model: Annotated[str | None, typer.Option(help="By default the last one that is no control, as PPO.")] = None,
    against: Annotated[str, typer.Option(help="The other one: SFT, a version, a control.")] = "SFT",
) -> None:
    """Compare a model with another one over several finished runs of one config."""
    from rlhf_ray.evaluate.seeds import print_comparison

    print_comparison(runs, model=model, against=against)


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
    _mend_environment()

    from rlhf_ray.bench.measure import run_bench
    from rlhf_ray.bench.report import print_report
    from rlhf_ray.run_state import write_json

    with _cluster_failures("the same command starts anew"), saying("stopped; a benchmark keeps nothing"):
        try:
            found = run_bench(work)
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
        str,
        typer.Option(
            metavar="MODEL[@VERSION]",
            help="policy, chat, base, helpfulness or safety: the newest, or that of a version, as in chat@v3.",
        ),
    ] = "policy",
) -> None:
    """Copy a model out of a run, for transformers and vLLM."""
    from rlhf_ray.cli.export import export_model

    source = export_model(run, to, what=model)
    print(f"{source} -> {to}")


@app.command()
def plan(
    model: Annotated[str, typer.Option(metavar="NAME|DIR", help="A preset, such as llama2-7b, or a checkpoint.")],
    gpus: Annotated[int, typer.Option(help="GPUs there are.")],
    gpu_memory: Annotated[float, typer.Option(metavar="GIB", help="Memory of each, GiB.")],
    reward_model: Annotated[
        str | None, typer.Option(metavar="NAME|DIR", help="Shape of reward and value models; the model's own.")
    ] = None,
    stage: Annotated[str, typer.Option(help="pretrain, sft, reward or ppo.")] = "ppo",
    batch: Annotated[int | None, typer.Option(help="Batch size; the config's.")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(help="Longest prompt; what the context leaves.")] = None,
    response_tokens: Annotated[int | None, typer.Option(help="Longest answer; the config's.")] = None,
    zero_stage: Annotated[int | None, typer.Option(help="The only ZeRO stage to try; 1, 2 and 3.")] = None,
    overhead: Annotated[float, typer.Option(metavar="GIB", help="Allowance per process for what is not counted.")] = 2,
    config: Annotated[Path | None, typer.Option(help="A TOML file; its roles, if any, are the placement.")] = None,
    set_: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines, sizes in bytes.")] = False,
) -> int:
    """Say which role needs how much memory, where it fits, and the settings that put it there."""
    from rlhf_ray.cli.plan import plan_json, plan_request, print_plan
    from rlhf_ray.planning.plan import make_plan

    made = make_plan(
        plan_request(
            model=model,
            reward_model=reward_model,
            stage=stage,
            gpus=gpus,
            gpu_memory_gib=gpu_memory,
            overhead_gib=overhead,
            zero_stage=zero_stage,
            batch=batch,
            prompt_tokens=prompt_tokens,
            response_tokens=response_tokens,
            config_path=config,
            overrides=set_ or [],
        )
    )
    if as_json:
        print(plan_json(made))
    else:
        print_plan(made)
    return 0 if made.fits else 1


def main() -> None:
    """Entry point: bad input is one line and exit code 2, a failed run one line and 1, signals end well."""
    _speak_utf8()
    try:
        with stopping_on_signals():
            code = app([_expanded(word) for word in sys.argv[1:]], prog_name="rlhf-ray", standalone_mode=False) or 0
    except typer.TyperException as error:
        code = _explain_usage(error)
    except UserError as error:
        code = _say(f"error: {error}", 2)
    except RunFailure as error:
        code = _say(f"failed: {error}", 1)
    sys.exit(code)


def _speak_utf8() -> None:
    """Arguments, paths, terminal and workers are in UTF-8 whatever the locale; no sign of a text ends a run."""
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"  # read at the start of Python alone, so this program starts again
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _expanded(word: str) -> str:
    """An argument with a leading ~ as a home directory, which shells leave alone in quotes and in --option=~/path."""
    option, path = re.fullmatch(r"(--[a-z-]+=)?(.*)", word, re.DOTALL).groups(default="")  # type: ignore[union-attr]
    return option + os.path.expanduser(path)


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
