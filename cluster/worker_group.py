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
from ray.exceptions import (
    GetTimeoutError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)

from cluster.deaths import Process, Starts, why_dead
from cluster.hardware import resident_bytes
from cluster.placement import Place

R = TypeVar("R")

Condition = Literal["dead", "busy", "idle"]

_LOSSES = (RayActorError, OutOfMemoryError, ObjectLostError)
"""A process has ended, or the machine that held its data."""

START_UP = "start-up"  # the step that a failure names while ranks come up

_LOOK_EVERY_S = 1.0
"""Between looks at the processes that are waited for."""


class WorkerError(RuntimeError):
    """A rank failed, died or missed its deadline; the message names role, rank, method and step."""

    def __init__(self, message: str, *, role: str, rank: int, step: str, cause: BaseException | None = None):
        super().__init__(message)
        self.role, self.rank, self.step, self.cause = role, rank, step, cause

    @property
    def died(self) -> bool:
        """Whether a process was lost: trying again may end otherwise."""
        return isinstance(self.cause, _LOSSES)

    @property
    def late(self) -> bool:
        """Whether there was no answer in time."""
        return isinstance(self.cause, GetTimeoutError)


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

    def sleep(self) -> None:
        """Leaves the devices to other roles, until `wake`."""

    def wake(self) -> None:
        """Has them again."""

    def give_back(self) -> None:
        """Gives memory of the devices back that it holds and does not use."""

    def peak_memory_gib(self) -> float:
        """Highest resident memory of this process so far, GiB."""
        return peak_gib()

    def busy_seconds(self) -> float:
        """Seconds this rank has spent in calls so far; what a call waits for inside, as in a collective, counts."""
        return self._busy_s

    def rendezvous_address(self) -> tuple[str, int]:
        """This node's address and a port for rank 0 to listen on, which is nobody else's from now on.

        A socket that is bound but does not listen keeps it from being given away. With SO_REUSEADDR on both, the store
        that DeepSpeed's backend makes of it may listen there all the same.
        """
        self._port_holder = socket.socket()
        self._port_holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._port_holder.bind(("", 0))
        return ray.util.get_node_ip_address(), int(self._port_holder.getsockname()[1])

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
    process: Process | None = None


def collect(
    calls: Sequence[Call[R]],
    *,
    timeout_s: float,
    step: str = "",
    starts: Starts | None = None,
    partners: "WorkerGroup | None" = None,
) -> list[R]:
    """Results of `calls` in order, raising as soon as a rank fails: the others may wait for it for ever.

    Args:
        starts: where the ranks are still coming up, tells of those that do not.
        partners: ranks that the called ones wait for, in a communicator that notices no death.
    Raises:
        WorkerError: a rank raised, died, or had not answered after `timeout_s` seconds; or a partner died.
    """
    deadline = time.monotonic() + timeout_s
    results: dict[Any, R] = {}
    waiting = {call.ref: call for call in calls}
    while waiting:
        for process in {call.process for call in waiting.values() if call.process is not None}:
            process.look()
        left_s = max(0.0, deadline - time.monotonic())
        done, _ = ray.wait(list(waiting), num_returns=1, timeout=min(left_s, _LOOK_EVERY_S), fetch_local=False)
        if not done:
            late = next(iter(waiting.values()))
            if starts is not None and (failure := starts.failure()):
                raise _error(late, step, failure)
            if partners is not None:
                partners.raise_if_dead(step)
            if left_s == 0.0:
                raise _error(late, step, f"gave no answer within {timeout_s:.0f} s", GetTimeoutError())
            continue
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
        if isinstance(cause, _LOSSES):
            raise _error(call, step, f"lost an input: {why_dead(cause, None)}", cause) from error
        raise _error(call, step, f"{type(cause).__name__}: {cause}", cause) from error
    except (RayActorError, OutOfMemoryError) as error:
        raise _error(call, step, f"the process died: {why_dead(error, call.process)}", error) from error
    except GetTimeoutError as error:
        raise _error(call, step, "its result could not be fetched within 60 s", error) from error
    except RayError as error:  # the runtime environment failed, the object store is full, an object was lost
        raise _error(call, step, f"{type(error).__name__}: {why_dead(error, None)}", error) from error


def _error(call: Call[Any], step: str, what: str, cause: BaseException | None = None) -> WorkerError:
    where = f"{call.role} rank {call.rank} failed in {call.method}" + (f" at {step}" if step else "")
    return WorkerError(f"{where}: {what}", role=call.role, rank=call.rank, step=step, cause=cause)


class WorkerGroup:
    """The ranks of one role, alive for the whole run."""

    def __init__(self, role: str, actors: list[Any], *, timeout_s: float):
        self.role = role
        self._actors, self._timeout_s = actors, timeout_s
        self._processes: list[Process] = []

    @classmethod
    def launch(
        cls,
        worker_class: Callable[..., Worker],
        place: Place,
        *,
        role: str,
        env: Mapping[str, str] | Sequence[Mapping[str, str]],
        rendezvous: bool = False,
        start_timeout_s: float = 300.0,
        call_timeout_s: float = 3600.0,
    ) -> "WorkerGroup":
        """Starts the ranks on their seats.

        Args:
            place: where they have some.
            env: environment variables of all ranks, or of each, set before its process imports anything.
            rendezvous: the ranks compute together: they get what torch.distributed needs to find each other.
            start_timeout_s: seconds for the processes to come up.
            call_timeout_s: default deadline of each later call, seconds.
        Raises:
            WorkerError.
        """
        starts = Starts()
        remote_class, seats = ray.remote(worker_class), place.layout.of(role)
        envs = [env] * len(seats) if isinstance(env, Mapping) else env
        actors = [
            remote_class.options(**place.actor_options(seat, own)).remote(role, seat.rank, len(seats))
            for seat, own in zip(seats, envs, strict=True)
        ]
        group = cls(role, actors, timeout_s=start_timeout_s)
        try:
            ready = group.submit(Worker.ready)
            pids = collect(ready, timeout_s=start_timeout_s, step=START_UP, starts=starts)
            group._processes = [Process(pid) for pid in pids]
            if rendezvous:
                address, port = group.call_one(0, Worker.rendezvous_address, step=START_UP)
                group.call(Worker.set_rendezvous, address, port, step=START_UP)
        except WorkerError:
            group.stop()
            raise
        group._timeout_s = call_timeout_s
        return group

    @property
    def num_ranks(self) -> int:
        """How many ranks the group has."""
        return len(self._actors)

    @property
    def actors(self) -> list[Any]:
        """Ray's handle of each rank, for other ranks to call."""
        return list(self._actors)

    @property
    def pids(self) -> list[int]:
        """Process id of each rank."""
        return [process.pid for process in self._processes]

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
        process = self._processes[rank] if self._processes else None  # none while the ranks come up
        return Call(self.role, rank, method.__name__, ref, tuple(data), process)

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
        try:
            return self.raise_if_dead("", patience_s=patience_s)
        except WorkerError:
            return "dead"

    def raise_if_dead(self, step: str, *, patience_s: float = 0.2) -> Condition:
        """ "busy" or "idle", as `condition`.

        Raises:
            WorkerError: a rank's process is gone.
        """
        calls = self.submit(Worker.ready)
        # A dead rank's call fails at once, a busy one's waits in its queue.
        answered, _ = ray.wait([call.ref for call in calls], num_returns=len(calls), timeout=patience_s)
        for call in calls:
            try:
                if call.ref in set(answered):
                    _result(call, step)
            except WorkerError as error:
                if error.died:
                    raise
        return "idle" if len(answered) == len(calls) else "busy"

    def wait_until_gone(self, seconds: float) -> None:
        """Waits so long at most until the processes on this machine have ended, and with them what they held."""
        deadline = time.monotonic() + seconds
        while any(resident_bytes(pid) for pid in self.pids) and time.monotonic() < deadline:
            time.sleep(0.1)

    def stop(self) -> None:
        """Ends the ranks; their seats are free for others."""
        for actor in self._actors:
            ray.kill(actor)
        for process in self._processes:
            process.close()
