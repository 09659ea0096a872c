"""What of a machine's environment would end a run: directories that cannot be written, names too long for sockets."""

import os
import re
import sys
import tempfile
from pathlib import Path

from cluster.hardware import count_gpus
from rlhf_ray.config import Config
from rlhf_ray.errors import UserError
from rlhf_ray.machine import EMBEDDED

SOCKET_PATH_BYTES = 107
"""Longest path of a Unix socket (unix(7))."""
_BELOW = len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
"""What Ray adds to the temporary directory for the longest of them."""


def check_machine(config: Config) -> None:
    """The temporary directories can be written, and Ray's sockets below them have short enough names.

    Raises:
        UserError: one line that names the variable.
    """
    for variable in ("TMPDIR", "RAY_TMPDIR"):
        if (given := os.environ.get(variable)) is not None:
            _check_directory(variable, given)
    if "TMPDIR" not in os.environ:
        _check_directory("TMPDIR", "/tmp", unset=True)
    variable = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"  # Ray's order
    directory = os.environ.get(variable, "/tmp")
    if config.cluster.address != EMBEDDED:
        return
    left = Path(directory) / "ray"
    if left.exists() and not os.access(left, os.W_OK | os.X_OK):
        raise UserError(
            f"{variable}={directory!r}: {left} cannot be written, perhaps another user's; set RAY_TMPDIR to a "
            "directory of your own, for Ray alone"
        )
    longest, length = SOCKET_PATH_BYTES - _BELOW, len(os.fsencode(directory))
    if length > longest:
        raise UserError(
            f"{variable}={directory!r}: has {length} bytes and may have {longest}: Ray's sockets below it may have "
            f"{SOCKET_PATH_BYTES}; set RAY_TMPDIR to a shorter one, for Ray alone"
        )


def try_writing(directory: str | Path) -> None:
    """Makes a directory in another and removes it: permission bits tell a superuser nothing, nor of read-only mounts.

    Raises:
        OSError: it cannot be written.
    """
    os.rmdir(tempfile.mkdtemp(prefix=".writable-", dir=directory))


def _check_directory(variable: str, directory: str, *, unset: bool = False) -> None:
    said = f"{variable}: is not set, and {directory}" if unset else f"{variable}={directory!r}:"
    if not os.path.isabs(directory):
        raise UserError(f"{said} must be an absolute path; for example {Path(directory).absolute()}")
    try:
        try_writing(directory)
    except OSError as error:
        raise UserError(
            f"{said} cannot be written ({error.strerror}); set {variable} to a directory you may write to"
        ) from error


def mend_environment() -> str | None:
    """Where HOME cannot be written, libraries keep their caches in the temporary directory; returns a line saying so.

    And a user without a name gets one, since torch asks for it, and directories that this user may not enter go from
    PATH: DeepSpeed looks for a program and takes "permission denied" for a failure. Where a path has a space torch
    compiles nothing, since its commands are cut there. Variables that are set stay.
    """
    home, user = os.path.expanduser("~"), os.getuid()
    if not any(name in os.environ for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
        os.environ["USER"] = f"uid-{user}"
    directories = os.environ.get("PATH", os.defpath).split(os.pathsep)
    os.environ["PATH"] = os.pathsep.join(path for path in directories if os.access(path, os.X_OK))
    if not count_gpus() and any(re.search(r"\s", path) for path in (sys.prefix, tempfile.gettempdir())):
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # on CPU vLLM compiles one small function of the sampler
    if os.access(home, os.W_OK | os.X_OK):
        return None
    caches = Path(tempfile.gettempdir()) / f"rlhf-ray-caches-{user}"
    caches.mkdir(mode=0o700, exist_ok=True)
    if caches.stat().st_uid != user:  # code is among what is cached
        caches = Path(tempfile.mkdtemp(prefix="rlhf-ray-caches-"))
    for variable in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TRITON_HOME", "FLASHINFER_WORKSPACE_BASE"):
        os.environ.setdefault(variable, str(caches))
    if home == "~":  # neither a variable nor an entry in the list of users says where it is
        os.environ["HOME"] = str(caches)
        return f"HOME is not set: it is {caches} for this run"
    return f"HOME={home!r} cannot be written: caches of libraries go to {caches}"
