"""Can the planner's layouts be launched, and do their ranks hold the bytes that it says?

    python benchmarks/layouts.py [--only "llama2-7b on 8 x 80, all on all"] [--result FILE]

For each case a plan is made, and a Ray cluster of as many nodes as it has is started on this machine, whose GPUs are
only said to be there. The run's own functions lay the roles out there and reserve their places, which must be the
plan's. Each rank is launched as a process, which must be on the node and see the GPUs of its seat. What it holds is
counted by benchmarks/meta_rank.py in a child process, two at a time: sixty-four that have imported torch would need
20 GB. Where a placement does not fit, there is the planner's verdict.

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
from unittest.mock import patch

from measuring import RESULTS, ROOT, parser_of, write_result

from cluster.layout import Layout, lay_out
from cluster.placement import Place, cluster_nodes, reserve
from cluster.plan import GIB, Memory
from cluster.worker_group import Worker, WorkerGroup, collect
from rlhf_ray.cli.plan import plan_request
from rlhf_ray.config import config_with, replicas
from rlhf_ray.errors import UserError
from rlhf_ray.machine import demands
from rlhf_ray.planning.plan import FROZEN, OVERHEAD_GIB, Plan, make_plan

PARTS = ("weights", "gradients", "optimizer")
MOST_OFF = 0.1
"""Share by which a plan may miss what the tensors hold."""
MOST_RANKS = 64
"""Processes of ranks that this machine has memory for: as many roles as that are up side by side."""
ALL_COUNT = 16
"""Ranks of a role up to which all count; of more, every eighth and the last, which padding would make different."""
AT_A_TIME = 2
"""Ranks that count side by side."""
SHOWN = ("policy", "value", "reference", "helpfulness", "rollout")
"""Roles in the table; the safety model is as the helpfulness model."""


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
    settings = {"num_ranks": num_ranks, "zero_stage": zero_stage, "recompute": "full"}
    return tuple(f"roles.{role}.{key}={value}" for role in ("policy", "value") for key, value in settings.items())


def frozen(*settings: str) -> tuple[str, ...]:
    """Settings of each frozen role."""
    return tuple(f"roles.{role}.{setting}" for role in FROZEN for setting in settings)


def engines(num_engines: int, size: int, num_chunks: int) -> tuple[str, ...]:
    """Settings of the engines, each on `size` GPUs."""
    return (
        f"roles.rollout.num_engines={num_engines}",
        f"roles.rollout.tensor_parallel_size={size}",
        "roles.rollout.gpu_memory_utilization=0.9",
        f"ppo.num_chunks={num_chunks}",
    )


def batches(size: int, minibatch: int) -> tuple[str, ...]:
    """Settings that let other numbers of ranks than powers of two divide the batch, and micro-batches of one row."""
    return f"ppo.batch_size={size}", f"ppo.minibatch_size={minibatch}", "ppo.micro_batch_tokens=4096"


ONE_EACH = tuple(f"roles.{role}.gpus=[{gpu}]" for gpu, role in enumerate(("policy", "value", *FROZEN, "rollout")))
SEVENS = (*trained(7, 3), *frozen("gpus=[15]"), *engines(1, 1, 7), *batches(448, 56))
TWO_REPLICAS = ("roles.reference.num_ranks=8", "roles.reference.ranks_per_replica=4")
TWENTIES = (
    *trained(20, 3),
    *frozen("num_ranks=4", "zero_stage=3"),
    *TWO_REPLICAS,
    *engines(1, 8, 20),
    *batches(640, 80),
)
CASES = (
    Case("llama2-7b", 8, 80),
    Case("llama2-7b", 8, 80, (*trained(2, 2), *frozen("gpus=[7]"), *engines(2, 1, 2))),
    Case("llama2-7b", 1, 141),
    Case("llama2-7b", 1, 141, ONE_EACH),
    Case("llama2-13b", 16, 40),
    Case("llama2-13b", 16, 40, SEVENS),
    Case("llama2-70b", 64, 80),
    Case("llama2-70b", 64, 80, TWENTIES),
)


class Counter(Worker):
    """A rank that says where it is and what it would hold."""

    def where(self) -> tuple[int, str, str, int]:
        """Rank, node, visible GPUs, and process id."""
        import ray

        return self.rank, ray.get_runtime_context().get_node_id(), os.environ["CUDA_VISIBLE_DEVICES"], os.getpid()

    def count(self, asked: dict[str, Any]) -> dict[str, int]:
        """Bytes by part.

        Args:
            asked: arguments of meta_rank.rank_bytes.
        Raises:
            RuntimeError: they could not be counted.
        """
        command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "meta_rank.py"), json.dumps(asked)]
        run = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False, timeout=300)
        if run.returncode:
            raise RuntimeError(run.stderr[-2000:])
        counted: dict[str, int] = json.loads(run.stdout.splitlines()[-1])
        return counted


def plan_of(case: Case) -> Plan:
    """The plan for PPO on rows of the whole context.

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
        prompt_tokens=None,
        response_tokens=None,
        config_path=None,
        overrides=case.apart,
    )
    return make_plan(request)


@contextmanager
def local_cluster(layout: Layout) -> Iterator[None]:
    """Ray on this machine, a raylet for each node, with GPUs that are not there; this process is its driver."""
    import ray
    from ray.cluster_utils import Cluster

    # The raylets inherit it: they would start processes in advance, and take GPUs from the sight of those that ask
    # for none of their own.
    with patch.dict(os.environ, RAY_ENABLE_WORKER_PRESTART="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0"):
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
    found: dict[str, Any] = {}
    with local_cluster(layout):
        config = config_with(plan.request.config, {**plan.settings, "run.device": "cuda"})
        laid_out = lay_out(demands(config, layout.roles), cluster_nodes(cpus_per_rank=cpus_per_rank))
        if laid_out.seats != layout.seats:
            raise RuntimeError(f"{case.name}: laid out as {list(laid_out.lines())}, planned as {list(layout.lines())}")
        place = reserve(laid_out, cpus_per_rank=cpus_per_rank, timeout_s=120)
        for together in side_by_side(layout, roles or layout.roles):
            groups: list[WorkerGroup] = []
            try:
                for role in together:
                    groups.append(launch(place, role))
                found |= {group.role: count_role(case.model, plan, group) for group in groups}
            finally:
                for group in groups:
                    group.stop()
        place.free()
    return {
        **said,
        "nodes": len(layout.nodes),
        "layout": list(layout.lines()),
        "roles": found,
        "largest_deviation": max(role["largest_deviation"] for role in found.values()),
        "processes": sum(role["ranks"] for role in found.values()),
        "seconds": round(time.monotonic() - begin, 1),
    }


def side_by_side(layout: Layout, roles: Sequence[str]) -> Iterator[list[str]]:
    """The roles in order, in lists of no more than MOST_RANKS ranks where a role alone does not have more."""
    together: list[str] = []
    for role in roles:
        if together and sum(len(layout.of(name)) for name in [*together, role]) > MOST_RANKS:
            yield together
            together = []
        together.append(role)
    yield together


def launch(place: Place, role: str) -> WorkerGroup:
    """The role's ranks, each on its seat.

    Raises:
        RuntimeError: one is not.
    """
    paths = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    env = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    # Sixty-four take minutes to start on two cores.
    group = WorkerGroup.launch(Counter, place, role=role, env=env, rendezvous=role != "rollout", start_timeout_s=600.0)
    seats = place.layout.of(role)
    sit = [(seat.rank, place.layout.nodes[seat.node].node_id, ",".join(map(str, seat.gpus))) for seat in seats]
    are = group.call(Counter.where)
    if [rank[:-1] for rank in are] != sit or len({pid for *_, pid in are}) < len(seats):
        group.stop()
        raise RuntimeError(f"{role}: ranks are at {are}, their seats at {sit}")
    return group


def count_role(model: str, plan: Plan, group: WorkerGroup) -> dict[str, Any]:
    """Has ranks of a role count, and holds them against the plan; bytes on each GPU of a rank."""
    role = group.role
    option, size = plan.placement.options[role], len(plan.placement.layout.of(role)[0].gpus)
    zero_stage = option.settings.get(f"roles.{role}.zero_stage")
    settings = getattr(config_with(plan.request.config, option.settings).roles, role)
    shards = len(replicas(settings)[0]) if role in FROZEN else 1
    asked = {"role": role, "model": model, "zero_stage": zero_stage, "shards": shards, "tensor_parallel_size": size}
    step = 1 if group.num_ranks <= ALL_COUNT else 8
    ranks, counted = sorted({*range(0, group.num_ranks, step), group.num_ranks - 1}), []
    for first in range(0, len(ranks), AT_A_TIME):
        calls = [group.submit_one(rank, Counter.count, asked) for rank in ranks[first : first + AT_A_TIME]]
        counted += collect(calls, timeout_s=600)
    planned = option.peak[1]
    return {
        "ranks": group.num_ranks,
        "gpus_per_rank": size,
        "zero_stage": zero_stage,
        "shards": shards,
        "counted": ranks,
        "plan": {part: getattr(planned, part) for part in PARTS},
        "tensors": {part: [min(each[part] for each in counted), max(each[part] for each in counted)] for part in PARTS},
        "largest_deviation": max(deviation(planned, each) for each in counted),
    }


def deviation(planned: Memory, counted: dict[str, int]) -> float:
    """By what share a plan misses a rank's bytes in the part where it misses most."""
    return max(abs(getattr(planned, part) - counted[part]) / max(counted[part], 1) for part in PARTS)


def table(cases: dict[str, Any]) -> str:
    """Markdown: a row for each case; GiB of weights, gradients and optimizer on each GPU of a role's fullest rank."""
    shown = {"helpfulness": "reward models, each", "rollout": "engines"}
    columns = ["layout", *(shown.get(role, role) for role in SHOWN), "largest deviation"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, case in cases.items():
        cells = [case["verdict"], *[""] * len(SHOWN)]
        if case["fits"]:
            cells = [cell(case["roles"][role]) for role in SHOWN] + [f"{100 * case['largest_deviation']:.2g} %"]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def cell(role: dict[str, Any]) -> str:
    """ "8 ranks, ZeRO 2: 25.1", "2 ranks of 8 GPUs: 16.1"."""
    size = f" of {role['gpus_per_rank']} GPUs" if role["gpus_per_rank"] > 1 else ""
    stage = f", ZeRO {role['zero_stage']}" if role["zero_stage"] else ""
    total = sum(most for _, most in role["tensors"].values()) / GIB
    several = f" in {role['ranks'] // shards} replicas" if 1 < (shards := role.get("shards", 1)) < role["ranks"] else ""
    return f"{role['ranks']} rank{'s' * (role['ranks'] > 1)}{size}{several}{stage}: {total:.1f}"


def main() -> None:
    """Launches, counts and writes."""
    parser = parser_of(__doc__)
    parser.add_argument("--only", choices=[case.name for case in CASES])
    options = parser.parse_args()
    result = options.result or RESULTS / "layouts.json"
    found: dict[str, Any] = {}
    if options.only and result.exists():
        found = json.loads(result.read_text(encoding="utf-8"))["cases"]
    config = {
        "cases": {case.name: {"settings": list(case.apart)} for case in CASES},
        "unit": "bytes on each GPU of a rank; least and most of the ranks that counted",
        "overhead_gib": OVERHEAD_GIB,
        "ranks": "Ray actors on nodes and GPUs that are only said to be there",
        "tensors": "meta device: DeepSpeed's after a backward pass and a step in a process group without others, the "
        "frozen models' as they are loaded, the engines' by the rules of vLLM's layers",
    }
    for case in CASES:
        if options.only in (None, case.name):
            found[case.name] = launched(case)
            facts = {key: value for key, value in found[case.name].items() if key not in ("roles", "layout")}
            print(case.name, facts, flush=True)
            ordered = {each.name: found[each.name] for each in CASES if each.name in found}
            write_result(result, {"cases": ordered}, config=config)
    print(table(ordered))
    if max(case.get("largest_deviation", 0.0) for case in found.values()) > MOST_OFF:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
