"""What README.md and docs/*.md print is true: commands parse, settings exist, the tree is the real one."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel
from typer.main import get_command

from rlhf_ray.cli.main import app
from rlhf_ray.config import Config, load_config, parse_config
from rlhf_ray.recipe.ledger import check_redo
from rlhf_ray.recipe.rounds import recipe
from rlhf_ray.recipe.stages import wanted_stages

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]
PACKAGES = ("model", "cluster", "rlhf_ray")
SPAN = re.compile(r"`([^`\n]+)`")
SETTING = re.compile(rf"({'|'.join(Config.model_fields)})(\.\w+)+")
OF_VERL = {"data.max_response_length", "data.train_batch_size"}  # the table of other systems' terms


def commands() -> list[str]:
    """Command lines of the documents, less what stands behind them as a remark, each once."""
    found: dict[str, None] = {}
    for document in DOCUMENTS:
        for line in document.read_text().splitlines():
            if re.match(r"\s+rlhf-ray ", line):
                found[re.split(r"\s{2,}", line.strip())[0]] = None
            found.update(dict.fromkeys(span for span in SPAN.findall(line) if span.startswith("rlhf-ray ")))
    return list(found)


def settings() -> list[str]:
    """Config keys between backticks; `roles.ROLE` stands for any of them."""
    found = {
        match[0]
        for document in DOCUMENTS
        for span in SPAN.findall(document.read_text())
        if (match := SETTING.match(span.replace("ROLE", "policy"))) and not span.endswith(".py")
    }
    return sorted(found - OF_VERL)


def readme_block(heading: str, *, fence: str = "```") -> list[str]:
    """Lines of the first fenced block below a heading of the README."""
    section = README.read_text().partition(f"## {heading}\n")[2]
    return section.partition(f"{fence}\n")[2].partition("```")[0].splitlines()


def tree() -> set[str]:
    """Paths of the README's tree; four columns of indentation are one folder."""
    paths, folders = set(), [""]
    for line in readme_block("Tree"):
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 4
        path = folders[depth] + name
        paths.add(path)
        folders[depth + 1 :] = [path]
    return paths


@pytest.mark.parametrize("line", commands())
def test_a_printed_command_parses(line: str) -> None:
    command, arguments = get_command(app), shlex.split(line)[1:]
    while hasattr(command, "commands"):
        command = command.commands[arguments.pop(0)]
    if arguments:  # else it is named, not shown
        context = command.make_context(command.name, arguments)
        config = context.params.get("config") or context.params.get("what")  # `show` takes a run's directory as well
        if "out" in context.params and (ROOT / config).is_file():
            made = load_config(ROOT / config, context.params["set_"])
            if command.name == "run":
                check_redo(recipe(made), wanted_stages(made), context.params["redo"] or ())


@pytest.mark.parametrize("key", settings())
def test_a_setting_that_is_named_exists(key: str) -> None:
    section: object = parse_config({"rounds": {}})
    for name in key.split("."):
        assert isinstance(section, BaseModel) and name in type(section).model_fields, key
        section = getattr(section, name)


def test_the_example_config_is_valid() -> None:
    config = parse_config(tomllib.loads("\n".join(readme_block("Your own data and models", fence="```toml"))))
    assert config.run.stages == ("reward", "ppo", "evaluate")
    assert config.inputs.chat == "models/my-llama-chat"


def test_the_config_of_the_walk_through_versions_is_valid() -> None:
    text = (ROOT / "docs" / "versions.md").read_text().partition("```toml\n")[2].partition("```")[0]
    config = parse_config(tomllib.loads(text))
    assert config.rounds is not None and [version.pool for version in config.rounds.versions] == ["last", "all"]


def test_the_tree_names_what_exists() -> None:
    assert sorted(path for path in tree() if not (ROOT / path).exists()) == []


def test_the_tree_names_every_module() -> None:
    modules = {
        str(file.relative_to(ROOT))
        for package in PACKAGES
        for file in (ROOT / package).rglob("*.py")
        if file.name != "__init__.py"
    }
    assert modules and sorted(modules - tree()) == []
