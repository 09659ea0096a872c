"""Are the planner's bytes those that training really holds?

    python benchmarks/plan_memory.py [--repeats 3] [--only NAME]

For each configuration a fresh process trains one worker's model for two optimizer steps of two micro-batches
through rlhf_ray/backends/train.py, in bf16 on CPU with one rank, and counts bytes:

- state: weights, gradient accumulator and optimizer state, by walking the engine's tensors after the steps;
- activations: the storages that a forward pass leaves for the backward pass;
- peak: the highest sum of the CPU allocator's live bytes in the second step, from torch's profiler;
- resident growth: the process's highest resident memory less that before the model was built. It holds also
  what the allocator and libraries keep, and leaves out pages never touched, such as most of DeepSpeed's bucket.

Predictions are those of planning/memory.py with the CPU's kernels. DeepSpeed's reduce bucket (1 GB at ZeRO 2 and
3, whatever the model) is left out of both sides of the peak: beside these models everything else would vanish.
Writes benchmarks/results/plan_memory.json and prints the table of docs/planning.md.
"""

import argparse
import gc
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from measuring import RESULTS, parser_of, write_result

from model.config import PRESETS, ModelConfig
from model.flops import num_parameters

MIB = 2**20
BUCKET_BYTES = 2 * 500_000_000


def shape(vocab: int, hidden: int, layers: int, heads: int, kv_heads: int, ffn: int) -> ModelConfig:
    """A Llama with a context of 512 tokens."""
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        ffn_size=ffn,
        max_seq_len=512,
    )


SHAPES = {
    "testbed": PRESETS["testbed"],
    "3.8m": PRESETS["3.8m"],
    "16m": shape(4096, 384, 8, 6, 2, 1024),
    "56m": shape(8192, 640, 10, 10, 5, 1728),
}

# name -> shape, head, ZeRO stage, what is recomputed, rows and tokens of a row of a micro-batch
CONFIGURATIONS: dict[str, tuple[str, str, int, str, int, int]] = {
    "testbed, ZeRO 1, 32 x 128": ("testbed", "lm", 1, "none", 32, 128),
    "testbed, ZeRO 1, 32 x 128, full recomputation": ("testbed", "lm", 1, "full", 32, 128),
    "testbed, ZeRO 1, 32 x 128, selective": ("testbed", "lm", 1, "selective", 32, 128),
    "3.8m, ZeRO 0, 16 x 128": ("3.8m", "lm", 0, "none", 16, 128),
    "3.8m, ZeRO 2, 4 x 128, scalar head": ("3.8m", "scalar", 2, "none", 4, 128),
    "16m, ZeRO 1, 2 x 128": ("16m", "lm", 1, "none", 2, 128),
    "16m, ZeRO 2, 8 x 256": ("16m", "lm", 2, "none", 8, 256),
    "16m, ZeRO 2, 8 x 256, selective": ("16m", "lm", 2, "selective", 8, 256),
    "16m, ZeRO 3, 8 x 256, full recomputation": ("16m", "lm", 3, "full", 8, 256),
    "56m, ZeRO 1, 2 x 256": ("56m", "lm", 1, "none", 2, 256),
    "56m, ZeRO 3, 4 x 256, selective": ("56m", "lm", 3, "selective", 4, 256),
    "56m, ZeRO 3, 4 x 256, full recomputation": ("56m", "lm", 3, "full", 4, 256),
}


def predict(name: str) -> dict[str, int]:
    """The planner's bytes of a configuration, the bucket left out of the peak."""
    from rlhf_ray.planning.memory import largest_matrix, training_memory, training_work

    shape_name, head, zero_stage, recompute, rows, length = CONFIGURATIONS[name]
    config, tokens = SHAPES[shape_name], rows * length
    work = training_work(
        config,
        tokens,
        targets=tokens - rows if head == "lm" else None,
        recompute=recompute,  # type: ignore[arg-type]
        cpu_kernels=True,
    )
    parameters = num_parameters(config, scalar_head=head == "scalar")
    phases = training_memory(parameters, largest_matrix(config), work, zero_stage=zero_stage, num_ranks=1)
    step = phases["head"]
    bucket = BUCKET_BYTES if zero_stage >= 2 else 0
    return {
        "weights": step.weights,
        "optimizer": step.optimizer,
        "activations": work.kept,
        "peak": max(memory.total for memory in phases.values()) - bucket,
    }


def measure(name: str) -> dict[str, int]:
    """Bytes of a configuration, counted in this process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    from model.heads import state_values
    from model.llama import Llama
    from rlhf_ray.backends.train import TrainEngine, init_distributed
    from rlhf_ray.config import OptimSection

    shape_name, head, zero_stage, recompute, rows, length = CONFIGURATIONS[name]
    config = SHAPES[shape_name]
    init_distributed(torch.device("cpu"))
    torch.manual_seed(0)
    tokens = mask = torch.empty(0)

    def loss(model: Any, _: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if head == "scalar":
            value = (state_values(model(tokens)).float() * mask).square().sum() / mask.sum()
        else:
            result = model(tokens, target_mask=mask, with_entropy=True)
            value = -(result.logprobs * mask).sum() / mask.sum()
        return value, {}

    def train(shape: ModelConfig, batch: torch.Tensor) -> TrainEngine:
        nonlocal tokens, mask
        tokens, mask = batch, torch.ones_like(batch, dtype=torch.bool)
        mask[:, 0] = False
        model = Llama(shape, head=head, recompute=recompute)  # type: ignore[arg-type]
        engine = TrainEngine(
            model, optim=OptimSection(warmup_steps=0), num_steps=10, zero_stage=zero_stage, precision="bf16"
        )
        engine.step([0, 1], loss)
        gc.collect()
        with record_function("second step"):
            engine.step([0, 1], loss)
        gc.collect()
        return engine

    batch = torch.randint(config.vocab_size, (rows, length))
    # What libraries allocate at their first use is theirs, not the model's.
    train(PRESETS["tiny"], torch.randint(PRESETS["tiny"].vocab_size, (2, 16))).close()
    gc.collect()
    before = resident_bytes()
    train(config, batch).close()
    resident_growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        engine = train(config, batch)
    state = state_bytes(engine)
    # Of a model that DeepSpeed has no hold of: at ZeRO 3 gathered weights, too, would outlive the forward pass.
    plain = Llama(config, head="none", recompute=recompute).bfloat16()  # type: ignore[arg-type]
    activations = kept_by_autograd(plain, lambda: plain(tokens))
    bucket = BUCKET_BYTES if zero_stage >= 2 else 0
    return {
        **state,
        "activations": activations,
        "peak": peak_of(profiler, "second step") - bucket,
        "resident_growth": resident_growth,
    }


def kept_by_autograd(model: Any, forward: Callable[[], Any]) -> int:
    """Bytes of the storages that a forward pass leaves for the backward pass, whoever holds them: autograd, or torch's
    selective recomputation. The result is left out, and what is the model's own.
    """
    import torch
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_iter

    made: dict[int, tuple[StorageWeakRef, int]] = {}

    def storages(values: Any) -> list[torch.UntypedStorage]:
        return [tensor.untyped_storage() for tensor in tree_iter(values) if isinstance(tensor, torch.Tensor)]

    def note(values: Any) -> None:
        made.update({storage._cdata: (StorageWeakRef(storage), storage.nbytes()) for storage in storages(values)})

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            note(args)
            result = operation(*args, **(kwargs or {}))
            note(result)
            return result

    with Watch():
        result = forward()
    left_out = {storage._cdata for storage in storages([result, *model.parameters(), model.model._tables])}
    return sum(size for key, (ref, size) in made.items() if not ref.expired() and key not in left_out)


def peak_of(profiler: Any, mark: str) -> int:
    """Highest sum of live bytes within a marked stretch; the profile began before anything was allocated."""
    events = profiler.profiler.kineto_results.events()
    [stretch] = [e for e in events if e.name() == mark]
    start, end = stretch.start_ns(), stretch.start_ns() + stretch.duration_ns()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = peak = 0
    for when, change in changes:
        live += change
        if start <= when <= end:
            peak = max(peak, live)
    return peak


def state_bytes(engine: Any) -> dict[str, int]:
    """Bytes of the engine's weights and optimizer state, each storage once."""
    optimizer = engine._engine.optimizer
    inner = optimizer.optimizer
    parameters = list(engine._engine.module.parameters())
    weights = [getattr(p, "ds_tensor", p) for p in parameters]
    # Stage 3 hands AdamW its master weights a sub-group at a time.
    masters = getattr(optimizer, "fp32_partitioned_groups_flat", None)
    masters = masters or [p for group in inner.param_groups for p in group["params"]]
    moments = [value for state in inner.state.values() for value in state.values()]
    optimizer_bytes = storage_bytes([*masters, *(m for m in moments if m.dim())])
    return {"weights": storage_bytes(weights), "optimizer": optimizer_bytes}


def storage_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of the tensors' storages, each once; on the meta device, where none has an address, as well."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def resident_bytes() -> int:
    """Resident memory of this process."""
    fields = Path("/proc/self/statm").read_text(encoding="utf-8").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def in_fresh_process(name: str) -> dict[str, int]:
    """`measure` in a process of its own, so that memory starts from the same place."""
    command = [sys.executable, __file__, "--measure", name]
    run = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False, timeout=600)
    if run.returncode:
        raise SystemExit(f"{name}: {run.stderr[-2000:]}")
    counted: dict[str, int] = json.loads(run.stdout.splitlines()[-1])
    return counted


def compared(name: str, measured: dict[str, Any]) -> dict[str, Any]:
    """Prediction, measurement and predicted over measured of a configuration."""
    predicted = predict(name)
    ratio = {key: round(value / measured[key]["mean"], 4) for key, value in predicted.items()}
    return {"predicted": predicted, "measured": measured, "ratio": ratio}


def table(rows: dict[str, Any]) -> str:
    """Markdown: predicted over measured, and the peaks in MiB."""
    lines = [
        "| configuration | weights | optimiser | activations | peak | predicted peak, MiB | measured peak, MiB "
        "| resident growth, MiB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        ratio, predicted, measured = row["ratio"], row["predicted"], row["measured"]
        cells = [f"{ratio[part]:.3f}" for part in ("weights", "optimizer", "activations", "peak")]
        cells += [f"{predicted['peak'] / MIB:.1f}", f"{measured['peak']['mean'] / MIB:.1f}"]
        cells.append(f"{measured['resident_growth']['mean'] / MIB:.0f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measures and writes."""
    parser = parser_of(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=CONFIGURATIONS)
    parser.add_argument("--measure", choices=CONFIGURATIONS, help=argparse.SUPPRESS)
    parser.add_argument("--predict-only", action="store_true", help="predict anew beside the measurements on file")
    options = parser.parse_args()
    result = options.result or RESULTS / "plan_memory.json"
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    if options.predict_only:
        on_file = json.loads(result.read_text(encoding="utf-8"))
        for name, row in on_file["configurations"].items():
            row |= compared(name, row["measured"])
        result.write_text(json.dumps(on_file, indent=2) + "\n", encoding="utf-8")
        print(table(on_file["configurations"]))
        return
    rows: dict[str, Any] = {}
    for name in [options.only] if options.only else CONFIGURATIONS:
        start = time.monotonic()
        runs = [in_fresh_process(name) for _ in range(options.repeats)]
        measured = {
            key: {
                "mean": statistics.mean(run[key] for run in runs),
                "spread": max(run[key] for run in runs) - min(run[key] for run in runs),
            }
            for key in runs[0]
        }
        rows[name] = compared(name, measured)
        print(name, rows[name]["ratio"], f"{time.monotonic() - start:.0f} s", flush=True)
    print(table(rows))
    if options.only:
        return
    measured_all = {
        "configurations": rows,
        "repeats": options.repeats,
        "unit": "bytes",
        "spread": "largest less smallest of the repeats",
    }
    fields = ("shape", "head", "zero_stage", "recompute", "rows", "row_tokens")
    config = {
        "configurations": {name: dict(zip(fields, values, strict=True)) for name, values in CONFIGURATIONS.items()},
        "shapes": {name: {**shape.model_dump(), "parameters": num_parameters(shape)} for name, shape in SHAPES.items()},
        "precision": "bf16",
        "ranks": 1,
    }
    write_result(result, measured_all, config=config)


if __name__ == "__main__":
    main()
