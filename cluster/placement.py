"""Placement groups whose wait says what is missing, and ends."""

import logging
import time

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

logger = logging.getLogger(__name__)

_LOG_EVERY_S = 30.0


class PlacementError(RuntimeError):
    """The cluster cannot hold the requested ranks, or did not in time; says what is needed and what there is."""


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
    needed = {name: sum(bundle.get(name, 0.0) for bundle in bundles) for name in ("CPU", "GPU")}
    total = ray.cluster_resources()
    for name, amount in needed.items():
        if amount > total.get(name, 0.0):
            raise PlacementError(
                f"{role}: {len(bundles)} ranks need {amount:g} {name}, the cluster has {total.get(name, 0.0):g}; "
                f"ask for fewer ranks or a smaller share per rank"
            )
    group = placement_group(bundles, strategy=strategy)
    start = time.monotonic()
    while not group.wait(timeout_seconds=min(_LOG_EVERY_S, timeout_s)):
        waited = time.monotonic() - start
        free = ray.available_resources()
        state = (
            f"needs {needed}, free now { ({k: free.get(k, 0.0) for k in needed}) }, nodes {len(ray.nodes())}"
        )
        if waited >= timeout_s:
            remove_placement_group(group)
            raise PlacementError(f"{role}: no place for {len(bundles)} ranks after {waited:.0f} s: {state}")
        logger.warning("%s: waiting for resources for %.0f s: %s", role, waited, state)
    return group
