"""A model copied out of a run: the newest, whole, or not at all."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from tiny_inputs import write_checkpoint

from rlhf_ray.cli.export import export_model, newest_model
from rlhf_ray.errors import UserError


def finish(run: Path, step: str, *, age_s: float) -> Path:
    """A finished step of a run with its model, as old as that."""
    directory = run / "steps" / step
    places = ["helpfulness/model", "safety/model"] if step.startswith("reward") else ["model"]
    for place in places:
        write_checkpoint(directory / place, reward_model=len(places) > 1)
    (directory / "step.json").write_text(json.dumps({"name": step}))
    made = 1_700_000_000 - age_s
    os.utime(directory / "step.json", (made, made))
    return directory / places[-1]


def test_the_newest_finished_model_is_copied_with_its_lineage(tmp_path: Path) -> None:
    run = tmp_path / "run"
    finish(run, "sft-aaa", age_s=20)
    newest = finish(run, "sft-bbb", age_s=10)
    finish(run, "sft@public-ccc", age_s=0)
    finish(run, "sft-ddd.partial", age_s=0)
    assert export_model(run, tmp_path / "deep" / "out", what="chat") == newest
    out = tmp_path / "deep" / "out"
    assert (out / "model.safetensors").read_bytes() == (newest / "model.safetensors").read_bytes()
    assert json.loads((out / "lineage.json").read_text()) == {"name": "sft-bbb"}
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_one_reward_model_of_a_step_is_exported_with_the_steps_lineage(tmp_path: Path) -> None:
    safety = finish(tmp_path / "run", "reward-aaa", age_s=0)
    assert export_model(tmp_path / "run", tmp_path / "out", what="safety") == safety
    assert json.loads((tmp_path / "out" / "lineage.json").read_text()) == {"name": "reward-aaa"}


def test_of_models_that_were_not_all_kept_the_newest_is_exported(tmp_path: Path) -> None:
    older, newer = (finish(tmp_path / "run", step, age_s=age) for step, age in (("sft-aaa", 9), ("sft-bbb", 0)))
    shutil.rmtree(newer)
    assert export_model(tmp_path / "run", tmp_path / "out", what="chat") == older
    with pytest.raises(UserError, match="holds no base of a finished pretrain step"):
        export_model(tmp_path / "run", tmp_path / "base", what="base")


def test_files_that_nobody_may_write_are_exported_as_others(tmp_path: Path) -> None:
    model = finish(tmp_path / "run", "sft-aaa", age_s=0)
    for path in [*model.iterdir(), model]:
        path.chmod(path.stat().st_mode & ~0o222)
    try:
        export_model(tmp_path / "run", tmp_path / "out", what="chat")
    finally:
        model.chmod(0o755)
    assert all(path.stat().st_mode & 0o200 for path in [tmp_path / "out", *(tmp_path / "out").iterdir()])


def test_a_copy_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    finish(tmp_path / "run", "ppo-aaa", age_s=0)
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(UserError, match=r"--to .*out: cannot be written \(.*No space left on device"):
        export_model(tmp_path / "run", tmp_path / "out", what="policy")


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(UserError, match="holds no policy of a finished ppo step; run it first"):
        export_model(run, tmp_path / "out", what="policy")
    model = finish(run, "ppo-aaa", age_s=0)
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match=r"--to .*there: already exists"):
        export_model(run, tmp_path / "there", what="policy")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--to .*file/out: cannot be written"):
        export_model(run, tmp_path / "file" / "out", what="policy")
    os.truncate(model / "model.safetensors", 100)
    with pytest.raises(UserError, match=r"run its step again"):
        export_model(run, tmp_path / "out", what="policy")
    assert not (tmp_path / "out").exists()


def test_the_newest_of_all_versions_is_found_and_one_by_its_name(tmp_path: Path) -> None:
    for age, name in enumerate(("sft", "sft@public", "sft@v1", "sft@v2", "sft@referee")):
        model = tmp_path / "steps" / f"{name}-abc" / "model"
        model.mkdir(parents=True)
        facts = model.parent / "step.json"
        facts.write_text("{}")
        os.utime(facts, (age, age))
    steps = tmp_path / "steps"
    assert newest_model(tmp_path, "chat") == steps / "sft@v2-abc" / "model"
    assert newest_model(tmp_path, "chat@v1") == steps / "sft@v1-abc" / "model"
    with pytest.raises(UserError, match=r"holds no chat@v7 of a finished sft step"):
        newest_model(tmp_path, "chat@v7")
    with pytest.raises(UserError, match=r"--model polcy: is no model of a run; did you mean policy\?"):
        newest_model(tmp_path, "polcy")
