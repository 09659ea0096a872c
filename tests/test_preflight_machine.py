"""What of the environment is refused before a run, and what is mended: temporary directories, homes."""

import os
import shutil
import socket
from pathlib import Path

import pytest

from rlhf_ray.config import parse_config
from rlhf_ray.errors import UserError
from rlhf_ray.machine import settled
from rlhf_ray.preflight.machine import check_machine, mend_environment

VARIABLES = ("TMPDIR", "RAY_TMPDIR", "RAY_ADDRESS", "LOGNAME", "USER", "LNAME", "USERNAME")
CACHES = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TRITON_HOME", "FLASHINFER_WORKSPACE_BASE", "MPLCONFIGDIR")


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    """An environment in which none of the variables is set; what a test sets is undone."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for variable in (*VARIABLES, *CACHES):
        os.environ.pop(variable, None)


def complaint(**cluster):
    with pytest.raises(UserError) as caught:
        check_machine(settled(parse_config({"cluster": cluster})))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def short_directory(length):
    """A directory of a name so long, not that of the tests, which may be too long itself."""
    directory = Path("/tmp") / str(os.getpid()).ljust(length - len("/tmp/"), "t")
    directory.mkdir()
    return directory


def test_a_temporary_directory_too_long_for_sockets_is_refused_and_the_longest_holds_one():
    # Of a socket's 107 bytes Ray takes 68: /ray/session_, 34 for time and process, /sockets/plasma_store.
    longest = short_directory(39)
    try:
        os.environ["TMPDIR"] = str(longest)
        check_machine(settled(parse_config({})))
        path = f"{longest}/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
        Path(path).parent.mkdir(parents=True)
        with socket.socket(socket.AF_UNIX) as unix:
            unix.bind(path)
    finally:
        shutil.rmtree(longest)
    longer = short_directory(40)
    try:
        os.environ["TMPDIR"] = str(longer)
        assert complaint() == (
            f"TMPDIR='{longer}': has 40 bytes and may have 39: Ray's sockets below it may have 107; set RAY_TMPDIR to "
            "a shorter one, for Ray alone"
        )
        check_machine(settled(parse_config({"cluster": {"address": "10.0.0.1:6379"}})))  # its Ray runs already
        os.environ["RAY_TMPDIR"] = "/tmp"  # the remedy
        check_machine(settled(parse_config({})))
        os.environ |= {"TMPDIR": "/tmp", "RAY_TMPDIR": str(longer)}
        assert complaint().startswith(f"RAY_TMPDIR='{longer}': has 40 bytes")
    finally:
        longer.rmdir()


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_temporary_directory_that_cannot_be_used_is_refused(tmp_path, variable):
    file = tmp_path / "file"
    file.write_text("")
    for given, reason in (("/nowhere/tmp", "No such file or directory"), (str(file), "Not a directory")):
        os.environ[variable] = given
        assert complaint() == (
            f"{variable}='{given}': cannot be written ({reason}); set {variable} to a directory you may write to"
        )
    os.environ[variable] = "tmp"
    assert complaint().startswith(f"{variable}='tmp': must be an absolute path; for example /")


def test_a_directory_of_another_users_ray_is_refused(tmp_path, monkeypatch):
    directory = short_directory(20)
    try:
        (directory / "ray").mkdir()
        os.environ["TMPDIR"] = str(directory)
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != directory / "ray")  # root may write anywhere
        assert complaint() == (
            f"TMPDIR='{directory}': {directory}/ray cannot be written, perhaps another user's; set RAY_TMPDIR to a "
            "directory of your own, for Ray alone"
        )
    finally:
        shutil.rmtree(directory)


def test_caches_move_where_home_cannot_be_written(tmp_path):
    os.environ |= {"HOME": str(tmp_path), "USER": "somebody", "PATH": f"{tmp_path}:/nowhere/bin:/usr/bin"}
    assert mend_environment() is None
    assert os.environ["PATH"] == f"{tmp_path}:/usr/bin"
    assert not [name for name in CACHES if name in os.environ]
    os.environ |= {"HOME": "/nonexistent", "TRITON_HOME": "/mine"}
    del os.environ["USER"]
    said = mend_environment()
    caches = Path(os.environ["XDG_CACHE_HOME"])
    assert said == f"HOME='/nonexistent' cannot be written: caches of libraries go to {caches}"
    assert caches.is_dir() and caches.name == f"rlhf-ray-caches-{os.getuid()}"
    assert os.environ["HOME"] == "/nonexistent", "code of users may look there"
    assert os.environ["TRITON_HOME"] == "/mine" and os.environ["USER"] == f"uid-{os.getuid()}"


@pytest.mark.parametrize("prefix, disabled", [("/opt/env", None), ("/home/me/my projects/.venv", "1")])
def test_nothing_is_compiled_where_the_environments_path_has_a_space(monkeypatch, prefix, disabled):
    os.environ.pop("TORCHDYNAMO_DISABLE", None)
    monkeypatch.setattr("sys.prefix", prefix)
    mend_environment()
    assert os.environ.get("TORCHDYNAMO_DISABLE") == disabled


def test_a_user_without_a_home_gets_one(monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as without HOME and an entry in passwd
    os.environ.pop("HOME", None)
    assert (mend_environment() or "").startswith("HOME is not set: it is ")
    assert os.environ["HOME"] == os.environ["XDG_CACHE_HOME"]
