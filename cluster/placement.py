"""A layout's resources in one placement group of Ray, whose wait says what is missing, and ends."""

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.hardware import Facts, facts
from cluster.layout import Host, Layout, PlacementError, Seat

logger = logging.getLogger(__name__)

_LOG_EVERY_S = 30.0
_ASK_S = 120.0
"""For a process to start on a node and say what the node has."""


@dataclass(frozen=True)
class Place:
    """What is held for a layout."""

    layout: Layout
    cpus_per_rank: float
    group: PlacementGroup
    bundles: Mapping[int, int]
    """Host of the layout -> its bundle."""
    devices: Mapping[int, tuple[str, ...]]
    """Host -> by what names CUDA knows the GPUs that are held there, in the layout's order."""
    facts: Mapping[int, Facts]
    """Host -> what it has."""

    def actor_options(self, seat: Seat, env: Mapping[str, str]) -> dict[str, Any]:
        """Options of the Ray actor that sits there; it sees the seat's GPUs and no other."""
        visible = ",".join(self.devices[seat.node][gpu] for gpu in seat.gpus)
        return {
            "num_cpus": self.cpus_per_rank,
            "runtime_env": {"env_vars": {**env, "CUDA_VISIBLE_DEVICES": visible}},
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self.group, self.bundles[seat.node]),
        }

    def is_whole(self) -> bool:
        """Whether all of its nodes are still there."""
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        return all(self.layout.nodes[node].node_id in alive for node in self.bundles)

    def free(self) -> None:
        """Gives it all back."""
        remove_placement_group(self.group)


def cluster_nodes(*, cpus_per_rank: float) -> list[Host]:
    """The nodes of the cluster, that of the driver first."""
    own = ray.get_runtime_context().get_node_id()
    alive = [node for node in ray.nodes() if node["Alive"]]
    alive.sort(key=lambda node: (node["NodeID"] != own, node["NodeManagerAddress"], node["NodeID"]))
    return [
        Host(
            gpus=int(node["Resources"].get("GPU", 0)),
            ranks=int(node["Resources"].get("CPU", 0) / cpus_per_rank + 1e-6),
            node_id=node["NodeID"],
        )
        for node in alive
    ]


def reserve(layout: Layout, *, cpus_per_rank: float, timeout_s: float = 300.0) -> Place:
    """Takes the resources of all seats, a bundle for each node, or raises in finite time.

    Args:
        layout: of nodes of this cluster.
        cpus_per_rank: Ray's CPU share of a rank.
        timeout_s: seconds to wait for busy resources to come free.
    Raises:
        PlacementError: still waiting at the deadline, or a node does not say what it has.
    """
    used = sorted({seat.node for seat in layout.seats})
    bundles = []
    for node in used:
        ranks = sum(seat.node == node for seat in layout.seats)
        bundles.append({"CPU": round(ranks * cpus_per_rank, 4), "GPU": layout.num_gpus(node)})
    bundles = [{name: amount for name, amount in bundle.items() if amount} for bundle in bundles]
    pinned = [{"ray.io/node-id": layout.nodes[node].node_id} for node in used]
    group = placement_group(bundles, bundle_label_selector=pinned)
    start = time.monotonic()
    while not group.wait(timeout_seconds=min(_LOG_EVERY_S, timeout_s)):
        waited = time.monotonic() - start
        needs, free, total = (_total(each) for each in (bundles, [ray.available_resources()], _alive()))
        state = f"{_listed(needs)} are needed; free now {_listed(free)} of {_listed(total)} on {len(_alive())} nodes"
        if waited >= timeout_s:
            remove_placement_group(group)
            raise PlacementError(f"{', '.join(layout.roles)}: no place after {waited:.0f} s: {state}")
        logger.warning("%s: waiting for resources for %.0f s: %s", ", ".join(layout.roles), waited, state)
    places = {node: bundle for bundle, node in enumerate(used)}
    own = ray.get_runtime_context().get_node_id()
    here = {n: ((), facts()) for n in used if layout.nodes[n].node_id == own and not layout.num_gpus(n)}
    asked = {
        node: _ask.options(
            num_cpus=min(cpus_per_rank, 1),
            num_gpus=layout.num_gpus(node),
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, bundle),
        ).remote()
        for node, bundle in places.items()
        if node not in here
    }
    try:
        told = here | dict(zip(asked, ray.get(list(asked.values()), timeout=_ASK_S), strict=True))
    except ray.exceptions.RayError as error:
        remove_placement_group(group)
        raise PlacementError(f"a node does not say what it has ({type(error).__name__}: {error})") from error
    return Place(
        layout=layout,
        cpus_per_rank=cpus_per_rank,
        group=group,
        bundles=places,
        devices={node: devices for node, (devices, _) in told.items()},
        facts={node: found for node, (_, found) in told.items()},
    )


@ray.remote(max_calls=1)
def _ask() -> tuple[tuple[str, ...], Facts]:
    """Run in a bundle, on all of its GPUs: their names, and the node's facts."""
    own = [str(gpu) for gpu in ray.get_gpu_ids()]
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return tuple(visible if len(visible) == len(own) else own), facts()


def _alive() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _total(bundles: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(bundle.get(name, 0.0) for bundle in bundles) for name in ("CPU", "GPU")}


def _listed(amounts: dict[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in amounts.items())
