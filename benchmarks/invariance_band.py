"""How far apart do two trainings end that should be the same, in bf16?

    python benchmarks/invariance_band.py [--repeats 3] [--precision bf16]

`tests/test_training_invariance.py` shows in fp32 that ZeRO stage, ranks, micro-batches, padding and packing
change nothing to 1e-5. This runs the same pairs in another precision: 20 optimizer steps of next-token
training of a model of 0.16M parameters, each variant against one baseline, from as many initial weights as
there are repeats. Differences of a parameter are relative to its root mean square. Writes
benchmarks/results/invariance_band.json.
"""

import statistics
import sys
from typing import Any

import torch
from measuring import RESULTS, ROOT, parser_of, write_result

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from training_world import BATCH, LONGEST, OPTIM, STEPS, UNTIED, Trained, launch, lm_data, train_lm  # noqa: E402

from cluster.session import session  # noqa: E402
from cluster.worker_group import WorkerGroup  # noqa: E402
from model.llama import Llama  # noqa: E402

RESULT = RESULTS / "invariance_band.json"
NUM_EXAMPLES = 16
# The epsilon of the recipe, not that of the fp32 tests, which must keep rounding out of the comparison.
OPTIMIZER = OPTIM.model_copy(update={"eps": 1e-5})
PACKED_ROWS = len(lm_data(NUM_EXAMPLES, UNTIED.vocab_size, "packed").train)
FULL_BATCH: dict[str, Any] = {"count": NUM_EXAMPLES, "batch_size": NUM_EXAMPLES}

# name -> (ranks, options), in groups that share a baseline: their first.
COMPARISONS: list[dict[str, tuple[int, dict[str, Any]]]] = [
    {
        "baseline: 1 rank, ZeRO-1, micro-batch 2": (1, {}),
        "the baseline again": (1, {}),
        "ZeRO-0": (1, {"zero_stage": 0}),
        "ZeRO-2": (1, {"zero_stage": 2}),
        "ZeRO-3": (1, {"zero_stage": 3}),
        "2 ranks": (2, {}),
        "2 ranks, ZeRO-3": (2, {"zero_stage": 3}),
        "micro-batch 1": (1, {"micro_batch_size": 1}),
        "micro-batch 8": (1, {"micro_batch_size": 8}),
        "rows twice as wide": (1, {"layout": "wide"}),
    },
    {
        "baseline: full batch, unpacked": (1, FULL_BATCH),
        "full batch, packed": (1, {**FULL_BATCH, "layout": "packed", "batch_size": PACKED_ROWS}),
    },
]


def start(seed: int) -> dict[str, torch.Tensor]:
    """The weights that training starts from."""
    model = Llama(UNTIED)
    model.init_weights(seed=seed)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def difference(run: Trained, baseline: Trained, seed: int) -> dict[str, float]:
    """Of weights, by a parameter's root mean square; of losses, relative; and by how far training moved."""
    largest, absolute, moved, relative, count = 0.0, 0.0, 0.0, 0.0, 0
    initial = start(seed)
    for name, weight in baseline.weights.items():
        gap = (run.weights[name].float() - weight.float()).abs()
        by_rms = gap / weight.float().square().mean().sqrt()
        largest = max(largest, by_rms.max().item())
        relative += by_rms.sum().item()
        absolute += gap.sum().item()
        moved += (weight.float() - initial[name]).abs().sum().item()
        count += gap.numel()
    losses = [abs(a - b) / b for a, b in zip(run.series("loss"), baseline.series("loss"), strict=True)]
    return {
        "weight_difference_max": largest,
        "weight_difference_mean": relative / count,
        "share_of_the_way_trained": absolute / moved,
        "loss_difference_max": max(losses),
    }


def measure(groups: dict[int, WorkerGroup], precision: str, repeats: int) -> dict[str, Any]:
    """For each variant the mean and the standard deviation over the repeats of each difference."""
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(1, repeats + 1):
        for comparison in COMPARISONS:
            baseline: Trained | None = None
            for name, (ranks, options) in comparison.items():
                run = train_lm(groups[ranks], precision=precision, optim=OPTIMIZER, seed=seed, **options)
                if baseline is None:
                    baseline = run
                    continue
                found.setdefault(name, []).append(difference(run, baseline, seed))
                print(seed, name, found[name][-1], flush=True)
    return {
        name: {
            key: {
                "mean": statistics.mean(row[key] for row in rows),
                "std": statistics.stdev(row[key] for row in rows) if len(rows) > 1 else None,
            }
            for key in rows[0]
        }
        for name, rows in found.items()
    }


def main() -> None:
    """Measures and writes."""
    parser = parser_of(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", choices=("bf16", "fp32"), nargs="+", default=["bf16"])
    options = parser.parse_args()
    with session(num_cpus=2):
        groups = {ranks: launch(f"trainer-{ranks}", ranks) for ranks in (1, 2)}
        bands = {precision: measure(groups, precision, options.repeats) for precision in options.precision}
    config = {
        "model": UNTIED.model_dump(),
        "optim": OPTIMIZER.model_dump(),
        "steps": STEPS,
        "batch_size": BATCH,
        "longest_example_tokens": LONGEST,
        "full_batch_examples": NUM_EXAMPLES,
    }
    write_result(options.result or RESULT, {"bands": bands, "repeats": options.repeats}, config=config)


if __name__ == "__main__":
    main()
