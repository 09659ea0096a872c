"""Does a run that is killed again and again end with the same bits as one that is left alone?

    python benchmarks/kill_and_resume.py [--kills 4] [--seed 0] [--work DIR]

Runs a small full recipe once, then again elsewhere: the driver's process group gets SIGKILL at random
moments, one in each part of the run, and the same command goes on. Then compares every checkpoint byte for
byte, and every metric but those that measure time and memory. Writes benchmarks/results/kill_and_resume.json.
"""

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from measuring import RESULTS, ROOT, parser_of, work_directory, write_result

RESULT = RESULTS / "kill_and_resume.json"
MEASURED = ("time/", "throughput/", "memory/")
"""Prefixes of metrics that no two runs share."""
IDLE_AGENTS = ("DashboardAgent", "RuntimeEnvAgent", "dashboard/agent.py", "runtime_env/agent/main.py")
"""Ray's agents, which outlive a killed raylet by the minute in which they try to report its end."""

SMALL = {
    "rounds": "none",
    "pairs.num_prompts": "none",
    "testbed.num_corpus": 1500,
    "testbed.num_demonstrations": 400,
    "testbed.num_prompts_train": 200,
    "testbed.num_prompts_early_stop": 32,
    "testbed.num_prompts_annotation": 200,
    "testbed.num_prompts_test": 60,
    "pretrain.num_steps": 30,
    "pretrain.save_every": 10,
    "sft.save_every": 4,
    "reward.batch_size": 16,
    "reward.save_every": 2,
    "ppo.num_steps": 8,
    "ppo.batch_size": 32,
    "ppo.minibatch_size": 16,
    "ppo.eval_every": 2,
    "ppo.save_every": 2,
}
"""What differs from configs/demo.toml."""
MAX_DELAY_S = 2.0  # from the metric row to the kill: enough to fall into a checkpoint or the next stage's start


def command(out: Path, config: dict[str, Any], *, stage: str = "run") -> list[str]:
    """The command line of a small run."""
    overrides = [text for key, value in config.items() for text in ("--set", f"{key}={value}")]
    return [
        *(sys.executable, "-m", "rlhf_ray.cli.main", stage, str(ROOT / "configs" / "demo.toml")),
        *("--out", str(out), *overrides),
    ]


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Starts a driver at the head of its own process group; both streams go to the end of `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        return subprocess.Popen(
            arguments, stdout=file, stderr=file, stdin=subprocess.DEVNULL, cwd=ROOT, start_new_session=True
        )


def rows_written(out: Path) -> int:
    """Metric rows of all stages so far: how far a run has come."""
    return sum(file.read_bytes().count(b"\n") for file in out.glob("steps/**/metrics.jsonl"))


def stage_under_way(out: Path) -> str:
    """What a run was at, by its directory: unfinished steps with their newest checkpoint."""
    names = []
    for partial in sorted(out.glob("steps/*.partial")):
        states = sorted(path.name for path in partial.glob("**/state/step-*[0-9]"))
        rows = sum(file.read_bytes().count(b"\n") for file in partial.glob("**/metrics.jsonl"))
        newest = int(states[-1].removeprefix("step-")) if states else 0
        names.append(f"{partial.name.rpartition('-')[0]} after {rows} steps, checkpoint {newest}")
    finished = [path.name.rpartition("-")[0] for path in sorted(out.glob("steps/*"), key=os.path.getmtime)]
    return "; ".join(names) or f"between stages, after {finished[-1] if finished else 'none'}"


def kill(driver: subprocess.Popen[bytes]) -> dict[str, float]:
    """SIGKILLs a driver's process group; returns how long what it had started lived on, seconds.

    Returns when all of it is gone but Ray's idle agents.
    """
    children = psutil.Process(driver.pid).children(recursive=True)
    working = [child for child in children if not _is_agent(child)]
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    begin = time.monotonic()
    gone, alive = psutil.wait_procs(working, timeout=120)
    if alive:
        raise SystemExit(f"{len(alive)} processes outlived the driver by 120 s: {alive}")
    return {"processes": float(len(gone)), "gone_after_s": round(time.monotonic() - begin, 1)}


def _is_agent(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return any(name in " ".join(process.cmdline()) for name in IDLE_AGENTS)
    return False


def finish(driver: subprocess.Popen[bytes], log: Path) -> None:
    """Waits for a driver to end well."""
    if driver.wait() != 0:
        raise SystemExit(f"exit code {driver.returncode}:\n{log.read_text(encoding='utf-8')[-2000:]}")


def run_and_kill(arguments: list[str], out: Path, *, rows: int, delay_s: float) -> dict[str, Any] | None:
    """Kills a run `delay_s` after it has `rows` metric rows; None where it ended before."""
    driver = start(arguments, out / "driver.log")
    while rows_written(out) < rows and driver.poll() is None:
        time.sleep(0.05)
    with contextlib.suppress(subprocess.TimeoutExpired):
        driver.wait(delay_s)
    if driver.poll() is not None:
        finish(driver, out / "driver.log")
        return None
    # While it is stopped, its directory says what it was at.
    os.killpg(driver.pid, signal.SIGSTOP)
    at = {"rows": rows, "delay_s": round(delay_s, 2), "during": stage_under_way(out)}
    return at | kill(driver)


def compare(left: Path, right: Path) -> dict[str, bool]:
    """Whether each finished step of two runs holds the same weights, metrics, answers and labels."""
    steps = {path.name for path in (*left.glob("steps/*"), *right.glob("steps/*"))}
    return {name: contents(left / "steps" / name) == contents(right / "steps" / name) for name in sorted(steps)}


def contents(step: Path) -> dict[str, str]:
    """File -> hash of what is to be the same in every run: all but logs, clocks and memory."""
    found: dict[str, str] = {}
    for path in sorted(p for p in step.rglob("*") if p.is_file() and "tensorboard" not in p.parts):
        name = str(path.relative_to(step))
        if name == "step.json":
            continue  # counts what the last attempt did
        if path.name == "metrics.jsonl":
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            kept = [{k: v for k, v in row.items() if not k.startswith(MEASURED)} for row in rows]
            found[name] = json.dumps(kept)
        elif path.name == "comparisons.parquet":
            import pyarrow.parquet as pq

            found[name] = str(pq.read_table(path).drop_columns("time").to_pylist())
        else:
            found[name] = path.read_bytes().hex() if path.stat().st_size < 4096 else _hash(path)
    return found


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def differences(left: Path, right: Path) -> list[str]:
    """Files of finished steps that are not the same in both runs."""
    found = []
    for name, same in compare(left, right).items():
        if not same:
            a, b = contents(left / "steps" / name), contents(right / "steps" / name)
            found += [f"{name}/{file}" for file in sorted(a.keys() | b.keys()) if a.get(file) != b.get(file)]
    return found


def moments(rows: int, *, kills: int, seed: int) -> list[tuple[int, float]]:
    """One random moment in each of `kills` equal parts of a run of `rows` metric rows: (row, delay)."""
    rng = random.Random(seed)
    return [(int((part + rng.random()) * rows / kills), rng.uniform(0, MAX_DELAY_S)) for part in range(kills)]


def benchmark(
    doc: str | None, measure: Callable[..., dict[str, Any]], *, kills: int, result: Path, settings: dict[str, Any]
) -> None:
    """Reads the options of a script that kills runs, measures, writes the result."""
    parser = parser_of(doc)
    parser.add_argument("--kills", type=int, default=kills)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with work_directory(options.work, prefix=f"{result.stem}-") as work:
        measured = measure(work, kills=options.kills, seed=options.seed)
    write_result(options.result or result, measured, config={"base": "configs/demo.toml", **settings})


def main() -> None:
    """Runs, kills, compares, writes the result."""
    benchmark(__doc__, kill_and_compare, kills=4, result=RESULT, settings=SMALL)


def kill_and_compare(work: Path, *, kills: int, seed: int) -> dict[str, Any]:
    """Runs, kills, compares; raises SystemExit, the runs kept, where they differ."""
    whole, killed = work / "whole", work / "killed"
    begin = time.monotonic()
    finish(start(command(whole, SMALL), whole / "driver.log"), whole / "driver.log")
    duration_s = time.monotonic() - begin
    print(f"left alone: {duration_s:.0f} s, {rows_written(whole)} metric rows", flush=True)
    deaths = []
    for rows, delay_s in moments(rows_written(whole), kills=kills, seed=seed):
        death = run_and_kill(command(killed, SMALL), killed, rows=rows, delay_s=delay_s)
        deaths.append(death)
        print(f"killed: {death}", flush=True)
    finish(start(command(killed, SMALL), killed / "driver.log"), killed / "driver.log")
    different = differences(whole, killed)
    steps = compare(whole, killed)
    weights = {
        str(path.relative_to(killed / "steps")): _hash(path)[:16]
        for path in sorted(killed.glob("steps/*/*/model.safetensors"))
    }
    if different or None in deaths:
        raise SystemExit(f"not identical: {different or 'a kill never came'}; the runs are in {work}")
    return {
        "identical": True,
        "steps_identical": steps,
        "kills": deaths,
        "weights_sha256": weights,
        "uninterrupted_s": round(duration_s, 1),
        "seed": seed,
    }


if __name__ == "__main__":
    main()
