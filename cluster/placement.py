"""Placement groups whose wait says what is missing, and ends."""

import logging
import time

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

logger = logging.getLogger(__name__)

_LOG_EVERY_S = 30.0


class PlacementError(RuntimeError):
    """The cluster cannot hold the ranks, or did not in time; says what is needed and what there is."""


def reserve(
    bundles: list[dict[str, float]], *, role: str, strategy: str = "PACK", timeout_s: float = 300.0
) -> PlacementGroup:
    """Reserves one bundle of resources per rank, or raises in finite time.

    Args:
        bundles: one {"CPU": n, "GPU": n} per rank.
        role: named in messages.
        strategy: Ray's placement strategy.
        timeout_s: seconds to wait for busy resources to come free.
    Raises:
        PlacementError: more than the whole cluster has (at once), or still waiting at the deadline.
    """
    needed = _total(bundles)
    total = _total([ray.cluster_resources()])
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    remedy = "ask for fewer ranks or a smaller share per rank"
    for name, amount in needed.items():
        if amount > total[name]:
            raise PlacementError(
                f"{role}: {len(bundles)} ranks need {amount:g} {name}, the cluster has {total[name]:g}; {remedy}"
            )
        rank, node = max(b.get(name, 0.0) for b in bundles), max(n.get(name, 0.0) for n in nodes)
        if rank > node:
            raise PlacementError(f"{role}: a rank needs {rank:g} {name}, the largest node has {node:g}; {remedy}")
    group = placement_group(bundles, strategy=strategy)
    start = time.monotonic()
    while not group.wait(timeout_seconds=min(_LOG_EVERY_S, timeout_s)):
        waited = time.monotonic() - start
        free = _total([ray.available_resources()])
        state = f"needs {_listed(needed)}; free now {_listed(free)} of {_listed(total)} on {len(nodes)} nodes"
        if waited >= timeout_s:
            remove_placement_group(group)
            raise PlacementError(f"{role}: no place for {len(bundles)} ranks after {waited:.0f} s: {state}")
        logger.warning("%s: waiting for resources for %.0f s: %s", role, waited, state)
    return group


def _total(bundles: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(bundle.get(name, 0.0) for bundle in bundles) for name in ("CPU", "GPU")}


def _listed(amounts: dict[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in amounts.items())
