"""Groups of one role on seats of its own, for tests that need no more."""

from collections.abc import Mapping
from typing import Any

from cluster.layout import Demand, lay_out
from cluster.placement import Place, cluster_nodes, reserve
from cluster.worker_group import Worker, WorkerGroup


def seated(role: str, num_ranks: int = 1, *, cpus: float = 0.1, gpus: int = 0, timeout_s: float = 60) -> Place:
    """Seats for so many ranks of a role."""
    layout = lay_out([Demand(role, num_ranks, gpus)], cluster_nodes(cpus_per_rank=cpus))
    return reserve(layout, cpus_per_rank=cpus, timeout_s=timeout_s)


def launch_alone(
    worker: type[Worker], *, role: str, num_ranks: int = 1, cpus: float = 0.1, env: Mapping[str, str], **options: Any
) -> WorkerGroup:
    """A group that gives its seats back when it is stopped."""
    place = seated(role, num_ranks, cpus=cpus)
    try:
        group = WorkerGroup.launch(worker, place, role=role, env=env, **options)
    except BaseException:
        place.free()
        raise
    stop = group.stop

    def stop_and_free() -> None:
        stop()
        place.free()

    group.stop = stop_and_free  # type: ignore[method-assign]
    return group
