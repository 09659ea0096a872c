"""A run whose driver or worker is killed goes on by the same command and ends with the same bits."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from kill_and_resume import SMALL, command, contents, differences, finish, rows_written, run_and_kill, start

from rlhf_ray.metrics import read_metrics

pytestmark = pytest.mark.slow

TINY = SMALL | {
    "testbed.num_corpus": 600,
    "testbed.num_demonstrations": 200,
    "testbed.num_prompts_annotation": 80,
    "pretrain.num_steps": 12,
    "pretrain.save_every": 4,
    "sft.epochs": 1,
    "ppo.num_steps": 5,
    "ppo.batch_size": 16,
    "ppo.minibatch_size": 8,
    "ppo.max_new_tokens": 12,
    "run.stages": '["testbed","tokenizer","pretrain","sft","pairs","label","reward","ppo"]',
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is left alone."""
    out = tmp_path_factory.mktemp("whole")
    finish(start(command(out, TINY), out / "driver.log"), out / "driver.log")
    return out


def without(whole: Path, out: Path, *stages: str) -> Path:
    """A copy of a run in which some stages have not been done."""
    shutil.copytree(whole, out, ignore=shutil.ignore_patterns(*(f"{stage}-*" for stage in stages)))
    return out


def wait_for_rows(out: Path, rows: int, driver: subprocess.Popen[bytes]) -> None:
    """Waits until the run has so many metric rows more than those of the stages done before."""
    while rows_written(out) < rows:
        assert driver.poll() is None, (out / "driver.log").read_text()[-2000:]
        time.sleep(0.02)


def test_pretraining_whose_driver_is_killed_ends_with_the_same_bits(whole: Path, tmp_path: Path) -> None:
    out = without(whole, tmp_path / "out", "pretrain")
    arguments, before = command(out, TINY, stage="pretrain"), rows_written(out)
    rows = random.Random(1).randrange(5, 11)  # past the first checkpoint
    assert run_and_kill(arguments, out, rows=before + rows, delay_s=0.05) is not None
    assert list(out.glob("steps/pretrain-*.partial"))
    finish(start(arguments, out / "driver.log"), out / "driver.log")
    assert "pretrain: going on from step" in (out / "driver.log").read_text()
    assert differences(whole, out) == []


def kill_worker(driver: subprocess.Popen[bytes], name: str) -> None:
    """SIGKILLs the driver's one worker of a class."""
    children = psutil.Process(driver.pid).children(recursive=True)
    [worker] = [child for child in children if f"ray::{name}" in " ".join(child.cmdline())]
    os.kill(worker.pid, signal.SIGKILL)


def test_ppo_whose_workers_and_then_driver_are_killed_ends_with_the_same_bits(whole: Path, tmp_path: Path) -> None:
    out = without(whole, tmp_path / "out", "ppo")
    arguments, before = command(out, TINY, stage="ppo"), rows_written(out)
    log = out / "driver.log"
    log.unlink()
    driver = start(arguments, log)
    for rows, worker in ((1, "RolloutWorker"), (3, "PolicyWorker")):
        wait_for_rows(out, before + rows, driver)
        kill_worker(driver, worker)
    finish(driver, log)
    lines = " ".join(log.read_text().split())  # the console breaks lines
    assert "rollout rank 0 failed in " in lines and "ppo: rebuilding rollout, repair 1 of 3" in lines
    assert "ppo: rebuilding policy, repair 2 of 3" in lines
    assert "Traceback" not in lines and "Unhandled error" not in lines  # Ray's word for calls that nobody waits for now
    assert differences(whole, out) == []

    shutil.rmtree(next(out.glob("steps/ppo-*")))
    driver = start([*arguments, "--set", "cluster.max_repairs=0"], log)
    wait_for_rows(out, before + 1, driver)
    children = psutil.Process(driver.pid).children(recursive=True)
    kill_worker(driver, "RolloutWorker")
    assert driver.wait(60) == 1
    [failure] = [line for line in log.read_text().splitlines() if line.startswith("failed: ")]
    assert "rollout rank 0 failed in " in failure and " at ppo step " in failure and "died" in failure
    assert psutil.wait_procs(children, timeout=30)[1] == []

    rows = random.Random(2).randrange(3, 5)  # past the first checkpoint
    assert run_and_kill(arguments, out, rows=before + rows, delay_s=0.3) is not None
    finish(start(arguments, log), log)
    assert "ppo: going on from step" in log.read_text()
    assert differences(whole, out) == []


LONGER = TINY | {"run.stages": '["ppo","evaluate"]', "ppo.eval_every": 3, "ppo.micro_batch_tokens": 400}


def test_ppo_that_is_made_longer_ends_with_the_bits_of_one_that_was_that_long_from_the_start(
    whole: Path, tmp_path: Path
) -> None:
    def run(out: Path, num_steps: int, micro_batch_tokens: int = 400) -> None:
        settings = {"ppo.num_steps": num_steps, "ppo.micro_batch_tokens": micro_batch_tokens}
        finish(start(command(out, LONGER | settings), out / "driver.log"), out / "driver.log")

    out, straight = without(whole, tmp_path / "out", "ppo"), without(whole, tmp_path / "straight", "ppo")
    run(out, 4)
    [short], [first] = out.glob("steps/ppo-*"), out.glob("steps/evaluate-*")
    assert [row["step"] for row in read_metrics(short)] == [0, 1, 2, 3] and list(short.glob("state/step-*4"))
    halved = Path(shutil.copytree(out, tmp_path / "halved"))
    run(out, 6)
    run(straight, 6)
    assert "ppo: going on from step 4" in (out / "driver.log").read_text()
    for name in ("ppo", "evaluate"):  # metrics and models, what training would go on from, answers
        [alone] = straight.glob(f"steps/{name}-*")
        assert contents(out / "steps" / alone.name) == contents(alone)
        assert len(list(out.glob(f"steps/{name}-*"))) == 2
    [evaluation] = [path for path in out.glob("steps/evaluate-*") if path != first]
    [long] = [path for path in out.glob("steps/ppo-*") if path != short]
    assert json.loads((evaluation / "step.json").read_text())["inputs"]["parents"]["model.PPO"] == f"{long.name}/model"
    assert not list(short.glob("state/*")) and (short / "model").is_dir()

    run(halved, 6, micro_batch_tokens=200)
    assert "ppo: going on from step 4" in (halved / "driver.log").read_text()
    rows = read_metrics(halved / "steps" / long.name)
    assert [row["step"] for row in rows] == list(range(6))
    assert rows[:4] == read_metrics(short)
    # The same answers of the same policy, scored in other micro-batches.
    assert rows[4]["reward/combined"] == pytest.approx(read_metrics(long)[4]["reward/combined"], rel=1e-4, abs=1e-5)


def test_a_kill_while_an_extension_is_built_does_not_hang_the_next_start(tmp_path: Path) -> None:
    (tmp_path / "deepspeed_shm_comm").mkdir()
    (tmp_path / "deepspeed_shm_comm" / "lock").touch()  # what torch's builder leaves when it is killed
    code = (
        "import torch; from rlhf_ray.backends.train import init_distributed; "
        "init_distributed(torch.device('cpu')); print(torch.distributed.get_world_size())"
    )
    rendezvous = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | rendezvous | {"TORCH_EXTENSIONS_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.stdout.split()[-1] == "1", done.stderr
