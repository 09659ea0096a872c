"""The commands that run a recipe as a job of a Ray cluster: submit, status, logs, stop."""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlhf_ray.errors import RunFailure, UserError
from rlhf_ray.stopping import saying, scratch_directory

if TYPE_CHECKING:
    from cluster.jobs import Client, Job

jobs_app = typer.Typer()

PACKAGES = ("model", "cluster", "rlhf_ray")
NOT_INSTALLED = (
    "; rlhf-ray must be installed on the cluster's machines, and Ray started there from that environment; "
    "with it installed but for this package, submit with --ship"
)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A TOML file.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Overrides one config value.")
]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="What `rlhf-ray submit` printed.")]
Address = Annotated[
    str | None,
    typer.Option(
        "--address", metavar="http://HOST:8265", help="The cluster's jobs server; else RAY_API_SERVER_ADDRESS."
    ),
]


@jobs_app.command()
def submit(
    config: ConfigPath,
    out: Annotated[Path, typer.Option("--out", help="Run directory, on a file system that every node sees.")],
    address: Address = None,
    set_: Overrides = None,
    ship: Annotated[bool, typer.Option("--ship", help="Send this installation's source code along.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Show the job's log until it ends.")] = False,
) -> None:
    """Run a recipe as a job of a Ray cluster; prints the job's id. Submit again to resume."""
    from rlhf_ray.config import load_config
    from rlhf_ray.preflight.run import check_submission

    check_submission(load_config(config, set_), out)
    with _cluster(address) as client, scratch_directory("rlhf-ray-") as files:
        from cluster import jobs

        _check_unused(client, out)
        shutil.copyfile(config, files / config.name)
        if ship:
            _copy_packages(files)
        entrypoint = _entrypoint(config.name, out, set_ or (), ship=ship)
        job = jobs.submit(client, entrypoint, files=files, metadata={"out": str(out)})
        print(job, flush=True)
        if follow:
            _follow(client, job)
        else:
            _say(f"follow it with {_command('logs', job, client)} --follow")


@jobs_app.command()
def status(
    job: Annotated[str | None, typer.Argument(metavar="[JOB]", help="One job; all of them without it.")] = None,
    address: Address = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """How the cluster's jobs are doing; exit code 1 if the one that is named has failed."""
    with _cluster(address) as client:
        from cluster import jobs

        found = jobs.jobs(client) if job is None else [jobs.job(client, job)]
        facts = [{**_facts(each), "progress": _progress(client, each)} for each in found]
    if as_json:
        print(json.dumps(facts if job is None else facts[0], indent=2))
    elif job is None:
        _print_table(found)
        print(*(f"{each['id']}: {each['progress']}\n" for each in facts if each["progress"]), sep="", end="")
    else:
        print("\n".join(f"{name}: {value}" for name, value in facts[0].items() if value is not None))
    if job is not None and found[0].state == "FAILED":
        raise _failure(found[0])


@jobs_app.command()
def logs(
    job: JobId,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", help="Until the job ends; exit code 1 if it fails.")] = False,
) -> None:
    """What a job has printed."""
    with _cluster(address) as client:
        from cluster import jobs

        if follow:
            _follow(client, job)
        else:
            print(jobs.logs(client, job), end="")


@jobs_app.command()
def stop(job: JobId, address: Address = None) -> None:
    """End a job as Ctrl-C ends a run, and wait until it has ended; submit it again to resume."""
    with _cluster(address) as client:
        from cluster import jobs

        with saying(f"\njob {job}: was asked to end; see {_command('status', job, client)}"):
            before = jobs.job(client, job)
            ended = jobs.stop(client, job)
        if before.ended:
            print(f"job {job}: had ended before: {ended.state}")
            return
        last = (jobs.logs(client, job).strip().splitlines() or ["nothing"])[-1]
        print(f"job {job}: {ended.state}; its last line: {last}")


@contextmanager
def _cluster(address: str | None) -> Iterator["Client"]:
    """A client of the jobs server, in a block whose errors are those that `main` prints."""
    field, value = _given_address(address)
    from cluster.jobs import JobsError, UnknownJobError, connect

    try:
        client = connect(value)
    except JobsError as error:
        raise UserError(f"{field} {error}") from error
    try:
        yield client
    except UnknownJobError as error:
        raise UserError(f"JOB: {error}; `rlhf-ray status` lists the jobs") from error
    except JobsError as error:
        raise RunFailure(str(error)) from error


def _given_address(address: str | None) -> tuple[str, str]:
    """Where the address is from, and the address. Ray takes jobs' addresses from RAY_ADDRESS as well."""
    if address is not None:
        return "--address", address
    if value := os.environ.get("RAY_API_SERVER_ADDRESS"):
        return "RAY_API_SERVER_ADDRESS", value
    if (value := os.environ.get("RAY_ADDRESS", "")).startswith(("http://", "https://")):
        return "RAY_ADDRESS", value
    raise UserError("--address: is not given, and RAY_API_SERVER_ADDRESS is not set; give --address http://HOST:8265")


def _check_unused(client: "Client", out: Path) -> None:
    """No job that has not ended works in the run directory: two would overwrite each other's checkpoints."""
    from cluster import jobs

    for job in jobs.jobs(client):
        if not job.ended and job.metadata.get("out") == str(out):
            raise UserError(
                f"--out {out}: job {job.id} ({job.state}) works there; stop it with "
                f"`{_command('stop', job.id, client)}`, or choose another directory"
            )


def _copy_packages(directory: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    for package in PACKAGES:
        shutil.copytree(
            root / package,
            directory / package,
            ignore=shutil.ignore_patterns("__pycache__"),
            copy_function=shutil.copyfile,
        )


def _entrypoint(config: str, out: Path, overrides: Sequence[str], *, ship: bool) -> str:
    """The job's command. Shipped source comes without the installed program, so Python starts it."""
    program = ["python", "-m", "rlhf_ray.cli.main"] if ship else ["rlhf-ray"]
    joined = [*overrides, "cluster.address=auto"]  # the cluster that the job is on
    return shlex.join(
        [*program, "run", config, "--out", str(out), *(part for each in joined for part in ("--set", each))]
    )


def _follow(client: "Client", job_id: str) -> None:
    """Prints the job's log until the job ends.

    Raises:
        RunFailure: it did not succeed.
    """
    from cluster import jobs

    stop_it = _command("stop", job_id, client)
    with saying(f"\nno longer following job {job_id}, which goes on; stop it with {stop_it}"):
        for text in jobs.follow(client, job_id):
            print(text, end="", flush=True)
        ended = jobs.wait(client, job_id, timeout_s=30)  # the log may end a moment before the state is final
    if ended.state != "SUCCEEDED":
        raise _failure(ended)


def _failure(job: "Job") -> RunFailure:
    if job.state == "STOPPED":
        return RunFailure(f"job {job.id} was stopped; the same config and --out, submitted again, resume it")
    code = "" if job.exit_code is None else f" with exit code {job.exit_code}"
    missing = job.exit_code == 127 or "No module named" in job.message
    return RunFailure(f"job {job.id} ended{code}: {job.message}" + (NOT_INSTALLED if missing else ""))


def _command(name: str, job: str, client: "Client") -> str:
    return f"rlhf-ray {name} {job} --address {client.get_address()}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _facts(job: "Job") -> dict[str, Any]:
    return {
        "id": job.id,
        "state": job.state,
        "entrypoint": job.entrypoint,
        "start": None if job.start is None else datetime.fromtimestamp(job.start).astimezone().isoformat(),
        "seconds": None if job.seconds is None else round(job.seconds, 1),
        "exit_code": job.exit_code,
        "message": job.message,
    }


def _progress(client: "Client", job: "Job") -> str | None:
    """How far a job that runs is, as its log says; a log that cannot be read says nothing."""
    from cluster import jobs
    from rlhf_ray.progress import last_progress

    with suppress(jobs.JobsError):
        return last_progress(jobs.logs(client, job.id)) if job.state == "RUNNING" else None
    return None


def _print_table(jobs: Sequence["Job"]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("job", "state", "start", "duration", "entrypoint", box=None)
    for column in table.columns:
        column.no_wrap = True
    for job in jobs:
        start = "" if job.start is None else f"{datetime.fromtimestamp(job.start):%Y-%m-%d %H:%M}"
        duration = "" if job.seconds is None else str(timedelta(seconds=round(job.seconds)))
        table.add_row(job.id, job.state, start, duration, escape(job.entrypoint))
    # A file gets entrypoints whole, a terminal what there is room for; `status JOB` says it all.
    Console(width=None if sys.stdout.isatty() else 10_000).print(table)
