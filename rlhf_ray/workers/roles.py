"""The run's roles: each a group of ranks, started when a stage first needs it and alive until the run ends."""

import os
import re
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import ray

from cluster.worker_group import Call, Worker, WorkerGroup, collect, peak_gib
from rlhf_ray.config import Config, OptimSection, RolloutRole, TrainRole
from rlhf_ray.machine import EMBEDDED, on_device
from rlhf_ray.workers.policy import PolicyWorker
from rlhf_ray.workers.reward import RewardWorker
from rlhf_ray.workers.rollout import RolloutWorker
from rlhf_ray.workers.scorer import Runtime, ScorerWorker
from rlhf_ray.workers.trainer import TrainerWorker
from rlhf_ray.workers.value import ValueWorker

WORKER_CLASSES: dict[str, type[Worker]] = {
    "policy": PolicyWorker,
    "value": ValueWorker,
    "helpfulness": RewardWorker,
    "safety": RewardWorker,
    "reference": ScorerWorker,
    "rollout": RolloutWorker,
}


class Roles:
    """Launches worker groups and shares this machine's cores between those that work at the same time."""

    def __init__(self, config: Config):
        self._config = config
        self._groups: dict[str, WorkerGroup] = {}
        self.engine_shape: Any = None
        """Of the model that the engines were started on; they take weights of no other."""
        self.step = ""
        """What the run is at, for messages about calls that have no step of their own."""
        self.cores = config.cluster.cores or len(os.sched_getaffinity(0))
        # Of a settled config (rlhf_ray.machine): neither is "auto" any more.
        self.runtime = Runtime(precision=config.run.precision, device=config.run.device)

    def __getitem__(self, role: str) -> WorkerGroup:
        """The role's group, started at first use."""
        return self.start(role)[0]

    def start(self, *roles: str) -> list[WorkerGroup]:
        """Starts the roles that are not yet up, side by side: most of a start is imports."""
        missing = [role for role in roles if role not in self._groups]
        if missing:
            with ThreadPoolExecutor(len(missing)) as pool:
                launched = {role: pool.submit(self._launch, role) for role in missing}
            self._groups |= {role: group.result() for role, group in launched.items() if not group.exception()}
            for group in launched.values():
                group.result()  # raises where one did not come up; the others are kept
        return [self._groups[role] for role in roles]

    def work_together(self, *roles: str, among: Sequence[str] = ()) -> None:
        """Divides the cores between roles whose ranks are about to compute at the same time.

        On CPU more runnable compute threads than cores are several times slower than too few, because threads spin
        at every barrier.

        Args:
            among: the roles between which cores are divided, where these are more than the ones to be started. The
                number of threads is a part of what makes bits equal, so it must not depend on what is done already.
        """
        groups = self.start(*roles)
        threads = max(1, self.cores // sum(getattr(self._config.roles, role).num_ranks for role in among or roles))
        for group in groups:
            group.call(_set_threads(group.role), threads, step=self.step)

    @property
    def timeout_s(self) -> float:
        """Deadline of a call, seconds."""
        return self._config.cluster.call_timeout_s

    def memory(self) -> dict[str, float]:
        """Peak memory of each role's largest rank so far, GiB, and of this driver."""
        return {
            **{f"memory/{role}_peak_gib": max(ranks) for role, ranks in self._ask(Worker.peak_memory_gib).items()},
            "memory/driver_peak_gib": peak_gib(),
        }

    def busy_seconds(self) -> dict[str, list[float]]:
        """Seconds that each role's ranks have spent in calls so far, rank by rank."""
        return self._ask(Worker.busy_seconds)

    def drop_dead(self) -> list[str]:
        """Ends every group that has lost a rank, so that its next use starts it anew; returns the roles.

        Whole groups, because the ranks that are left may wait in a collective for the one that is gone. So may ranks of
        another group, for one whose call failed because the dead one owed it data: where there is a death, groups of
        several ranks that are still busy are ended too.
        """
        conditions = {role: group.condition() for role, group in self._groups.items()}
        if "dead" not in conditions.values():
            return []
        ended = [
            role
            for role, condition in conditions.items()
            if condition == "dead" or (condition == "busy" and self._groups[role].num_ranks > 1)
        ]
        for role in ended:
            self._groups.pop(role).stop()
        return ended

    def resize(self, config: Config) -> None:
        """Roles are of this config's size from now on; those that are up in another are ended."""
        changed = [role for role in self._groups if getattr(config.roles, role) != getattr(self._config.roles, role)]
        self._config = config
        self._stop(changed)

    def release(self, needed: Collection[str]) -> None:
        """Ends the roles that are not needed any more."""
        self._stop([role for role in self._groups if role not in needed])

    def end(self, role: str) -> None:
        """Ends a role, if it is up."""
        self._stop([role] if role in self._groups else [])

    def unload(self) -> None:
        """Frees models, optimizers and data of all roles but the engines, whose weights later stages replace."""
        groups = [group for role, group in self._groups.items() if role != "rollout"]
        calls = [call for group in groups for call in group.submit(ScorerWorker.unload)]
        collect(calls, timeout_s=self.timeout_s, step=f"{self.step} end")

    def stop(self) -> None:
        """Ends all roles."""
        self._stop(list(self._groups))

    def _stop(self, roles: Sequence[str]) -> None:
        for role in roles:
            self._groups.pop(role).stop()

    def _ask(self, method: Callable[[Any], float]) -> dict[str, list[float]]:
        """What the method returns, by role and rank."""
        calls = {role: group.submit(method) for role, group in self._groups.items()}
        return {role: collect(ranks, timeout_s=self.timeout_s, step=self.step) for role, ranks in calls.items()}

    def _launch(self, role: str) -> WorkerGroup:
        settings: Any = getattr(self._config.roles, role)
        num_ranks = settings.num_ranks
        on_gpu = self.runtime.device == "cuda" and bool(on_device(self._config, [role]))
        embedded = self._config.cluster.address in (None, EMBEDDED)
        if isinstance(settings, RolloutRole):
            size = settings.tensor_parallel_size
            gpus = float(size) if size > 1 else settings.gpus_per_rank or 1.0
        else:
            size, gpus = 1, settings.gpus_per_rank or 1.0
        resources = {"CPU": self._config.cluster.cpus_per_rank, **({"GPU": gpus} if on_gpu else {})}
        return WorkerGroup.launch(
            WORKER_CLASSES[role],
            role=role,
            num_ranks=num_ranks,
            resources=resources,
            env=worker_environment(threads=max(1, self.cores // (num_ranks * size)), on_gpu=on_gpu, embedded=embedded),
            rendezvous=isinstance(settings, TrainRole),
            start_timeout_s=self._config.cluster.start_timeout_s,
            call_timeout_s=self._config.cluster.call_timeout_s,
        )

    def begin_training(self, role: str, *, optim: OptimSection, num_steps: int, state: Path | None) -> list[Call[None]]:
        """Starts putting the role's built model under DeepSpeed, as `roles.ROLE` says; `state` is to go on from."""
        settings = getattr(self._config.roles, role)
        assert isinstance(settings, TrainRole)
        return self[role].submit(
            TrainerWorker.begin_training,
            optim=optim,
            num_steps=num_steps,
            zero_stage=settings.zero_stage,
            activation_checkpointing=settings.activation_checkpointing,
            state=str(state) if state else None,
        )


def worker_environment(*, threads: int, on_gpu: bool, embedded: bool = True) -> dict[str, str]:
    """Environment of a rank, set before its process starts.

    Args:
        embedded: the rank is on this machine. What is installed on others, and where, is not known here.
    """
    return {
        **(_allocator() if embedded and not on_gpu else {}),
        "OMP_NUM_THREADS": str(threads),
        # Idle threads sleep, because roles on one machine take turns on its cores; but not at once: waking them costs
        # more than a small model's matrix products.
        "GOMP_SPINCOUNT": "10000",
        "DS_ACCELERATOR": "cuda" if on_gpu else "cpu",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "0"),
        "TRANSFORMERS_VERBOSITY": "error",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # threads are limited here, not pinned to cores
    }


def _allocator() -> dict[str, str]:
    """The jemalloc that Ray brings along, unless something is preloaded already.

    torch on CPU takes every tensor from malloc. glibc's gives large ones back at once and gets them again page by page;
    a training step of SmolLM2-135M takes a tenth longer by it, and a process holds 1.1 GB more (docs/decisions.md).
    """
    library = Path(ray.__file__).parent / "core" / "libjemalloc.so"
    if "LD_PRELOAD" in os.environ or not library.exists():
        return {}
    # oversize_threshold:0: by default jemalloc, too, gives tensors above 8 MiB back at once. The background thread
    # gives back what an idle process does not use; without it, that happens only while a process allocates.
    settings = "oversize_threshold:0,dirty_decay_ms:10000,muzzy_decay_ms:0,background_thread:true"
    return {"LD_PRELOAD": _one_word(library), "MALLOC_CONF": settings}


@cache
def _one_word(library: Path) -> str:
    """A name of a file by which LD_PRELOAD finds it, for as long as this process lives.

    The loader splits at spaces and colons, knows no quotes, and puts something else for words after a dollar.
    """
    if not re.search(r"[\s:$]", str(library)):
        return str(library)
    return f"/proc/{os.getpid()}/fd/{os.open(library, os.O_RDONLY)}"


def _set_threads(role: str) -> Any:
    return RolloutWorker.set_threads if role == "rollout" else ScorerWorker.set_threads
