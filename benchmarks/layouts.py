"""Can the planner's layouts be launched, and do their ranks hold the bytes that it says?

    python benchmarks/layouts.py [--only "llama2-7b on 8 x 80, all on all"] [--result FILE]

For each case a plan is made, and a Ray cluster of as many nodes as it has is started on this machine, whose GPUs are
only said to be there. The run's own functions lay the roles out there and reserve their places, which must be the
plan's; the roles are launched one after the other, all ranks of one at a time, each a process. It must be on the node
and see the GPUs of its seat. What it holds is counted by benchmarks/meta_rank.py in a child process of the rank, two at
a time: sixty-four that have imported torch would need 20 GB. Where a placement does not fit, there is the planner's
verdict.

Writes benchmarks/results/layouts.json, with --only into what is there, and prints the table of docs/planning.md. Ends
with 1 where a rank's bytes are over 10 % off.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from measuring import RESULTS, ROOT, parser_of, write_result

from cluster.layout import Layout, lay_out
from cluster.placement import Place, cluster_nodes, reserve
from cluster.plan import GIB, Memory
from cluster.worker_group import Worker, WorkerGroup, collect
from rlhf_ray.cli.plan import plan_request
from rlhf_ray.config import config_with
from rlhf_ray.errors import UserError
from rlhf_ray.machine import demands
from rlhf_ray.planning.plan import OVERHEAD_GIB, Plan, make_plan

PARTS = ("weights", "gradients", "optimizer")
MOST_OFF = 0.1
"""Share by which a plan may miss what the tensors hold."""
AT_A_TIME = 2
"""Ranks that count side by side."""
FROZEN = ("reference", "helpfulness", "safety")


@dataclass(frozen=True)
class Case:
    """What is planned and launched."""

    model: str
    gpus: int
    gib: int
    """Memory of each GPU."""
    apart: tuple[str, ...] = ()
    """Settings that give each kind of role GPUs of its own; none where the planner searches, and has all on all."""

    @property
    def name(self) -> str:
        return f"{self.model} on {self.gpus} x {self.gib}, {'apart' if self.apart else 'all on all'}"


def trained(num_ranks: int, zero_stage: int) -> tuple[str, ...]:
    """Settings of both trained roles."""
    settings = {"num_ranks": num_ranks, "zero_stage": zero_stage, "activation_checkpointing": "true"}
    return tuple(f"roles.{role}.{key}={value}" for role in ("policy", "value") for key, value in settings.items())


def engines(num_engines: int, size: int, num_chunks: int) -> tuple[str, ...]:
    """Settings of the engines, each on `size` GPUs."""
    return (
        f"roles.rollout.num_engines={num_engines}",
        f"roles.rollout.tensor_parallel_size={size}",
        "roles.rollout.gpu_memory_utilization=0.9",
        f"ppo.num_chunks={num_chunks}",
    )


CASES = (
    Case("llama2-7b", 8, 80),
    Case("llama2-7b", 8, 80, (*trained(2, 2), *(f"roles.{role}.gpus=[7]" for role in FROZEN), *engines(2, 1, 2))),
    Case("llama2-7b", 1, 141),
    Case(
        "llama2-7b",
        1,
        141,
        tuple(f"roles.{role}.gpus=[{gpu}]" for gpu, role in enumerate(("policy", "value", *FROZEN, "rollout"))),
    ),
    Case("llama2-13b", 16, 40),
    Case(
        "llama2-13b",
        16,
        40,
        (*trained(4, 3), *(f"roles.{role}.gpus=[12]" for role in FROZEN), *engines(2, 1, 4)),
    ),
    Case("llama2-70b", 64, 80),
    Case(
        "llama2-70b",
        64,
        80,
        (
            *trained(16, 3),
            *(f"roles.{role}.{setting}" for role in FROZEN for setting in ("num_ranks=4", "zero_stage=3")),
            *engines(2, 8, 16),
            "ppo.micro_batch_tokens=1024",
        ),
    ),
)


class Counter(Worker):
    """A rank that says where it is and what it would hold."""

    def count(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Bytes by part, rank, pid, node and visible GPUs.

        Args:
            asked: arguments of meta_rank.rank_bytes.
        """
        import ray

        command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "meta_rank.py"), json.dumps(asked)]
        run = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False, timeout=300)
        if run.returncode:
            raise RuntimeError(run.stderr[-2000:])
        return {
            "bytes": json.loads(run.stdout.splitlines()[-1]),
            "rank": self.rank,
            "pid": os.getpid(),
            "node_id": ray.get_runtime_context().get_node_id(),
            "gpus": os.environ["CUDA_VISIBLE_DEVICES"],
        }


def plan_of(case: Case) -> Plan:
    """The plan for rows of the whole context, or of 1,024 tokens where the placement is given.

    Raises:
        UserError: it cannot be laid out.
    """
    request = plan_request(
        model=case.model,
        reward_model=None,
        stage="ppo",
        gpus=case.gpus,
        gpu_memory_gib=case.gib,
        overhead_gib=OVERHEAD_GIB,
        zero_stage=None,
        batch=None,
        prompt_tokens=512 if case.apart else None,
        response_tokens=512 if case.apart else None,
        config_path=None,
        overrides=case.apart,
    )
    return make_plan(request)


@contextmanager
def local_cluster(layout: Layout) -> Iterator[None]:
    """Ray on this machine, a raylet for each node, with GPUs that are not there; this process is its driver."""
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    os.environ["RAY_ENABLE_WORKER_PRESTART"] = "0"
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        for node in layout.nodes:
            cluster.add_node(num_cpus=8, num_gpus=node.gpus, object_store_memory=80 * 2**20)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def launched(case: Case, roles: Sequence[str] = ()) -> dict[str, Any]:
    """What came of a case: its plan's verdict, and where it fits each role's bytes by plan and by tensors.

    Args:
        roles: those to launch; by default all.
    Raises:
        RuntimeError: the layout on the cluster is not the plan's, or a rank is not on its seat.
    """
    try:
        plan = plan_of(case)
    except UserError as error:
        return {"fits": False, "verdict": str(error)}
    said: dict[str, Any] = {"fits": plan.fits, "verdict": plan.verdict}
    if not plan.fits:
        return said
    layout, begin = plan.placement.layout, time.monotonic()
    cpus_per_rank = plan.request.config.cluster.cpus_per_rank
    with local_cluster(layout):
        config = config_with(plan.request.config, {**plan.settings, "run.device": "cuda"})
        found = lay_out(demands(config, layout.roles), cluster_nodes(cpus_per_rank=cpus_per_rank))
        if found.seats != layout.seats:
            raise RuntimeError(f"{case.name}: laid out as {list(found.lines())}, planned as {list(layout.lines())}")
        place = reserve(found, cpus_per_rank=cpus_per_rank, timeout_s=120)
        of_roles = {role: count_role(case.model, plan, place, role) for role in roles or layout.roles}
        place.free()
    return {
        **said,
        "nodes": len(layout.nodes),
        "layout": list(layout.lines()),
        "roles": of_roles,
        "largest_deviation": max(role["largest_deviation"] for role in of_roles.values()),
        "processes": sum(role["ranks"] for role in of_roles.values()),
        "seconds": round(time.monotonic() - begin, 1),
    }


def count_role(model: str, plan: Plan, place: Place, role: str) -> dict[str, Any]:
    """Launches a role, has all ranks count, and holds them against the plan; bytes on a GPU of each rank.

    Raises:
        RuntimeError: a rank is not on its seat.
    """
    option, seats = plan.placement.options[role], place.layout.of(role)
    zero_stage = option.settings.get(f"roles.{role}.zero_stage")
    asked = {
        "role": role,
        "model": model,
        "zero_stage": zero_stage,
        "tensor_parallel_size": len(seats[0].gpus),
    }
    begin = time.monotonic()
    paths = [str(ROOT), str(ROOT / "benchmarks")]
    env = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    group = WorkerGroup.launch(Counter, place, role=role, env=env, rendezvous=role != "rollout")
    up = time.monotonic()
    counted: list[dict[str, Any]] = []
    try:
        for first in range(0, group.num_ranks, AT_A_TIME):
            ranks = range(first, min(first + AT_A_TIME, group.num_ranks))
            counted += collect([group.submit_one(rank, Counter.count, asked) for rank in ranks], timeout_s=600)
    finally:
        group.stop()
    sits = [(seat.rank, place.layout.nodes[seat.node].node_id, ",".join(map(str, seat.gpus))) for seat in seats]
    if [(each["rank"], each["node_id"], each["gpus"]) for each in counted] != sits:
        raise RuntimeError(f"{role}: ranks are on {counted}, their seats are {sits}")
    if len({each["pid"] for each in counted}) < len(seats):
        raise RuntimeError(f"{role}: ranks share processes: {counted}")
    planned = option.peak[1]
    return {
        "ranks": len(seats),
        "gpus_per_rank": len(seats[0].gpus),
        "zero_stage": zero_stage,
        "plan": {part: getattr(planned, part) for part in PARTS},
        "tensors": {part: extremes([each["bytes"][part] for each in counted]) for part in PARTS},
        "largest_deviation": round(max(deviation(planned, each["bytes"]) for each in counted), 6),
        "seconds": {"launch": round(up - begin, 1), "count": round(time.monotonic() - up, 1)},
    }


def extremes(sizes: Sequence[int]) -> dict[str, int]:
    """Least and most of some ranks' bytes."""
    return {"min": min(sizes), "max": max(sizes)}


def deviation(planned: Memory, counted: dict[str, int]) -> float:
    """By what share a plan misses a rank's bytes in the part where it misses most."""
    return max(abs(getattr(planned, part) - counted[part]) / max(counted[part], 1) for part in PARTS)


def table(cases: dict[str, Any]) -> str:
    """Markdown: a row for each role of each case that was launched, GiB of the largest rank."""
    lines = [
        "| layout | role | ranks x GPUs | ZeRO | weights | gradients | optimizer | largest deviation |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, case in cases.items():
        for role, found in case.get("roles", {}).items():
            sizes = [f"{found['tensors'][part]['max'] / GIB:.2f}" for part in PARTS]
            ranks, stage = f"{found['ranks']} x {found['gpus_per_rank']}", found["zero_stage"] or "-"
            off = f"{100 * found['largest_deviation']:.3f} %"
            lines.append(f"| {name} | {role} | {ranks} | {stage} | {' | '.join(sizes)} | {off} |")
    return "\n".join(lines)


def main() -> None:
    """Launches, counts and writes."""
    parser = parser_of(__doc__)
    parser.add_argument("--only", choices=[case.name for case in CASES])
    options = parser.parse_args()
    result = options.result or RESULTS / "layouts.json"
    found: dict[str, Any] = {}
    if options.only and result.exists():
        found = json.loads(result.read_text(encoding="utf-8"))["cases"]
    for case in CASES:
        if options.only in (None, case.name):
            found[case.name] = launched(case)
            facts = {key: value for key, value in found[case.name].items() if key not in ("roles", "layout")}
            print(case.name, facts, flush=True)
    found = {case.name: found[case.name] for case in CASES if case.name in found}
    print(table(found))
    config = {
        "cases": {case.name: {"settings": list(case.apart)} for case in CASES},
        "unit": "bytes on each GPU of a rank; least and most of the ranks",
        "overhead_gib": OVERHEAD_GIB,
        "ranks": "Ray actors on nodes and GPUs that are only said to be there, all of a role at a time",
        "tensors": "counted on the meta device in a child process of each rank: policy and value by a step of DeepSpeed "
        "in a process group without others, frozen roles of ZeRO 3 as DeepSpeed divides them, engines by the rules of "
        "vLLM's layers",
    }
    write_result(result, {"cases": found}, config=config)
    if max(case.get("largest_deviation", 0.0) for case in found.values()) > MOST_OFF:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
