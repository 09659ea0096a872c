"""PPO and the evaluation with frozen models divided over ranks, against the same run with whole ones."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_inputs import VOCABULARY, prompt, write_rows, write_tokenizer

from model.checkpoint import save_checkpoint
from model.config import PRESETS
from model.llama import Llama
from rlhf_ray.config import config_with, parse_config
from rlhf_ray.metrics import read_metrics
from rlhf_ray.recipe.run import run_recipe

pytestmark = pytest.mark.slow  # two runs on real engines

FROZEN = ("reference", "helpfulness", "safety")
SHAPE = PRESETS["tiny"].model_copy(update={"vocab_size": VOCABULARY})


def test_divided_models_score_as_whole_ones_do_in_ppo_and_at_the_end(tmp_path: Path) -> None:
    """Three chunks in PPO, one at the end: of two ranks one has nothing of its own, and takes part all the same.

    The helpfulness model has two replicas.
    """
    models = {name: tmp_path / name for name in ("chat", *FROZEN[1:])}
    for seed, (name, path) in enumerate(models.items()):
        model = Llama(SHAPE, head="lm" if name == "chat" else "scalar")
        model.init_weights(seed=seed)
        weights = ((n, 4 * tensor if tensor.dim() > 1 else tensor) for n, tensor in model.state_dict().items())
        save_checkpoint(path, SHAPE, weights, num_labels=None if name == "chat" else 1)
    rows = [prompt(number) for number in range(3)]
    tables = {name: write_rows(tmp_path / name, "prompts", rows) for name in ("train", "early_stop", "test")}
    config = parse_config(
        {
            "run": {"device": "cpu", "precision": "fp32", "stages": ["ppo", "evaluate"]},
            "cluster": {"cores": 4},
            "inputs": {**{name: str(path) for name, path in models.items()}, "tokenizer": str(tmp_path / "tokenizer")},
            "data": {f"prompts_{name}": path for name, path in tables.items()},
            "ppo": {
                "num_steps": 1,
                "batch_size": 3,
                "minibatch_size": 3,
                "num_chunks": 3,
                "max_new_tokens": 6,
                "micro_batch_tokens": 64,
            },
            "evaluate": {"temperatures": [1.0], "max_new_tokens": 6, "diversity_prompts": 0},
        }
    )
    write_tokenizer(tmp_path / "tokenizer")
    found: list[dict[str, Any]] = []
    divided = {f"roles.{role}.{key}": n for role in FROZEN for key, n in (("num_ranks", 2), ("zero_stage", 3))}
    replicas = {"roles.helpfulness.num_ranks": 4, "roles.helpfulness.ranks_per_replica": 2}
    for name, settings in (("whole", {}), ("divided", divided | replicas)):
        made = run_recipe(config_with(config, settings), tmp_path / name)
        report = json.loads(made["evaluation"].path.read_text())
        [step] = read_metrics(made["policy"].path.parent)
        found.append({**step, **report["models"]["PPO"]})
    whole, other = found
    for figure in ("reward/helpfulness", "reward/safety", "kl/per_sequence", "reward_combined", "kl_per_sequence"):
        assert other[figure] == pytest.approx(whole[figure], rel=1e-4, abs=1e-5), figure
    assert abs(whole["reward/helpfulness"] - whole["reward/safety"]) > 0.01
