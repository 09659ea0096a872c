"""One Ray session per run: connect to a cluster or start an embedded one, and always leave it stopped."""

import logging
import os
import secrets
import shlex
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from cluster.hardware import SMALL_SHARED_BYTES, memory_limit_bytes, shared_memory_bytes

logger = logging.getLogger(__name__)

_logs = ""


def log_directory() -> str:
    """Where processes of the latest session write their output, each on its own machine; "" without one."""
    return _logs


def _log_report(data: dict[str, Any], ignore_prefix: bool) -> None:
    logger.debug("%s: %s", data["pid"], "\n".join(data["lines"]))


class _Fixed(list[str]):
    """Takes no more elements."""

    def extend(self, more: Iterable[str]) -> None:
        """Does nothing."""


def _job_config() -> ray.job_config.JobConfig:
    """Workers import this program from where the driver did, and nothing from its current directory.

    Ray would have them look there first, where a file `model.py` or `queue.py` stands in for a module of that name.
    """
    root = Path(__file__).resolve().parents[1]
    config = ray.job_config.JobConfig()
    config._py_driver_sys_path = _Fixed([] if root.name == "site-packages" else [str(root)])
    return config


def object_store_bytes(memory: int, shared: int) -> int | None:
    """Size of an embedded Ray's object store; None leaves it to Ray, which takes 30 % of the memory.

    Where /dev/shm is smaller than that Ray would keep the whole store in a file on disk. A smaller one is better,
    unless it held nothing.

    Args:
        memory: bytes that this machine's processes may use.
        shared: bytes that are free in /dev/shm.
    """
    return int(0.95 * shared) if SMALL_SHARED_BYTES <= shared < 0.32 * memory else None


def _runtime_env(python: str) -> dict[str, str] | None:
    """What has ranks start where the interpreter's path has a space: Ray hands it to a shell as it is."""
    quoted = shlex.quote(python)
    return None if quoted == python else {"py_executable": quoted}


@contextmanager
def session(*, address: str | None = None, num_cpus: int | None = None) -> Iterator[None]:
    """A Ray session for the length of a `with` block.

    Args:
        address: of a running cluster ("auto" or "host:port"); "local" or None starts an embedded Ray on this
            machine, which listens on its loopback alone and ends with the block, its workers included.
        num_cpus: CPUs the embedded Ray offers; None for what the process may use.
    Raises:
        ConnectionError: the cluster at `address` does not answer.
    """
    # Ray's own telemetry and metrics agents cost start-up time and cores, and nothing here reads them.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray gives its node 30 s to come up; a machine busy with other work can take longer.
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # After a repair nobody reads the results of calls that waited for the dead rank. Ray would print a page for each.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    on_terminate = signal.getsignal(signal.SIGTERM)
    embedded = address in (None, "local")
    # What Ray does by default where firewalls ask: nodes are at 127.0.0.1, and listen there alone. An address that is
    # given as loopback Ray would turn into the machine's own.
    ray._private.ray_constants.ENABLE_RAY_CLUSTER = not embedded
    if embedded:
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):  # where ranks meet; workers inherit it
            os.environ.setdefault(variable, "lo")
        os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
        if not os.access(os.path.expanduser("~"), os.W_OK):  # where Ray would write a token for its processes
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        cpus = num_cpus or len(os.sched_getaffinity(0))
        ray.init(
            address="local",
            num_cpus=cpus,
            object_store_memory=object_store_bytes(memory_limit_bytes(), shared_memory_bytes()),
            include_dashboard=False,
            runtime_env=_runtime_env(sys.executable),
            log_to_driver=False,
            logging_level="ERROR",
            job_config=_job_config(),
        )
    else:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", job_config=_job_config())
    if threading.current_thread() is threading.main_thread():
        # Ray puts its own handler in place, which prints a stack trace and exits with another code.
        signal.signal(signal.SIGTERM, on_terminate)
    # Otherwise a thread of Ray's prints a report of every dead worker to stdout, long, without role or step;
    # WorkerError says the same.
    ray._private.worker.print_to_stdstream = _log_report
    global _logs
    _logs = ray._private.worker._global_node.get_logs_dir_path()  # below the --temp-dir of a cluster that is joined
    try:
        yield
    finally:
        ray.shutdown()
