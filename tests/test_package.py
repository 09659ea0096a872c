"""Facts about the packages as a whole: who imports whom, what a wheel holds, which versions are pinned."""

import ast
import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("model", "cluster", "rlhf_ray")
HEAVY = {"torch", "ray", "vllm", "deepspeed", "transformers", "pyarrow"}


def modules_loaded_by(code: str, *, cwd: Path = ROOT) -> set[str]:
    """Names of all modules, sub-modules too, that a fresh interpreter started in `cwd` holds after `code`."""
    script = f"import json, sys\n{code}\nprint(json.dumps(list(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


def source_files(package: str) -> list[Path]:
    """Every Python file of a package; never none, so that no scan passes for want of files."""
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"no Python files in {package}/"
    return files


def imported_modules(file: Path) -> Iterator[str]:
    """Modules of rlhf_ray that a file imports, at any depth of it; of `from package import name` package.name."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("rlhf_ray."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "rlhf_ray":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_packages(file: Path) -> Iterator[str]:
    """Top-level packages that a file imports, at any depth of it, `import_module("...")` included."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            yield from (str(arg.value).partition(".")[0] for arg in node.args if isinstance(arg, ast.Constant))


def texts_of_unsaid_encoding(tree: ast.AST) -> Iterator[ast.Call]:
    """Calls that read or write text and leave its encoding to the locale."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        keywords = {keyword.arg for keyword in call.keywords}
        words = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        if method in ("read_text", "write_text"):
            is_text = True
        elif method == "open" or ast.unparse(call.func) in ("open", "fdopen"):
            is_text = ast.unparse(call.func) not in ("os.open", "gzip.open") and not any(
                set(word) <= set("rwaxb+") and "b" in word for word in words
            )
        else:
            is_text = bool(keywords & {"text", "universal_newlines"})
        if is_text and "encoding" not in keywords:
            yield call


def test_files_are_text_in_utf_8_whatever_the_locale():
    assert len(list(texts_of_unsaid_encoding(ast.parse("p.read_text(); p.open('a'); open(p); p.open('rb')")))) == 3
    files = [file for folder in (*PACKAGES, "scripts", "benchmarks") for file in source_files(folder)]
    found = {(f.name, call.lineno) for f in files for call in texts_of_unsaid_encoding(ast.parse(f.read_bytes()))}
    assert found == set()


@pytest.mark.parametrize(
    ("module", "must_not_load"),
    [
        ("model", HEAVY | {"cluster", "rlhf_ray"}),
        ("model.config", HEAVY | {"cluster", "rlhf_ray"}),
        ("model.flops", HEAVY | {"cluster", "rlhf_ray"}),
        ("cluster", (HEAVY - {"ray", "pyarrow"}) | {"model", "rlhf_ray"}),  # Ray may load pyarrow by itself
        ("cluster.plan", HEAVY | {"model", "rlhf_ray"}),
        ("rlhf_ray", HEAVY),
        ("rlhf_ray.config", HEAVY),
        ("rlhf_ray.run_state", HEAVY),
        ("rlhf_ray.recipe.stages", HEAVY),
        ("rlhf_ray.recipe.ledger", HEAVY),
        ("rlhf_ray.preflight.run", HEAVY),
        ("rlhf_ray.cli.main", HEAVY),
        ("rlhf_ray.cli.plan", HEAVY),
        ("rlhf_ray.cli.show", HEAVY),
    ],
)
def test_importing_a_light_module_loads_nothing_heavy(module: str, must_not_load: set[str]) -> None:
    assert modules_loaded_by(f"import {module}") & must_not_load == set()


def test_help_is_shown_without_loading_anything_heavy() -> None:
    # The console script's own path: what makes `rlhf-ray --help` quick is what it does not import.
    help_run = """
import contextlib, io
from rlhf_ray.cli.main import main
sys.argv = ["rlhf-ray", "--help"]
with contextlib.redirect_stdout(io.StringIO()) as shown:
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, stop.code
assert "Usage" in shown.getvalue(), shown.getvalue()
"""
    assert modules_loaded_by(help_run) & HEAVY == set()


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("model", {"cluster", "rlhf_ray", "ray", "vllm", "deepspeed"}),
        ("cluster", {"model", "rlhf_ray", "torch", "vllm", "deepspeed"}),
    ],
)
def test_imports_go_one_way(package: str, forbidden: set[str]) -> None:
    wrong = [
        (str(file.relative_to(ROOT)), name)
        for file in source_files(package)
        for name in imported_packages(file)
        if name in forbidden
    ]
    assert wrong == []


ROOMS = (
    *("errors", "config_errors", "config", "records", "stopping", "run_state", "metrics", "progress"),
    "algo",
    "data",
    "machine",
    "testbed",
    "backends",
    "workers",
    "recipe",
    "planning",
    "preflight",
    "evaluate",
    "bench",
    "cli",
)
"""What lies in rlhf_ray, so that each imports only those before it."""


def room(module: str) -> int:
    """The place of a module, or of a name in it, in ROOMS: that of the longest of those that lead to it."""
    name = module.removeprefix("rlhf_ray.") + "."
    found = [place for place, each in enumerate(ROOMS) if name.startswith(f"{each}.")]
    assert found, f"{module} lies in none of the rooms"
    return max(found, key=lambda place: len(ROOMS[place]))


def test_no_room_imports_from_one_above_it() -> None:
    files = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in source_files("rlhf_ray")}
    files.pop("rlhf_ray.__init__")
    assert {room(module) for module in files} == set(range(len(ROOMS)))
    imports = {module: list(imported_modules(file)) for module, file in files.items()}
    assert "rlhf_ray.recipe.ledger.Ledger" in imports["rlhf_ray.preflight.run"]
    wrong = [(module, name) for module, names in imports.items() for name in names if room(name) > room(module)]
    assert wrong == []


@pytest.mark.parametrize(("engine", "files"), [("deepspeed", ["train"]), ("vllm", ["rollout", "weights"])])
def test_few_files_import_each_engine(engine: str, files: list[str]) -> None:
    importers = {
        str(source.relative_to(ROOT))
        for package in PACKAGES
        for source in source_files(package)
        if engine in imported_packages(source)
    }
    assert importers == {f"rlhf_ray/backends/{file}.py" for file in files}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tree, so that earlier build folders change nothing."""
    tree = tmp_path_factory.mktemp("tree")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "."]
    subprocess.run(pip, cwd=tree, check=True, capture_output=True)
    (built,) = tree.glob("*.whl")
    return built


def test_the_wheel_holds_every_source_file(wheel: Path) -> None:
    expected = {str(file.relative_to(ROOT)) for package in PACKAGES for file in source_files(package)}
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if name.endswith(".py")} == expected


def test_the_wheel_holds_every_data_file(wheel: Path) -> None:
    data = {".toml", ".html", ".css", ".js"}
    expected = {
        str(file.relative_to(ROOT))
        for package in PACKAGES
        for file in (ROOT / package).rglob("*")
        if file.suffix in data
    }
    with zipfile.ZipFile(wheel) as archive:
        assert expected <= set(archive.namelist())


def test_the_packages_import_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    script = "; ".join(
        f"import {name}; assert {name}.__file__.startswith({str(tmp_path)!r}), {name}.__file__"
        for name in (*PACKAGES, "rlhf_ray.cli.main")
    )
    assert set(PACKAGES) <= modules_loaded_by(script, cwd=tmp_path)


@pytest.mark.parametrize("pins", ["cpu.txt", "gpu.txt"])
def test_the_pins_satisfy_the_declared_ranges(pins: str) -> None:
    lines = (ROOT / "requirements" / pins).read_text().splitlines()
    pinned = {}
    for requirement in (Requirement(line) for line in lines if line and not line.startswith("#")):
        (specifier,) = requirement.specifier
        pinned[canonicalize_name(requirement.name)] = specifier.version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    required = project["project"]["dependencies"] + project["build-system"]["requires"]
    for requirement in map(Requirement, required):
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, requirement
