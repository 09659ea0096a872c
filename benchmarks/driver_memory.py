"""Does the driver's memory grow with the steps of PPO, or with the batch?

    python benchmarks/driver_memory.py [--steps 100] [--work DIR]

Runs PPO on a small model with the driver in this process; after every iteration notes the resident memory,
and the number and pickled size of all results that came back to the driver. Then again, shorter, with four
times the batch. Writes benchmarks/results/driver_memory.json and docs/driver_memory.png.
"""

import json
import pickle
import statistics
from pathlib import Path
from typing import Any

import psutil
from kill_and_resume import SMALL
from measuring import RESULTS, ROOT, parser_of, work_directory, write_result

import cluster.worker_group as worker_group
from rlhf_ray.config import load_config
from rlhf_ray.recipe import ppo
from rlhf_ray.recipe.run import run_recipe
from rlhf_ray.recipe.stages import STAGES

RESULT = RESULTS / "driver_memory.json"
PICTURE = ROOT / "docs" / "driver_memory.png"
CONFIG = SMALL | {
    "pretrain.num_steps": 10,
    "sft.epochs": 1,
    "ppo.batch_size": 16,
    "ppo.max_new_tokens": 12,
    "ppo.eval_every": 10,
    "ppo.patience": 1000,
    "ppo.save_every": 25,
}


class Watch:
    """Counts what reaches the driver, and samples its memory after each PPO iteration."""

    def __init__(self) -> None:
        self.samples: list[dict[str, float]] = []
        self._objects, self._bytes = 0, 0
        self._result, self._iteration = worker_group._result, ppo.iteration

    def __enter__(self) -> "Watch":
        worker_group._result = self._counted  # type: ignore[assignment]
        ppo.iteration = self._sampled  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        worker_group._result, ppo.iteration = self._result, self._iteration

    def _counted(self, *args: Any) -> Any:
        value = self._result(*args)
        self._objects += 1
        self._bytes += len(pickle.dumps(value))
        return value

    def _sampled(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self._objects, self._bytes = 0, 0
        row = self._iteration(*args, **kwargs)
        self.samples.append(
            {
                "rss_mib": psutil.Process().memory_info().rss / 2**20,
                "objects": self._objects,
                "bytes": self._bytes,
                "tokens_per_answer": row["response/tokens"],
            }
        )
        return row


def measure(work: Path, **changes: int) -> list[dict[str, float]]:
    """One run of the recipe, whose stages before PPO are done once; a sample for each PPO iteration."""
    overrides = [f"{key}={value}" for key, value in {**CONFIG, **_dotted(changes)}.items()]
    config = load_config(ROOT / "configs" / "demo.toml", overrides)
    with Watch() as watch:
        run_recipe(config, work, stages=[stage for stage in STAGES if stage != "evaluate"])
    return watch.samples


def _dotted(changes: dict[str, int]) -> dict[str, int]:
    return {f"ppo.{name}": value for name, value in changes.items()}


def slope(values: list[float]) -> float:
    """Least-squares growth per step."""
    return statistics.linear_regression(range(len(values)), values).slope


def summary(samples: list[dict[str, float]]) -> dict[str, float]:
    """Growth over the second half, when imports, pools and caches have settled; traffic per iteration."""
    memory = [sample["rss_mib"] for sample in samples]
    half = len(memory) // 2
    return {
        "rss_first_mib": round(memory[0], 1),
        "rss_middle_mib": round(memory[half], 1),
        "rss_last_mib": round(memory[-1], 1),
        "second_half_slope_kib_per_step": round(1024 * slope(memory[half:]), 2),
        "objects_per_iteration": statistics.mean(sample["objects"] for sample in samples),
        "bytes_per_iteration": round(statistics.mean(sample["bytes"] for sample in samples), 1),
        "tokens_per_answer": round(statistics.mean(sample["tokens_per_answer"] for sample in samples), 1),
    }


def draw(runs: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Resident memory against step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    for name, samples in runs.items():
        axes.plot(range(len(samples)), [sample["rss_mib"] for sample in samples], label=name)
    top = max(sample["rss_mib"] for samples in runs.values() for sample in samples)
    axes.set(xlabel="PPO iteration", ylabel="driver's resident memory, MiB", ylim=(0, 1.15 * top))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measures, writes, draws."""
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    options = parser.parse_args()
    batch = CONFIG["ppo.batch_size"]
    with work_directory(options.work, prefix="driver-memory-") as work:
        runs = {f"batch of {batch}": measure(work, num_steps=options.steps)}
        runs[f"batch of {4 * batch}"] = measure(work, num_steps=max(4, options.steps // 4), batch_size=4 * batch)
    measured = {
        **{name: summary(samples) for name, samples in runs.items()},
        "rss_mib": {name: [round(sample["rss_mib"], 2) for sample in runs[name]] for name in runs},
    }
    config = {"base": "configs/demo.toml", **CONFIG, "ppo.num_steps": options.steps}
    write_result(options.result or RESULT, measured, config=config)
    draw(runs, options.picture)
    print(json.dumps({name: measured[name] for name in runs}, indent=2))


if __name__ == "__main__":
    main()
