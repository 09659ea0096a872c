"""Groups of ranks on a real Ray: dispatch, deadlines, failures naming their origin, placement, clean ends."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from seats import launch_alone, seated

from cluster.layout import PlacementError
from cluster.placement import cluster_nodes
from cluster.session import session
from cluster.worker_group import Worker, WorkerError, WorkerGroup, collect
from rlhf_ray.config import parse_config
from rlhf_ray.workers.roles import Roles, worker_environment

pytestmark = pytest.mark.slow  # real Ray sessions, a minute and a half

CPUS = 4
ENV = {"PYTHONPATH": os.path.dirname(__file__)}  # ranks import their class from this file


class Rank(Worker):
    """A worker that answers, hangs, raises or dies on request."""

    def environment(self, *names: str) -> list[str | None]:
        return [os.environ.get(name) for name in names]

    def maps(self, library: str) -> bool:
        return library in Path("/proc/self/maps").read_text()

    def add(self, a: int, *, b: int = 0) -> int:
        return a + b + self.rank

    def make(self, value: int) -> tuple[str, list[int], list[int]]:
        return "made", [value], [value + 1]

    def total(self, *parts: list[int]) -> int:
        return sum(sum(part) for part in parts)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def sleep_but_on(self, rank: int, seconds: float) -> None:
        if self.rank != rank:
            time.sleep(seconds)
        else:
            raise ValueError("weights are upside down")

    def die_on(self, rank: int, seconds: float) -> None:
        if self.rank == rank:
            os._exit(7)
        time.sleep(seconds)

    def die(self) -> tuple[str, list[int], list[int]]:
        os._exit(7)

    def fail(self) -> tuple[str, list[int], list[int]]:
        raise ValueError("no batch today")

    def end_by(self, number: int) -> None:
        print("the last batch was odd", file=sys.stderr, flush=True)
        os.kill(os.getpid(), number)
        time.sleep(60)

    def port_is_free(self, port: int) -> bool:
        with socket.socket() as other, contextlib.suppress(OSError):
            other.bind(("", port))
            return True
        return False


class Thorough(Rank):
    """A worker whose method calls another of its methods."""

    def sleep_twice(self, seconds: float) -> None:
        self.sleep(seconds)
        super().sleep(seconds)


def test_a_worker_counts_the_seconds_of_its_calls_once() -> None:
    worker = Thorough("sleeper", 0, 1)
    assert worker.busy_seconds() == 0.0
    worker.sleep_twice(0.05)
    once = worker.busy_seconds()
    assert 0.1 <= once < 0.2
    with pytest.raises(ValueError, match="no batch today"):
        worker.fail()
    assert worker.ready() == os.getpid()  # of the base class, which do not count
    assert once < worker.busy_seconds() < once + 0.05


class Stillborn(Worker):
    """A worker whose construction fails, as its role says."""

    def __init__(self, role: str, rank: int, num_ranks: int):
        if role == "value":
            raise OSError("no such device")
        print("no licence", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV) if role == "policy" else os._exit(7)


@pytest.fixture(scope="module", autouse=True)
def ray_session() -> Iterator[None]:
    with session(num_cpus=CPUS):
        yield


def launch(num_ranks: int = 2, *, role: str = "policy", cpus: float = 0.1, timeout_s: float = 60) -> WorkerGroup:
    return launch_alone(
        Rank,
        role=role,
        num_ranks=num_ranks,
        cpus=cpus,
        env={"COLOUR": "teal", **ENV},
        rendezvous=True,
        start_timeout_s=30,
        call_timeout_s=timeout_s,
    )


@pytest.fixture(scope="module")
def group(ray_session: None) -> Iterator[WorkerGroup]:
    """Two ranks for the tests that leave them whole."""
    made = launch()
    yield made
    made.stop()


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int], seconds: float = 15.0) -> list[int]:
    """Those of `pids` that still run after `seconds`."""
    deadline = time.monotonic() + seconds
    while (left := [pid for pid in pids if alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def test_ranks_are_processes_of_their_own_with_a_common_rendezvous(group: WorkerGroup) -> None:
    assert len({os.getpid(), *group.pids}) == 3
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "COLOUR")
    first, second = group.call(Rank.environment, *names)
    assert first[:3] == ["0", "2", "0"]
    assert second[:3] == ["1", "2", "0"]
    assert first[3:] == second[3:]
    assert first[3] and int(first[4] or 0) > 0 and first[5] == "teal"
    assert group.call(Rank.port_is_free, int(first[4] or 0)) == [False, False]  # kept for rank 0


def test_ranks_on_cpu_take_memory_from_rays_jemalloc(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = worker_environment(threads=1, on_gpu=False)
    assert environment["LD_PRELOAD"].endswith("libjemalloc.so")
    group = launch_alone(Rank, role="policy", env=environment | ENV)
    assert group.call(Rank.maps, environment["LD_PRELOAD"]) == [True]
    # Nobody to meet, and a library that finds these would look for others.
    assert group.call(Rank.environment, "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") == [[None] * 4]
    group.stop()
    assert "LD_PRELOAD" not in worker_environment(threads=1, on_gpu=False, embedded=False)  # on machines of others
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libmine.so")  # inherited by the ranks
    assert "LD_PRELOAD" not in worker_environment(threads=1, on_gpu=False)


def test_calls_go_by_method_reference_and_answer_in_rank_order(group: WorkerGroup) -> None:
    assert group.call(Rank.add, 10, b=5) == [15, 16]  # 10 + 5 + rank
    assert group.call_one(1, Rank.add, 1) == 2


def test_data_goes_from_rank_to_rank_by_reference(group: WorkerGroup) -> None:
    made = group.submit_one(0, Rank.make, 3, num_data=2)
    used = group.submit_one(1, Rank.total, *made.data)
    assert collect([used, made], timeout_s=60) == [7, "made"]  # 3 + 4


def test_a_call_that_hangs_ends_at_its_deadline() -> None:
    hung = launch(1, role="value", timeout_s=1.0)
    start = time.monotonic()
    with pytest.raises(WorkerError, match=r"value rank 0 failed in sleep at ppo step 3: .*within 1 s") as caught:
        hung.call(Rank.sleep, 60, step="ppo step 3")
    assert time.monotonic() - start < 10
    assert (caught.value.role, caught.value.rank, caught.value.step) == ("value", 0, "ppo step 3")
    hung.stop()
    assert wait_until_gone(hung.pids) == []


def test_the_call_named_at_the_deadline_is_one_that_has_not_answered() -> None:
    pair = launch()
    calls = [pair.submit_one(0, Rank.add, 1), pair.submit_one(1, Rank.sleep, 60)]
    with pytest.raises(WorkerError, match="policy rank 1 failed in sleep: gave no answer within 2 s"):
        collect(calls, timeout_s=2)
    pair.stop()


def test_a_rank_that_raises_is_named_at_once_though_the_other_waits() -> None:
    pair = launch()
    start = time.monotonic()
    with pytest.raises(WorkerError) as caught:
        pair.call(Rank.sleep_but_on, 1, 60, step="sft step 2")
    assert time.monotonic() - start < 10
    assert (
        str(caught.value) == "policy rank 1 failed in sleep_but_on at sft step 2: ValueError: weights are upside down"
    )
    assert isinstance(caught.value.cause, ValueError)
    pair.stop()


def test_a_rank_that_dies_is_named_at_once_though_the_other_waits() -> None:
    pair = launch()
    start = time.monotonic()
    with pytest.raises(WorkerError, match=r"policy rank 1 failed in die_on at sft step 2: the process died") as caught:
        pair.call(Rank.die_on, 1, 60, step="sft step 2")
    assert time.monotonic() - start < 15
    assert caught.value.rank == 1 and "\n" not in str(caught.value)
    pair.stop()
    assert wait_until_gone(pair.pids) == []


@pytest.mark.parametrize(
    "number, what",
    [
        (signal.SIGKILL, "SIGKILL; it held 0.0 GiB when last seen; its last words: the last batch was odd"),
        (signal.SIGILL, "SIGILL; it held 0.0 GiB when last seen; its last words: the last batch was odd | "),
    ],
)
def test_a_death_is_told_by_its_signal_memory_and_last_words(number: int, what: str) -> None:
    rank = launch(1)
    with pytest.raises(WorkerError) as caught:
        rank.call(Rank.end_by, number, step="sft step 2")
    told = f"policy rank 0 failed in end_by at sft step 2: the process died: killed by {what}"
    assert re.sub(r"held 0\.\d", "held 0.0", str(caught.value)).startswith(told)
    assert caught.value.died
    if number == signal.SIGILL:
        crash = f'Fatal Python error: Illegal instruction | File "{__file__}", line '
        assert crash in str(caught.value) and str(caught.value).endswith(" in end_by")
    rank.stop()


@pytest.mark.parametrize("method, what", [(Rank.fail, "no batch today"), (Rank.die, "the process died")])
def test_the_producer_is_named_not_those_who_wait_for_its_data(method, what) -> None:
    producer, consumer = launch(1, role="rollout"), launch(1, role="safety")
    made = producer.submit_one(0, method, num_data=2)
    used = consumer.submit_one(0, Rank.total, *made.data)
    more = consumer.submit_one(0, Rank.total, made.data[0])
    with pytest.raises(WorkerError, match=f"rollout rank 0 failed in {method.__name__} at ppo step 1: .*{what}"):
        collect([used, made, more], timeout_s=60, step="ppo step 1")
    producer.stop()
    consumer.stop()


def test_groups_that_may_wait_for_a_dead_one_are_ended_with_it() -> None:
    """A rank whose input died fails, and the others of its group wait for it in their collective."""
    roles = Roles(parse_config({"run": {"device": "cpu"}}))
    sizes = {"policy": 2, "value": 2, "reference": 1, "helpfulness": 1}
    groups = {role: launch(size, role=role) for role, size in sizes.items()}
    roles._groups.update(groups)
    try:
        assert roles.drop_dead() == []
        groups["policy"].submit_one(0, Rank.sleep, 120)
        groups["reference"].submit_one(0, Rank.sleep, 120)  # alone: it will come to its end
        assert roles.drop_dead() == []
        with pytest.raises(WorkerError, match="the process died"):
            groups["helpfulness"].call(Rank.die)
        assert sorted(roles.drop_dead()) == ["helpfulness", "policy"]
        assert sorted(roles._groups) == ["reference", "value"]
        assert wait_until_gone(groups["policy"].pids) == []
    finally:
        roles.stop()


def test_files_of_the_current_directory_stand_in_for_no_module(tmp_path: Path) -> None:
    for name in ("model", "queue", "cluster"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('the {name} of someone else')")
    script = """
import sys
sys.path.insert(0, sys.argv[1])
from cluster.session import session
import ray

with session(num_cpus=1):
    @ray.remote
    def where():
        import cluster, model, queue
        return [model.__file__, cluster.__file__]

    print(*ray.get(where.remote()), sep="\\n")
"""
    root = Path(__file__).parent.parent
    command = [sys.executable, "-P", "-c", script, str(root)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [str(root / name / "__init__.py") for name in ("model", "cluster")], done.stderr


@pytest.mark.parametrize(
    "role, what",
    [
        ("value", "the process died: OSError: no such device$"),
        (
            "policy",
            r"the process died: killed by SIGSEGV; its last words: no licence \| Fatal Python error: Segmentation",
        ),
        # Its exit code is known where the driver saw the process before the raylet had taken note of its end.
        (
            "safety",
            "the process died: it (left with exit code 7|says nothing of why, as a process that SIGKILL ends); "
            "its last words: no lic",
        ),
    ],
)
def test_a_rank_whose_constructor_fails_is_named_and_frees_its_place(role: str, what: str) -> None:
    with pytest.raises(WorkerError, match=f"{role} rank 0 failed in ready at start-up: {what}"):
        launch_alone(Stillborn, role=role, cpus=3, env=ENV, start_timeout_s=30)
    wait_for_cpus(CPUS - 0.2)  # the shared group keeps two tenths


def test_placement_that_can_never_fit_fails_at_once() -> None:
    start = time.monotonic()
    with pytest.raises(PlacementError, match="reference: rank 2 of 3 has no place: the CPUs of 1 nodes take 2 ranks"):
        seated("reference", 3, cpus=2.0)
    with pytest.raises(PlacementError, match="rollout: rank 0 of 1 has no place: each rank of a role needs 64 GPUs of"):
        seated("rollout", gpus=64)
    assert time.monotonic() - start < 2


def test_nodes_that_have_gone_have_no_seats(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = {"Alive": False, "Resources": {"CPU": 64.0}, "NodeID": "b", "NodeManagerAddress": "10.0.0.2"}
    nodes = [*ray.nodes(), gone]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    [host] = cluster_nodes(cpus_per_rank=0.5)
    assert (host.ranks, host.node_id) == (2 * CPUS, ray.get_runtime_context().get_node_id())


def test_busy_placement_ends_at_its_deadline_and_is_taken_back() -> None:
    holder = launch(1, role="policy", cpus=3.0)
    start = time.monotonic()
    with pytest.raises(
        PlacementError,
        match=r"value: no place after 2 s: 2 CPU, 0 GPU are needed; free now 0\.\d+ CPU",
    ):
        seated("value", cpus=2.0, timeout_s=2.0)
    assert 2 <= time.monotonic() - start < 10
    holder.stop()
    # The request does not come to life once there is room: all is free but what the shared group holds.
    wait_for_cpus(CPUS - 0.2)


def test_stop_frees_the_place_and_ends_the_processes(group: WorkerGroup) -> None:
    for _ in range(3):  # each needs nearly all there is
        big = launch(1, cpus=3.5)
        big.stop()
        assert wait_until_gone(big.pids) == []


def wait_for_cpus(amount: float, seconds: float = 10.0) -> None:
    """Waits until Ray has `amount` CPUs free."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if ray.available_resources().get("CPU", 0.0) >= amount - 1e-6:
            return
        time.sleep(0.2)
    raise AssertionError(f"{ray.available_resources().get('CPU', 0.0)} CPUs are free, not {amount}")


SESSION_SCRIPT = """
import json, os, sys, time
from cluster.layout import Demand, lay_out
from cluster.placement import cluster_nodes, reserve
from cluster.session import session
from cluster.worker_group import Worker, WorkerGroup
with session(num_cpus=1):
    place = reserve(lay_out([Demand("policy", 2)], cluster_nodes(cpus_per_rank=0.1)), cpus_per_rank=0.1)
    group = WorkerGroup.launch(Worker, place, role="policy", env={})
    import psutil
    print(json.dumps([p.pid for p in psutil.Process().children(recursive=True)]), flush=True)
    if sys.argv[1] == "hang":
        time.sleep(600)
    if sys.argv[1] == "fail":
        raise ValueError("in the block")
time.sleep(0.1)
"""


@pytest.mark.parametrize("end", ["leave", "fail", pytest.param("hang", marks=pytest.mark.slow)])
def test_nothing_is_left_running_after_a_session(end: str) -> None:
    """Left by its end, by an error, or because the driver was killed."""
    driver = subprocess.Popen(
        [sys.executable, "-c", SESSION_SCRIPT, end],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    with driver:
        assert driver.stdout is not None
        pids = json.loads(driver.stdout.readline())
        assert len(pids) >= 4  # Ray's own and two ranks
        if end == "hang":
            driver.kill()
        assert driver.wait(60) == {"leave": 0, "fail": 1, "hang": -9}[end]
    # Of a killed driver's Ray the two agents of the raylet, idle, try for a minute more to report its end.
    assert len(wait_until_gone(pids, seconds=15)) <= (2 if end == "hang" else 0)
    assert wait_until_gone(pids, seconds=90) == []


DEATH_SCRIPT = """
import os, time
from cluster.layout import Demand, lay_out
from cluster.placement import cluster_nodes, reserve
from cluster.session import session
from cluster.worker_group import Worker, WorkerError, WorkerGroup
with session(num_cpus=1):
    place = reserve(lay_out([Demand("policy", 2)], cluster_nodes(cpus_per_rank=0.1)), cpus_per_rank=0.1)
    group = WorkerGroup.launch(Worker, place, role="policy", env={})
    os.kill(group.pids[1], 9)
    try:
        group.call(Worker.peak_memory_gib, step="ppo step 3")
    except WorkerError as error:
        print(error)
    time.sleep(2)  # Ray's own reports come late, from a thread
"""


def test_a_death_is_reported_in_one_line() -> None:
    done = subprocess.run([sys.executable, "-c", DEATH_SCRIPT], capture_output=True, text=True, timeout=120)
    [line] = done.stdout.splitlines()
    assert line.startswith("policy rank 1 failed in peak_memory_gib at ppo step 3: the process died: killed by SIGKILL")
    assert len(line) < 300


def test_cluster_imports_no_torch() -> None:
    code = (
        "import sys, cluster.jobs, cluster.layout, cluster.plan, cluster.placement, cluster.worker_group\n"
        "print([m for m in ('torch', 'model', 'rlhf_ray') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


@pytest.mark.parametrize(
    "env, what",
    [
        (
            {"PYTHONHOME": "/nowhere"},
            "its process ended while it started; its last words: .*No module named 'encodings'",
        ),
        ({"PYTHONPATH": "HERE"}, "its process ended while it started; its last words: this site is closed"),
    ],
)
def test_a_process_that_ends_before_it_is_up_is_told_at_once(env: dict[str, str], what: str, tmp_path: Path) -> None:
    """Ray tells nobody, and starts another after a minute. Until then it starts fewer: this test is the last."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nprint('this site is closed', file=sys.stderr, flush=True)\nos.kill(os.getpid(), 4)\n"
    )
    start = time.monotonic()
    env = {name: value.replace("HERE", str(tmp_path)) for name, value in env.items()}
    with pytest.raises(WorkerError, match=f"value rank 0 failed in ready at start-up: {what}"):
        launch_alone(Rank, role="value", env=env, start_timeout_s=120)
    assert time.monotonic() - start < 60
