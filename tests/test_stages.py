"""The table of stages, and the graph that a config makes of it."""

import inspect

import pytest

from rlhf_ray.config import CONTENT, EXECUTION, LENGTH, Config, RolesSection, TrainRole, config_with, settings_of
from rlhf_ray.errors import UserError
from rlhf_ray.recipe.rounds import node_of, recipe
from rlhf_ray.recipe.stages import MODELS, ON_DEMAND, STAGES, Given, Made, field_of, maker_of
from rlhf_ray.run_state import digest

IN_ROUNDS = (*ON_DEMAND, "reward-accuracy")


def graph(**settings):
    """The nodes of the default config with dotted keys, their dots as two underscores, replaced."""
    return recipe(config_with(Config(), {key.replace("__", "."): value for key, value in settings.items()}))


def named(nodes, name):
    [node] = [node for node in nodes if node.name == name]
    return node


def made(nodes):
    """What each node makes."""
    return {node.name: list(node.makes) for node in nodes}


# --- the table -------------------------------------------------------------------------------------------------


def test_what_a_stage_needs_is_made_before_it_or_named_by_the_config():
    for place, (name, stage) in enumerate(STAGES.items()):
        assert name == stage.name
        before = {output for earlier in list(STAGES.values())[:place] for output in earlier.makes}
        assert before.issuperset(stage.needs), name
        assert all(field_of(need) for need in stage.may_need if need != "referee"), name  # a model of [rounds] alone
        assert all(maker_of(need) in STAGES for need in stage.needs), name


def test_no_two_stages_make_the_same():
    outputs = [output for stage in STAGES.values() for output in stage.makes]
    assert len(set(outputs)) == len(outputs)
    assert set(MODELS) <= {*outputs, "previous"}


@pytest.mark.parametrize("stage", STAGES.values(), ids=lambda stage: stage.name)
def test_roles_and_settings_of_a_stage_are_those_of_the_config(stage):
    roles = RolesSection()
    assert set(stage.roles) <= set(RolesSection.model_fields)
    assert set(stage.trains) <= set(stage.roles)
    assert all(isinstance(getattr(roles, role), TrainRole) for role in stage.trains)
    assert digest(settings_of(Config(), stage.settings, marks=("", EXECUTION, LENGTH, CONTENT)))


def test_every_section_of_the_recipe_stands_in_the_key_of_a_stage():
    sections = set(Config.model_fields) - {"run", "cluster", "roles", "data", "inputs", "rounds", "stage_roles"}
    assert sections <= {name for stage in STAGES.values() for name in stage.settings}


@pytest.mark.parametrize("stage", STAGES.values(), ids=lambda stage: stage.name)
def test_the_runner_of_a_stage_is_a_function_of_context_step_and_inputs(stage):
    from rlhf_ray.recipe.run import runner

    assert list(inspect.signature(runner(stage)).parameters) == ["context", "step", "inputs"]


# --- the graph -------------------------------------------------------------------------------------------------


def test_the_default_recipe_is_every_stage_once_in_order():
    nodes = graph()
    assert [node.name for node in nodes] == [name for name in STAGES if name not in IN_ROUNDS]
    assert made(nodes) == {name: list(STAGES[name].makes) for name in made(nodes)} | {"sft": ["chat", "previous"]}
    assert named(nodes, "sft").makes == {"chat": "model", "previous": "epoch-1"}
    assert named(nodes, "pairs").inputs["model.0"] == Made("sft", "previous")
    assert named(nodes, "pairs").inputs["model.1"] == Made("sft", "chat")
    assert "comparisons_held_out" not in named(nodes, "reward").inputs


def test_every_node_works_on_what_nodes_before_it_make():
    for nodes in (graph(), graph(data__public_demonstrations="/d"), graph(sft__epochs=1, inputs__helpfulness="/h")):
        there = set()
        for node in nodes:
            sources = [source for source in node.inputs.values() if isinstance(source, Made)]
            assert {(source.node, source.output) for source in sources} <= there, node.name
            there |= {(node.name, output) for output in node.makes}


def test_one_epoch_leaves_no_earlier_model_and_the_newest_answers_twice():
    nodes = graph(sft__epochs=1)
    assert named(nodes, "sft").makes == {"chat": "model"}
    assert named(nodes, "pairs").inputs["model.0"] == named(nodes, "pairs").inputs["model.1"] == Made("sft", "chat")
    assert named(graph(sft__epochs=3), "sft").makes["previous"] == "epoch-2"


def test_a_chat_model_that_is_given_stands_in_for_fine_tuning_and_brings_its_tokenizer():
    nodes, chat = graph(inputs__chat="/chat"), Given("inputs.chat", "/chat")
    assert [name for name, outputs in made(nodes).items() if not outputs] == ["tokenizer", "sft"]
    assert {named(nodes, "pairs").inputs[f"model.{place}"] for place in (0, 1)} == {chat}
    for name in ("reward", "ppo", "evaluate"):
        assert (named(nodes, name).inputs["chat"], named(nodes, name).inputs["tokenizer"]) == (chat, chat)


def test_models_that_answer_may_be_given():
    nodes = graph(pairs__models=("newest", "/other"))
    assert named(nodes, "pairs").inputs["model.0"] == Made("sft", "chat")
    assert named(nodes, "pairs").inputs["model.1"] == Given("pairs.models[1]", "/other")


def test_comparisons_that_are_given_stand_in_for_pairs_and_labels():
    nodes = graph(data__comparisons="/c", data__comparisons_held_out="/h")
    assert made(nodes)["pairs"] == made(nodes)["label"] == []
    reward = named(nodes, "reward")
    assert reward.inputs["comparisons"] == Given("data.comparisons", "/c")
    assert reward.inputs["comparisons_held_out"] == Given("data.comparisons_held_out", "/h")


def test_pairs_that_are_given_are_labelled():
    nodes = graph(data__pairs="/p")
    assert (made(nodes)["pairs"], made(nodes)["label"]) == ([], ["comparisons"])
    assert named(nodes, "label").inputs["pairs"] == Given("data.pairs", "/p")


def test_a_reward_model_that_is_given_is_not_trained():
    nodes = graph(inputs__helpfulness="my_rewards:short")
    reward = named(nodes, "reward")
    assert (reward.makes, reward.roles) == ({"safety": "safety/model"}, ("safety",))
    for name in ("ppo", "evaluate"):
        assert named(nodes, name).inputs["helpfulness"] == Given("inputs.helpfulness", "my_rewards:short")
        assert named(nodes, name).inputs["safety"] == Made("reward", "safety")
        assert "helpfulness" in named(nodes, name).roles
    assert made(graph(inputs__helpfulness="/h", inputs__safety="/s"))["reward"] == []


def test_public_demonstrations_are_learnt_first():
    nodes = graph(data__public_demonstrations="/d")
    assert [node.name for node in nodes if node.stage.name == "sft"] == ["sft@public", "sft"]
    public, own = named(nodes, "sft@public"), named(nodes, "sft")
    assert public.inputs["demonstrations"] == Given("data.public_demonstrations", "/d")
    assert (public.inputs["base"], public.makes) == (Made("pretrain", "base"), {"chat": "model"})
    assert own.inputs["demonstrations"] == Made("testbed", "demonstrations")
    assert own.inputs["base"] == Made("sft@public", "chat")
    assert node_of(config_with(Config(), {"data.public_demonstrations": "/d"}), "sft").name == "sft"
    with_chat = graph(data__public_demonstrations="/d", inputs__chat="/c")
    assert "sft@public" not in made(with_chat)


def test_controls_stand_beside_the_runs_own_models():
    inputs = named(graph(evaluate__controls={"longer": "/m"}), "evaluate").inputs
    assert inputs["model.longer"] == Given("evaluate.controls.longer", "/m")
    assert list(inputs) == [*STAGES["evaluate"].needs, "model.SFT", "model.PPO", "model.longer"]
    with pytest.raises(UserError, match=r"evaluate.controls.PPO: the label is taken by this run's own"):
        graph(evaluate__controls={"PPO": "/m"})
    for label in ("long greedy", "long own", "long T=0.7"):
        with pytest.raises(UserError, match=rf"evaluate.controls.{label}: its end would name a decoding"):
            graph(evaluate__controls={label: "/m"})
