"""Jobs on a Ray cluster, over its jobs server: submit, look, read, follow, stop. Knows nothing of what a job does."""

import asyncio
import logging
import os
import queue
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

STOP_WAIT_S = 20
"""Seconds from SIGTERM to SIGKILL when a job is stopped; Ray's own 3 are short for a program that ends in order."""

_CONNECT_TIMEOUT_S = 5.0
_ANSWER_TIMEOUT_S = 60.0
_POLL_S = 0.5
_ENDED = ("STOPPED", "SUCCEEDED", "FAILED")
_TOKEN = (
    "give the token that the cluster was started with: RAY_AUTH_MODE=token, and the token in RAY_AUTH_TOKEN, in a file "
    "named by RAY_AUTH_TOKEN_PATH, or in ~/.ray/auth_token"
)


class JobsError(RuntimeError):
    """The jobs server cannot be reached, or did not do what it was asked; told in one line."""


class UnknownJobError(JobsError):
    """The cluster has no job of that id."""


@dataclass(frozen=True)
class Job:
    """What the cluster knows of a job; times are seconds since 1970."""

    id: str
    state: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    entrypoint: str
    start: float | None
    end: float | None
    exit_code: int | None
    message: str
    """The last line of the job's state: of a failed job, the last that it printed."""
    metadata: Mapping[str, str]

    @property
    def ended(self) -> bool:
        """Whether the state is final."""
        return self.state in _ENDED

    @property
    def seconds(self) -> float | None:
        """How long it took, or has been there so far."""
        return None if self.start is None else (self.end or time.time()) - self.start


class Client(JobSubmissionClient):
    """Ray's client, each of whose requests has a deadline and fails in one line."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        try:
            return super()._do_request(method, endpoint, timeout=_ANSWER_TIMEOUT_S, **options)
        except AuthenticationError as error:
            raise JobsError(_refused(self._address, error)) from error
        except OSError as error:  # all of requests' exceptions are
            raise JobsError(_no_answer(self._address, error)) from error

    def _raise_error(self, r: Any) -> None:
        if r.status_code == 404:
            raise UnknownJobError(_last_line(r.text))
        raise JobsError(f"{self._address}: the jobs server answers {r.status_code}: {_last_line(r.text)}")


def connect(address: str) -> Client:
    """A client of the jobs server at `address`, http://HOST:PORT. Tokens are Ray's own, from its variables and file.

    Raises:
        JobsError: the address is malformed, no jobs server answers there, or it refuses the token.
    """
    host, port = _host_and_port(address)
    # Ray's client prefers this variable to its argument.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.ERROR)  # uploads, closed connections
    try:
        socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT_S).close()
        # As ray.init does, and its job client does not: a token that is there is used, unless RAY_AUTH_MODE says no.
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        return Client(address)
    except AuthenticationError as error:
        raise JobsError(_refused(address, error)) from error
    except JobsError:
        raise
    except (OSError, RuntimeError, LookupError) as error:  # another server's answers give all of these
        raise JobsError(_no_answer(address, error)) from error


def _host_and_port(address: str) -> tuple[str, int]:
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        parts, host, port = urlsplit(""), None, None
    if parts.scheme not in ("http", "https") or not host:
        raise JobsError(
            f"{address!r}: must read http://HOST:PORT; `ray start --head` prints it, the port is 8265 by default"
        )
    return host, port or (443 if parts.scheme == "https" else 80)


def _refused(address: str, error: Exception) -> str:
    reason = str(error).splitlines()[0].partition(". ")[0]
    return f"{address}: {reason}; {_TOKEN}"


def _no_answer(address: str, error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return (
        f"{address}: no Ray jobs server answers there ({lines[0]}); `ray start --head` starts one and prints its "
        "address, the port is 8265 by default"
    )


def submit(client: Client, entrypoint: str, *, files: Path, metadata: Mapping[str, str]) -> str:
    """Starts a shell command on the cluster's head node and returns the id of the job at once.

    Args:
        files: a directory whose content goes along: the job and its workers start in a copy of it, from which
            Python imports first.
        metadata: kept with the job.
    Raises:
        JobsError: the cluster does not take the job.
    """
    environment = {
        "working_dir": str(files),
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)},  # read by the process that stops the job
    }
    job_id: str = client.submit_job(entrypoint=entrypoint, runtime_env=environment, metadata=dict(metadata))
    return job_id


def jobs(client: Client) -> list[Job]:
    """The jobs that were submitted since the cluster started, oldest first; programs that joined it are left out.

    Raises:
        JobsError: no answer.
    """
    found = [_job(details) for details in client.list_jobs() if details.submission_id]
    return sorted(found, key=lambda job: job.start or 0.0)


def job(client: Client, job_id: str) -> Job:
    """One job.

    Raises:
        UnknownJobError, JobsError.
    """
    if not re.fullmatch(r"[\w.-]+", job_id):  # it becomes a part of the request's path
        raise UnknownJobError(f"{job_id!r} is no job id")
    return _job(client.get_job_info(job_id))


def logs(client: Client, job_id: str) -> str:
    """All that the job has printed so far.

    Raises:
        UnknownJobError, JobsError.
    """
    job(client, job_id)
    text: str = client.get_job_logs(job_id)
    return text


def follow(client: Client, job_id: str) -> Iterator[str]:
    """What the job has printed and what it goes on to print, until it ends.

    Raises:
        UnknownJobError, JobsError: the connection was lost, for one.
    """
    job(client, job_id)
    chunks: queue.SimpleQueue[str | Exception | None] = queue.SimpleQueue()

    async def read() -> None:
        async for text in client.tail_job_logs(job_id):
            chunks.put(text)

    def tail() -> None:
        try:
            asyncio.run(read())
            chunks.put(None)
        except Exception as error:  # handed to the reader, who raises it
            chunks.put(error)

    # In a thread of its own: asyncio swallows what a signal's handler raises while one of its callbacks runs.
    threading.Thread(target=tail, daemon=True).start()
    while (chunk := chunks.get()) is not None:
        if isinstance(chunk, Exception):
            raise JobsError(f"job {job_id}: its log broke off ({chunk}); follow it again") from chunk
        yield chunk


def wait(client: Client, job_id: str, *, timeout_s: float) -> Job:
    """The job once it has ended.

    Raises:
        UnknownJobError, JobsError: it has not ended after `timeout_s` seconds, for one.
    """
    deadline = time.monotonic() + timeout_s
    while not (found := job(client, job_id)).ended:
        if time.monotonic() > deadline:
            raise JobsError(f"job {job_id}: is still {found.state} after {timeout_s:.0f} s")
        time.sleep(_POLL_S)
    return found


def stop(client: Client, job_id: str, *, timeout_s: float = 3 * STOP_WAIT_S) -> Job:
    """Asks the job to end, SIGTERM and after `STOP_WAIT_S` SIGKILL, and waits until it has.

    Returns:
        the job as it ended, or had ended before.
    Raises:
        UnknownJobError, JobsError: as `wait`.
    """
    found = job(client, job_id)
    if found.ended:
        return found
    client.stop_job(job_id)
    return wait(client, job_id, timeout_s=timeout_s)


def _job(details: Any) -> Job:
    """Ray's record of a job, less what nobody needs; Ray counts milliseconds."""
    start, end = (None if time_ms is None else time_ms / 1000 for time_ms in (details.start_time, details.end_time))
    return Job(
        id=details.submission_id or details.job_id,
        state=details.status.value,
        entrypoint=details.entrypoint,
        start=start,
        end=end or None,
        exit_code=details.driver_exit_code,
        message=_last_line(details.message or ""),
        metadata=details.metadata or {},
    )


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
