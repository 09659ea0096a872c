"""The report of a benchmark: JSON for programs (docs/performance.md), a table for people."""

import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.hardware import cpu
from cluster.plan import GIB, held_in
from model.config import ModelConfig
from model.flops import num_parameters, peak_flops, weight_bytes
from rlhf_ray.bench.figures import UNKNOWN, Lap, idle_share, phase_spread, rates, spread, turn_spread, utilisation
from rlhf_ray.bench.workload import Workload, model_flops
from rlhf_ray.planning.plan import Request, make_plan
from rlhf_ray.run_state import package_versions


def report(work: Workload, shapes: Mapping[str, ModelConfig], laps: list[Lap], roles: Any) -> dict[str, Any]:
    """Everything that is known of the laps, as JSON values."""
    seconds, device = spread([lap.seconds for lap in laps]), device_facts(work, roles)
    found: dict[str, Any] = {
        "benchmark": work.what,
        "model": {
            "source": work.config.inputs.chat or f"preset {work.config.model.preset}, random weights",
            "parameters": num_parameters(work.shape),
            "shape": work.shape.model_dump(mode="json"),
        },
        "workload": {
            "batch_size": work.batch_size,
            "prompt_tokens": work.prompt_tokens,
            "response_tokens": work.response_tokens,
        },
        "repeats": work.repeats,
        "warmup": work.warmup,
        "seconds": seconds,
        "phases": phase_spread(laps),
    }
    median = seconds["median"]
    if work.what == "sync":
        size = weight_bytes(work.shape, bytes_per_parameter=2 if work.config.run.precision == "bf16" else 4)
        found |= {"weights": roles.weights_way(), "weight_bytes": size, "rates": {"gb_per_s": size / median / 1e9}}
    else:
        answers = work.batch_size
        tokens = {"prompt_tokens": answers * work.prompt_tokens, "response_tokens": answers * work.response_tokens}
        flops = model_flops(work, shapes)
        # The table of peaks is of bf16.
        peak = peak_flops(device["name"]) if device["kind"] == "cuda" and work.config.run.precision == "bf16" else None
        found |= {
            "tokens": tokens,
            "rates": rates(median, answers=answers, **tokens),
            "model_flops": flops,
            "mfu": utilisation(flops, median, peak=peak, devices=device["count"]),
        }
    peaks = {key.removeprefix("memory/").removesuffix("_peak_gib"): gib for key, gib in roles.memory().items()}
    if device["kind"] == "cuda" and work.what == "round" and work.config.run.precision == "bf16":
        _, gib = roles.gpu_memory_gib()
        found["planned_gib"] = planned_gib(work, shapes, gpus=device["count"], gpu_gib=gib)
    return found | {
        "turns": turn_spread(laps),
        "idle_share": idle_share(laps),
        "peak_memory_gib": peaks,
        "precision": work.config.run.precision,
        "device": device,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "packages": package_versions(),
        "config": work.config.model_dump(mode="json"),
    }


def planned_gib(work: Workload, shapes: Mapping[str, ModelConfig], *, gpus: int, gpu_gib: float) -> dict[str, Any]:
    """What the planner says of the config: GiB of each role's peak, and on the fullest GPU in each turn."""
    request = Request(
        stage="ppo",
        model=shapes["policy"],
        reward_model=shapes["helpfulness"],
        config=work.config,
        given=True,
        gpus=gpus,
        gpu_bytes=int(gpu_gib * GIB),
        prompt_tokens=work.prompt_tokens,
    )
    placement = make_plan(request).placement
    options = placement.options
    together = [[options[name] for name in names] for names in placement.gpus]
    phases = sorted({phase for option in options.values() for phase in option.phases})
    return {
        "roles": {name: option.peak[1].total / GIB for name, option in options.items()},
        "turns": {phase: max(held_in(phase, on_gpu) for on_gpu in together) / GIB for phase in phases},
    }


def device_facts(work: Workload, roles: Any) -> dict[str, Any]:
    """Kind, name and number of what the roles compute on; a CPU's name is that of the driver's machine."""
    if roles.runtime.device == "cpu":
        return {"kind": "cpu", "name": str(cpu()), "count": work.config.cluster.cores or len(os.sched_getaffinity(0))}
    names = sorted(set(roles.gpus()))
    return {"kind": "cuda", "name": ", ".join(names) or UNKNOWN, "count": len(roles.gpus())}


def commit() -> str:
    """The commit of the source, "+" where files of it have been changed since; "unknown" outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return UNKNOWN  # installed: a repository around it is another one
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    except OSError:
        return UNKNOWN
    return done.stdout.strip() or UNKNOWN


def print_report(report: Mapping[str, Any]) -> None:
    """The figures as a table on stdout."""
    device, work = report["device"], report["workload"]
    table = Table("figure", "median", "quartiles", title=f"rlhf-ray bench {report['benchmark']}", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, values in {"a repeat": report["seconds"], **report["phases"]}.items():
        table.add_row(f"{name}, s", f"{values['median']:.4g}", f"{values['q1']:.4g} to {values['q3']:.4g}")
    for name, value in report["rates"].items():
        text = f"{value:,.0f}" if value >= 1e4 else f"{value:,.4g}"
        table.add_row(name.replace("gb", "GB").replace("_per_s", "/s").replace("_", " "), text)
    if "mfu" in report:
        table.add_row("model FLOPs utilisation", report["mfu"] if report["mfu"] == UNKNOWN else f"{report['mfu']:.1%}")
    for role, share in report["idle_share"].items():
        table.add_row(f"idle, {role}" if role != "all" else "idle, all roles", f"{share:.1%}")
    planned = report.get("planned_gib", {"roles": {}})["roles"]
    for role, gib in report["peak_memory_gib"].items():
        plan = f"planned {planned[role]:.2f}" if role in planned else ""
        table.add_row(f"peak memory of {role}, GiB", f"{gib:.2f}", plan)
    for name, turn in report["turns"].items():
        seconds, (before, after) = turn["seconds"], turn["used_gib"]
        table.add_row(
            f"turn {name}, s; GPU {before:.2f} to {after:.2f} GiB",
            f"{seconds['median']:.4g}",
            f"{seconds['q1']:.4g} to {seconds['q3']:.4g}",
        )
    batch = f"{work['batch_size']} answers of {work['prompt_tokens']} + {work['response_tokens']} tokens"
    console = Console()
    console.print(table)
    for line in (
        f"{report['model']['source']}, {report['model']['parameters']:,} parameters",
        f"{report['precision']} on {device['count']} x {device['name']}, commit {report['commit']}",
        f"{report['repeats']} repeats after {report['warmup']} to warm up"
        + (f", by way of {report['weights']}" if report["benchmark"] == "sync" else f", each of {batch}"),
    ):
        console.print(line, highlight=False, markup=False)
