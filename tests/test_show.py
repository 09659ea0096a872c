"""`rlhf-ray show` and `rlhf-ray clean`: what a recipe is, what of it is done, and what goes."""

import json
import shutil

import pytest
from fake_steps import SETTLED, begin, entry_of, finish, finish_all, ledger_of
from tiny_inputs import write_checkpoint

from model.config import PRESETS
from model.flops import num_parameters
from rlhf_ray.cli.show import _size
from rlhf_ray.config import Config, config_with
from rlhf_ray.recipe.stages import ON_DEMAND, STAGES
from rlhf_ray.run_state import RunDir

CONFIG = '[run]\ndevice = "cpu"\nprecision = "fp32"\n[cluster]\naddress = "local"\n'


@pytest.fixture
def show(call, tmp_path):
    """`rlhf-ray show CONFIG --json` of the default config with overrides; returns the nodes by name and the disk."""
    (tmp_path / "run.toml").write_text(CONFIG)

    def run(*arguments, what=None):
        code, out, err = call("show", what or tmp_path / "run.toml", *arguments, "--json")
        assert (code, err) == (0, ""), err
        found = json.loads(out)
        return {node["node"]: node for node in found["nodes"]}, found["disk"]

    return run


def states(nodes):
    return {name: node["state"] for name, node in nodes.items()}


def record(run, settings=None):
    """The config of a run's last command."""
    RunDir(run).record(config=config_with(Config(), {**SETTLED, **(settings or {})}).model_dump(mode="json"))


ALL = [name for name in STAGES if name not in (*ON_DEMAND, "reward-accuracy")]
"""Of a recipe without rounds."""


def refused(result):
    code, out, err = result
    assert (code, out) == (2, "") and err.count("\n") == 1
    return err


# --- show ------------------------------------------------------------------------------------------------------


def test_a_config_is_shown_before_there_is_a_run(show, tmp_path):
    nodes, _ = show()
    assert list(nodes) == ALL and set(states(nodes).values()) == {"to do"}
    assert nodes["testbed"]["why"] == "never made" and nodes["tokenizer"]["why"] == "after testbed"
    assert nodes["evaluate"]["why"] == "after tokenizer, reward, testbed, sft, ppo"
    assert nodes["sft"]["inputs"] == {
        "demonstrations": "testbed/demonstrations",
        "tokenizer": "tokenizer/tokenizer",
        "base": "pretrain/base",
    }
    assert nodes["sft"]["makes"]["chat"] == {"path": None, "kept": False, "parents": {}}
    assert show("--out", tmp_path / "new") == show() and not (tmp_path / "new").exists()


def test_a_run_is_shown_by_its_directory_or_its_config(show, tmp_path):
    run = tmp_path / "run"
    ledger = ledger_of(run)
    for name in ("testbed", "tokenizer", "pretrain"):
        finish(ledger, name)
    record(run)
    by_config, disk = show("--out", run)
    assert states(by_config) == {name: "done" if name in ALL[:3] else "to do" for name in ALL}
    assert (by_config, disk) == show(what=run)
    pretrained, step = by_config["pretrain"], entry_of(ledger, "pretrain").step
    assert (pretrained["step"], pretrained["why"], pretrained["other_source"]) == (step.path.name, "", False)
    assert pretrained["makes"]["base"]["path"] == str(step.path / "model") and pretrained["makes"]["base"]["kept"]
    assert set(pretrained["makes"]["base"]["parents"]) == {"corpus", "tokenizer"}
    assert pretrained["seconds"] >= 0
    assert pretrained["disk_bytes"] == sum(f.stat().st_size for f in step.path.rglob("*") if f.is_file())
    assert disk["now_bytes"] == sum(f.stat().st_size for f in (run / "steps").rglob("*") if f.is_file())
    assert by_config["sft"]["why"] == "never made"


def test_what_has_changed_is_named(show, tmp_path):
    run = tmp_path / "run"
    finish_all(ledger_of(run, {"ppo.num_steps": 4}))
    record(run, {"ppo.num_steps": 4})
    assert set(states(show(what=run)[0]).values()) == {"done"}
    nodes, _ = show("--out", run, "--set", "reward.margin=none", "--set", "ppo.num_steps=4")
    assert [name for name, state in states(nodes).items() if state == "to do"] == ["reward", "ppo", "evaluate"]
    assert nodes["reward"]["why"] == "reward.margin was small and is none" and nodes["ppo"]["why"] == "after reward"
    nodes, _ = show("--out", run, "--set", "ppo.num_steps=6")
    assert nodes["ppo"]["why"] == "goes on from step 4" and nodes["evaluate"]["why"] == "after ppo"
    nodes, _ = show("--out", run, "--set", "ppo.num_steps=4")
    assert nodes["ppo"]["steps_done"] == 4


def test_stages_that_are_not_asked_for_and_those_that_are_given(show, tmp_path):
    nodes, _ = show("--set", 'run.stages=["testbed","tokenizer"]')
    assert set(states(nodes).values()) == {"to do", "not asked for"}
    assert [name for name, state in states(nodes).items() if state == "to do"] == ["testbed", "tokenizer"]
    chat = write_checkpoint(tmp_path / "chat")
    nodes, _ = show("--set", f"inputs.chat={chat}")
    assert [name for name, state in states(nodes).items() if state == "given"] == ["tokenizer", "sft"]
    assert nodes["sft"]["why"] == "the config names what it would make"
    assert nodes["ppo"]["inputs"]["chat"] == f"inputs.chat={chat}"


def test_other_source_is_marked(show, tmp_path, monkeypatch):
    finish(ledger_of(tmp_path / "run"), "testbed")
    for module in ("rlhf_ray.run_state", "rlhf_ray.cli.show", "rlhf_ray.recipe.ledger"):
        monkeypatch.setattr(f"{module}.source_hash", lambda: "another")
    nodes, _ = show("--out", tmp_path / "run")
    assert nodes["testbed"]["state"] == "done" and nodes["testbed"]["other_source"]


def test_the_table_shows_stages_lineage_and_disk(call, tmp_path):
    run = tmp_path / "run"
    ledger = finish_all(ledger_of(run), but=("evaluate",))
    record(run)
    shutil.rmtree(entry_of(ledger, "sft").outputs["chat"].path)
    steps = {name: entry_of(ledger, name).directory for name in ALL[:-1]}
    code, out, err = call("show", run)
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert any(line.startswith("reward comparisons, tokenizer, chat done ") for line in lines)
    assert any(line.startswith("evaluate ") and "after " in line for line in lines)
    line_of_chat = f"{steps['sft']} <- {steps['pretrain']} <- {steps['testbed']}"
    assert f"policy: {steps['ppo']} <- {line_of_chat}" in lines
    assert f"safety: {steps['reward']} <- {line_of_chat}" in lines
    assert f"chat: {steps['sft']} (not kept) <- {steps['pretrain']} <- {steps['testbed']}" in lines
    assert lines[-1].startswith("disk: ")
    # The chat model that was not kept is made again, because the evaluation works on it.
    assert any(line.startswith("sft ") and "its model was not kept" in line for line in lines)


def test_what_is_to_come_by_hand(show, tmp_path):
    tiny = ("--set", "model.preset=tiny", "--set", "tokenizer.vocab_size=400")
    shape = PRESETS["tiny"].model_copy(update={"vocab_size": 400})
    model, scalar = num_parameters(shape), num_parameters(shape, scalar_head=True)
    everything = 4 * (6 * model + 2 * scalar)  # fp32: base, previous, chat, policy, last; both rewards
    everything -= 4 * model
    # Weights and two moments in fp32 of policy and value, from which PPO goes on.
    states = 12 * (model + scalar)
    assert show(*tiny)[1]["still_needed_bytes"] == everything + states
    assert show(*tiny, "--set", 'run.keep=["states"]')[1]["still_needed_bytes"] == 4 * model + states
    kept = show(*tiny, "--set", 'run.keep=["chat","safety"]')[1]
    assert kept["still_needed_bytes"] == 4 * (2 * model + scalar) and kept["keep"] == ["chat", "safety"]
    finish_all(ledger_of(tmp_path / "run", {"model.preset": "tiny", "tokenizer.vocab_size": 400}))
    assert show(*tiny, "--out", tmp_path / "run")[1]["still_needed_bytes"] == 0


@pytest.mark.parametrize("given", ["chat", "base"])
def test_a_checkpoint_that_is_not_there_is_no_reason_to_fail(show, tmp_path, given):
    nodes, disk = show("--set", f"inputs.{given}={tmp_path}/nowhere")
    assert disk["still_needed_bytes"] is None
    assert nodes["reward"]["state"] == "to do"


def test_what_cannot_be_shown(call, tmp_path):
    config = tmp_path / "run.toml"
    config.write_text(CONFIG)
    (tmp_path / "empty").mkdir()
    assert "empty: holds no run (no config in manifest.json); give the directory" in refused(
        call("show", tmp_path / "empty")
    )
    for option in (("--out", tmp_path), ("--set", "run.seed=1")):
        line = refused(call("show", tmp_path / "empty", *option))
        assert "empty: is a run's directory, which has a config of its own; give a CONFIG" in line
    assert "nowhere.toml: cannot be read" in refused(call("show", tmp_path / "nowhere.toml"))
    assert "did you mean ppo.num_steps?" in refused(call("show", config, "--set", "ppo.num_step=3"))
    assert "run.stages='stf' is no stage" in refused(call("show", config, "--set", 'run.stages=["stf"]'))


# --- clean -----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    """A finished run, and training that is under way to another length."""
    finish_all(ledger_of(tmp_path / "run", {"ppo.num_steps": 4}))
    begin(ledger_of(tmp_path / "run", {"ppo.num_steps": 4, "ppo.batch_size": 7}), "ppo", steps=2)
    state = entry_of(ledger_of(tmp_path / "run", {"ppo.num_steps": 4}), "ppo").step.path / "state" / "step-00000004"
    (state / "policy").write_text("x" * 1500)
    return tmp_path / "run"


def test_results_stay_and_states_go(run, call):
    ledger = ledger_of(run, {"ppo.num_steps": 4})
    step = entry_of(ledger, "ppo").step
    code, out, err = call("clean", run)
    assert (code, err) == (0, "")
    assert out == f"{step.path.name}: 1.5 kB\n1.5 kB removed\n"
    after = ledger_of(run, {"ppo.num_steps": 4})
    assert all(entry.done for entry in after.entries())
    assert all(artefact.path.exists() for entry in after.entries() for artefact in entry.outputs.values())
    assert entry_of(ledger_of(run, {"ppo.num_steps": 6}), "ppo").step.latest_state() == (0, None)
    under_way = entry_of(ledger_of(run, {"ppo.num_steps": 4, "ppo.batch_size": 7}), "ppo").step
    assert under_way.latest_state()[0] == 2  # it is not finished
    assert call("clean", run)[1] == "nothing removed\n"


def test_unfinished_steps_go_where_that_is_asked_for(run, call):
    [partial] = run.glob("steps/*.partial")
    code, out, _ = call("clean", run, "--unfinished")
    assert code == 0 and f"{partial.name}: " in out and not partial.exists()
    assert all(entry.done for entry in ledger_of(run, {"ppo.num_steps": 4}).entries())


def test_what_cannot_be_cleaned(run, call, tmp_path):
    assert "holds no run (no steps/)" in refused(call("clean", tmp_path))
    with RunDir(run).locked():
        assert "is at work there; wait for it or stop it" in refused(call("clean", run))
    assert (entry_of(ledger_of(run, {"ppo.num_steps": 4}), "ppo").step.path / "state").is_dir()


def test_a_file_of_two_names_is_counted_once(tmp_path):
    (tmp_path / "model").write_bytes(b"x" * 100)
    (tmp_path / "last").hardlink_to(tmp_path / "model")
    (tmp_path / "other").write_bytes(b"x" * 10)
    assert _size(tmp_path) == 110 and _size(tmp_path / "nowhere") == 0
