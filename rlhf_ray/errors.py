"""Exceptions whose message says it all: the command line prints them as one line, without a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Bad input, told in one line that names the field or row, the value, the rule and the remedy.

    The command line prints the line without a traceback and exits with code 2.
    """


class RunFailure(RuntimeError):
    """A run that cannot go on, for a reason the message gives: diverged, out of sync, a worker lost.

    The command line prints the line without a traceback and exits with code 1.
    """


@contextmanager
def located(place: str) -> Iterator[None]:
    """Puts `place`, a field or a file and row, in front of the UserErrors of a `with` block."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
