"""A recipe of two rounds made of the stages there are: order, what is handed over, what a second run does."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_steps import SETTLED

from rlhf_ray.config import Config, config_with
from rlhf_ray.recipe import run as executor
from rlhf_ray.recipe.context import Context
from rlhf_ray.recipe.ledger import MissingInputError
from rlhf_ray.recipe.preference_collection import week
from rlhf_ray.recipe.stages import STAGES, Given, Made, Node
from rlhf_ray.run_state import RunDir

ROUND = ("pairs", "label", "reward", "ppo")
ORDER = [f"{stage}@{scope}" for scope in ("v1", "v2") for stage in ROUND]
PROMPTS, CHAT, TOKENIZER = (Given(f"data.{name}", f"{name}") for name in ("prompts", "chat", "tokenizer"))


def rounds() -> list[Node]:
    """Two rounds; in the second the policy of the first answers beside the chat model."""
    nodes, newest, changes = [], CHAT, {}
    for scope in ("v1", "v2"):
        inputs = {
            "pairs": {"model.0": CHAT, "model.1": newest},
            "label": {"pairs": Made(f"pairs@{scope}", "pairs")},
            "reward": {"comparisons": Made(f"label@{scope}", "comparisons")},
            "ppo": {name: Made(f"reward@{scope}", name) for name in ("helpfulness", "safety")},
        }
        for name in ROUND:
            given = {need: PROMPTS for need in STAGES[name].needs if need.startswith("prompts")}
            own = {"tokenizer": TOKENIZER, "chat": CHAT, **given, **inputs[name]}
            needed = {need: source for need, source in own.items() if need in STAGES[name].needs or "model" in need}
            nodes.append(Node(STAGES[name], needed, STAGES[name].makes, scope, changes))
        newest, changes = Made(f"ppo@{scope}", "policy"), {"label.noise": 0.5}
    return nodes


class Roles:
    """Notes which roles stay."""

    def __init__(self) -> None:
        self.step, self.kept = "", []

    def release(self, needed: set[str]) -> None:
        self.kept.append((self.step, needed))

    def lay_out(self, config: Config, seated: tuple[str, ...]) -> None: ...

    def unload(self) -> None: ...


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SimpleNamespace]:
    """Runs the rounds with stages that only write; says what was run with what."""
    monkeypatch.chdir(tmp_path)
    for name in ("prompts", "chat", "tokenizer"):
        Path(name).touch()

    def start(*, wanted: tuple[str, ...] = ROUND, fails_at: str = "", **options: Any) -> SimpleNamespace:
        seen = SimpleNamespace(order=[], inputs={}, noise={}, found={}, made={}, kept=[])

        def stage_of(stage: Any) -> Callable[..., dict[str, Any]]:
            def write(context: Context, step: Any, inputs: Any) -> dict[str, Any]:
                seen.order.append(step.name)
                seen.inputs[step.name], seen.noise[step.name] = inputs, context.config.label.noise
                work = step.begin()
                seen.found[step.name] = sorted(path.name for path in work.iterdir() if path.name != "step.json")
                (work / "half").touch()
                if step.name == fails_at:
                    raise KeyboardInterrupt
                for place in stage.makes.values():
                    (work / place).parent.mkdir(exist_ok=True)
                    (work / place).write_text(f"{step.name} of week {week(step.name)}")
                return {"steps": 400} if stage.name == "ppo" else {}

            return write

        monkeypatch.setattr(executor, "runner", stage_of)
        context = Context(config_with(Config(), SETTLED), RunDir("run"))
        context._roles = roles = Roles()
        with context.run.locked():
            try:
                seen.made = executor.run_nodes(context, rounds(), wanted, **options)
            except KeyboardInterrupt:
                assert fails_at
        seen.kept = roles.kept
        return seen

    return start


def test_nodes_run_in_order_on_what_the_others_made(run) -> None:
    seen = run()
    assert seen.order == ORDER
    inputs = seen.inputs["pairs@v2"]
    assert inputs["model.0"].path == Path("chat")
    assert inputs["model.1"].path.read_text() == "ppo@v1 of week 1" and inputs["model.1"].scope == "v1"
    assert seen.inputs["label@v2"]["pairs"].path.read_text() == "pairs@v2 of week 2"
    assert set(seen.inputs["label@v2"]) == {"pairs", "prompts_annotation"}
    assert seen.inputs["reward@v1"]["comparisons"].path.read_text() == "label@v1 of week 1"
    assert seen.made["policy"].path.read_text() == "ppo@v2 of week 2"
    assert seen.made["policy"].parents["helpfulness"] == seen.made["helpfulness"].key
    recorded = RunDir("run").manifest()["artefacts"]
    assert [made["scope"] for made in recorded.values() if made["kind"] == "policy"] == ["v1", "v2"]
    assert len(recorded) == 2 * sum(len(STAGES[stage].makes) for stage in ROUND)
    own = recorded[str(seen.made["policy"].path.relative_to(Path("run").resolve()))]
    assert (own["key"], own["parents"]) == (seen.made["policy"].key, seen.made["policy"].parents)


def test_each_node_tells_its_place_among_those_that_the_command_runs(run, capsys) -> None:
    def places() -> list[str]:
        lines = capsys.readouterr().err.splitlines()
        return [line.partition("  done in ")[0] for line in lines if "  done in " in line]

    run(fails_at="label@v2")
    assert places() == [f"{number} of 8  {name}" for number, name in enumerate(ORDER[:5], start=1)]
    run()
    assert places() == ["1 of 3  label@v2", "2 of 3  reward@v2", "3 of 3  ppo@v2"]


def test_a_node_is_run_with_its_own_settings(run) -> None:
    noise = run().noise
    assert {noise[name] for name in ORDER[:4]} == {0.1} and {noise[name] for name in ORDER[4:]} == {0.5}


def test_a_second_run_does_nothing_and_returns_the_same(run, capsys) -> None:
    first = run()
    capsys.readouterr()
    second = run()
    assert second.order == [] and second.made == first.made
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("done before with the same inputs") == said.count("skipped") == len(ORDER)


def test_an_interrupted_node_goes_on_and_those_before_it_are_not_run_again(run) -> None:
    first = run(fails_at="label@v2")
    assert first.order == ORDER[:6]
    second = run()
    assert second.order == ORDER[5:]
    assert second.found["label@v2"] == ["half"] and second.found["reward@v2"] == []


def test_a_node_whose_inputs_nothing_has_made_is_refused(run) -> None:
    with pytest.raises(MissingInputError, match=r"pairs@v2 needs policy, which .*; run .*ppo.* first"):
        run(wanted=("pairs", "label"))
    assert run().order == ORDER[2:]


def test_one_round_made_anew_takes_with_it_what_depends_on_it(run) -> None:
    run()
    assert run(redo=["label@v2"]).order == ORDER[5:]
    assert run(redo=["reward@v1"]).order == ORDER[2:]
    assert run().order == []


def test_a_redo_that_is_interrupted_goes_on_and_a_later_one_starts_anew(run) -> None:
    run()
    assert run(redo=["label@v2"], fails_at="reward@v2").order == ORDER[5:7]
    assert run(redo=["label@v2"]).order == ORDER[6:]
    assert run(redo=["label@v2"]).order == ORDER[5:]


def test_roles_stay_as_long_as_a_later_node_needs_them(run) -> None:
    kept = dict(run().kept)
    assert list(kept) == ORDER
    everything = {role for stage in ROUND for role in STAGES[stage].roles}
    assert all(kept[name] == everything for name in ORDER[:6])
    assert kept["reward@v2"] == set(STAGES["ppo"].roles) and kept["ppo@v2"] == set()
