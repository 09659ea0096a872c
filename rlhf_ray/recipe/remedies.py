"""What helps after a failure, as the end of its line: said only where it is true."""

import errno

from cluster.deaths import MEMORY_FULL
from cluster.session import log_directory
from cluster.worker_group import START_UP, WorkerError

GOES_ON = "the same command goes on from the last checkpoint"


def what_helps(error: WorkerError, *, goes_on: str = GOES_ON, again: bool = False) -> str:
    """Where to look, and what to do.

    Args:
        goes_on: what the same command does, where nothing stands in its way.
        again: the failure has come a second time, and is to be expected a third.
    """
    where = f"the workers' logs are in {log_directory()}"
    if error.died and MEMORY_FULL in str(error):
        return f"{where}; with more memory, or smaller micro-batches and models, {goes_on}"
    if error.died:
        return where if again else f"{where}, and {goes_on}"
    if error.late:
        key = "start_timeout_s" if error.step == START_UP else "call_timeout_s"
        return f"{where}; if it only needs longer, raise cluster.{key}, and {goes_on}"
    remedy = error.cause and disk_remedy(error.cause, goes_on=goes_on)
    return f"{where}; {remedy}" if remedy else where


def disk_remedy(error: BaseException, *, goes_on: str = GOES_ON) -> str:
    """What to do about an error of the file system; "" for all others."""
    number = getattr(error, "errno", None)
    if number is None and "os error 28" in str(error):  # Rust's, from safetensors
        number = errno.ENOSPC
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"make room, and {goes_on}"
    if number in (errno.EIO, errno.EROFS, errno.ESTALE):
        return f"once the disk is in order, {goes_on}"
    if number in (errno.EACCES, errno.EPERM):
        return f"let this user write there, and {goes_on}"
    if number in (errno.EMFILE, errno.ENFILE):
        return f"raise the limit of open files (ulimit -n), and {goes_on}"
    return ""
