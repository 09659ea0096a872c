"""Python modules of the user's own: what belongs to them, whether their names are free, and where in them it failed."""

import ast
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder, all_suffixes
from pathlib import Path

from rlhf_ray.errors import UserError

OURS = ("model", "cluster", "rlhf_ray")
_OUR_ROOT = Path(__file__).resolve().parents[2]
_MESSAGE_LENGTH = 300


@contextmanager
def blamed(what: str, *, remedy: str) -> Iterator[None]:
    """Tells what the user's code raises in a `with` block as one line, with its file and line.

    SystemExit and the like as well, which would end a worker and name nobody. Only what a signal brought passes.

    Raises:
        UserError: something was raised.
    """
    try:
        yield
    except BaseException as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        raised_by = frames[-1].f_globals.get("__name__", "").partition(".")[0]
        if not isinstance(error, Exception) and raised_by in ("ray", *OURS):  # the handlers of signals
            raise
        raise UserError(f"{what} ({_told(error)}); {remedy}") from error


def own_modules(name: str, home: Path) -> dict[str, Path]:
    """The module `name` and all that it imports from `home`, by name, with the file of each; nothing is imported.

    Goes by import statements, those inside functions too, and by `import_module` with a name written out. A module that
    is loaded already from elsewhere in `home`, as where code adds to sys.path, counts too. Empty where `name` is not
    from `home`; what this program is made of does not count.
    """
    found: dict[str, Path] = {}
    waiting = [name]
    while waiting:
        parts, directory = waiting.pop().split("."), home
        for depth, part in enumerate(parts if all(parts) else [], start=1):
            dotted = ".".join(parts[:depth])
            if dotted not in found:
                place = _locate(part, directory) or _loaded(dotted, home)
                if place is None or _is_ours(place):
                    break
                found[dotted] = place
                waiting += _imports(dotted, place)
            if not _is_package(found[dotted]):
                break
            directory = found[dotted] if found[dotted].is_dir() else found[dotted].parent
    return {dotted: place for dotted, place in found.items() if place.is_file()}


def check_names_free(name: str, home: Path) -> None:
    """No module of `own_modules` is called as another one, of which Python would import but one.

    Raises:
        UserError: one is.
    """
    elsewhere = [place for place in sys.path if Path(place or ".").resolve() != home.resolve()]
    for dotted, file in own_modules(name, home).items():
        top = dotted.partition(".")[0]
        if _locate(top, home) is None:
            continue  # from a directory below, which other code put on sys.path
        if top in OURS:
            other = f"rlhf-ray's own package {top}"
        elif top in sys.stdlib_module_names:
            other = f"Python's own module {top}"
        else:
            spec = PathFinder.find_spec(top, elsewhere)
            other = spec.origin if spec is not None and spec.origin else ""
        if other:
            raise UserError(f"{file}: its name is that of {other}, and Python imports only one of the two; rename it")


def own_sources(name: str) -> dict[str, Path]:
    """As `own_modules`, of a module that has been imported; of an installed one, or one of ours, its own file alone."""
    file = getattr(sys.modules[name], "__file__", None)
    if file is None:
        return {}  # built into Python
    levels = name.count(".") + (Path(file).stem == "__init__")
    return {name: Path(file)} | (own_modules(name, Path(file).parents[levels]) if _is_users(file) else {})


def _locate(name: str, directory: Path) -> Path | None:
    """The file of a module in a directory, or the directory of a package that has no `__init__`."""
    files = [name + middle + suffix for middle in ("/__init__", "") for suffix in all_suffixes()]
    places = [directory / file for file in files if (directory / file).is_file()]
    places += [directory / name] if (directory / name).is_dir() else []
    return places[0] if places else None


def _loaded(dotted: str, home: Path) -> Path | None:
    file = getattr(sys.modules.get(dotted), "__file__", None)
    return Path(file) if file is not None and _is_users(file) and Path(file).is_relative_to(home) else None


def _is_package(place: Path) -> bool:
    return place.is_dir() or place.name.startswith("__init__.")


def _imports(dotted: str, place: Path) -> Iterator[str]:
    """Absolute names that a module's source imports; some may be no modules but what is in them."""
    if place.suffix != ".py":
        return
    try:
        tree = ast.parse(place.read_bytes())
    except (SyntaxError, ValueError):
        return  # importing it tells
    package = dotted if _is_package(place) else dotted.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # Level 1 is the package itself, each further one its parent.
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.Call) and _name(node.func) in ("import_module", "__import__"):
            for part in node.args[:1]:
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield package + part.value if part.value.startswith(".") else part.value


def _name(function: ast.expr) -> str:
    return str(getattr(function, "attr", getattr(function, "id", "")))


def _told(error: BaseException) -> str:
    """Where in the user's code, which exception, and what it says, in one line."""
    # A cause comes first: a generator that raises StopIteration stands in that one's frames alone.
    raised = [other.__traceback__ for other in (error.__cause__, error) if other is not None]
    places = [(frame.f_code.co_filename, line) for trace in raised for frame, line in traceback.walk_tb(trace)]
    if isinstance(error, SyntaxError) and error.filename:
        places.append((error.filename, error.lineno or 0))
    places = [place for place in places if _is_users(place[0])] or [p for p in places if _is_installed(p[0])]
    try:
        message = error.msg if isinstance(error, SyntaxError) else str(error)
    except Exception:  # the user's as well
        message = ""
    where = f"{places[-1][0]} line {places[-1][1]}: " if places else ""
    message = " ".join(message.split())[:_MESSAGE_LENGTH]
    return f"{where}{type(error).__name__}" + (f": {message}" if message else "")


def _is_ours(file: str | Path) -> bool:
    return any(Path(file).is_relative_to(_OUR_ROOT / name) for name in OURS)


def _is_installed(file: str) -> bool:
    return not _is_ours(file) and bool({"site-packages", "dist-packages"}.intersection(Path(file).parts))


def _is_users(file: str) -> bool:
    """Whether a file is there and neither installed nor Python's nor ours."""
    if _is_ours(file) or _is_installed(file) or not Path(file).exists():
        return False
    return not Path(file).is_relative_to(sysconfig.get_paths()["stdlib"])
