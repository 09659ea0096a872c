"""Does a run whose workers are killed, one in every role and phase, end with the same bits as one left alone?

    python benchmarks/kill_workers.py [--work DIR]

Runs a small full recipe once, then again elsewhere with the driver in this process. At one call of each role and
phase the rank gets SIGKILL; the run rebuilds its group and goes on from the stage's last checkpoint. Then
compares every checkpoint byte for byte, and every metric but those that measure time and memory. Writes
benchmarks/results/kill_workers.json.
"""

import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from kill_and_resume import SMALL, command, compare, differences, finish, start
from measuring import RESULTS, ROOT, parser_of, work_directory, write_result

from cluster.worker_group import WorkerGroup
from rlhf_ray.config import load_config
from rlhf_ray.recipe import run as recipe

RESULT = RESULTS / "kill_workers.json"
DELAY_S = 0.02  # from the call to the kill: the method is then under way

# (stage, role, method, which of its calls in the stage), in the order in which they come. Where a stage goes on from a
# checkpoint its calls are counted on.
KILLS = [
    ("pretrain", "policy", "train_lm", 14),
    ("sft", "policy", "train_lm", 7),
    ("pairs", "rollout", "generate", 3),
    ("reward", "helpfulness", "train_reward", 3),
    ("reward", "safety", "train_reward", 6),
    ("ppo", "rollout", "generate", 3),
    ("ppo", "rollout", "load_weights", 5),
    ("ppo", "reference", "logprobs", 4),
    ("ppo", "helpfulness", "score", 6),
    ("ppo", "safety", "score", 8),
    ("ppo", "value", "values", 7),
    ("ppo", "policy", "build_experience", 7),
    ("ppo", "value", "train_value", 9),
    ("ppo", "policy", "train_policy", 11),
    ("ppo", "policy", "export_weights", 18),
    ("evaluate", "policy", "summarize", 2),
]


class Killer:
    """Kills ranks at the calls named in KILLS, and counts what became of it."""

    def __init__(self) -> None:
        self.done: list[tuple[str, str, str, int]] = []
        self._stage, self._calls = "", Counter[tuple[str, str]]()
        self._submit_one, self._run_node = WorkerGroup.submit_one, recipe.run_node

    def __enter__(self) -> "Killer":
        killer = self

        def submit_one(group: WorkerGroup, rank: int, method: Any, *args: Any, **kwargs: Any) -> Any:
            call = killer._submit_one(group, rank, method, *args, **kwargs)
            killer._calls[group.role, method.__name__] += 1
            at = (killer._stage, group.role, method.__name__, killer._calls[group.role, method.__name__])
            if at in KILLS:
                killer.done.append(at)
                print(f"kill {at}", flush=True)
                threading.Timer(DELAY_S, os.kill, (group.pids[rank], signal.SIGKILL)).start()
            return call

        def run_node(context: Any, entry: Any) -> None:
            killer._stage = entry.node.name
            killer._calls.clear()
            killer._run_node(context, entry)

        WorkerGroup.submit_one = submit_one  # type: ignore[method-assign]
        recipe.run_node = run_node
        return self

    def __exit__(self, *_: object) -> None:
        WorkerGroup.submit_one = self._submit_one  # type: ignore[method-assign]
        recipe.run_node = self._run_node


def main() -> None:
    """Runs, kills, compares, writes the result."""
    options = parser_of(__doc__).parse_args()
    with work_directory(options.work, prefix="kill-workers-") as work:
        measured = kill_and_compare(work / "whole", work / "killed")
    write_result(options.result or RESULT, measured, config={"base": "configs/demo.toml", **SMALL})


def kill_and_compare(whole: Path, killed: Path) -> dict[str, Any]:
    """Runs, kills, compares; raises SystemExit, the runs kept, where they differ."""
    begin = time.monotonic()
    finish(start(command(whole, SMALL), whole / "driver.log"), whole / "driver.log")
    whole_s = time.monotonic() - begin
    print(f"left alone: {whole_s:.0f} s", flush=True)
    overrides = [f"{key}={value}" for key, value in (SMALL | {"cluster.max_repairs": len(KILLS)}).items()]
    begin = time.monotonic()
    with Killer() as killer:
        recipe.run_recipe(load_config(ROOT / "configs" / "demo.toml", overrides), killed)
    killed_s = time.monotonic() - begin
    different = differences(whole, killed)
    missed = [kill for kill in KILLS if kill not in killer.done]
    if different or missed:
        raise SystemExit(
            f"files that differ: {different}; kills that never came: {missed}; the runs are in {killed.parent}"
        )
    return {
        "identical": True,
        "kills_stage_role_method_call": killer.done,
        "steps_identical": compare(whole, killed),
        "whole_s": round(whole_s, 1),
        "killed_s": round(killed_s, 1),
    }


if __name__ == "__main__":
    main()
