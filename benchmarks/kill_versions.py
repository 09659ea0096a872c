"""Does a run of V1 to V5 whose driver, engines and policy ranks are killed end with the same bits as one left alone?

    python benchmarks/kill_versions.py [--kills 10] [--seed 0] [--work DIR]

Runs five small versions once, then again elsewhere: at random moments the driver, an engine or a policy rank
gets SIGKILL. A run that lost a worker repairs itself; after a driver's death the same command goes on. Then
compares every file of every step. Writes benchmarks/results/kill_versions.json.
"""

import contextlib
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
from kill_and_resume import SMALL, benchmark, command, compare, differences, finish, kill, stage_under_way, start
from measuring import RESULTS

RESULT = RESULTS / "kill_versions.json"
VERSIONS = {
    **SMALL,
    "rounds": "{}",
    "pairs.num_prompts": 33,
    "rejection_sampling.samples_per_prompt": 4,
    "rejection_sampling.num_prompts": 40,
    "rejection_sampling.group_size": 10,
    "rejection_sampling.temperatures": "[0.8, 1.1]",
    "rejection_sampling.sweep_prompts": 8,
    "rejection_sampling.sweep_samples": 4,
    "sft.epochs": 1,
    "cluster.max_repairs": 9,
}
"""What differs from configs/demo.toml."""
VICTIMS = {"driver": None, "engine": "ray::RolloutWorker", "policy": "ray::PolicyWorker"}
"""Who is killed, by the name of its process."""
PATIENCE_S = 600.0  # for a victim that is not up at its moment


def find(driver: subprocess.Popen[bytes], title: str) -> psutil.Process | None:
    """A process that the driver has started, by the name that Ray gives it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(driver.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if " ".join(child.cmdline()).startswith(title):
                    return child
    return None


def strike(driver: subprocess.Popen[bytes], victim: str, out: Path) -> dict[str, Any] | None:
    """Kills the driver, or a worker as soon as there is one; None where the run has ended before."""
    title, deadline = VICTIMS[victim], time.monotonic() + PATIENCE_S
    while driver.poll() is None and time.monotonic() < deadline:
        at = {"victim": victim, "during": stage_under_way(out)}
        if title is None:
            os.killpg(driver.pid, signal.SIGSTOP)
            return at | kill(driver)
        if (worker := find(driver, title)) is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()
                return at
        time.sleep(0.2)
    return None


def kill_and_compare(work: Path, *, kills: int, seed: int) -> dict[str, Any]:
    """Runs, kills, compares; raises SystemExit, the runs kept, where they differ."""
    whole, killed = work / "whole", work / "killed"
    log = killed / "driver.log"
    begin = time.monotonic()
    finish(start(command(whole, VERSIONS), whole / "driver.log"), whole / "driver.log")
    duration_s = time.monotonic() - begin
    print(f"left alone: {duration_s:.0f} s", flush=True)
    rng = random.Random(seed)
    victims = [list(VICTIMS)[number % len(VICTIMS)] for number in range(kills)]
    rng.shuffle(victims)
    deaths: list[dict[str, Any] | None] = []
    driver = start(command(killed, VERSIONS), log)
    for victim in victims:
        delay_s = rng.uniform(0.3, 1.7) * duration_s / (kills + 1)
        with contextlib.suppress(subprocess.TimeoutExpired):
            driver.wait(delay_s)
        if driver.poll():  # what was killed last may have died twice at one place, which ends a run
            driver = start(command(killed, VERSIONS), log)
        death = strike(driver, victim, killed)
        deaths.append(death if death is None else {**death, "delay_s": round(delay_s, 1)})
        print(f"killed: {deaths[-1]}", flush=True)
        if driver.poll() is not None:
            driver = start(command(killed, VERSIONS), log)
    finish(driver, log)
    different, missed = differences(whole, killed), deaths.count(None)
    repairs = log.read_text(encoding="utf-8").count("rebuilding")
    if different or missed:
        raise SystemExit(f"differ: {different}; {missed} kills came too late; the runs are in {work}")
    return {
        "identical": True,
        "steps_identical": compare(whole, killed),
        "kills": deaths,
        "repairs": repairs,
        "uninterrupted_s": round(duration_s, 1),
    }


def main() -> None:
    """Runs, kills, compares, writes the result."""
    benchmark(__doc__, kill_and_compare, kills=10, result=RESULT, settings=VERSIONS)


if __name__ == "__main__":
    main()
