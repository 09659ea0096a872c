"""Groups of worker ranks over Ray: launch, rendezvous, dispatch by method reference, deadlines.

A worker is a plain class derived from `Worker`; Ray wraps it at launch, so it also runs in-process in a test.
"""

import functools
import inspect
import os
import resource
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.placement import reserve

R = TypeVar("R")

Condition = Literal["dead", "busy", "idle"]


class WorkerError(RuntimeError):
    """A rank failed, died or missed its deadline; the message names role, rank, method and step."""

    def __init__(self, message: str, *, role: str, rank: int, step: str, cause: BaseException | None = None):
        super().__init__(message)
        self.role, self.rank, self.step, self.cause = role, rank, step, cause


class Worker:
    """One rank of a role. Public methods of derived classes count the seconds that they run."""

    _busy_s = 0.0
    _depth = 0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, member in list(vars(cls).items()):
            if inspect.isfunction(member) and not name.startswith("_"):
                setattr(cls, name, _counting_seconds(member))

    def __init__(self, role: str, rank: int, num_ranks: int):
        self.role, self.rank, self.num_ranks = role, rank, num_ranks

    def ready(self) -> int:
        """The process id, once the process is up."""
        return os.getpid()

    def peak_memory_gib(self) -> float:
        """Highest resident memory of this process so far, GiB."""
        return peak_gib()

    def busy_seconds(self) -> float:
        """Seconds this rank has spent in calls so far; what a call waits for inside, as in a collective, counts."""
        return self._busy_s

    def rendezvous_address(self) -> tuple[str, int]:
        """This node's address and a port that was free a moment ago, for rank 0 to listen on."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), int(probe.getsockname()[1])

    def set_rendezvous(self, address: str, port: int) -> None:
        """Puts torch.distributed's rendezvous variables in the environment of this rank."""
        os.environ.update(
            MASTER_ADDR=address,
            MASTER_PORT=str(port),
            RANK=str(self.rank),
            LOCAL_RANK="0",  # Ray shows each rank its own devices only
            WORLD_SIZE=str(self.num_ranks),
        )


def _counting_seconds(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, whose outermost calls add to its worker's busy seconds."""

    @functools.wraps(method)
    def counted(self: Worker, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        self._depth += 1
        try:
            return method(self, *args, **kwargs)
        finally:
            self._depth -= 1
            if not self._depth:
                self._busy_s += time.perf_counter() - start

    return counted


def peak_gib() -> float:
    """Highest resident memory of the calling process so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@dataclass(frozen=True)
class Call(Generic[R]):
    """One method call under way on one rank.

    `ref` is the result that comes back to the driver (small); `data` are further results that stay in the
    object store and are handed on by reference.
    """

    role: str
    rank: int
    method: str
    ref: Any
    data: tuple[Any, ...] = ()


def collect(calls: Sequence[Call[R]], *, timeout_s: float, step: str = "") -> list[R]:
    """Results of `calls` in order, raising as soon as a rank fails: the others may wait for it for ever.

    Raises:
        WorkerError: a rank raised, died, or had not answered after `timeout_s` seconds.
    """
    deadline = time.monotonic() + timeout_s
    results: dict[Any, R] = {}
    waiting = {call.ref: call for call in calls}
    while waiting:
        done, _ = ray.wait(
            list(waiting), num_returns=1, timeout=max(0.0, deadline - time.monotonic()), fetch_local=False
        )
        if not done:
            late = next(iter(waiting.values()))
            raise _error(late, step, f"gave no answer within {timeout_s:.0f} s")
        # A failed call takes its dependants down with it: take all that is done, first submitted first.
        answered, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0, fetch_local=False)
        for ref in [ref for ref in waiting if ref in set(answered)]:
            results[ref] = _result(waiting.pop(ref), step)
    return [results[call.ref] for call in calls]


def _result(call: Call[R], step: str) -> R:
    try:
        value: R = ray.get(call.ref, timeout=60)
        return value
    except RayTaskError as error:
        cause = error.cause if isinstance(error.cause, BaseException) else error
        if isinstance(cause, RayActorError):
            raise _error(call, step, f"lost an input: {_why_dead(cause)}", cause) from error
        raise _error(call, step, f"{type(cause).__name__}: {cause}", cause) from error
    except RayActorError as error:
        raise _error(call, step, f"the process died: {_why_dead(error)}", error) from error
    except GetTimeoutError as error:
        raise _error(call, step, "its result could not be fetched within 60 s", error) from error


def _why_dead(error: RayActorError) -> str:
    """The last line of Ray's report, less its guesses: what a constructor raised, or how the process died."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].partition(" Some common causes")[0] if lines else type(error).__name__


def _error(call: Call[Any], step: str, what: str, cause: BaseException | None = None) -> WorkerError:
    where = f"{call.role} rank {call.rank} failed in {call.method}" + (f" at {step}" if step else "")
    return WorkerError(f"{where}: {what}", role=call.role, rank=call.rank, step=step, cause=cause)


class WorkerGroup:
    """The ranks of one role, alive for the whole run."""

    def __init__(self, role: str, actors: list[Any], placement: Any, pids: list[int], *, timeout_s: float):
        self.role, self.pids = role, pids
        self._actors, self._placement, self._timeout_s = actors, placement, timeout_s

    @classmethod
    def launch(
        cls,
        worker_class: Callable[..., Worker],
        *,
        role: str,
        num_ranks: int = 1,
        resources: Mapping[str, float],
        env: Mapping[str, str],
        start_timeout_s: float = 300.0,
        call_timeout_s: float = 3600.0,
    ) -> "WorkerGroup":
        """Starts the ranks and gives them a rendezvous.

        Args:
            resources: {"CPU": share, "GPU": share} of one rank.
            env: environment variables of each rank, set before its process imports anything.
            start_timeout_s: seconds for placement, and again for the processes to come up.
            call_timeout_s: default deadline of each later call, seconds.
        Raises:
            PlacementError, WorkerError.
        """
        placement = reserve([dict(resources)] * num_ranks, role=role, timeout_s=start_timeout_s)
        remote_class = ray.remote(worker_class)
        actors = [
            remote_class.options(
                num_cpus=resources.get("CPU", 0),
                num_gpus=resources.get("GPU", 0),
                runtime_env={"env_vars": dict(env)},
                scheduling_strategy=PlacementGroupSchedulingStrategy(placement, placement_group_bundle_index=rank),
            ).remote(role, rank, num_ranks)
            for rank in range(num_ranks)
        ]
        group = cls(role, actors, placement, [], timeout_s=start_timeout_s)
        try:
            group.pids = group.call(Worker.ready, step="start-up")
            address, port = group.call_one(0, Worker.rendezvous_address, step="start-up")
            group.call(Worker.set_rendezvous, address, port, step="start-up")
        except WorkerError:
            group.stop()
            raise
        group._timeout_s = call_timeout_s
        return group

    @property
    def num_ranks(self) -> int:
        """How many ranks the group has."""
        return len(self._actors)

    def submit_one(
        self, rank: int, method: Callable[..., Any], *args: Any, num_data: int = 0, **kwargs: Any
    ) -> Call[Any]:
        """Starts `method` on one rank and returns at once.

        With `num_data` = n the method returns (result, data_1, ..., data_n), and the data stay in the object
        store.
        """
        remote_method = getattr(self._actors[rank], method.__name__)
        refs = remote_method.options(num_returns=1 + num_data).remote(*args, **kwargs)
        ref, *data = refs if num_data else [refs]
        return Call(self.role, rank, method.__name__, ref, tuple(data))

    def submit(self, method: Callable[..., R], *args: Any, **kwargs: Any) -> list[Call[R]]:
        """Starts `method` with the same arguments on every rank and returns at once."""
        return [self.submit_one(rank, method, *args, **kwargs) for rank in range(self.num_ranks)]

    def call(self, method: Callable[..., R], *args: Any, step: str = "", **kwargs: Any) -> list[R]:
        """Runs `method` on every rank and waits for all; see `collect` for what it raises."""
        return collect(self.submit(method, *args, **kwargs), timeout_s=self._timeout_s, step=step)

    def call_one(self, rank: int, method: Callable[..., R], *args: Any, step: str = "", **kwargs: Any) -> R:
        """Runs `method` on one rank and waits for it."""
        return collect([self.submit_one(rank, method, *args, **kwargs)], timeout_s=self._timeout_s, step=step)[0]

    def condition(self, *, patience_s: float = 5.0) -> Condition:
        """ "dead": a rank's process is gone; "busy": one is in a call; else "idle"."""
        calls = self.submit(Worker.ready)
        # A dead rank's call fails at once, a busy one's waits in its queue.
        answered, _ = ray.wait([call.ref for call in calls], num_returns=len(calls), timeout=patience_s)
        for call in calls:
            try:
                if call.ref in set(answered):
                    _result(call, "")
            except WorkerError as error:
                if isinstance(error.cause, RayActorError):
                    return "dead"
        return "idle" if len(answered) == len(calls) else "busy"

    def stop(self) -> None:
        """Ends the ranks and frees their place."""
        for actor in self._actors:
            ray.kill(actor)
        remove_placement_group(self._placement)
