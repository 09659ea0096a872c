"""Layouts on a real Ray whose GPUs are not there: every rank starts on its seat and sees its GPUs and no other."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from seats import seated

from cluster.layout import Demand, PlacementError, lay_out
from cluster.placement import Place, cluster_nodes, reserve
from cluster.worker_group import Worker, WorkerGroup
from rlhf_ray.cli.plan import plan_request
from rlhf_ray.planning.plan import make_plan

pytestmark = pytest.mark.slow  # a real Ray, and many processes: half a minute

CPUS, GPUS = 4, 8
ENV = {"PYTHONPATH": os.path.dirname(__file__)}  # ranks import their class from this file


class Seated(Worker):
    """Says what it sees, and whether it is awake."""

    awake = True

    def sees(self) -> tuple[str, int, int]:
        return os.environ["CUDA_VISIBLE_DEVICES"], self.rank, self.num_ranks

    def sleep(self) -> None:
        self.awake = False

    def wake(self) -> None:
        self.awake = True

    def is_awake(self) -> bool:
        return self.awake


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    ray.init(num_cpus=CPUS, num_gpus=GPUS, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def start(place: Place) -> dict[str, WorkerGroup]:
    return {role: WorkerGroup.launch(Seated, place, role=role, env=ENV) for role in place.layout.roles}


def take(demands: list[Demand]) -> Place:
    layout = lay_out(demands, cluster_nodes(cpus_per_rank=0.1))
    return reserve(layout, cpus_per_rank=0.1, timeout_s=60)


def test_apart_together_and_over_two_gpus() -> None:
    demands = [
        Demand("policy", num_ranks=2, gpus_per_rank=1),
        Demand("rollout", num_ranks=2, gpus_per_rank=2),
        Demand("reference", gpus_per_rank=1, gpus=(1,)),
        Demand("safety"),
    ]
    place = take(demands)
    groups = start(place)
    try:
        # The engines first, side by side; the policy where nobody is; the reference where it was put.
        assert [seen for seen, *_ in groups["rollout"].call(Seated.sees)] == ["2,3", "4,5"]
        assert groups["policy"].call(Seated.sees) == [("0", 0, 2), ("6", 1, 2)]
        assert groups["reference"].call(Seated.sees) == [("1", 0, 1)]
        assert groups["safety"].call(Seated.sees) == [("", 0, 1)]
    finally:
        for group in groups.values():
            group.stop()
        place.free()


def test_a_plan_is_launched_as_it_is() -> None:
    """All six roles of a 7B PPO round on four GPUs: what the planner seats, and who shares with whom."""
    config = [
        "roles.rollout.tensor_parallel_size=2",
        "roles.rollout.num_engines=2",
        "roles.rollout.gpu_memory_utilization=0.7",
        *(f"roles.{role}.num_ranks=4" for role in ("policy", "value", "reference", "helpfulness", "safety")),
        *(f"roles.{role}.zero_stage=2" for role in ("policy", "value")),
        *(f"roles.{role}.recompute=full" for role in ("policy", "value")),
        "ppo.num_chunks=4",
        "ppo.micro_batch_tokens=4096",
    ]
    asked = {"stage": "ppo", "overhead_gib": 1.0, "zero_stage": None, "batch": None, "config_path": None}
    lengths = {"prompt_tokens": 1024, "response_tokens": 512}
    request = plan_request(
        model="llama2-7b", reward_model=None, gpus=4, gpu_memory_gib=141.0, overrides=config, **asked, **lengths
    )
    plan = make_plan(request)
    assert plan.fits, plan.verdict
    roles = plan.placement.layout.roles
    sizes = {role: plan.placement.layout.of(role) for role in roles}
    place = take([Demand(role, len(found), len(found[0].gpus), (0, 1, 2, 3)) for role, found in sizes.items()])
    assert [(s.role, s.rank, s.gpus) for s in place.layout.seats if s.gpus] == [
        (s.role, s.rank, s.gpus) for s in plan.placement.layout.seats
    ]
    groups = start(place)
    try:
        for role in roles:
            seen = [visible for visible, *_ in groups[role].call(Seated.sees)]
            assert seen == [",".join(map(str, seat.gpus)) for seat in place.layout.of(role)], role
            assert place.layout.neighbours(role) == {*roles} - {role}
        groups["policy"].call(Worker.sleep)
        assert groups["policy"].call(Seated.is_awake) == [False] * 4
        groups["policy"].call(Worker.wake)
        assert groups["policy"].call(Seated.is_awake) == [True] * 4
    finally:
        for group in groups.values():
            group.stop()
        place.free()


def test_gpus_that_others_hold_are_not_ours() -> None:
    mine = seated("policy", 3, gpus=1)
    theirs = seated("value", 2, gpus=1)
    group = WorkerGroup.launch(Seated, theirs, role="value", env=ENV)
    try:
        assert [seen for seen, *_ in group.call(Seated.sees)] == ["3", "4"]  # Ray's, of which the first three are gone
        begin = time.monotonic()
        with pytest.raises(PlacementError, match=r"rollout: no place after 2 s: 0\.4 CPU, 4 GPU are needed; free now"):
            seated("rollout", 4, gpus=1, timeout_s=2)
        assert time.monotonic() - begin < 20
    finally:
        group.stop()
        theirs.free()
        mine.free()


def test_the_node_says_what_it_has(tmp_path: Path) -> None:
    place = seated("policy", gpus=1)
    try:
        [facts] = place.facts.values()
        assert facts.cores == len(os.sched_getaffinity(0)) and facts.memory_bytes > 2**30 and facts.cpu
        assert place.is_whole()
    finally:
        place.free()
