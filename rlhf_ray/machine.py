"""What a config leaves to the machine ("auto", none), settled once; and the machine as a run's results name it.

No torch: preflight asks before anything heavy is loaded.
"""

import importlib.metadata
import os
from collections.abc import Sequence
from typing import Any

from cluster import hardware
from cluster.layout import Demand
from rlhf_ray.config import Config, config_with
from rlhf_ray.data.reward_function import is_function

EMBEDDED = "local"
"""The address that stands for a Ray of the run's own, as it does for ray.init."""


def settled(config: Config) -> Config:
    """The config with what depends on this machine and its environment written out; one that is settled stays as it is.

    Device, precision and the cluster's address.
    """
    device = config.run.device
    if device == "auto":
        device = "cuda" if hardware.count_gpus() and not is_cpu_build() else "cpu"
    precision = config.run.precision
    if precision == "auto":
        precision = "bf16" if device == "cuda" or hardware.cpu().has_bf16 else "fp32"
    address = config.cluster.address or ray_address() or EMBEDDED
    return config_with(config, {"run.device": device, "run.precision": precision, "cluster.address": address})


def ray_address() -> str | None:
    """The cluster that RAY_ADDRESS names, if any. Addresses over http are those of jobs servers."""
    address = os.environ.get("RAY_ADDRESS") or None
    return None if address is None or address.startswith(("http://", "https://")) else address


def is_cpu_build() -> bool:
    """Whether the torch that is installed has no CUDA in it."""
    return importlib.metadata.version("torch").endswith("+cpu")


def demands(config: Config, roles: Sequence[str]) -> list[Demand]:
    """What each role asks for, with settled device. Rewards that are functions hold no model, and take no GPU."""
    held = on_device(config, roles) if config.run.device == "cuda" else []
    found = []
    for role in roles:
        settings: Any = getattr(config.roles, role)
        size = getattr(settings, "tensor_parallel_size", 1) if role in held else 0
        found.append(Demand(role, settings.num_ranks, size, (settings.gpus or ()) if role in held else ()))
    return found


def on_device(config: Config, roles: Sequence[str]) -> list[str]:
    """Those of the roles that hold a model, and with it GPUs where there are some; a function does not.

    The evaluation's referee takes the place of the helpfulness model.
    """
    inputs, rounds = config.inputs, config.rounds
    refereed = not is_function(inputs.referee) if inputs.referee else rounds is not None and rounds.referee
    return [r for r in roles if not is_function(getattr(inputs, r, "")) or (r == "helpfulness" and refereed)]


def machine_facts(config: Config) -> dict[str, Any]:
    """What a settled config's models are computed on, for manifests and results: of the machine of the driver."""
    return {
        "precision": config.run.precision,
        "device": config.run.device,
        "cpu": str(hardware.cpu()),
        "cores": config.cluster.cores or len(os.sched_getaffinity(0)),
        "gpus": hardware.count_gpus(),
    }


def opening_lines(config: Config) -> list[str]:
    """What a settled config takes and on what, for the start of a run; and what is ill-chosen for this CPU."""
    facts, cpu = machine_facts(config), hardware.cpu()
    on_gpu = config.run.device == "cuda"
    gpus = f"{facts['gpus']} GPUs, " if on_gpu else ""
    ray = "a Ray of its own" if config.cluster.address == EMBEDDED else f"the Ray cluster at {config.cluster.address}"
    if config.cluster.address == ray_address():
        ray += " (RAY_ADDRESS)"
    lines = [f"{facts['precision']} on {facts['device']}: {gpus}{facts['cores']} cores of {facts['cpu']}; {ray}"]
    if config.run.precision == "bf16" and not on_gpu and not cpu.has_bf16:
        lines.append(
            f"warning: run.precision=bf16: {cpu.name} has no units for it, and multiplies matrices some 60 times "
            "slower than in fp32 (0.8 against 51 GFLOP/s on AVX2); leave it out, or set run.precision=fp32"
        )
    if config.cluster.address == EMBEDDED and (free := hardware.shared_memory_bytes()) < hardware.SMALL_SHARED_BYTES:
        lines.append(
            f"warning: /dev/shm has {free / 2**20:.0f} MiB free, too few for Ray's object store: what roles pass on "
            "goes through a file in TMPDIR, on disk; give a container more (docker run --shm-size=4g)"
        )
    return lines
