"""Benchmarks: the arithmetic by hand, bad input, and two of them on real Ray, vLLM and DeepSpeed."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_inputs import write_checkpoint, write_tokenizer

from model.config import PRESETS, ModelConfig
from model.flops import num_parameters, peak_flops
from rlhf_ray.bench.figures import Lap, idle_share, phase_spread, rates, spread, turn_spread, utilisation
from rlhf_ray.bench.report import planned_gib, print_report
from rlhf_ray.bench.workload import ROLES, Workload, check_bench, model_flops
from rlhf_ray.config import load_config, parse_config
from rlhf_ray.errors import UserError
from rlhf_ray.workers.roles import Turn

ROOT = Path(__file__).resolve().parent.parent
TINY = {
    "run": {"device": "cpu"},
    "tokenizer": {"vocab_size": 300},
    "model": {"preset": "tiny"},
    "ppo": {"batch_size": 8, "minibatch_size": 4, "num_chunks": 2},
}
OPTIONS = {"repeats": 2, "warmup": 1, "prompt_tokens": 6, "response_tokens": 10, "out": None}


def check(what="round", sections=None, **options):
    """`check_bench` of the tiny config with tables laid over it."""
    raw = {
        section: {**TINY.get(section, {}), **(sections or {}).get(section, {})}
        for section in {*TINY, *(sections or {})}
    }
    return check_bench(what, parse_config(raw), **{**OPTIONS, **options})


# --- arithmetic ------------------------------------------------------------------------------------------------


def test_spread_by_hand():
    # Of 1, 2, 3, 4 the quartiles lie at places 0.75, 1.5 and 2.25.
    assert spread([4.0, 1.0, 3.0, 2.0]) == {"median": 2.5, "q1": 1.75, "q3": 3.25, "all": [4.0, 1.0, 3.0, 2.0]}
    assert spread([7.0]) == {"median": 7.0, "q1": 7.0, "q3": 7.0, "all": [7.0]}


def test_rates_by_hand():
    assert rates(2.0, answers=8, prompt_tokens=256, response_tokens=512) == {
        "prompt_tokens_per_s": 128.0,
        "response_tokens_per_s": 256.0,
        "tokens_per_s": 384.0,
        "samples_per_s": 4.0,
    }


def test_idle_share_by_hand():
    laps = [
        Lap(2.0, {}, {"policy": [1.0, 0.5], "rollout": [2.0]}),
        Lap(3.0, {}, {"policy": [1.0, 1.5], "rollout": [1.0]}),
    ]
    # policy: 4 of 2 x 5 rank-seconds busy; rollout: 3 of 5; together 7 of 15.
    assert idle_share(laps) == pytest.approx({"policy": 0.6, "rollout": 0.4, "all": 8 / 15})


def test_phases_and_what_is_left_of_a_lap():
    from rlhf_ray.bench.measure import phases

    row = {"time/rollout_s": 1.0, "time/sync_s": 0.5, "time/step_s": 1.5, "reward/combined": 3.0}
    assert phases(row, 1.75) == {"rollout": 1.0, "sync": 0.5, "other": 0.25}
    assert phases({"response/tokens_total": 80.0}, 1.75) == {}
    laps = [Lap(1.75, phases(row, 1.75), {}), Lap(2.75, phases(row, 2.75), {})]
    assert phase_spread(laps)["other"]["median"] == 0.75


def test_turns_by_hand():
    def turn(seconds, before, after, leave=("rollout",)):
        return Turn(leave, ("policy", "value"), seconds, (before, after))

    laps = [
        Lap(2.0, {}, {}, [turn(0.5, 9.0, 3.0), turn(0.25, 4.0, 5.0, leave=())]),
        Lap(2.0, {}, {}, [turn(1.5, 8.0, 4.0), turn(0.25, 4.0, 5.0, leave=()), turn(0.25, 4.0, 6.0, leave=())]),
    ]
    found = turn_spread(laps)
    assert list(found) == ["-rollout +policy +value", "+policy +value"]
    assert found["-rollout +policy +value"] == {
        "per_lap": 1.0,
        "seconds": {"median": 1.0, "q1": 0.75, "q3": 1.25, "all": [0.5, 1.5]},
        "used_gib": [9.0, 4.0],
    }
    assert (found["+policy +value"]["per_lap"], found["+policy +value"]["used_gib"]) == (1.5, [4.0, 6.0])


def test_a_report_has_what_the_planner_says_of_the_config():
    work = check(sections={"roles": {role: {"gpus": [0], "zero_stage": 2} for role in ("policy", "value")}})
    shapes = dict.fromkeys(ROLES["round"], PRESETS["1b"])
    planned = planned_gib(work, shapes, gpus=1, gpu_gib=140.0)
    assert set(planned["roles"]) == set(ROLES["round"])
    # bf16 weights, fp32 gradients, master weights and moments
    least = (2 + 4 + 12) * num_parameters(PRESETS["1b"]) / 2**30
    # The others leave it their memory, all but what a process has of its own.
    assert least < planned["roles"]["policy"] < planned["turns"]["policy"] == planned["roles"]["policy"] + 5 * 2
    assert planned["turns"]["sync"] > 2 * 2 * num_parameters(PRESETS["1b"]) / 2**30


def test_utilisation_by_hand_and_unknown_without_a_peak():
    peak = peak_flops("NVIDIA H100 80GB HBM3")
    assert utilisation(989e12, 4.0, peak=peak, devices=2) == pytest.approx(0.125)
    assert utilisation(989e12, 4.0, peak=peak_flops("AMD EPYC"), devices=2) == "unknown"


def test_model_flops_by_hand():
    shape = ModelConfig(
        vocab_size=10, hidden_size=4, num_layers=1, num_heads=2, num_kv_heads=1, ffn_size=6, max_seq_len=16
    )

    def flops(what):
        config = parse_config({"ppo": {"batch_size": 2, "minibatch_size": 2, "inner_epochs": 2}})
        options = {"repeats": 1, "warmup": 0, "prompt_tokens": 3, "response_tokens": 2}
        work = Workload(what=what, config=config, shape=shape, **options)
        return model_flops(work, dict.fromkeys(ROLES[what], shape))

    # A block has 4 x (12 + 18) = 120 matrix weights: a token of a row of T takes 240 + 4 x 2 x 2 x (T + 1) / 2.
    row_of_5, row_of_4 = 5 * (240 + 48), 4 * (240 + 40)
    head = 2 * (2 * 10 * 4)  # of two response tokens
    assert flops("rollout") == 2 * (row_of_4 + head)
    assert flops("score") == 2 * (5 * row_of_5 + 2 * head)
    assert flops("train") == 2 * 2 * 3 * (2 * row_of_5 + head)  # two epochs
    assert flops("sync") == 0
    assert flops("round") == flops("rollout") + flops("score") + flops("train")


# --- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "options", "complaint"),
    [
        ({"model": {"preset": "tinny"}}, {}, "model.preset='tinny' is not known; did you mean tiny?"),
        (
            {},
            {"prompt_tokens": 200},
            "--prompt-tokens 200 and --response-tokens 10 are 210 tokens together, and the model's context holds 64;",
        ),
        ({"ppo": {"minibatch_size": 3}}, {}, "ppo.batch_size=8 must be divisible by ppo.minibatch_size=3"),
        ({"roles": {"policy": {"num_ranks": 1000}}}, {}, "roles.policy.num_ranks=1000 must be at most"),
        ({"tokenizer": {"vocab_size": 5}}, {}, "tokenizer.vocab_size=5 must be at least"),
        ({"inputs": {"chat": "nowhere"}}, {}, "inputs.chat='nowhere': no such checkpoint directory"),
        ({"inputs": {"safety": "nowhere"}}, {}, "inputs.safety is given without inputs.chat; give both"),
        ({"inputs": {"safety": "math:sqrt"}}, {}, "inputs.safety='math:sqrt' is a function, which cannot read"),
        ({}, {"out": ROOT}, f"--out {ROOT}: is a directory; give the name of a JSON file"),
        ({}, {"out": Path("/proc/nothing/a.json")}, "--out /proc/nothing: /proc cannot be written"),
        ({}, {"out": Path(__file__) / "a.json"}, f"--out {__file__}: {__file__} is a file; choose a directory"),
    ],
)
def test_bad_input_is_told_before_anything_starts(sections, options, complaint):
    sections = {**sections, "model": {"preset": "tiny", "max_seq_len": 64, **sections.get("model", {})}}
    with pytest.raises(UserError) as error:
        check(sections=sections, **options)
    assert str(error.value).startswith(complaint)


def test_ranks_count_where_the_roles_are_started():
    crowded = {
        "roles": {"value": {"num_ranks": 1000}},
        "ppo": {"num_chunks": 1000, "batch_size": 1000, "minibatch_size": 1000},
    }
    with pytest.raises(UserError, match=r"roles\.value\.num_ranks=1000 must be at most"):
        check("train", sections=crowded)
    check("sync", sections=crowded)  # starts no value model


def test_the_shape_is_what_pretraining_would_make_or_the_chat_models(tmp_path):
    assert check().shape.vocab_size == 300 and check().shape.max_seq_len == 256
    assert check(sections={"model": {"max_seq_len": 32}}).shape.max_seq_len == 32
    chat = write_checkpoint(tmp_path / "chat", vocab_size=301)
    write_tokenizer(chat)
    assert check(sections={"inputs": {"chat": str(chat)}, "model": {"preset": "no matter"}}).shape.vocab_size == 301
    assert check(sections={"inputs": {"base": str(chat)}}).config.inputs.chat == str(chat)


def test_a_benchmark_has_its_own_lengths_and_no_warmup_of_the_value_model():
    work = check(sections={"ppo": {"value_warmup_steps": 5, "max_new_tokens": 99}, "data": {"corpus": "nowhere"}})
    ppo = work.config.ppo
    assert (ppo.max_new_tokens, ppo.num_steps, ppo.value_warmup_steps) == (10, 3, 0)
    assert work.config.data.corpus is None
    assert work.batch_size == 8


# --- on the real system ----------------------------------------------------------------------------------------


def bench(what: str, directory: Path) -> dict:
    """The report of a benchmark of the tiny model, run from the command line; checks that it leaves nothing."""
    temporary, out, config = directory / "tmp", directory / "new" / f"{what}.json", directory / "tiny.toml"
    temporary.mkdir(exist_ok=True)
    config.write_text(
        "".join(f"[{s}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in t.items()) for s, t in TINY.items())
    )
    command = [sys.executable, "-m", "rlhf_ray.cli.main", "bench", what, str(config), "--out", str(out)]
    command += ["--repeats", "2", "--warmup", "1", "--prompt-tokens", "6", "--response-tokens", "10"]
    environment = {**os.environ, "TMPDIR": str(temporary), "RAY_TMPDIR": "/tmp"}  # sockets need short paths
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert f"rlhf-ray bench {what}" in result.stdout and "peak memory of policy" in result.stdout
    assert not list(temporary.glob("rlhf-ray-bench-*"))
    report = json.loads(out.read_text())
    assert (report["benchmark"], report["repeats"], report["warmup"]) == (what, 2, 1)
    assert report["workload"] == {"batch_size": 8, "prompt_tokens": 6, "response_tokens": 10}
    assert len(report["seconds"]["all"]) == 2 and report["seconds"]["q1"] > 0
    assert all(rate > 0 for rate in report["rates"].values())
    assert set(report["idle_share"]) == {"all", *ROLES[what]}
    assert all(0 < share < 1 for share in report["idle_share"].values())
    assert set(report["peak_memory_gib"]) == {"driver", *ROLES[what]}
    assert report["device"]["kind"] == "cpu" and report["device"]["name"].endswith("bf16 units)")
    assert report["precision"] == report["config"]["run"]["precision"] in ("bf16", "fp32")
    assert {"torch", "ray", "deepspeed"} <= set(report["packages"])
    assert report["commit"] and report["date"] and report["config"]["ppo"]["max_new_tokens"] == 10
    return report


@pytest.mark.slow
def test_whole_iterations_and_weight_syncs_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = bench("round", tmp_path)
    # That 80 tokens were sampled each time has been checked against PPO's own count.
    assert report["tokens"] == {"prompt_tokens": 8 * 6, "response_tokens": 8 * 10}
    median = report["seconds"]["median"]
    assert report["rates"]["response_tokens_per_s"] == pytest.approx(80 / median)
    assert report["rates"]["samples_per_s"] == pytest.approx(8 / median)
    assert set(report["phases"]) == {"rollout", "score", "update", "sync", "other"}
    for lap, seconds in enumerate(report["seconds"]["all"]):
        assert math.fsum(phase["all"][lap] for phase in report["phases"].values()) == pytest.approx(seconds)
    assert all(min(phase["all"]) > 0 for phase in report["phases"].values())
    assert report["mfu"] == "unknown" and report["model_flops"] > 0
    assert report["turns"] == {} and "planned_gib" not in report  # on CPU nobody leaves

    report = bench("sync", tmp_path)
    assert report["phases"] == {} and "mfu" not in report
    assert report["weight_bytes"] == 2 * report["model"]["parameters"]
    gb_per_s = report["weight_bytes"] / report["seconds"]["median"] / 1e9
    assert report["rates"] == {"gb_per_s": pytest.approx(gb_per_s)}
    print_report(report)
    assert "GB/s" in capsys.readouterr().out


def test_the_demo_can_be_measured():
    work = check_bench("round", load_config(ROOT / "configs" / "demo.toml", ["run.device=cpu"]), **OPTIONS)
    assert work.shape.vocab_size == 512
