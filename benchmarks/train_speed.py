"""Training steps of one rank against a bare torch loop on the same model and data: speed, MFU, memory, planned bytes.

    python benchmarks/train_speed.py 1b [--kinds sft,reward,ppo] [--zero 1,2] [--recompute none] [--micro-tokens 16384]

The shape is a preset's name. `sft` are packed rows, every token learnt; `reward` pairs of answers; `ppo` the policy's
update on prompts of half the length, with entropy. The bare loop has the same model, bf16 weights, fp32 master weights
and gradients and fused AdamW, computes nothing again, and has neither DeepSpeed nor anything distributed. `--recompute
none,selective,full` measures each stage with all three. TORCH_COMPILE_DISABLE=1 in the environment gives all sides
torch's operations in place of kernels. Runs on CUDA where there is some, else on CPU. Writes
benchmarks/results/train_speed_SHAPE.json, or --result.
"""

import argparse
import gc
import itertools
import os
import resource
import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from measuring import RESULTS, parser_of, spread, write_result
from torch import Tensor

from cluster.hardware import gpu_names
from model.checkpoint import meta_model
from model.config import PRESETS, ModelConfig, Recompute
from model.flops import forward_flops_per_token, num_parameters, peak_flops
from model.fused import in_one_kernel
from model.heads import last_token_scores
from model.llama import Llama
from rlhf_ray.algo.losses import lm_loss
from rlhf_ray.algo.ranking import ranking_loss
from rlhf_ray.backends.train import TrainEngine, init_distributed
from rlhf_ray.config import OptimSection
from rlhf_ray.planning.memory import largest_matrix, training_memory, training_work

OPTIM = OptimSection(lr=1e-6, schedule="constant", warmup_steps=0)
Batch = dict[str, Tensor]
Loss = Callable[[Any, Batch], tuple[Tensor, dict[str, Tensor]]]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def batches_of(kind: str, config: ModelConfig, *, tokens: int, number: int) -> list[Batch]:
    """Micro-batches of random tokens."""
    generator = torch.Generator().manual_seed(0)
    length = min(2048, config.max_seq_len, tokens // 2)  # two rows at the least, for a pair
    rows, found = tokens // length, []
    for _ in range(number):
        batch = {"tokens": torch.randint(4, config.vocab_size, (rows, length), generator=generator)}
        columns = torch.arange(length).expand(rows, length)
        if kind == "sft":  # four examples a row
            piece = max(2, length // 4)
            batch |= {"segment_ids": columns // piece + 1, "position_ids": columns % piece}
            batch["target_mask"] = batch["position_ids"] > 0
        else:
            batch["lengths"] = torch.randint(3 * length // 4, length + 1, (rows,), generator=generator)
            batch["target_mask"] = (columns >= length // 2) & (columns < batch["lengths"][:, None])
        found.append({name: tensor.to(DEVICE) for name, tensor in batch.items()})
    return found


def loss_of(kind: str, batches: list[Batch]) -> Loss:
    """The stage's loss, over all micro-batches of a step."""
    targets = sum(int(batch["target_mask"].sum()) for batch in batches)
    rows = sum(len(batch["tokens"]) for batch in batches)

    def lm(model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        result = model(**batch, with_entropy=kind == "ppo")
        return lm_loss(result.logprobs, batch["target_mask"], denominator=targets)

    def ranking(model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        scores = last_token_scores(model(batch["tokens"], lengths=batch["lengths"]), batch["lengths"])
        chosen, rejected = scores.chunk(2)
        return ranking_loss(chosen, rejected, torch.zeros_like(chosen), denominator=rows // 2)

    return ranking if kind == "reward" else lm


def flops_of(kind: str, config: ModelConfig, batches: list[Batch]) -> float:
    """Model FLOPs of a step; recomputation and padding do not count."""
    total = 0.0
    for batch in batches:
        if kind == "sft":
            real, context = batch["tokens"].numel(), int(batch["position_ids"].max()) + 1
        else:
            real, context = int(batch["lengths"].sum()), float(batch["lengths"].float().mean())
        total += real * forward_flops_per_token(config, int(context), with_head=False)
        if kind != "reward":
            total += int(batch["target_mask"].sum()) * 2 * config.vocab_size * config.hidden_size
    return 3 * total


def model_of(config: ModelConfig, *, head: Any, recompute: Recompute) -> Llama:
    """With random weights, made where they are to be."""
    model = meta_model(config, head=head, dtype=torch.bfloat16).to_empty(device=DEVICE)
    model.tie_weights()
    model.model.recompute = recompute
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
    return model


class Bare:
    """A loop with nothing around it."""

    def __init__(self, model: Llama):
        self.model = model.to(DEVICE, torch.bfloat16)
        self._masters = [p.detach().float().clone() for p in self.model.parameters()]
        self._optimizer = torch.optim.AdamW(self._masters, lr=1e-6, betas=(0.9, 0.95), eps=1e-5, fused=True)

    def step(self, batches: list[Batch], loss: Loss) -> None:
        """One optimizer step."""
        for batch in batches:
            loss(self.model, batch)[0].backward()
            for master, parameter in zip(self._masters, self.model.parameters(), strict=True):
                gradient = parameter.grad.float() if parameter.grad is not None else torch.zeros_like(master)
                master.grad = gradient if master.grad is None else master.grad + gradient
                parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self._masters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_copy_(list(self.model.parameters()), self._masters)

    def close(self) -> None:
        """Frees it."""
        del self.model, self._masters, self._optimizer


def measure(side: Any, batches: list[Batch], loss: Loss, *, steps: int) -> dict[str, Any]:
    """Seconds of steps after two to warm up, and the memory they took."""
    for _ in range(2):
        side.step(batches, loss)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        side.step(batches, loss)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    if DEVICE.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": spread(seconds), "peak_gib": round(peak / 2**30, 3)}


def write(options: argparse.Namespace, config: ModelConfig, gpu: str, found: dict[str, Any]) -> None:
    """The figures so far."""
    bare = {
        kind: row["seconds"]["median"]
        for name, row in found.items()
        for kind, side in [name.split("/")]
        if side == "bare"
    }
    ratios = {name: round(row["seconds"]["median"] / bare[name.partition("/")[0]], 3) for name, row in found.items()}
    write_result(
        options.result or RESULTS / f"train_speed_{options.shape}.json",
        {
            "runs": found,
            "seconds_over_bare": ratios,
            "gpu": gpu,
            "kernels": in_one_kernel(DEVICE) and os.environ.get("TORCH_COMPILE_DISABLE") != "1",
            "statistic": statistics.median.__name__,
        },
        config={"shape": config.model_dump(mode="json"), **{k: v for k, v in vars(options).items() if k != "result"}},
    )


def main() -> None:
    """Every work by the bare loop and by DeepSpeed at each ZeRO stage, in turn."""
    parser = parser_of(__doc__)
    parser.add_argument("shape", choices=PRESETS)
    parser.add_argument("--kinds", default="sft,reward,ppo")
    parser.add_argument("--zero", default="1,2")
    parser.add_argument("--micro-tokens", type=int, default=16_384)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--recompute", default="none")
    options = parser.parse_args()
    config = PRESETS[options.shape]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    init_distributed(DEVICE)
    name = gpu_names()[0] if DEVICE.type == "cuda" else "cpu"
    peak = peak_flops(torch.cuda.get_device_name()) if DEVICE.type == "cuda" else None
    found: dict[str, Any] = {}
    for kind in options.kinds.split(","):
        batches = batches_of(kind, config, tokens=options.micro_tokens, number=options.micro_batches)
        loss, flops = loss_of(kind, batches), flops_of(kind, config, batches)
        head: Any = "scalar" if kind == "reward" else "lm"

        sides: list[tuple[int | None, Any]] = [(None, "none")]
        sides += itertools.product(map(int, options.zero.split(",")), options.recompute.split(","))
        for stage, recompute in sides:
            model = model_of(config, head=head, recompute=recompute)
            if stage is None:
                label, side = "bare", Bare(model)
            else:
                label = f"zero{stage}" if recompute == "none" else f"zero{stage} {recompute}"
                side = TrainEngine(model, optim=OPTIM, num_steps=100, zero_stage=stage, precision="bf16")
            del model
            row = measure(side, batches, loss, steps=options.steps)
            side.close()
            del side
            gc.collect()
            if DEVICE.type == "cuda":
                torch.cuda.empty_cache()
            median = row["seconds"]["median"]
            row["tokens_per_s"] = round(sum(batch["tokens"].numel() for batch in batches) / median)
            row["mfu"] = None if peak is None else round(flops / median / peak, 4)
            if stage is not None:
                tokens = batches[0]["tokens"].numel()
                targets = None if kind == "reward" else int(batches[0]["target_mask"].sum())
                work = training_work(config, tokens, targets=targets, recompute=recompute)
                sizes = {"zero_stage": stage, "num_ranks": 1}
                planned = training_memory(
                    num_parameters(config, scalar_head=kind == "reward"), largest_matrix(config), work, **sizes
                )
                row["planned_gib"] = round(max(memory.total for memory in planned.values()) / 2**30, 3)
            found[f"{kind}/{label}"] = row
            speed = f"{row['tokens_per_s']:,} tokens/s, MFU {row['mfu']}"
            print(f"{kind:<7} {label:<15} {median:.4f} s  {speed}", flush=True)
            write(options, config, name, found)  # whatever becomes of the next


if __name__ == "__main__":
    main()
