"""The check for GPU machines, rehearsed on CPU with small shapes."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_ray.bench.workload import check_bench
from rlhf_ray.config import load_config

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "gpu_check.py"


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=900)


@pytest.mark.slow
def test_each_step_leaves_a_line_with_its_figures_and_is_not_run_twice(tmp_path: Path) -> None:
    """The other benchmarks are rehearsed by their own tests."""
    parts = ("numeric", "train", "rollout")
    done = check(*parts, "--device", "cpu", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = {row["step"]: row for row in map(json.loads, (tmp_path / "check.jsonl").read_text().splitlines())}
    steps = ["attention", "kernels", "train tiny", "train tiny recompute", "train tiny without kernels"]
    steps += ["bench rollout", "vLLM alone"]
    assert {name: row["rc"] for name, row in lines.items()} == dict.fromkeys(steps, 0), lines
    runs = lines["train tiny"]["result"]["runs"]
    assert set(runs) == {f"{kind}/{side}" for kind in ("sft", "reward", "ppo") for side in ("bare", "zero1", "zero2")}
    assert all(run["tokens_per_s"] > 0 and run["mfu"] is None for run in runs.values())
    again = lines["train tiny recompute"]["result"]["runs"]
    assert set(again) == {f"sft/{side}" for side in ("bare", "zero2", "zero2 selective", "zero2 full")}
    assert again["sft/zero2"]["planned_gib"] > again["sft/zero2 full"]["planned_gib"]
    assert lines["bench rollout"]["result"]["seconds"]["median"] > 0
    assert lines["vLLM alone"]["result"]["response_tokens_per_s"] > 0
    again = check(*parts, "--device", "cpu", "--out", str(tmp_path))
    assert (again.returncode, again.stdout) == (0, "")
    assert len((tmp_path / "check.jsonl").read_text().splitlines()) == len(steps)


def test_every_benchmark_is_one_that_a_gpu_machine_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many GPUs as its step has; nothing of it is started."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    given = ['roles.rollout.weights="store"']
    all_parts = importlib.import_module("gpu_check").parts("cuda", tmp_path, given)
    steps = [step for part in all_parts.values() for step in part]
    assert all(given[0] in step.command for step in steps if step.name.split()[0] in ("bench", "demo"))
    benches = [step for step in steps if step.name.startswith("bench ")]
    assert len(benches) == 11 and {step.gpus for step in benches} == {1, 2}
    monkeypatch.setattr("rlhf_ray.machine.is_cpu_build", lambda: False)
    for step in benches:
        monkeypatch.setattr("cluster.hardware.count_gpus", lambda number=step.gpus: number)
        words = step.command[step.command.index("bench") + 1 :]
        sets = [words[index + 1] for index, word in enumerate(words) if word == "--set"]
        sizes = {name: int(words[words.index(f"--{name}") + 1]) for name in ("prompt-tokens", "response-tokens")}
        lengths = {name.replace("-", "_"): size for name, size in sizes.items()}
        work = check_bench(words[0], load_config(Path(words[1]), sets), repeats=3, warmup=1, out=None, **lengths)
        assert work.config.run.device == "cuda" and work.config.roles.rollout.weights == "store", step.name


@pytest.mark.parametrize(("torch", "is_older"), [("2.11.0+cu130", True), ("2.13.0+cpu", False), ("3.0.1", False)])
def test_libraries_that_are_older_have_help(monkeypatch: pytest.MonkeyPatch, torch: str, is_older: bool) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.setattr("importlib.metadata.version", {"torch": torch}.__getitem__)
    monkeypatch.setenv("PYTHONPATH", "/given")
    paths = importlib.import_module("gpu_check").environment()["PYTHONPATH"].split(":")
    assert paths == [*([str(SCRIPT.parent / "older_stack")] if is_older else []), "/given"]


def test_a_part_that_is_not_known_is_told(tmp_path: Path) -> None:
    done = check("numerics", "--out", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("error: PART numerics is not known; there are numeric, demo, train")


def test_what_needs_more_gpus_than_there_are_is_not_run(tmp_path: Path) -> None:
    done = check("two", "--out", str(tmp_path))
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if gpus < 2:
        assert [row["rc"] for row in rows] == ["not run"] * 5
        assert rows[0]["end"] == f"needs 2 GPUs, there are {gpus}"
        assert check("two", "--out", str(tmp_path)).stdout == done.stdout  # and is asked for again
