"""Exceptions whose message says it all: the command line prints them as one line, without a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager

SHOWN_PROBLEMS = 10
"""Broken rows that are told one by one, before a count of the others."""


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


class RowErrors:
    """The UserErrors of the rows of one file, told together rather than one a run."""

    def __init__(self, path: str):
        self._path = path
        self._found: list[tuple[str, UserError]] = []

    @contextmanager
    def of(self, row: str) -> Iterator[None]:
        """Keeps a UserError of a `with` block as that of a row."""
        try:
            yield
        except UserError as error:
            self._found.append((row, error))

    def raise_any(self) -> None:
        """Raises what was kept, in one line.

        Raises:
            UserError: if there is anything.
        """
        if not self._found:
            return
        shown = self._found[: SHOWN_PROBLEMS if len({str(error) for _, error in self._found}) > 1 else 1]
        more = len(self._found) - len(shown)
        told = "; ".join(f"{row}: {error}" for row, error in shown) + f" (and {more} more rows)" * (more > 0)
        raise UserError(f"{self._path} {told}") from shown[0][1]
