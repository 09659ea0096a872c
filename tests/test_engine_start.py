"""An engine in a process of its own, where nothing has asked the kernel for a CPU's special units before."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_inputs import write_tokenizer

from model.checkpoint_files import expected_shapes
from model.config import PRESETS, to_hf_config

SCRIPT = """
import sys
from rlhf_ray.preflight.machine import mend_environment
mend_environment()  # as the command line does
from rlhf_ray.workers.rollout import RolloutWorker
worker = RolloutWorker("rollout", 0, 1)
worker.start(
    sys.argv[1], tokenizer=sys.argv[1], precision=sys.argv[2], max_num_seqs=4, kv_cache_gib=0.05, on_gpu=False
)
question = [{"role": "user", "content": "which is a fish?"}]
print(repr(worker.chat(question, seed=0, temperature=1.0, max_new_tokens=4)))
"""

MANY = """
import sys
from model.checkpoint_files import read_config
from rlhf_ray.backends.rollout import RolloutEngine
engine = RolloutEngine(sys.argv[1], read_config(sys.argv[1]), precision="fp32", max_num_seqs=256, num_ids=300)
prompts = [[5] * 40] * 300
made = engine.generate(prompts, seeds=range(300), temperature=1.0, max_new_tokens=2, end_ids=[])
print(sum(len(each.tokens) for each in made))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The testbed's model, no matrix of which has 1 MiB, with all weights zero."""
    directory = tmp_path_factory.mktemp("engine") / "model"
    config = PRESETS["testbed"].model_copy(update={"vocab_size": 300})
    shapes = expected_shapes(config, reward_model=False)
    assert max(4 * int(np.prod(shape)) for shape in shapes.values()) < 2**20
    write_tokenizer(directory)
    (directory / "config.json").write_text(json.dumps(to_hf_config(config, num_labels=None, dtype="float32")))
    save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, directory / "model.safetensors")
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_an_engine_answers_in_a_fresh_process_in_every_precision(checkpoint: Path, precision: str) -> None:
    command = [sys.executable, "-c", SCRIPT, str(checkpoint), precision]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]  # -4 is SIGILL
    assert done.stdout.splitlines()[-1].startswith(("'", '"'))


@pytest.mark.slow
def test_prompts_of_more_tokens_than_a_step_takes_are_answered(checkpoint: Path) -> None:
    """256 prompts of 40 tokens; a step takes 4,096, and vLLM cannot divide a seeded prompt between steps on CPU."""
    done = subprocess.run([sys.executable, "-c", MANY, str(checkpoint)], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1:] == ["600"], done.stderr[-2000:]
