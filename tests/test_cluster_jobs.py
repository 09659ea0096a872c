"""Recipes as jobs of a Ray cluster that asks for a token: submit, follow, stop, resume, and what is refused."""

import http.server
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from tiny_inputs import PRETRAINING_RUN

from cluster import jobs as cluster_jobs
from cluster.jobs import Job
from rlhf_ray.cli import jobs as cli_jobs

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
PATIENCE_S = 300.0
TOKEN = secrets.token_hex(32)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.toml"
    path.write_text(PRETRAINING_RUN.format(num_steps=400, save_every=10))
    return path


# --- without a cluster -----------------------------------------------------------------------------------------


@pytest.fixture
def call(call, monkeypatch):
    """As elsewhere, with no cluster in the environment."""
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.setenv(name, "")  # put back afterwards, whatever is done to it
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    return call


def refused(result):
    """The one line of an outcome that is a refusal."""
    code, out, err = result
    assert (code, out) == (2, ""), err
    [line] = err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


@pytest.fixture
def server():
    """Starts a web server that gives one answer to everything; its address."""
    with ExitStack() as stack:

        def start(code, text=""):
            class Handler(http.server.BaseHTTPRequestHandler):
                def do_GET(self):
                    self.send_response(code)
                    self.end_headers()
                    self.wfile.write(text.encode())

                def log_message(self, *_):
                    pass

            made = stack.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
            threading.Thread(target=made.serve_forever, daemon=True).start()
            stack.callback(made.shutdown)
            return f"http://127.0.0.1:{made.server_port}"

        yield start


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_an_address_is_needed(call, monkeypatch):
    told = refused(call("status"))
    assert told == ("--address: is not given, and RAY_API_SERVER_ADDRESS is not set; give --address http://HOST:8265")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # a cluster's address, but not its jobs server's
    assert refused(call("status")) == told
    monkeypatch.setenv("RAY_ADDRESS", "http://:1")
    assert refused(call("status")).startswith("RAY_ADDRESS 'http://:1': must read http://HOST:PORT")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "head")
    assert refused(call("status")).startswith("RAY_API_SERVER_ADDRESS 'head': must read")
    assert refused(call("status", "--address", "http://[")).startswith("--address 'http://[': must read")


@pytest.mark.parametrize("address", ["localhost:8265", "ray://head:10001", "http://", "http://head:99999", "auto"])
def test_malformed_addresses(call, address):
    for command in (("status",), ("logs", "job"), ("stop", "job")):
        assert refused(call(*command, "--address", address)) == (
            f"--address {address!r}: must read http://HOST:PORT; `ray start --head` prints it, the port is 8265 by "
            "default"
        )


def test_where_no_jobs_server_answers(call, server, monkeypatch):
    nobody = f"http://127.0.0.1:{free_port()}"
    told = refused(call("status", "--address", nobody))
    assert told.startswith(f"--address {nobody}: no Ray jobs server answers there ([Errno 111]")
    assert told.endswith("`ray start --head` starts one and prints its address, the port is 8265 by default")
    for code, text in ((404, ""), (500, ""), (200, "hello"), (200, "{}")):
        other = server(code, text)
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", nobody)  # --address goes before it
        assert refused(call("status", "--address", other)).startswith(f"--address {other}: no Ray jobs server")


@pytest.mark.parametrize("code", [401, 403])
def test_a_server_that_refuses_the_token(call, server, code):
    told = refused(call("status", "--address", server(code, "No")))
    reason = {401: "Authentication required: No", 403: "Authentication failed: No"}[code]
    assert f": {reason}; give the token that the cluster was started with: RAY_AUTH_MODE=token" in told


def test_what_is_wrong_with_a_config_is_told_before_a_cluster_is_asked(call, config):
    def submit(*arguments):
        return refused(call("submit", config, "--address", "nonsense", *arguments))

    assert submit("--out", "/r", "--set", "ppo.num_step=3").startswith("--set: ppo.num_step is not a known key")
    assert submit("--out", "/r", "--set", "pretrain.seq_len=4096").startswith("pretrain.seq_len=4096 must be at most")
    assert submit("--out", "r").startswith("--out='r' must be an absolute path")
    assert submit("--out", "/r").startswith("--address 'nonsense'")  # nothing else was wrong


def test_how_a_job_that_did_not_succeed_is_told():
    def told(state, exit_code, message):
        return str(cli_jobs._failure(Job("j", state, "", 0.0, 1.0, exit_code, message, {})))

    assert (
        told("FAILED", 1, "failed: ppo step 3: diverged")
        == "job j ended with exit code 1: failed: ppo step 3: diverged"
    )
    assert told("FAILED", None, "the node died") == "job j ended: the node died"
    assert "submit with --ship" in told("FAILED", 127, "sh: 1: rlhf-ray: not found")
    assert told("STOPPED", None, "") == "job j was stopped; the same config and --out, submitted again, resume it"


def test_a_job_that_runs_shows_the_newest_line_of_its_progress(call, monkeypatch):
    line = "3 of 9  sft  120/240  0:01:05 left  loss 1.203"
    logs = {"a": f"3 of 9  sft  reading data\n{line}\nsft: a worker died\n", "b": line, "c": "no run of ours\n"}
    found = {
        name: Job(name, state, "rlhf-ray run", None, None, None, "", {})
        for name, state in (("a", "RUNNING"), ("b", "SUCCEEDED"), ("c", "RUNNING"), ("d", "RUNNING"))
    }

    def read(client, name):
        if name not in logs:
            raise cluster_jobs.JobsError("no agent there answers")
        return logs[name]

    monkeypatch.setattr(cluster_jobs, "connect", lambda address: None)
    monkeypatch.setattr(cluster_jobs, "jobs", lambda client: list(found.values()))
    monkeypatch.setattr(cluster_jobs, "job", lambda client, name: found[name])
    monkeypatch.setattr(cluster_jobs, "logs", read)
    at = ("--address", "http://head:8265")
    assert call("status", "a", *at)[1].splitlines()[-1] == f"progress: {line}"
    assert "progress" not in call("status", "d", *at)[1]
    assert call("status", *at)[1].splitlines()[5:] == [f"a: {line}"]
    told = json.loads(call("status", "--json", *at)[1])
    assert [facts["progress"] for facts in told] == [line, None, None, None]


# --- on a cluster ----------------------------------------------------------------------------------------------


def environment(**changes):
    """Of the cluster and of a user who has its token."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_A")}
    return {
        **own,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        **changes,
    }


def rlhf_ray(*arguments, **changes):
    """The installed program, to its end: (code, stdout, stderr)."""
    command = [BIN / "rlhf-ray", *map(str, arguments)]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment(**changes), timeout=PATIENCE_S
    )
    return result.returncode, result.stdout, result.stderr


def wait_for(condition, what):
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"no {what} within {PATIENCE_S:.0f} s"
        time.sleep(0.2)
    return found


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """A cluster of one node, with a token: (the process, the address of its jobs server)."""
    work = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # sockets lie in it, whose paths must be short
    port, dashboard, agent, client = (free_port() for _ in range(4))
    address = f"http://127.0.0.1:{dashboard}"
    command = [
        *(BIN / "ray", "start", "--head", "--block", "--disable-usage-stats", f"--temp-dir={work}"),
        *(f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
        *(f"--ray-client-server-port={client}", "--num-cpus=2", f"--object-store-memory={100 * 2**20}"),
    ]
    log = work / "head.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment(), start_new_session=True)
    try:
        wait_for(lambda: process.poll() is not None or rlhf_ray("status", "--address", address)[0] == 0, "cluster")
        assert process.poll() is None, log.read_text()
        yield psutil.Process(process.pid), address
    finally:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for left in psutil.wait_procs(family, timeout=20)[1]:
            left.kill()
        shutil.rmtree(work, ignore_errors=True)


def option(process, name):
    """The value of an option on the command line that started the cluster."""
    [value] = [part.partition("=")[2] for part in process.cmdline() if part.startswith(f"{name}=")]
    return Path(value)


def workers(process):
    """The recipe's ranks on the cluster."""
    return [child for child in process.children(recursive=True) if "Worker" in child.name()]


@pytest.mark.slow
def test_a_job_is_followed_stopped_and_resumed(head, config, tmp_path):
    process, address = head
    out, at = tmp_path / "run", ("--address", address)

    def state():
        found = sorted(out.glob("steps/pretrain-*.partial/state/step-*[0-9]"))
        return int(found[-1].name.removeprefix("step-")) if found else 0

    code, stdout, stderr = rlhf_ray("submit", config, "--out", out, *at)
    job = stdout.strip()
    assert (code, stderr) == (0, f"follow it with rlhf-ray logs {job} --address {address} --follow\n")

    # Ctrl-C ends the following, not the job.
    follower = subprocess.Popen(
        [BIN / "rlhf-ray", "logs", job, *at, "--follow"],
        env=environment(),
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        for line in follower.stdout:
            if line.startswith("pretrain: starting"):
                break
        follower.send_signal(signal.SIGINT)
        error = follower.communicate(timeout=PATIENCE_S)[1]
    finally:
        follower.kill()
        follower.wait()
    assert follower.returncode == 130, error
    assert error == (
        f"\nno longer following job {job}, which goes on; stop it with rlhf-ray stop {job} --address {address}\n"
    )
    code, stdout, _ = rlhf_ray("status", job, *at, "--json")
    facts = json.loads(stdout)
    assert (code, facts["id"], facts["state"]) == (0, job, "RUNNING")
    assert facts["entrypoint"] == f"rlhf-ray run tiny.toml --out {out} --set cluster.address=auto"

    # Two jobs in one directory would overwrite each other's checkpoints.
    told = refused(rlhf_ray("submit", config, "--out", out, *at))
    assert told.startswith(f"--out {out}: job {job} (RUNNING) works there; stop it with `rlhf-ray stop {job}")

    wait_for(state, "checkpoint")
    assert workers(process)
    assert re.search(r"^progress: 3 of 3  pretrain  \d+/400  .*loss", rlhf_ray("status", job, *at)[1], re.MULTILINE)
    code, stdout, stderr = rlhf_ray("stop", job, *at)
    assert (code, stderr) == (0, "")
    assert stdout == (
        f"job {job}: STOPPED; its last line: stopped; the same command goes on from the last checkpoint\n"
    )
    wait_for(lambda: not workers(process), "end of the workers")
    assert rlhf_ray("stop", job, *at)[:2] == (0, f"job {job}: had ended before: STOPPED\n")
    assert rlhf_ray("logs", job, *at, "--follow")[::2] == (
        1,
        f"failed: job {job} was stopped; the same config and --out, submitted again, resume it\n",
    )

    reached = state()
    code, stdout, stderr = rlhf_ray("submit", config, "--out", out, *at, "--follow")
    assert (code, stderr) == (0, ""), stdout
    assert 0 < reached < 400 and f"pretrain: going on from step {reached} " in stdout
    again = stdout.splitlines()[0]
    assert list(out.glob("steps/pretrain-*/model/model.safetensors"))
    rows = rlhf_ray("status", *at)[1].splitlines()
    assert [re.split(r"\s{2,}", row.strip())[:2] for row in rows[1:3]] == [[job, "STOPPED"], [again, "SUCCEEDED"]]


@pytest.mark.slow
def test_a_job_with_shipped_source_that_fails_is_told_by_its_last_line(head, config, tmp_path):
    process, address = head
    code, stdout, stderr = rlhf_ray(
        *("submit", config, "--out", tmp_path / "run", "--address", address, "--ship", "--follow"),
        *("--set", 'run.stages=["tokenizer"]', "--set", "data.corpus=/nowhere/corpus.parquet"),
    )
    job = stdout.splitlines()[0]
    last = "error: data.corpus: /nowhere/corpus.parquet: no such file; give the path of a Parquet file"
    assert (code, stdout.splitlines()[-1]) == (1, last)
    assert stderr == f"failed: job {job} ended with exit code 2: {last}\n"
    assert f"job {job}: python -m rlhf_ray.cli.main run tiny.toml" in stdout
    code, stdout, failed = rlhf_ray("status", job, "--address", address)
    assert (code, failed) == (1, stderr)
    assert "state: FAILED\n" in stdout and "exit_code: 2\n" in stdout
    sent = "session_latest/runtime_resources/working_dir_files/*/rlhf_ray/cli/jobs.py"
    assert [file.read_bytes() for file in option(process, "--temp-dir").glob(sent)] == [
        Path(cli_jobs.__file__).read_bytes()
    ]


@pytest.mark.slow
def test_a_wrong_token_none_and_an_unknown_job_are_refused(head, config, tmp_path):
    at = ("--address", head[1])
    submit = ("submit", config, "--out", tmp_path / "run", *at)
    wrong = {"RAY_AUTH_TOKEN": "wrong"}
    none = {"RAY_AUTH_TOKEN": "", "HOME": str(tmp_path)}
    for changes, reason in (
        (wrong, "Authentication failed: Forbidden: Invalid authentication token"),
        (none, "Token authentication is enabled but Ray couldn't find an authentication token"),
        ({**none, "RAY_AUTH_MODE": "disabled"}, "Authentication required: Unauthorized: Missing authentication token"),
        ({**none, "RAY_AUTH_TOKEN_PATH": "/nowhere"}, "RAY_AUTH_TOKEN_PATH is set but file cannot be opened"),
    ):
        told = refused(rlhf_ray(*submit, **changes))
        assert told.startswith(f"--address {head[1]}: {reason}") and "; give the token that the cluster" in told
    path = tmp_path / "token"
    path.write_text(TOKEN)
    given = {**none, "RAY_AUTH_TOKEN_PATH": str(path)}
    assert rlhf_ray("status", *at, **given)[0] == 0
    for command in ("status", "logs", "stop"):
        assert refused(rlhf_ray(command, "nope", *at)) == (
            "JOB: Job nope does not exist; `rlhf-ray status` lists the jobs"
        )
        assert refused(rlhf_ray(command, "a/../b", *at)).startswith("JOB: 'a/../b' is no job id")


@pytest.mark.slow
def test_logs_of_a_cluster_that_is_joined_lie_below_its_own_directory(head):
    code = (
        "from cluster.session import log_directory, session\nwith session(address='auto'):\n    print(log_directory())"
    )
    port = option(head[0], "--port")
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(RAY_ADDRESS=f"127.0.0.1:{port}"),
        timeout=PATIENCE_S,
    )
    assert result.returncode == 0, result.stderr
    logs = Path(result.stdout.strip())
    assert logs.is_dir() and logs.is_relative_to(option(head[0], "--temp-dir"))
