"""The whole recipe from the command line on real Ray, vLLM and DeepSpeed: two policy ranks, two engines."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

ROOT = Path(__file__).parent.parent
TINY = {
    "rounds": "none",
    "pairs.num_prompts": 300,
    "evaluate.temperatures": [1.0, 0.0],
    "evaluate.own_temperatures": "none",
    "testbed.num_corpus": 1500,
    "testbed.num_demonstrations": 400,
    "testbed.num_prompts_train": 200,
    "testbed.num_prompts_early_stop": 32,
    "testbed.num_prompts_annotation": 300,
    "testbed.num_prompts_test": 60,
    "pretrain.num_steps": 10,
    "sft.epochs": 2,
    "ppo.num_steps": 4,
    "ppo.batch_size": 32,
    "ppo.minibatch_size": 16,
    "ppo.eval_every": 2,
    "roles.policy.num_ranks": 2,
    "roles.policy.zero_stage": 3,
    "roles.value.num_ranks": 2,
    "roles.rollout.num_engines": 2,
    "ppo.num_chunks": 2,
}


def run(out: Path, **changes: object) -> subprocess.CompletedProcess[str]:
    """`rlhf-ray run` on the demo's config made tiny."""
    overrides = {**TINY, **changes}
    command = [sys.executable, "-m", "rlhf_ray.cli.main", "run", "configs/demo.toml", "--out", str(out)]
    command += [part for key, value in overrides.items() for part in ("--set", f"{key}={value}")]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env={**os.environ})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run's directory."""
    out = tmp_path_factory.mktemp("recipe") / "run"
    result = run(out)
    assert result.returncode == 0, result.stderr
    return out


def step(out: Path, name: str) -> Path:
    """The one finished step of that name."""
    [found] = [path for path in (out / "steps").glob(f"{name}-*") if path.suffix != ".partial"]
    return found


@pytest.mark.slow
def test_every_stage_leaves_its_output(finished: Path) -> None:
    report = json.loads((step(finished, "evaluate") / "evaluation.json").read_text())
    assert set(report["models"]) == {"SFT", "PPO", "SFT greedy", "PPO greedy"}
    assert report["models"]["SFT"]["kl_per_sequence"] == 0.0  # the reference is the SFT model itself
    rows = [json.loads(line) for line in (step(finished, "ppo") / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[0]["kl/per_sequence"] == 0.0 != rows[-1]["kl/per_sequence"]  # nothing is learnt before the first update
    assert all(row["policy/padding"] < 0.25 for row in rows)
    answers = pq.read_table(step(finished, "evaluate") / "answers.parquet")
    assert answers.num_rows == 4 * 60
    for name in ("reward_helpfulness", "reward_safety", "reward_combined"):
        for model, figures in report["models"].items():
            rewards = [row[name] for row in answers.to_pylist() if row["model"] == model]
            assert sum(rewards) / 60 == pytest.approx(
                figures[name], rel=1e-4, abs=1e-5
            )  # float32, summed in other orders
    assert not list((finished / "steps").glob("*.partial"))


@pytest.mark.slow
def test_checkpoints_open_in_transformers(finished: Path) -> None:
    directory = step(finished, "ppo") / "model"
    tokenizer = AutoTokenizer.from_pretrained(directory)
    question = [{"role": "user", "content": "what does the bee say?"}]
    tokens = tokenizer.apply_chat_template(question, return_tensors="pt")["input_ids"]
    policy = AutoModelForCausalLM.from_pretrained(directory)
    assert torch.isfinite(policy(tokens).logits).all()
    reward = AutoModelForSequenceClassification.from_pretrained(step(finished, "reward") / "safety" / "model")
    assert reward(tokens).logits.shape == (1, 1)


@pytest.mark.slow
def test_again_does_nothing_and_a_changed_value_redoes_what_depends_on_it(finished: Path) -> None:
    again = run(finished)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("skipped") == 9 and "starting" not in again.stderr
    changed = run(finished, **{"evaluate.temperatures": [1.0]})
    assert changed.returncode == 0, changed.stderr
    assert changed.stderr.count("skipped") == 8 and "evaluate: starting" in changed.stderr


@pytest.mark.slow
def test_fine_tuning_on_public_dialogues_comes_first_and_its_model_is_the_start(finished: Path) -> None:
    demonstrations = step(finished, "testbed") / "demonstrations.parquet"
    before = {path.name for path in (finished / "steps").iterdir()}
    two_stages = run(finished, **{"run.stages": '["sft"]', "data.public_demonstrations": f'"{demonstrations}"'})
    assert two_stages.returncode == 0, two_stages.stderr
    new = [path for path in (finished / "steps").iterdir() if path.name not in before]
    made = {path.name.rpartition("-")[0]: json.loads((path / "step.json").read_text()) for path in new}
    assert set(made) == {"sft@public", "sft"}
    [public] = [path for path in new if path.name.startswith("sft@public")]
    assert made["sft"]["inputs"]["parents"]["base"] == f"{public.name}/model"
    assert made["sft@public"]["inputs"]["parents"]["base"].startswith("pretrain-")


VERSIONS = {
    "roles.policy.num_ranks": 1,
    "roles.policy.zero_stage": 1,
    "roles.value.num_ranks": 1,
    "pairs.num_prompts": 100,
    "rejection_sampling.samples_per_prompt": 4,
    "rejection_sampling.num_prompts": 60,
    "rejection_sampling.group_size": 32,
    "rejection_sampling.temperatures": [0.7, 1.0],
    "rejection_sampling.sweep_prompts": 16,
    "rejection_sampling.sweep_samples": 4,
    "ppo.num_steps": 2,
}
"""On other ranks than the steps that are there already, which are used all the same."""


@pytest.mark.slow
def test_versions_by_rejection_sampling_and_ppo_on_top(finished: Path) -> None:
    last = '{methods=["rejection-sampling","ppo"],pool="all",settings={"sft.epochs"=1}}'
    made = run(finished, **VERSIONS, rounds=f"{{versions=[{{}},{last}]}}")
    assert made.returncode == 0, made.stderr
    for name in ("testbed", "tokenizer", "pretrain", "sft"):
        assert f"{name}: done before with the same inputs" in made.stderr
    samples = pq.read_table(step(finished, "rejection-sample@v2") / "samples.parquet").to_pylist()
    assert len(samples) == 60 * 4 and {row["scope"] for row in samples} == {"v2"}
    by_prompt: dict[str, list[dict]] = {}
    for row in samples:
        by_prompt.setdefault(row["prompt_id"], []).append(row)
    assert all([row["sample"] for row in rows] == [0, 1, 2, 3] for rows in by_prompt.values())
    assert any(len({tuple(row["tokens"]) for row in rows}) > 1 for rows in by_prompt.values())
    eos = AutoTokenizer.from_pretrained(step(finished, "tokenizer") / "tokenizer").eos_token_id
    assert all((row["tokens"][-1] == eos) == row["finished"] for row in samples)
    chosen = pq.read_table(step(finished, "select@v2") / "selections.parquet").to_pylist()
    assert {row["scope"] for row in chosen} == {"v1", "v2"} and len(chosen) == len({r["prompt_id"] for r in chosen})
    for row in chosen:
        if row["scope"] == "v2" and row["is_safety"]:
            assert row["safety"] == max(r["safety"] for r in by_prompt[row["prompt_id"]])
    accuracy = json.loads((step(finished, "reward-accuracy") / "reward_accuracy.json").read_text())
    assert set(accuracy) == {f"{name}.{week}" for name in ("helpfulness", "safety") for week in ("v1", "v2")}
    assert accuracy["helpfulness.v1"]["count/helpfulness/v2"] > 0  # of a week that the model has not seen
    reports = (finished / "steps").glob("evaluate-*/evaluation.json")
    labels = [set(json.loads(path.read_text())["models"]) for path in reports]
    assert {"SFT", "V1", "V2", "V2 + PPO", "SFT greedy", "V1 greedy", "V2 greedy", "V2 + PPO greedy"} in labels

    people = finished.parent / "week2.parquet"
    waits = f'{{versions=[{{}},{{comparisons="{people}"}}]}}'
    waiting = run(finished, **VERSIONS, rounds=waits)
    assert waiting.returncode == 0, waiting.stderr
    assert (
        f"reward@v2 waits for rounds.versions[1].comparisons={people}; the pairs to be compared are" in waiting.stderr
    )
    people.write_bytes((step(finished, "label@v2") / "comparisons.parquet").read_bytes())
    goes_on = run(finished, **VERSIONS, rounds=waits)
    assert goes_on.returncode == 0, goes_on.stderr
    assert "select@v2: starting" in goes_on.stderr and "pairs@v2: done before" in goes_on.stderr
