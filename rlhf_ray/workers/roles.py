"""The run's roles: each a group of ranks, started when a stage first needs it and alive until the run ends."""

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ray

from cluster.layout import Layout, PlacementError, lay_out
from cluster.placement import Place, cluster_nodes, reserve
from cluster.worker_group import Call, Worker, WorkerError, WorkerGroup, collect, peak_gib
from rlhf_ray.backends.weights import Channel, Way
from rlhf_ray.config import Config, OptimSection, RolloutRole, TrainRole, replicas
from rlhf_ray.machine import EMBEDDED, demands
from rlhf_ray.progress import console
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


ENDS_S = 10.0
"""For processes to end that were told to."""


@dataclass(frozen=True)
class Turn:
    """A change of the roles that are awake on GPUs, as it was measured."""

    leave: tuple[str, ...]
    wake: tuple[str, ...]
    seconds: float
    used_gib: tuple[float, float]
    """Taken on the fullest GPU of trained and frozen roles, before and after."""


class Roles:
    """Launches worker groups and shares this machine's cores between those that work at the same time."""

    def __init__(self, config: Config, seated: Sequence[str] = ()):
        """For roles of a settled config; `seated` as in `lay_out`."""
        self._groups: dict[str, WorkerGroup] = {}
        self._place: Place | None = None
        self._asleep: set[str] = set()
        self.lay_out(config, seated)
        self.engine_kind: Any = None
        """Shape of the model that the engines were started on, and the way weights come; they take no others."""
        self.engine_ids = 0
        """Rows of the vocabulary that they have."""
        self.engines_forgot = False
        """Whether the engines have slept since a trainer sent them weights."""
        self.turn_log: list[Turn] | None = None
        """Where turns are noted that have roles leave or wake; None measures nothing."""
        self.step = ""
        """What the run is at, for messages about calls that have no step of their own."""
        # Of a settled config (rlhf_ray.machine): neither is "auto" any more.
        self.runtime = Runtime(precision=config.run.precision, device=config.run.device)

    def __getitem__(self, role: str) -> WorkerGroup:
        """The role's group, started at first use."""
        return self.start(role)[0]

    def start(self, *roles: str) -> list[WorkerGroup]:
        """Starts the roles that are not yet up, side by side: most of a start is imports."""
        missing = [role for role in roles if role not in self._groups]
        if missing:
            place = self._take_place()
            with ThreadPoolExecutor(len(missing)) as pool:
                launched = {role: pool.submit(self._launch, role, place) for role in missing}
            self._groups |= {role: group.result() for role, group in launched.items() if not group.exception()}
            for group in launched.values():
                group.result()  # raises where one did not come up; the others are kept
        return [self._groups[role] for role in roles]

    def turns(self, *roles: str) -> list[tuple[str, ...]]:
        """The roles in groups, each of which can work at the same time.

        On CPU it is one, which shares the cores. Roles that share a GPU take turns: there each would only slow the
        other down, and while one works the others leave it their memory.
        """
        if self.runtime.device == "cpu":
            return [roles]
        layout = self._take_place().layout
        turns: list[list[str]] = []
        for role in roles:
            turn = next((turn for turn in turns if layout.are_apart(role, turn)), None)
            turns.append([role]) if turn is None else turn.append(role)
        return [tuple(turn) for turn in turns]

    def make_resident(self, *roles: str) -> None:
        """Has the roles ready to compute at the same time, awake on GPUs that the others have left to them.

        On CPU it divides the cores between them: more runnable compute threads than cores are several times slower than
        too few, because threads spin at every barrier.
        """
        self.start(*roles)
        layout = self._take_place().layout
        if self.runtime.device == "cpu":
            seats = [seat for role in roles for seat in layout.of(role)]
            on_node = Counter(seat.node for seat in seats)
            calls = [
                self._groups[seat.role].submit_one(
                    seat.rank, _set_threads(seat.role), max(1, self._cores(seat.node) // on_node[seat.node])
                )
                for seat in seats
            ]
            collect(calls, timeout_s=self.timeout_s, step=self.step)
            return
        leave = [
            role
            for role in self._groups
            if role not in roles and role not in self._asleep and not layout.are_apart(role, roles)
        ]
        waking = [role for role in roles if role in self._asleep]
        measured = self.turn_log is not None and bool(leave or waking)
        before, start = self.gpu_memory_gib()[0] if measured else 0.0, time.perf_counter()
        self._all(leave, Worker.sleep)
        self._asleep |= {*leave}
        self.engines_forgot |= "rollout" in leave
        self._all([r for r in roles if r not in waking and not layout.are_apart(r, waking)], Worker.give_back)
        self._all(waking, Worker.wake)
        self._asleep -= {*waking}
        if measured:
            seconds = time.perf_counter() - start
            assert self.turn_log is not None
            self.turn_log.append(Turn(tuple(leave), tuple(waking), seconds, (before, self.gpu_memory_gib()[0])))

    def can_overlap(self, role: str, others: Sequence[str]) -> bool:
        """Whether a role can compute while others do: on GPUs of its own; on CPU it would only take their cores."""
        return self.runtime.device == "cuda" and self._take_place().layout.are_apart(role, others)

    def shares_gpus(self, role: str) -> bool:
        """Whether other roles need its GPUs in turn."""
        return bool(self._take_place().layout.neighbours(role))

    def weights_way(self) -> Way:
        """How the policy's weights get to the engines (`backends/weights.py`)."""
        layout = self._take_place().layout
        if self.runtime.device == "cpu" or self._config.roles.rollout.weights == "store" or not layout.of("policy"):
            return "store"
        # A rank without an engine on its GPU would keep each of its buckets: CUDA IPC waits for somebody to open them.
        if layout.gpus("rollout") == layout.gpus("policy"):
            return "ipc"
        # NCCL takes two ranks on one GPU for an error.
        return "nccl" if layout.gpus("rollout").isdisjoint(layout.gpus("policy", rank=0)) else "store"

    def channel(self) -> Channel | None:
        """The connection from policy to engines; None where weights go through the object store."""
        if (way := self.weights_way()) == "store":
            return None
        engines = self["rollout"]
        return Channel(
            way=way,
            engines=tuple(engines.actors),
            pids=tuple(engines.pids),
            ranks_each=self._config.roles.rollout.tensor_parallel_size,
            num_ids=self.engine_ids,
            timeout_s=self.timeout_s,
        )

    def replicas(self, role: str) -> list[range]:
        """Ranks of each replica of the role's model: all must take part in what one of them computes."""
        return replicas(getattr(self._config.roles, role))

    def frozen(self, role: str) -> dict[str, Any]:
        """How a model is held that the role only scores with: options of `ScorerWorker.load_frozen`."""
        return {
            "runtime": self.runtime,
            "ranks_per_replica": len(self.replicas(role)[0]),
            "shares_device": self.shares_gpus(role),
        }

    def gpu_memory_gib(self) -> tuple[float, float]:
        """(taken, there is) on the fullest GPU of trained and frozen roles that are up; zeros of none."""
        groups = [group for role, group in self._groups.items() if role != "rollout"]
        calls = [call for group in groups for call in group.submit(ScorerWorker.gpu_memory_gib)]
        return max(collect(calls, timeout_s=self.timeout_s, step=self.step), default=(0.0, 0.0))

    def _all(self, roles: Sequence[str], method: Callable[[Any], None]) -> None:
        """Calls a method on all ranks of the roles, side by side; where it fails, none is left half way."""
        calls = [call for role in roles for call in self._groups[role].submit(method)]
        try:
            collect(calls, timeout_s=self.timeout_s, step=self.step)
        except WorkerError:
            self._stop([role for role in roles if self._groups[role].condition() != "dead"])
            raise

    @property
    def timeout_s(self) -> float:
        """Deadline of a call, seconds."""
        return self._config.cluster.call_timeout_s

    def gpus(self) -> list[str]:
        """Names of the GPUs that the roles are on; "" of one whose node does not tell."""
        place = self._take_place()
        used = {(seat.node, gpu) for seat in place.layout.seats for gpu in seat.gpus}
        names = {node: facts.gpus for node, facts in place.facts.items()}
        return [names[node][gpu] if gpu < len(names[node]) else "" for node, gpu in sorted(used)]

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
        another group, for one whose call failed because the dead one owed it data, or policy and engines for each
        other: where there is a death, groups of several ranks that are still busy are ended too, and these two.
        """
        conditions = {role: group.condition() for role, group in self._groups.items()}
        if "dead" not in conditions.values():
            return []
        linked = ("policy", "rollout") if self.weights_way() == "nccl" else ()
        ended = [
            role
            for role, condition in conditions.items()
            if condition == "dead" or (condition == "busy" and (self._groups[role].num_ranks > 1 or role in linked))
        ]
        if self._place is not None and not self._place.is_whole():
            ended = list(conditions)
            self.stop()
        self._stop([role for role in ended if role in self._groups])
        return ended

    def lay_out(self, config: Config, seated: Sequence[str]) -> None:
        """Roles are of this config's sizes from now on; all end where that moves one that is up.

        Args:
            seated: those that share the GPUs; on CPU, and where none is named, all have seats.
        """
        everyone = config.run.device != "cuda" or not seated
        seated = tuple(WORKER_CLASSES if everyone else seated)
        if self._place is not None and not _still_sits(self._place.layout, config, seated):
            self.stop()  # by the config that they were started with
        self._config, self._seated = config, seated

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
        """Ends all roles, and gives their place back."""
        self._stop(list(self._groups))
        if self._place is not None:
            self._place.free()
            self._place = None

    def _stop(self, roles: Sequence[str]) -> None:
        ended = [self._groups.pop(role) for role in roles]
        self._asleep -= {*roles}
        if "rollout" in roles and self._config.roles.rollout.tensor_parallel_size > 1:
            # Ended at once they would leave files by which their ranks spoke. It takes vLLM four seconds.
            engines = ended[roles.index("rollout")]
            closing = [call.ref for call in engines.submit(RolloutWorker.close)]
            ray.wait(closing, num_returns=len(closing), timeout=ENDS_S)
        for group in ended:
            group.stop()
        if self.runtime.device == "cuda":  # memory of the GPUs comes free with the processes
            for group in ended:
                group.wait_until_gone(ENDS_S)

    def _ask(self, method: Callable[[Any], float]) -> dict[str, list[float]]:
        """What the method returns, by role and rank."""
        calls = {role: group.submit(method) for role, group in self._groups.items()}
        return {role: collect(ranks, timeout_s=self.timeout_s, step=self.step) for role, ranks in calls.items()}

    def _cores(self, node: int) -> int:
        """That compute threads may fill on a node."""
        return self._config.cluster.cores or self._take_place().facts[node].cores

    def _take_place(self) -> Place:
        """Of all seated roles, once; said on GPUs, where it matters."""
        if self._place is None:
            cluster = self._config.cluster
            nodes = cluster_nodes(cpus_per_rank=cluster.cpus_per_rank)
            layout = lay_out(demands(self._config, self._seated), nodes)
            self._place = reserve(layout, cpus_per_rank=cluster.cpus_per_rank, timeout_s=cluster.start_timeout_s)
            if self.runtime.device == "cuda":
                for line in layout.lines():
                    console.print(line, highlight=False, soft_wrap=True)
        return self._place

    def _launch(self, role: str, place: Place) -> WorkerGroup:
        settings: Any = getattr(self._config.roles, role)
        processes = settings.num_ranks * getattr(settings, "tensor_parallel_size", 1)
        embedded = self._config.cluster.address in (None, EMBEDDED)
        return WorkerGroup.launch(
            WORKER_CLASSES[role],
            place,
            role=role,
            env=[
                worker_environment(
                    threads=max(1, self._cores(seat.node) // processes),
                    on_gpu=bool(seat.gpus),
                    embedded=embedded,
                    wakes_engines=role == "rollout" or role in place.layout.neighbours("rollout"),
                )
                for seat in place.layout.of(role)
            ],
            rendezvous=not isinstance(settings, RolloutRole),
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
            recompute=settings.recompute,
            state=str(state) if state else None,
        )


def _still_sits(held: Layout, config: Config, seated: Sequence[str]) -> bool:
    """Whether the layout is that of the seated roles; nodes that have joined since change nothing."""
    try:
        return lay_out(demands(config, seated), held.nodes) == held
    except PlacementError:
        return False


def worker_environment(
    *, threads: int, on_gpu: bool, embedded: bool = True, wakes_engines: bool = False
) -> dict[str, str]:
    """Environment of a rank, set before its process starts.

    Args:
        embedded: the rank is on this machine. What is installed on others, and where, is not known here.
        wakes_engines: it is one, or is on its GPUs. vLLM's own allocator, by which it sleeps, refuses segments that
            grow; and CUDA IPC does not share them with every container.
    """
    return {
        **(_allocator() if embedded and not on_gpu else {}),
        **({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} if on_gpu and not wakes_engines else {}),
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
