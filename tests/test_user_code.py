"""The user's own modules: which belong to a reward function, and whose names are taken."""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from rlhf_ray.data.reward_function import find_function, function_version
from rlhf_ray.data.user_code import own_modules
from rlhf_ray.errors import UserError

FILES = {
    "my_rewards.py": "import json\nimport scoring.words as w\nfrom scoring import *\ndef f(d, a):\n    import lazy\n",
    "scoring/__init__.py": "from . import lengths\nfrom .lengths import LONG\n",
    "scoring/lengths.py": "LONG = 3\n",
    "scoring/words.py": "import importlib\nfrom scoring.deep.lists import BAD\nn = importlib.import_module('named')\n",
    "scoring/deep/lists.py": "BAD = ['x']\n",  # a package without __init__.py
    "lazy.py": "import my_rewards\n",  # in a circle
    "named.py": "A = 1\n",
    "elsewhere/added.py": "B = 1\n",
    "other.py": "C = 1\n",
}
IMPORTED = ["my_rewards.py", "scoring/__init__.py", "scoring/lengths.py", "scoring/words.py", "scoring/deep/lists.py"]


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test imports is gone after it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("my_rewards", None)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(root: Path, files: Mapping[str, str] = FILES) -> str:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return str(root)


def test_all_that_a_module_imports_from_its_directory_belongs_to_it(tmp_path: Path) -> None:
    found = own_modules("my_rewards", Path(write(tmp_path)))
    files = {str(file.relative_to(tmp_path)) for file in found.values()}
    assert files == {*IMPORTED, "lazy.py", "named.py"}
    assert found["scoring.deep.lists"] == tmp_path / "scoring/deep/lists.py"
    assert own_modules("json", tmp_path) == own_modules("nowhere", tmp_path) == {}
    assert not set(found).intersection(sys.modules)


@pytest.mark.parametrize("changed", [*IMPORTED, "lazy.py", "named.py"])
def test_the_version_follows_every_file_that_is_imported(tmp_path: Path, changed: str) -> None:
    root = write(tmp_path)
    first = function_version("my_rewards:f", root=root)
    (tmp_path / "other.py").write_text("C = 2\n")
    assert function_version("my_rewards:f", root=root) == first
    with (tmp_path / changed).open("a") as file:
        file.write("# changed\n")
    assert function_version("my_rewards:f", root=root) != first


def test_the_version_follows_the_name_and_a_module_found_by_a_changed_path(tmp_path: Path) -> None:
    source = "import sys, os\nsys.path.append(os.path.dirname(__file__) + '/elsewhere')\nimport added\nf = g = print\n"
    root = write(tmp_path, {**FILES, "my_rewards.py": source})
    first = function_version("my_rewards:f", root=root)
    assert function_version("my_rewards:g", root=root) != first
    write(tmp_path, {"elsewhere/added.py": "B = 2\n"})
    assert function_version("my_rewards:f", root=root) != first


def test_a_function_from_another_directory_of_the_users_is_followed_too(tmp_path: Path) -> None:
    sys.path.append(write(tmp_path / "library", {"pack/__init__.py": "from pack.a import f", "pack/a.py": "f = print"}))
    first = function_version("pack:f", root=str(tmp_path))
    write(tmp_path / "library", {"pack/a.py": "f = zip"})
    assert function_version("pack:f", root=str(tmp_path)) != first
    assert function_version("operator:add", root=str(tmp_path)) == function_version("operator:add", root=str(tmp_path))


@pytest.mark.parametrize(
    ("files", "spec", "taken"),
    [
        ({"model.py": "f = print"}, "model:f", "model.py: its name is that of rlhf-ray's own package model"),
        ({"cluster/__init__.py": "", "r.py": "import cluster\nf = print"}, "r:f", "cluster/__init__.py: its name is"),
        ({"random.py": "f = print"}, "random:f", "random.py: its name is that of Python's own module random"),
        (
            {"r.py": "from queue import X\nf = print", "queue.py": "X = 1"},
            "r:f",
            "queue.py: its name is that of Python's",
        ),
        ({"r.py": "import numpy\nf = print", "numpy.py": ""}, "r:f", "numpy.py: its name is that of /"),
    ],
)
def test_a_module_with_the_name_of_another_is_told(
    tmp_path: Path, files: dict[str, str], spec: str, taken: str
) -> None:
    root = write(tmp_path, files)
    with pytest.raises(UserError) as raised:
        find_function(spec, root=root)
    assert str(raised.value).startswith(f"{spec}: {root}/{taken}")
    assert str(raised.value).endswith("and Python imports only one of the two; rename it")


def test_modules_beside_the_config_may_be_called_as_what_nobody_hides(tmp_path: Path) -> None:
    root = write(tmp_path, {"chat.py": "from data import rate as f", "data.py": "def rate(d, a): ...", "random.py": ""})
    assert find_function("chat:f", root=root).__module__ == "data"
    import random

    assert hasattr(random, "shuffle")  # what is there and not imported hides nothing either
