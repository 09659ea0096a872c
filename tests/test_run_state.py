"""The run directory: outputs appear whole, checkpoints are whole, keys follow their inputs."""

import json
import os

import pytest

from rlhf_ray import run_state
from rlhf_ray.errors import UserError
from rlhf_ray.run_state import (
    Due,
    RunDir,
    code_version,
    copy_files,
    digest,
    drop_state,
    fingerprint,
    newest_state,
    source_hash,
    sweep,
    within,
    write_json,
)

INPUTS = {"config": {"sft": {"lr": 1e-5}}, "seed": 0, "parents": {"base": "pretrain-1/model"}}


def test_a_step_is_done_once_it_is_finished_and_not_before(tmp_path):
    run = RunDir(tmp_path)
    run.machine = {"precision": "fp32"}
    step = run.step("sft", INPUTS)
    (step.begin() / "model").write_text("weights")
    assert not step.done and not RunDir(tmp_path).step("sft", INPUTS).done
    assert step.finish(loss=0.5) == step.path
    again = RunDir(tmp_path).step("sft", INPUTS)
    assert again.done and (again.path / "model").read_text() == "weights"
    assert not again.partial.exists()
    recorded = json.loads((again.path / "step.json").read_text())
    assert recorded.pop("seconds") >= 0
    assert recorded == {
        "name": "sft",
        "key": again.key,
        "inputs": INPUTS,
        "length": {},
        "source": source_hash(),
        "machine": {"precision": "fp32"},
        "loss": 0.5,
    }
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["steps"][again.path.name]["loss"] == 0.5


def test_finish_is_one_rename_and_what_fails_before_it_leaves_the_checkpoint(tmp_path, monkeypatch):
    step = RunDir(tmp_path).step("sft", INPUTS)
    step.begin()
    with step.new_state(4) as directory:
        (directory / "weights").write_text("4")

    def killed(*names):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "rename", killed)
        step.finish()
    assert not step.done
    done, state = step.latest_state()
    assert done == 4 and (state / "weights").read_text() == "4"
    assert not (step.finish() / "state").exists()


def test_a_checkpoint_appears_whole_and_replaces_the_one_before(tmp_path):
    step = RunDir(tmp_path).step("ppo", INPUTS)
    step.begin()
    assert step.latest_state() == (0, None)
    for steps_done in (9, 10):
        with step.new_state(steps_done) as directory:
            (directory / "weights").write_text(str(steps_done))
            assert step.latest_state()[0] == (9 if steps_done == 10 else 0)  # not this one yet
    done, state = step.latest_state()
    assert done == 10 and (state / "weights").read_text() == "10"
    assert [path.name for path in state.parent.iterdir()] == ["step-00000010"]


def test_a_checkpoint_that_failed_half_way_is_no_checkpoint(tmp_path):
    step = RunDir(tmp_path).step("ppo", INPUTS)
    step.begin()
    with step.new_state(5) as directory:
        (directory / "weights").write_text("5")
    with pytest.raises(OSError, match="disk full"), step.new_state(6) as directory:
        (directory / "weights").write_text("half")
        raise OSError("disk full")
    assert step.latest_state()[0] == 5  # step-00000006.writing is passed over
    with step.new_state(6) as directory:
        assert list(directory.iterdir()) == []  # the half of the last attempt is gone
        (directory / "weights").write_text("6")
    assert step.latest_state()[0] == 6


def test_a_checkpoint_is_due_by_steps_by_the_clock_and_at_the_end(monkeypatch):
    clock = iter([0.0, 59.0, 60.0, 60.0, 80.0, 140.0, 259.0, 260.0])
    monkeypatch.setattr(run_state.time, "monotonic", lambda: next(clock))
    due = Due(5, 60.0)  # begun at 0
    assert not due.now(3, 100)  # at 59
    assert due.now(4, 100)  # at 60
    with due.writing():  # from 60 to 80: 20 s, a tenth of 200
        pass
    assert not due.now(6, 100)  # at 140, 60 after
    assert not due.now(7, 100)  # at 259
    assert due.now(8, 100)  # at 260, 180 after
    clock = iter([0.0, *[1e9] * 4])
    due = Due(5, None)
    assert [due.now(done, 7) for done in (4, 5, 6, 7)] == [False, True, False, True]


def test_a_part_of_a_result_is_made_once(tmp_path):
    step = RunDir(tmp_path).step("evaluate", INPUTS)
    step.begin()

    def again():
        raise AssertionError("made twice")

    assert step.kept("0", lambda: {"a": (1 / 3, None)}) == {"a": [1 / 3, None]}
    assert RunDir(tmp_path).step("evaluate", INPUTS).kept("0", again) == {"a": [1 / 3, None]}
    assert not (step.finish() / "parts").exists()


def test_what_was_half_written_is_swept_away(tmp_path):
    for name in ("model", "state/step-00000002", "best/after-000001"):
        (tmp_path / name).mkdir(parents=True)
    for name in (".model.partial-77", "state/step-00000003.writing", "best/.after-000002.partial-77"):
        (tmp_path / name / "policy").mkdir(parents=True)
    for name in ("metrics.jsonl.writing", ".answers.parquet.77.tmp"):
        (tmp_path / name).touch()
    sweep(tmp_path)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert left == ["best", "best/after-000001", "model", "state", "state/step-00000002"]


def test_files_are_copied_without_their_modes(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text("new")
    (source / "tokenizer.json").chmod(0o400)
    source.chmod(0o500)
    to = tmp_path / "to"
    to.mkdir()
    (to / "tokenizer.json").write_text("old")
    (to / "tokenizer.json").chmod(0o400)
    before = os.umask(0o027)
    try:
        copy_files(source, to)
    finally:
        os.umask(before)
    assert (to / "tokenizer.json").read_text() == "new"
    assert (to / "tokenizer.json").stat().st_mode & 0o777 == 0o640
    assert to.stat().st_mode & 0o200
    copy_files(to, tmp_path / "linked", link=True)
    assert (tmp_path / "linked" / "tokenizer.json").samefile(to / "tokenizer.json")


def test_the_newest_of_two_whole_checkpoints_counts(tmp_path):
    """A kill may come between the rename of the new one and the removal of the old one."""
    step = RunDir(tmp_path).step("ppo", INPUTS)
    for name in ("step-00000099", "step-00000100", "step-00000101.writing"):
        (step.begin() / "state" / name).mkdir(parents=True)
    assert step.latest_state() == (100, step.partial / "state" / "step-00000100")


@pytest.mark.parametrize(
    "changed",
    [
        {**INPUTS, "seed": 1},
        {**INPUTS, "config": {"sft": {"lr": 2e-5}}},
        {**INPUTS, "parents": {"base": "pretrain-2/model"}},
        {**INPUTS, "version": 2},
    ],
    ids=["seed", "config", "parent", "version"],
)
def test_every_input_changes_the_key(tmp_path, changed):
    run = RunDir(tmp_path)
    assert run.step("sft", changed).key != run.step("sft", INPUTS).key


def to_length(run, num_steps):
    """A step of training that can be made longer."""
    return run.step("ppo", INPUTS, length={"ppo.num_steps": num_steps, "ppo.patience": 5})


def trained(run, num_steps, *, steps=None, keep=True, model="weights"):
    """Such a step, finished."""
    step = to_length(run, num_steps)
    steps = num_steps if steps is None else steps
    (step.begin() / "model").write_text(model)
    if step.latest_state()[0] < steps:
        with step.new_state(steps) as directory:
            (directory / "policy").write_text(str(steps))
    return step.finish(keep_state=keep, steps=steps)


def test_training_is_filed_under_its_steps_and_goes_on_from_a_shorter_one(tmp_path):
    run = RunDir(tmp_path)
    short = trained(run, 4)
    (short / "metrics.jsonl").write_text("rows\n")
    step = to_length(run, 6)
    assert not step.done and step.latest_state() == (4, short / "state" / "step-00000004")
    assert step.continued() == short
    assert (step.begin() / "metrics.jsonl").read_text() == "rows\n"
    long = trained(run, 6)
    assert long != short and to_length(run, 6).path == long and to_length(run, 4).path == short
    assert (short / "model").exists() and newest_state(short) == (0, None) and newest_state(long)[0] == 6


def test_what_an_interrupted_attempt_has_done_comes_before_what_was_finished(tmp_path):
    run = RunDir(tmp_path)
    trained(run, 4)
    step = to_length(run, 9)
    step.begin()
    with step.new_state(5):
        pass
    assert step.latest_state()[0] == 5 and step.continued() is None
    assert to_length(run, 12).partial == step.partial  # it is under way to whatever length


def test_training_that_has_ended_early_is_the_result_of_a_longer_one_too(tmp_path):
    run = RunDir(tmp_path)
    first = trained(run, 400, steps=40)
    again = trained(run, 500, steps=40, model="the same")
    assert again == first and (again / "model").read_text() == "the same"
    assert to_length(run, 500).done and newest_state(again)[0] == 40  # the state has moved along
    assert sorted(path.name for path in run.steps.iterdir()) == [first.name]


def test_without_a_checkpoint_there_is_nothing_to_go_on_from(tmp_path):
    run = RunDir(tmp_path)
    trained(run, 4, keep=False)
    assert to_length(run, 6).latest_state() == (0, None) and to_length(run, 4).done


@pytest.mark.parametrize(
    ("earlier", "length", "steps", "passes"),
    [
        ((400, 5), (500, 5), 400, True),
        ((400, 5), (300, 5), 400, False),
        ((400, 5), (300, 5), 40, True),  # ended early
        ((400, 5), (500, 6), 400, True),
        ((400, 5), (500, 4), 400, False),  # it would have ended before
    ],
)
def test_what_training_passes_through(earlier, length, steps, passes):
    names = ("ppo.num_steps", "ppo.patience")
    before, now = (dict(zip(names, limits, strict=True)) for limits in (earlier, length))
    assert within(before, now, steps=steps) == passes


def test_states_go_and_results_stay(tmp_path):
    for name in ("model", "last", "state/step-00000002", "safety/model", "safety/state/step-00000001", "best/after-1"):
        (tmp_path / name).mkdir(parents=True)
    drop_state(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "model", "safety"]
    assert [path.name for path in (tmp_path / "safety").iterdir()] == ["model"]


def test_the_order_of_inputs_does_not_change_the_key():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})


def test_a_fingerprint_follows_content_and_names_but_not_the_place(tmp_path):
    def directory(name, files):
        for file, text in files.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return fingerprint(tmp_path / name)

    first = directory("a", {"config.json": "{}", "sub/weights": "1"})
    assert directory("b", {"config.json": "{}", "sub/weights": "1"}) == first
    assert directory("c", {"config.json": "{}", "sub/weights": "2"}) != first
    assert directory("d", {"config.json": "{}", "sub/weight": "1"}) != first
    assert directory("e", {"config.json": "{}", "sub/weights": "1", "more": ""}) != first


def test_the_version_of_code_is_that_of_the_named_modules():
    assert code_version("rlhf_ray.errors") == code_version("rlhf_ray.errors")
    assert code_version("rlhf_ray.errors") != code_version("rlhf_ray.records")
    assert code_version("rlhf_ray.algo") != code_version("rlhf_ray.algo.kl")


def test_the_manifest_gathers_steps(tmp_path):
    run = RunDir(tmp_path)
    run.record(packages={"torch": "2"}, steps={"a-1": {}})
    run.record(steps={"b-2": {}})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest == {"packages": {"torch": "2"}, "steps": {"a-1": {}, "b-2": {}}}


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="Circular"):
        circle: dict = {}
        circle["self"] = circle
        write_json(path, circle)
    assert json.loads(path.read_text()) == {"a": 1}


def test_one_process_works_in_a_directory_at_a_time(tmp_path):
    with RunDir(tmp_path).locked():
        complaint = rf"--out {tmp_path}: process {os.getpid()} is at work there; wait for it or stop it"
        with pytest.raises(UserError, match=complaint), RunDir(tmp_path).locked():
            raise AssertionError("two are at work")
    with RunDir(tmp_path).locked():
        pass


def test_what_is_renamed_is_on_disk(tmp_path, monkeypatch):
    """A power cut after a rename must not leave empty files under a name that says they are whole."""
    synced, fsync, rename = set(), os.fsync, os.rename

    def recorded(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def checked(source, target):
        assert {path.stat().st_ino for path in [source, *source.rglob("*")]} <= synced
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr(os, "rename", checked)
    step = RunDir(tmp_path).step("ppo", INPUTS)
    (step.begin() / "model").mkdir()
    (step.partial / "model" / "weights").write_text("1")
    with step.new_state(1) as directory:
        (directory / "policy").mkdir()
        (directory / "policy" / "moments").write_text("2")
    step.finish()


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    run = RunDir(tmp_path / "file" / "run")
    with pytest.raises(UserError, match=r"--out .*file/run: cannot be written"), run.locked():
        raise AssertionError("something is there")


def test_a_directory_is_made_where_work_begins_and_not_where_it_is_read(tmp_path):
    run = RunDir(tmp_path / "run")
    assert run.manifest() == {} and not run.step("sft", INPUTS).done and run.step("sft", INPUTS).facts() == {}
    assert list(tmp_path.iterdir()) == []
    with run.locked():
        assert run.steps.is_dir()


def test_results_of_another_length_go_and_the_record_of_it_last(tmp_path, monkeypatch):
    def step(limit):
        return RunDir(tmp_path).step("ppo", {"stage": "ppo"}, length={"ppo.num_steps": limit})

    work = step(10).begin()
    for name in ("model", "last", "parts", "state", "best"):
        (work / name).mkdir()
    killed = []

    def kill(path):
        killed.append(path.name)
        if len(killed) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_state.shutil, "rmtree", kill)
        step(20).begin()
    assert (work / "step.json").exists() and "step.json" not in killed  # the next start knows whose they are
    step(20).begin()
    assert sorted(path.name for path in work.iterdir()) == ["best", "state", "step.json"]


def test_a_directory_that_is_not_removed_whole_has_another_name(tmp_path, monkeypatch):
    state = tmp_path / "ppo-1" / "state" / "step-00000004"
    state.mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(run_state.shutil, "rmtree", lambda path, **_: None)  # killed at it
        run_state.drop_state(tmp_path / "ppo-1")
    assert run_state.newest_state(tmp_path / "ppo-1") == (0, None)
    sweep(tmp_path / "ppo-1")
    assert list((tmp_path / "ppo-1").iterdir()) == []


def test_a_step_is_of_all_the_source_that_worked_on_it(tmp_path, monkeypatch):
    sources = []
    for source in ("a", "b", "b", "c"):
        monkeypatch.setattr(run_state, "source_hash", lambda source=source: source)
        step = RunDir(tmp_path).step("sft", INPUTS)
        step.begin()
        sources.append(run_state.read_facts(step.partial)["source"])
    assert sources == ["a", "a+b", "a+b", "a+b+c"]


def test_the_config_of_the_manifest_is_the_last_runs(tmp_path):
    RunDir(tmp_path).record(config={"collect": {"held_out": 0.1}})
    RunDir(tmp_path).record(config={"pairs": {}})
    assert RunDir(tmp_path).manifest() == {"config": {"pairs": {}}}
