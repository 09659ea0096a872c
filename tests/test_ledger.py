"""Keys: what a result depends on changes them, and nothing else does; what is done, what is gone on with."""

import shutil
from dataclasses import replace
from functools import reduce

import pytest
from fake_steps import SETTLED, begin, entry_of, finish, finish_all, keys, ledger_of
from pydantic import ValidationError

from rlhf_ray import run_state
from rlhf_ray.config import CONTENT, EXECUTION, LENGTH, Config, config_with, settings_of
from rlhf_ray.recipe import ledger as ledger_module
from rlhf_ray.recipe.ledger import (
    cannot_go_on,
    difference,
    droppable,
    missing_inputs,
    of_other_source,
    to_run,
    why,
)
from rlhf_ray.recipe.rounds import recipe
from rlhf_ray.recipe.stages import ON_DEMAND, STAGES, Given, Node
from rlhf_ray.run_state import RunDir

OTHERS = (True, False, 1, 2, 3, 0.3, 0.5, "tiny", "fp32", "bf16", "cosine", "constant", "none", "large", "k2")
OTHERS += ("penalty", "policy", "keep", (0.5,), (0.7, 0.8), ("newest", "elsewhere"), {"longer": "elsewhere"})
OTHERS += ("random", "development", (0, 1), "store")
"""Values among which every field has a valid one that is not its default."""
CONSTANT = {"schedule": "constant", "warmup_ratio": 0.0}
ALL = [name for name in STAGES if name not in (*ON_DEMAND, "reward-accuracy")]
SAMPLING = {"pairs", "rejection-sample", "ppo", "evaluate"}
"""Stages whose results depend on the engine."""


def with_another(field):
    """The default config with another value of a field."""
    for value in OTHERS:
        try:
            config = config_with(Config(), {**SETTLED, field: value})
        except ValidationError:
            continue
        before = config_with(Config(), SETTLED)
        if reduce(getattr, field.split("."), config) != reduce(getattr, field.split("."), before):
            return {field: value}
    raise AssertionError(f"no other value of {field} is known here")


@pytest.fixture
def step(tmp_path):
    """The step of a stage whose inputs are all given."""
    (tmp_path / "input").write_text("")

    def made(name, settings=None, *, makes=None):
        stage = STAGES[name]
        inputs = {need: Given(f"data.{need}", str(tmp_path / "input")) for need in stage.needs}
        node = Node(stage, inputs, makes or stage.makes)
        return entry_of(ledger_of(tmp_path / "run", settings, [node]), name).step

    return made


def fields(stage, *marks):
    return list(settings_of(Config(), stage.settings, marks=marks))


# --- keys ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES.values(), ids=lambda stage: stage.name)
def test_what_a_result_depends_on_stands_in_the_key_and_nothing_else_does(stage, step):
    before = step(stage.name).key
    for field in fields(stage, ""):
        assert step(stage.name, with_another(field)).key != before, field
    for field in set(fields(stage, EXECUTION, CONTENT)) - set(fields(stage)):
        assert step(stage.name, with_another(field)).key == before, field


def test_every_kind_of_mark_is_there_to_be_tested():
    marks = (EXECUTION, LENGTH, CONTENT)
    found = {mark: {field for stage in STAGES.values() for field in fields(stage, mark)} for mark in marks}
    assert {"ppo.num_chunks", "sft.save_every", "roles.rollout.num_engines"} <= found[EXECUTION]
    assert {"pretrain.num_steps", "ppo.num_steps", "ppo.patience"} <= found[LENGTH]
    assert {"pairs.models", "evaluate.controls"} <= found[CONTENT]


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ({"run.seed": 1}, set(STAGES) - {"testbed", "tokenizer"}),
        ({"run.precision": "bf16"}, set(STAGES) - {"testbed", "tokenizer", "label"}),
        ({"roles.rollout.max_num_seqs": 8}, SAMPLING),
        ({"roles.rollout.tensor_parallel_size": 2}, SAMPLING),
        ({"ppo.safety_threshold": 0.5}, {"rejection-sample", "select", "ppo", "evaluate"}),
        ({"roles.rollout.num_engines": 2, "roles.rollout.kv_cache_gib": 1.0}, set()),
        ({f"roles.{role}.num_ranks": 2 for role in ("policy", "value", "helpfulness", "reference")}, set()),
        ({"roles.policy.zero_stage": 3, "roles.value.recompute": "full"}, set()),
        ({"ppo.num_chunks": 4, "ppo.micro_batch_tokens": 9, "sft.micro_batch_size": 9}, set()),
        ({"run.save_every_s": None, "run.keep": (), "run.stages": ("ppo",), "cluster.cores": 1}, set()),
    ],
)
def test_settings_of_more_than_one_stage(step, settings, changed):
    assert {name for name in STAGES if step(name).key != step(name, settings).key} == changed


@pytest.mark.parametrize(
    ("name", "field", "schedule", "same"),
    [
        ("pretrain", "pretrain.num_steps", {}, False),  # a cosine
        ("pretrain", "pretrain.num_steps", {"pretrain.optim": CONSTANT}, True),
        ("pretrain", "pretrain.num_steps", {"pretrain.optim": {**CONSTANT, "warmup_ratio": 0.1}}, False),
        ("ppo", "ppo.num_steps", {}, True),
        ("ppo", "ppo.patience", {}, True),
        ("ppo", "ppo.num_steps", {"ppo.optim.schedule": "cosine"}, False),
        ("ppo", "ppo.num_steps", {"ppo.value_optim.schedule": "cosine"}, False),
        ("ppo", "ppo.patience", {"ppo.value_optim.warmup_ratio": 0.1}, False),
    ],
)
def test_a_length_stands_in_the_key_where_the_learning_rate_depends_on_it(step, name, field, schedule, same):
    short, long = step(name, {**schedule, field: 7}), step(name, {**schedule, field: 9})
    assert (short.key == long.key) == same
    assert (short.length.get(field), long.length.get(field)) == ((7, 9) if same else (None, None))


def test_only_training_that_can_be_made_longer_has_a_length(step):
    constant = {f"{section}.optim": CONSTANT for section in ("pretrain", "sft", "reward")}
    lengths = {name: set(found) for name in STAGES if (found := step(name, constant).length)}
    assert lengths == {"pretrain": {"pretrain.num_steps"}, "ppo": {"ppo.num_steps", "ppo.patience"}}


def test_one_reward_model_of_two_is_another_result(step):
    both, one = step("reward"), step("reward", makes={"safety": "safety/model"})
    assert both.key != one.key and one.inputs["makes"] == ["safety"]


def test_the_version_of_a_stage_stands_in_its_key(step, monkeypatch):
    before = step("ppo").key
    monkeypatch.setitem(STAGES, "ppo", replace(STAGES["ppo"], version=7))
    assert step("ppo").key != before and step("ppo").inputs["version"] == 7


def test_given_files_go_by_what_they_hold(tmp_path):
    places = {name: tmp_path / name for name in ("a", "b", "c")}
    for name, path in places.items():
        path.mkdir()
        (path / "weights").write_text("other" if name == "c" else "same")

    def key(place):
        given = {"inputs.chat": str(place), "data.prompts_annotation": str(places["a"])}
        return entry_of(ledger_of(tmp_path / "run", given), "pairs").step.key

    assert key(places["a"]) == key(places["b"]) != key(places["c"])


def test_other_source_changes_no_key_and_is_told(tmp_path, monkeypatch):
    before = finish_all(ledger_of(tmp_path))
    assert of_other_source(before.entries()) == []
    for module in (run_state, ledger_module):
        monkeypatch.setattr(module, "source_hash", lambda: "as after a new comment")
    after = ledger_of(tmp_path)
    assert keys(after) == keys(before) and all(entry.done for entry in after.entries())
    assert of_other_source(after.entries()) == ALL


# --- what is done ----------------------------------------------------------------------------------------------


def test_a_change_leaves_what_does_not_depend_on_it_done(tmp_path):
    finish_all(ledger_of(tmp_path))
    after = ledger_of(tmp_path, {"reward.margin": "none"})
    assert [entry.node.name for entry in after.entries() if not entry.done] == ["reward", "ppo", "evaluate"]
    assert [entry.node.name for entry in to_run(after.entries(), ALL)] == ["reward", "ppo", "evaluate"]
    assert [entry.node.name for entry in to_run(after.entries(), ["evaluate", "sft"])] == ["evaluate"]
    finish_all(after)
    assert all(entry.done for entry in ledger_of(tmp_path).entries())  # both results are there


def test_a_longer_testbed_leaves_alone_what_uses_the_tables_that_stay(tmp_path):
    finish_all(ledger_of(tmp_path))
    longer = ledger_of(tmp_path, {"testbed.num_prompts_test": 7})
    assert [entry.node.name for entry in longer.entries() if not entry.done] == ALL
    finish(longer, "testbed")  # the same tables
    assert all(entry.done for entry in longer.entries())


def test_children_are_filed_under_the_steps_that_their_parent_has_done(tmp_path):
    first = finish_all(ledger_of(tmp_path, {"ppo.num_steps": 10}), but=("ppo", "evaluate"))
    finish(first, "ppo", steps=4)  # stopped early
    evaluation = finish(first, "evaluate").step.path
    same = ledger_of(tmp_path, {"ppo.num_steps": 20})
    assert entry_of(same, "evaluate").step.path == evaluation
    longer = ledger_of(tmp_path, {"ppo.num_steps": 30, "ppo.patience": 9})
    finish(longer, "ppo", steps=6)
    assert not entry_of(longer, "evaluate").done


def test_artefacts_say_where_they_are_and_what_they_are_made_from(tmp_path):
    entry = entry_of(finish_all(ledger_of(tmp_path)), "reward")
    safety = entry.outputs["safety"]
    assert safety.path == entry.step.path / "safety" / "model" and safety.path.is_dir()
    assert safety.key == f"{entry.directory}/safety/model" and safety.maker == entry.directory
    assert safety.parents == {name: artefact.key for name, artefact in entry.inputs.items()}
    assert set(safety.parents) == set(STAGES["reward"].needs)


# --- asked for anew --------------------------------------------------------------------------------------------


def test_what_is_asked_for_anew_and_its_dependents_are_made_once_more(tmp_path):
    ledger = finish_all(ledger_of(tmp_path))
    before = keys(ledger)
    ledger.redo(["reward"])
    assert [entry.node.name for entry in ledger.entries() if not entry.done] == ["reward", "ppo", "evaluate"]
    asked = entry_of(ledger, "reward").step.key
    assert asked != before["reward"] and why(entry_of(ledger, "reward"), []) == "asked for anew"
    finish(ledger, "reward")  # the command is interrupted in what depends on it, and given again
    again = ledger_of(tmp_path)
    again.redo(["reward"])
    assert entry_of(again, "reward").step.key == asked and entry_of(again, "reward").done
    finish_all(again)
    again.redo_is_over()
    after = keys(ledger_of(tmp_path))
    assert {name for name in ALL if after[name] != before[name]} == {"reward", "ppo", "evaluate"}
    assert RunDir(tmp_path).manifest()["redone"] == {"reward": 1}
    again.redo(["reward"])
    assert entry_of(again, "reward").step.key not in (asked, before["reward"])
    assert RunDir(tmp_path).manifest()["redone"] == {"reward": 2}


def test_what_is_asked_for_anew_together_is_all_made_anew(tmp_path):
    ledger = finish_all(ledger_of(tmp_path))
    before = keys(ledger)
    ledger.redo(["testbed", "tokenizer"])
    finish(ledger, "testbed")  # the same tables: by itself it would leave the tokenizer as it is
    assert not entry_of(ledger, "tokenizer").done
    assert entry_of(ledger, "tokenizer").step.key != before["tokenizer"]


def test_a_table_made_anew_that_holds_the_same_leaves_what_uses_it_alone(tmp_path):
    ledger = finish_all(ledger_of(tmp_path))
    before = keys(ledger)
    ledger.redo(["testbed"])
    finish(ledger, "testbed")
    assert {name for name in ALL if keys(ledger)[name] != before[name]} == {"testbed"}


# --- gone on with ----------------------------------------------------------------------------------------------


def test_ppo_goes_on_from_where_a_shorter_one_ended(tmp_path):
    short = finish_all(ledger_of(tmp_path, {"ppo.num_steps": 4}))
    ended = entry_of(short, "ppo").step.path
    longer = ledger_of(tmp_path, {"ppo.num_steps": 6, "ppo.micro_batch_tokens": 7, "roles.policy.num_ranks": 2})
    entry = entry_of(longer, "ppo")
    assert not entry.done and entry.step.latest_state() == (4, ended / "state" / "step-00000004")
    assert entry.step.continued() == ended
    assert why(entry, ["ppo"]) == "goes on from step 4"
    assert [found.node.name for found in to_run(longer.entries(), ALL)] == ["ppo", "evaluate"]
    assert why(entry_of(longer, "evaluate"), ["ppo"]) == "after ppo"
    finish_all(longer)
    assert entry_of(longer, "ppo").step.path != ended and (ended / "model").is_dir()
    assert not (ended / "state").exists()  # the longer one has it
    assert all(found.done for found in ledger_of(tmp_path, {"ppo.num_steps": 4}).entries())


def test_a_schedule_over_all_steps_starts_anew(tmp_path):
    cosine = {"ppo.optim.schedule": "cosine"}
    finish_all(ledger_of(tmp_path, {**cosine, "ppo.num_steps": 4}))
    entry = entry_of(ledger_of(tmp_path, {**cosine, "ppo.num_steps": 6}), "ppo")
    assert entry.step.latest_state() == (0, None)
    assert why(entry, ["ppo"]) == "ppo.num_steps was 4 and is 6"


def test_shorter_training_starts_anew_and_says_why(tmp_path):
    finish_all(ledger_of(tmp_path, {"ppo.num_steps": 6}))
    entry = entry_of(ledger_of(tmp_path, {"ppo.num_steps": 4}), "ppo")
    assert entry.step.latest_state() == (0, None)
    assert why(entry, ["ppo"]) == "ppo.num_steps was 6 and is 4"


def test_training_that_stopped_early_is_done_at_every_limit_beyond(tmp_path):
    ledger = finish_all(ledger_of(tmp_path, {"ppo.num_steps": 400}), but=("ppo", "evaluate"))
    finish(ledger, "ppo", steps=40)
    done = [entry_of(ledger_of(tmp_path, {"ppo.num_steps": steps}), "ppo").done for steps in (39, 40, 500)]
    assert done == [False, True, True]
    more_patient = entry_of(ledger_of(tmp_path, {"ppo.num_steps": 400, "ppo.patience": 6}), "ppo")
    assert not more_patient.done and more_patient.step.latest_state()[0] == 40


def test_a_shorter_run_leaves_the_longer_ones_state(tmp_path):
    longer = finish_all(ledger_of(tmp_path, {"ppo.num_steps": 40}))
    state = entry_of(longer, "ppo").step.path / "state"
    finish_all(ledger_of(tmp_path, {"ppo.num_steps": 10}))
    assert state.is_dir() and entry_of(ledger_of(tmp_path, {"ppo.num_steps": 50}), "ppo").step.latest_state()[0] == 40


def test_fewer_steps_than_are_done_are_refused(tmp_path):
    ledger = finish_all(ledger_of(tmp_path, {"ppo.num_steps": 6}), but=("ppo", "evaluate"))
    partial = begin(ledger, "ppo", steps=5).step.partial
    assert cannot_go_on(entry_of(ledger_of(tmp_path, {"ppo.num_steps": 4}), "ppo")) == (
        f"ppo.num_steps=4 is too low for {partial}, which has 5 steps done; set it to 5 or more, or remove that "
        "directory"
    )
    for settings in ({"ppo.num_steps": 5}, {"ppo.num_steps": 9, "ppo.patience": 8}, {"ppo.num_steps": 6}):
        assert cannot_go_on(entry_of(ledger_of(tmp_path, settings), "ppo")) == ""
    less_patient = entry_of(ledger_of(tmp_path, {"ppo.num_steps": 6, "ppo.patience": 2}), "ppo")
    assert cannot_go_on(less_patient).startswith(
        f"ppo.patience=2 is too low for {partial}, which was begun with 5; set"
    )


# --- models that were not kept ---------------------------------------------------------------------------------


def kinds(ledger, keep=()):
    return [artefact.kind for artefact in droppable(ledger.entries(), keep)]


def test_models_that_nothing_needs_any_more_can_go(tmp_path):
    ledger = finish_all(ledger_of(tmp_path), but=("pairs", "label", "reward", "ppo", "evaluate"))
    assert kinds(ledger) == ["base"]  # the others are needed by what is not done, whoever asks for it
    assert kinds(finish_all(ledger, but=("evaluate",))) == ["base", "previous", "last"]
    assert kinds(finish_all(ledger)) == ["base", "chat", "previous", "helpfulness", "safety", "last"]
    assert kinds(ledger, ("chat", "last")) == ["base", "previous", "helpfulness", "safety"]
    assert kinds(ledger, ("base", "previous", "chat", "helpfulness", "safety", "last")) == []


def test_what_a_recipe_ends_in_stays(tmp_path):
    nodes = recipe(config_with(Config(), SETTLED))[:7]
    assert nodes[-1].name == "reward"
    assert kinds(finish_all(ledger_of(tmp_path, nodes=nodes))) == ["base", "chat", "previous"]


def test_the_last_version_stays_whatever_is_kept(tmp_path):
    rounds = {"versions": [{}, {}], "referee": False}
    nodes = recipe(config_with(Config(), {**SETTLED, "rounds": rounds}))
    ledger = finish_all(ledger_of(tmp_path, {"rounds": rounds}, nodes))
    dropped = {
        artefact.label.partition("-")[0] for artefact in droppable(ledger.entries(), ()) if artefact.kind == "chat"
    }
    assert dropped == {"sft", "sft@v1"}


def test_a_model_that_was_not_kept_is_made_again_where_something_needs_it(tmp_path):
    ledger = finish_all(ledger_of(tmp_path))
    base = entry_of(ledger, "pretrain").outputs["base"]
    before = keys(ledger)
    shutil.rmtree(base.path)
    assert to_run(ledger_of(tmp_path).entries(), ALL) == []
    again = ledger_of(tmp_path, {"reward.margin": "none"})
    assert [entry.node.name for entry in to_run(again.entries(), ALL)] == ["reward", "ppo", "evaluate"]
    again = ledger_of(tmp_path, {"sft.batch_size": 7})
    assert [entry.node.name for entry in to_run(again.entries(), ["sft"])] == ["pretrain", "sft"]
    assert why(entry_of(again, "pretrain"), ["pretrain", "sft"]) == "its model was not kept"
    assert finish(again, "pretrain").outputs["base"] == base and base.path.is_dir()
    assert keys(ledger_of(tmp_path)) == before


# --- why -------------------------------------------------------------------------------------------------------


def test_the_reason_names_the_field_with_both_values(tmp_path):
    finish_all(ledger_of(tmp_path))

    def reason(name, **settings):
        settings = {key.replace("__", "."): value for key, value in settings.items()}
        return why(entry_of(ledger_of(tmp_path, settings), name), [])

    assert reason("evaluate", evaluate__max_new_tokens=7) == "evaluate.max_new_tokens was 512 and is 7"
    assert reason("sft", sft__batch_size=7, sft__optim={"lr": 1.0}) == (
        "sft.batch_size was 64 and is 7; sft.optim.lr was 2e-05 and is 1.0"
    )
    numbers = set(type(Config().testbed).model_fields) - {"evaluate_on"}
    many = reason("testbed", **{f"testbed__{name}": 5 for name in numbers})
    assert many.endswith("; 4 more") and many.count(" was ") == 3  # of seven
    (tmp_path / "given").mkdir()
    given = {"inputs__chat": str(tmp_path / "given"), "data__comparisons": str(tmp_path / "given")}
    assert reason("reward", **given) == "chat is another; comparisons is another; tokenizer is another"


def test_other_reasons(tmp_path):
    ledger = ledger_of(tmp_path)
    testbed, tokenizer = entry_of(ledger, "testbed"), entry_of(ledger, "tokenizer")
    assert why(testbed, ["testbed"]) == "never made"
    assert why(tokenizer, ["testbed", "tokenizer"]) == "after testbed"
    assert why(tokenizer, ["tokenizer"]) == "waits for corpus"
    testbed.step.begin()
    assert why(testbed, ["testbed"]) == "was begun"
    finish(ledger, "testbed"), finish(ledger, "tokenizer")
    assert missing_inputs(entry_of(ledger, "pairs"), ledger.run).startswith("pairs needs previous, chat, which neither")
    assert missing_inputs(entry_of(ledger, "reward"), ledger.run) == (
        f"reward needs comparisons, chat, which neither the config names nor {ledger.run.path} holds; run label, sft "
        "first, or set data.comparisons, inputs.chat"
    )


def test_the_reason_is_told_by_the_step_that_is_most_alike(tmp_path):
    for settings in ({"evaluate.max_new_tokens": 5, "run.seed": 3}, {"evaluate.max_new_tokens": 6}):
        finish_all(ledger_of(tmp_path, settings))
    step = entry_of(ledger_of(tmp_path, {"evaluate.max_new_tokens": 7}), "evaluate").step
    assert difference(step) == "evaluate.max_new_tokens was 6 and is 7"
