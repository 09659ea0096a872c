"""What a config leaves to the machine, settled: device, precision, cluster; and who asks for GPUs."""

import json

import pytest

from cluster import hardware
from cluster.hardware import Cpu
from cluster.layout import Demand
from rlhf_ray import machine
from rlhf_ray.cli.main import main
from rlhf_ray.config import parse_config
from rlhf_ray.machine import demands, machine_facts, on_device, opening_lines, settled

OLD = Cpu(name="Old CPU", vectors="avx2", has_bf16=False)
NEW = Cpu(name="New CPU", vectors="avx512", has_bf16=True)


@pytest.fixture(autouse=True)
def computer(monkeypatch):
    """Makes this machine one with a CPU and so many GPUs."""

    def make(cpu, gpus=0, cpu_build=False):
        monkeypatch.setattr(hardware, "cpu", lambda: cpu)
        monkeypatch.setattr(hardware, "count_gpus", lambda: gpus)
        monkeypatch.setattr(machine, "is_cpu_build", lambda: cpu_build)

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    make(OLD)
    return make


@pytest.mark.parametrize(
    ("given", "computer_is", "device", "precision"),
    [
        ({}, (OLD,), "cpu", "fp32"),
        ({}, (NEW,), "cpu", "bf16"),
        ({}, (OLD, 1), "cuda", "bf16"),
        ({}, (OLD, 1, True), "cpu", "fp32"),  # GPUs, and a torch that has no CUDA
        ({"device": "cpu"}, (OLD, 1), "cpu", "fp32"),
        ({"device": "cuda"}, (OLD,), "cuda", "bf16"),  # a cluster's driver without a GPU
        ({"precision": "fp32"}, (NEW, 1), "cuda", "fp32"),
        ({"precision": "bf16"}, (OLD,), "cpu", "bf16"),
    ],
)
def test_device_and_precision(computer, given, computer_is, device, precision):
    computer(*computer_is)
    found = settled(parse_config({"run": given}))
    assert (found.run.device, found.run.precision) == (device, precision)
    assert machine_facts(found)["precision"] == precision
    computer(NEW, 2)
    assert settled(found).run == found.run, "what is settled stays as it is, wherever it is read again"


def test_the_cluster_is_the_configs_or_that_of_ray_address(monkeypatch):
    def address(given=None):
        return settled(parse_config({"cluster": {"address": given}})).cluster.address

    assert (address(), address("local"), address("auto")) == ("local", "local", "auto")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert (address(), address("local"), address("auto")) == ("10.0.0.1:6379", "local", "auto")
    assert opening_lines(settled(parse_config({})))[0].endswith("; the Ray cluster at 10.0.0.1:6379 (RAY_ADDRESS)")
    monkeypatch.setenv("RAY_ADDRESS", "http://10.0.0.1:8265")  # of a jobs server
    assert address() == "local"
    assert opening_lines(settled(parse_config({})))[0].endswith("; a Ray of its own")


def test_roles_ask_for_gpus_where_they_hold_a_model_and_the_device_has_some():
    given = {"inputs": {"helpfulness": "my_rewards:words"}, "roles": {"rollout": {"tensor_parallel_size": 2}}}
    given["roles"]["policy"] = {"num_ranks": 2, "gpus": [4, 5]}
    roles = ("policy", "helpfulness", "safety", "rollout")
    on_gpu = settled(parse_config({**given, "run": {"device": "cuda"}}))
    assert demands(on_gpu, roles) == [
        Demand("policy", 2, 1, (4, 5)),
        Demand("helpfulness", 1, 0),
        Demand("safety", 1, 1),
        Demand("rollout", 1, 2),
    ]
    on_cpu = settled(parse_config({**given, "run": {"device": "cpu"}}))
    assert demands(on_cpu, roles) == [Demand(role, 2 if role == "policy" else 1, 0) for role in roles]


def test_the_opening_line_names_arithmetic_and_cpu_and_a_warning_the_factor(computer):
    config = {"run": {"precision": "bf16", "device": "cpu"}, "cluster": {"cores": 2}}
    computer(NEW)
    assert opening_lines(settled(parse_config(config))) == [
        "bf16 on cpu: 2 cores of New CPU (avx512, bf16 units); a Ray of its own"
    ]
    computer(OLD)
    said, warning = opening_lines(settled(parse_config(config)))
    assert said == "bf16 on cpu: 2 cores of Old CPU (avx2, no bf16 units); a Ray of its own"
    assert warning == (
        "warning: run.precision=bf16: Old CPU has no units for it, and multiplies matrices some 60 times slower than "
        "in fp32 (0.8 against 51 GFLOP/s on AVX2); leave it out, or set run.precision=fp32"
    )
    assert len(opening_lines(settled(parse_config({"run": {"device": "cpu"}})))) == 1
    computer(OLD, 2)
    assert opening_lines(settled(parse_config({"cluster": {"cores": 2}}))) == [
        "bf16 on cuda: 2 GPUs, 2 cores of Old CPU (avx2, no bf16 units); a Ray of its own"
    ]


def test_little_shared_memory_is_told_where_ray_is_of_the_runs_own(monkeypatch):
    monkeypatch.setattr(hardware, "shared_memory_bytes", lambda: 64 * 2**20)
    assert opening_lines(settled(parse_config({})))[-1].startswith("warning: /dev/shm has 64 MiB free, too few for Ray")
    assert len(opening_lines(settled(parse_config({"cluster": {"address": "auto"}})))) == 1


@pytest.mark.parametrize(
    ("memory_gib", "shared_gib", "expected_gib"),
    [
        (24, 24, None),  # Ray's 30 % fit
        (24, 4, 3.8),  # Ray would want 7.2 and take a file on disk for all of it
        (24, 1 / 16, None),  # a container's default: nothing would fit
        (2, 1, None),
    ],
)
def test_the_object_store_fits_shared_memory(memory_gib, shared_gib, expected_gib):
    from cluster.session import object_store_bytes

    found = object_store_bytes(int(memory_gib * 2**30), int(shared_gib * 2**30))
    assert found == (None if expected_gib is None else int(expected_gib * 2**30))


def test_a_run_says_and_records_what_it_computes_on(tmp_path, monkeypatch, capsys):
    config = tmp_path / "run.toml"
    config.write_text(
        '[run]\nstages = ["testbed"]\n[testbed]\nnum_corpus = 20\nnum_demonstrations = 20\nnum_prompts_train = 20\n'
        "num_prompts_early_stop = 20\nnum_prompts_annotation = 20\nnum_prompts_test = 20\n"
    )
    monkeypatch.setattr("sys.argv", ["rlhf-ray", "run", str(config), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert capsys.readouterr().err.startswith("fp32 on cpu: ")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["machine"]["cpu"] == "Old CPU (avx2, no bf16 units)"
    assert manifest["config"]["run"]["precision"] == manifest["machine"]["precision"] == "fp32"
    [step] = (tmp_path / "out" / "steps").glob("testbed-*/step.json")
    assert json.loads(step.read_text())["machine"] == manifest["machine"]


def test_a_function_holds_no_gpu_but_where_a_referee_takes_its_place() -> None:
    def held(rounds: object = None, **inputs: str) -> list[str]:
        config = parse_config({"inputs": {"helpfulness": "m:f", **inputs}, **({"rounds": rounds} if rounds else {})})
        return on_device(config, ["helpfulness", "safety"])

    assert held() == ["safety"] and held(safety="m:g") == []
    assert held(referee="/models/r") == ["helpfulness", "safety"]
    assert held(referee="m:r") == held({"referee": False}) == ["safety"]
    assert held({"referee": True}) == ["helpfulness", "safety"]
