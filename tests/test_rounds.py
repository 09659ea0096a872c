"""Versions V1, V2, ... as a graph."""

from pathlib import Path

import pytest
from fake_steps import SETTLED, entry_of, finish, ledger_of

from rlhf_ray.cli.show import recipe_facts
from rlhf_ray.config import Config, config_with, parse_config
from rlhf_ray.errors import UserError
from rlhf_ray.recipe.ledger import to_run, waiting
from rlhf_ray.recipe.rounds import node_of, recipe
from rlhf_ray.recipe.stages import Given, Made, Node, wanted_stages
from rlhf_ray.run_state import RunDir

PPO = {"methods": ["rejection-sampling", "ppo"], "pool": "all"}


def graph(*versions: dict, **settings: object) -> dict[str, Node]:
    """The nodes by name; without versions those of the paper's."""
    rounds = {"versions": list(versions)} if versions else {}
    dotted = {key.replace("__", "."): value for key, value in settings.items()}
    return {node.name: node for node in recipe(config_with(Config(), {"rounds": rounds, **dotted}))}


def test_the_papers_versions_are_the_default() -> None:
    nodes = graph()
    expected = ["testbed", "tokenizer", "pretrain", "sft"]
    for number in range(1, 6):
        stages = ("pairs", "label", "reward", "rejection-sample", "select", "sft")
        expected += [f"{stage}@v{number}" for stage in stages]
    expected += ["ppo@v5", "reward-accuracy", "pairs@referee", "label@referee", "reward@referee", "evaluate"]
    assert list(nodes) == expected
    # §3.2.3: until V3 the answers of the last round alone, then those of all.
    pools = {
        number: [n for n in nodes[f"select@v{number}"].inputs if n.startswith("samples.")] for number in range(1, 6)
    }
    assert pools == {
        **{number: [] for number in (1, 2, 3)},
        **{number: [f"samples.v{earlier}" for earlier in range(1, number)] for number in (4, 5)},
    }


def test_a_version_works_on_what_the_one_before_has_left() -> None:
    nodes = graph({}, {}, PPO)
    sft, v1, v2, v3 = (Made(name, "chat") for name in ("sft", "sft@v1", "sft@v2", "sft@v3"))
    answering = {
        name: tuple(nodes[name].inputs[f"model.{place}"] for place in (0, 1)) for name in nodes if "pairs" in name
    }
    assert answering == {
        "pairs@v1": (Made("sft", "previous"), sft),
        "pairs@v2": (sft, v1),
        "pairs@v3": (v1, v2),
        "pairs@referee": (sft, Made("ppo@v3", "policy")),
    }
    weeks = {
        name: {n: s for n, s in nodes[name].inputs.items() if n.startswith("comparisons")}
        for name in ("reward@v1", "reward@v3", "reward@referee")
    }
    assert weeks == {
        "reward@v1": {"comparisons.v1": Made("label@v1", "comparisons")},
        "reward@v3": {f"comparisons.v{number}": Made(f"label@v{number}", "comparisons") for number in (1, 2, 3)},
        "reward@referee": {"comparisons": Made("label@referee", "comparisons")},
    }
    assert [nodes[f"reward@v{number}"].inputs["chat"] for number in (1, 2, 3)] == [sft, v1, v2]
    assert [nodes[f"rejection-sample@v{number}"].inputs["chat"] for number in (1, 2, 3)] == [sft, v1, v2]
    for name in ("rejection-sample@v3", "select@v3", "ppo@v3", "evaluate"):
        assert nodes[name].inputs["helpfulness"] == Made("reward@v3", "helpfulness"), name
    assert nodes["sft@v3"].inputs["base"] == Made("pretrain", "base")
    assert nodes["sft@v3"].inputs["selections"] == Made("select@v3", "selections")
    assert nodes["ppo@v3"].inputs["chat"] == v3
    assert nodes["reward@referee"].makes == {"helpfulness": "helpfulness/model"}
    compared = {n: s for n, s in nodes["evaluate"].inputs.items() if n.startswith("model.")}
    assert compared == {
        "model.SFT": sft,
        "model.V1": v1,
        "model.V2": v2,
        "model.V3": v3,
        "model.V3 + PPO": Made("ppo@v3", "policy"),
    }
    assert nodes["evaluate"].inputs["chat"] == sft


def test_where_a_version_starts_and_what_it_learns_beside_its_selections() -> None:
    nodes = graph({}, {"start": "chat"}, {"start": "newest"}, sft__demonstration_share=0.0)
    starts = [nodes[f"sft@v{number}"].inputs["base"] for number in (1, 2, 3)]
    assert starts == [Made("pretrain", "base"), Made("sft", "chat"), Made("sft@v2", "chat")]
    assert all("demonstrations" not in nodes[f"sft@v{number}"].inputs for number in (1, 2, 3))
    assert "demonstrations" in nodes["sft"].inputs


def test_a_version_by_ppo_alone_and_one_with_settings_of_its_own() -> None:
    nodes = graph({"methods": ["ppo"]}, {"settings": {"rejection_sampling.teacher": "/large", "sft.epochs": 4}})
    assert "rejection-sample@v1" not in nodes
    assert nodes["ppo@v1"].inputs["chat"] == Made("sft", "chat")
    assert nodes["rejection-sample@v2"].inputs["chat"] == Given("rejection_sampling.teacher", "/large")
    assert nodes["sft@v2"].changes["sft.epochs"] == 4 and not nodes["sft"].changes
    of_all = {"sft.epochs": 3, "sft.optim.lr": 1e-4}
    nodes = graph({}, {"settings": {"sft.epochs": 4}}, rounds__settings=of_all)
    assert nodes["sft@v1"].changes == of_all and nodes["sft@v2"].changes == {**of_all, "sft.epochs": 4}
    assert not nodes["sft"].changes
    of_all = {"reward.held_out": 0.05, "pairs.models": ("newest",)}  # what is measured is what none was trained on
    nodes = graph({}, rounds__settings=of_all)
    for name in ("reward@v1", "reward-accuracy", "pairs@referee"):
        assert nodes[name].changes == of_all
    assert [n for n in nodes["pairs@v1"].inputs if n.startswith("model.")] == ["model.0"]
    assert nodes["pairs@v1"].inputs["model.0"] == Made("sft", "chat")
    nodes = graph({"methods": ["ppo"]}, {"settings": {"rejection_sampling.teacher": "/large", "sft.epochs": 4}})
    assert list(nodes["evaluate"].inputs)[-3:] == ["model.SFT", "model.V1", "model.V2"]


def test_given_comparisons_are_one_more_table_and_given_reward_models_need_none() -> None:
    nodes = graph({}, {}, data__comparisons="/c")
    given = Given("data.comparisons", "/c")
    assert [nodes[f"reward@v{number}"].inputs["comparisons.given"] for number in (1, 2)] == [given, given]
    assert "comparisons.given" not in nodes["reward@referee"].inputs
    nodes = graph({}, {}, inputs__helpfulness="/h", inputs__safety="/s", rounds__referee=False)
    assert not any(name.startswith(("pairs", "label", "reward")) for name in nodes)
    assert nodes["select@v2"].inputs["safety"] == Given("inputs.safety", "/s")
    nodes = graph({}, inputs__helpfulness="/h", inputs__safety="/s")
    assert not any(node.scope == "referee" for node in nodes.values())  # nobody compares
    nodes = graph({}, inputs__helpfulness="/h")
    assert set(nodes["reward@v1"].makes) == {"safety"} and set(nodes["reward@referee"].makes) == {"helpfulness"}
    assert nodes["evaluate"].inputs["helpfulness"] == Given("inputs.helpfulness", "/h")
    nodes = graph({}, inputs__referee="/r")
    assert nodes["evaluate"].inputs["referee"] == Given("inputs.referee", "/r")
    assert not any(node.scope == "referee" for node in nodes.values())  # it is there
    assert not any("referee" in node.inputs for node in nodes.values() if node.name != "evaluate")


def test_versions_of_a_given_chat_model_start_from_it() -> None:
    given = Given("inputs.chat", "/m")
    for start in ("base", "chat"):
        nodes = graph({"start": start}, {}, inputs__chat="/m", inputs__helpfulness="/h", inputs__safety="/s")
        assert nodes["sft"].makes == {} and set(nodes["sft@v1"].makes) == {"chat"}
        assert nodes["sft@v1"].inputs["base"] == given
        assert nodes["rejection-sample@v2"].inputs["chat"] == Made("sft@v1", "chat")
        models = [nodes["evaluate"].inputs[f"model.{label}"] for label in ("SFT", "V1", "V2")]
        assert models == [given, Made("sft@v1", "chat"), Made("sft@v2", "chat")]
    nodes = graph({}, inputs__chat="/m", inputs__base="/b")
    assert nodes["sft@v1"].inputs["base"] == Given("inputs.base", "/b")


def test_a_stage_that_learns_selections_alone_needs_no_demonstrations() -> None:
    def sft(**settings: object) -> set[str]:
        config = config_with(Config(), {key.replace("__", "."): value for key, value in settings.items()})
        return set(next(node for node in recipe(config, ["sft"]) if node.name == "sft").inputs)

    given = {"data__selections": "/s", "inputs__base": "/b"}
    assert sft(**given, sft__demonstration_share=0.0) == {"tokenizer", "base", "selections"}
    assert "demonstrations" in sft(**given) and "demonstrations" in sft(sft__demonstration_share=0.0)


def test_settings_may_be_nested_as_toml_nests_them() -> None:
    nested, flat = {"sft": {"optim": {"lr": 1e-4}, "epochs": 3}}, {"sft.optim.lr": 1e-4, "sft.epochs": 3}
    config = parse_config({"sft": {"seq_len": 128}, "rounds": {"settings": nested, "versions": [{"settings": nested}]}})
    assert config.rounds is not None
    assert config.rounds.settings == config.rounds.versions[0].settings == flat


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            {"rounds": {"versions": []}},
            "rounds.versions=[] must hold at least one value; correct it, or leave it out for the default, [{}, {}",
        ),
        ({"rounds": {"versions": [{"methods": ["dpo"]}]}}, "rounds.versions.methods='dpo' must be"),
        (
            {"rounds": {"versions": [{}, {"settings": {"run.seed": 3}}]}},
            "rounds.versions[1].settings has run.seed, which is the same in all versions",
        ),
        (
            {"rounds": {"settings": {"sft.epocs": 3}}},
            "rounds.settings: sft.epocs is not a known key; did you mean sft.epochs?",
        ),
        (
            {"rounds": {"settings": {"sft.epochs.x": 3}}},
            "rounds.settings: sft.epochs.x: epochs is a value, not a section; drop what follows it",
        ),
        (
            {"rounds": {"versions": [{"methods": ["ppo", "rejection-sampling"]}]}},
            "rounds.versions.methods=['ppo', 'rejection-sampling'] must be rejection-sampling, ppo, or both in",
        ),
        (
            {"rounds": {"versions": [{"settings": {"reward.held_out": 0.1}}]}},
            "rounds.versions[0].settings has reward.held_out, by which all versions are measured; set rounds.settings",
        ),
        (
            {"rounds": {"versions": [{"comparisons": "/w"}]}, "inputs": {"helpfulness": "/h", "safety": "/s"}},
            "rounds.versions[0].comparisons='/w': nothing learns from them, since inputs.helpfulness and inputs.safety",
        ),
        (
            {"rounds": {"versions": [{"settings": {"sft.epocs": 3}}]}},
            "rounds.versions[0].settings: sft.epocs is not a known key; did you mean sft.epochs?",
        ),
        ({"rounds": {}, "data": {"selections": "/s"}}, "data.selections is for a single stage"),
        (
            {"stage_roles": {"sft": {"policy": {"ranks": 2}}}},
            "stage_roles.sft: roles.policy.ranks is not a known key; did you mean roles.policy.num_ranks?",
        ),
    ],
)
def test_wrong_rounds_are_named(raw: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_config(raw)
    assert message in str(error.value)


def test_a_stage_may_have_roles_of_another_size_whatever_the_version() -> None:
    nodes = graph({}, {"settings": {"sft.epochs": 4}}, stage_roles={"sft": {"policy": {"num_ranks": 8}}})
    size = {"roles.policy.num_ranks": 8}
    assert nodes["sft"].changes == nodes["sft@v1"].changes == size
    assert nodes["sft@v2"].changes == {**size, "sft.epochs": 4} and not nodes["reward@v1"].changes
    with pytest.raises(UserError, match=r"stage_roles.stf: is no stage; did you mean sft\?"):
        graph({}, stage_roles={"stf": {}})


def facts_of(config: Config, run: Path) -> list[dict]:
    """What `show` tells of the nodes."""
    RunDir(run).record(config=config.model_dump(mode="json"))
    nodes: list[dict] = recipe_facts(run, out=None, overrides=[])["nodes"]
    return nodes


def test_a_version_waits_for_people_and_goes_on(tmp_path: Path) -> None:
    table = tmp_path / "week2.parquet"
    settings = {"rounds": {"versions": [{}, {"comparisons": str(table)}, {}]}}
    config = config_with(Config(), {**SETTLED, **settings})
    wanted, nodes = wanted_stages(config), recipe(config)
    assert "label@v2" not in [node.name for node in nodes]
    assert not any(node.scope == "referee" for node in nodes)  # nobody is there to compare for it
    ledger = ledger_of(tmp_path / "run", settings, nodes)
    names = [entry.node.name for entry in to_run(ledger.entries(), wanted)]
    assert names[-1] == "pairs@v2" and names[0] == "testbed"
    for name in names:
        finish(ledger, name)
    assert to_run(ledger.entries(), wanted) == []
    entry, source = waiting(ledger.entries()) or (None, None)
    assert entry is not None and (entry.node.name, source.path) == ("reward@v2", str(table))
    assert ledger.made(source.answers).path == entry_of(ledger, "pairs@v2").outputs["pairs"].path
    shown = {node["node"]: node for node in facts_of(config, tmp_path / "run")}
    assert (shown["pairs@v2"]["state"], shown["reward@v2"]["state"], shown["evaluate"]["state"]) == (
        "done",
        "waits",
        "waits",
    )
    assert shown["evaluate"]["why"] == "for rounds.versions[1].comparisons"
    table.write_text("comparisons")
    ledger = ledger_of(tmp_path / "run", settings, nodes)
    assert waiting(ledger.entries()) is None
    assert to_run(ledger.entries(), wanted)[0].node.name == "reward@v2"


def test_rejection_sampling_alone_is_a_part_of_the_recipe_where_it_is_asked_for() -> None:
    config = Config()
    assert "rejection-sample" not in [node.name for node in recipe(config)]
    assert "rejection-sample" not in wanted_stages(config)
    nodes = {node.name: node for node in recipe(config, ("rejection-sample",))}
    assert nodes["select"].inputs["samples"] == Made("rejection-sample", "samples")
    assert nodes["rejection-sample"].inputs["chat"] == Made("sft", "chat")


def test_held_out_prompts_are_needed_only_where_there_are_temperatures_to_choose_from() -> None:
    single: dict = {"rejection_sampling.temperatures": (0.7,)}
    for temperatures, needed in (({}, True), (single, False)):
        alone = {n.name: n for n in recipe(config_with(Config(), temperatures), ("rejection-sample",))}
        rounds = graph({}, {}, **temperatures)
        for node in (alone["rejection-sample"], rounds["rejection-sample@v1"], rounds["rejection-sample@v2"]):
            assert ("prompts_early_stop" in node.inputs) is needed, node.name
    of_v2 = graph({}, {"settings": single})
    assert "prompts_early_stop" in of_v2["rejection-sample@v1"].inputs
    assert "prompts_early_stop" not in of_v2["rejection-sample@v2"].inputs


def test_what_many_versions_work_on_is_looked_up_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every node works on several of those before it: one that is looked up for each of these is so without end."""
    config = config_with(Config(), {**SETTLED, "rounds": {"versions": [{"pool": "all"}] * 12}})
    nodes = recipe(config)
    ledger, looked_up = ledger_of(tmp_path / "run", {"rounds": config.rounds}, nodes), []
    find = ledger._look_up
    monkeypatch.setattr(ledger, "_look_up", lambda node: looked_up.append(node.name) or find(node))
    ledger.entries()
    assert sorted(looked_up) == sorted(node.name for node in nodes)


def test_a_stage_is_planned_by_the_node_that_starts_most_roles() -> None:
    """The referee, which comes last, is one reward model of two."""
    config = config_with(Config(), {"rounds": {}})
    assert node_of(config, "reward").name == "reward@v5"
    assert node_of(config, "reward").roles == ("helpfulness", "safety")
    assert node_of(Config(), "rejection-sample").roles == ("helpfulness", "safety", "rollout")  # not in its recipe
