"""Tokens/s of TRL's SFT and reward trainers, and of this project's workers on the same work.

    python benchmarks/trl_trainers.py sft 3.8m
    python benchmarks/trl_trainers.py reward smollm2 --smollm2 models/smollm2

Options: [--steps 10] [--threads 1 2] [--variants fp32 autocast bf16] [--env .venv-trl-trainers] [--work DIR]
[--result FILE]; `tiny --steps 2` tries the script out. Run it on an idle machine; the first call makes the environment.

TRL 1.16.0 in an environment of its own. A step is 32 rows of 96 random tokens: 32 examples of which every token is
learnt, or 16 pairs of answers; AdamW, gradients clipped at 1, in micro-batches of at most MICRO rows. The project's
side is one rank of the policy, or of the helpfulness model, under DeepSpeed on real Ray, called as the recipe calls it;
its bf16 keeps fp32 master weights, which TRL's `bf16` does not. Both sides are measured with each number of threads,
and of each the fastest counts. Writes benchmarks/results/trl_SFT-OR-REWARD_SHAPE.json.
"""

import itertools
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import trl_environment as trl_env

TRL = "1.16.0"
ROWS, LENGTH = 32, 96
MICRO = {"3.8m": 32, "smollm2": 8, "tiny": 32}
"""Rows of a micro-batch."""
LEARNING_RATE = 1e-5


def train(job: dict[str, Any]) -> None:
    """Runs TRL's trainer and writes the seconds of its steps. In TRL's environment, which has none of this project."""
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    torch.set_num_threads(job["threads"])
    dtype = torch.bfloat16 if job["variant"] == "bf16" else torch.float32
    is_sft, rows = job["kind"] == "sft", job["rows"]
    ends: list[float] = []
    examples = len(rows) if is_sft else len(rows) // 2
    micro = job["micro"] if is_sft else job["micro"] // 2
    options = {
        "output_dir": str(Path(job["scratch"]) / "trl"),
        "use_cpu": True,
        "bf16": job["variant"] == "autocast",
        "fp16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": min(micro, examples),
        "gradient_accumulation_steps": max(1, examples // micro),
        "max_steps": trl_env.WARMUP + job["steps"],
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "max_length": None,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 10**9,
    }
    shared = {
        "processing_class": trl_env.wordless_tokenizer(job["vocabulary"]),
        "callbacks": [trl_env.step_clock(ends)],
    }
    trainer: Any
    if is_sft:
        model = AutoModelForCausalLM.from_pretrained(job["chat"], dtype=dtype)
        data = datasets.Dataset.from_dict({"input_ids": rows})
        trainer = SFTTrainer(model=model, args=SFTConfig(**options), train_dataset=data, **shared)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(job["reward"], num_labels=1, dtype=dtype)
        data = datasets.Dataset.from_dict({"chosen_ids": rows[:examples], "rejected_ids": rows[examples:]})
        trainer = RewardTrainer(model=model, args=RewardConfig(**options), train_dataset=data, **shared)
    trainer.train()
    trl_env.write_seconds(job, ends)


def own_seconds(job: dict[str, Any], directory: Path, *, precision: str, threads: int) -> list[float]:
    """Seconds of each step of the project's worker after warm-up."""
    from own_trainers import PreferenceRows, sft_rows

    from cluster.worker_group import collect
    from rlhf_ray.config import OptimSection, parse_config
    from rlhf_ray.recipe.context import Context
    from rlhf_ray.run_state import RunDir
    from rlhf_ray.workers.policy import PolicyWorker
    from rlhf_ray.workers.reward import RewardWorker
    from rlhf_ray.workers.trainer import TrainerWorker

    is_sft = job["kind"] == "sft"
    role, source, head = ("policy", job["chat"], "lm") if is_sft else ("helpfulness", job["reward"], "scalar")
    settings = {"run": {"precision": precision}, "cluster": {"cores": threads}}
    context = Context(parse_config(settings), RunDir(directory / "run"))
    try:
        roles = context.roles
        roles.make_resident(role)
        group, builder = roles[role], sft_rows if is_sft else PreferenceRows
        group.call(TrainerWorker.build, source, head=head, seed=0, runtime=roles.runtime)
        group.call(TrainerWorker.open_data, builder, job["rows"])
        optim = OptimSection(lr=LEARNING_RATE, schedule="constant", warmup_steps=0)
        collect(roles.begin_training(role, optim=optim, num_steps=10**6, state=None), timeout_s=roles.timeout_s)
        seconds = []
        for step in range(trl_env.WARMUP + job["steps"]):
            start = time.perf_counter()
            if is_sft:
                group.call(PolicyWorker.train_lm, step, batch_size=ROWS, micro_batch_size=job["micro"], seed=0)
            else:
                group.call(
                    RewardWorker.train_reward,
                    step,
                    batch_size=ROWS // 2,
                    micro_batch_tokens=job["micro"] * LENGTH,
                    safety_loss_coef=0.0,
                )
            seconds.append(time.perf_counter() - start)
        return seconds[trl_env.WARMUP :]
    finally:
        context.close()


def main() -> None:
    """Measures both sides and writes the result."""
    sys.path.insert(0, str(trl_env.ROOT))
    from measuring import RESULTS, spread, work_directory, write_result
    from ppo_work import make_work

    from model.checkpoint import read_config

    parser = trl_env.trl_parser(__doc__, environment=".venv-trl-trainers", steps=10)
    parser.add_argument("kind", choices=("sft", "reward"))
    parser.add_argument("shape", choices=tuple(MICRO))
    options = parser.parse_args()
    python = trl_env.make_environment(options.env.absolute(), trl=TRL)
    load = os.getloadavg()
    with work_directory(options.work, prefix="trl-trainers-") as directory:
        work = make_work(options.shape, directory, smollm2=options.smollm2)
        vocabulary, rng = read_config(work.chat).vocab_size, random.Random(0)
        job = {
            "kind": options.kind,
            "chat": str(work.chat),
            "reward": str(work.helpfulness),
            "vocabulary": vocabulary,
            "rows": [[rng.randrange(16, vocabulary) for _ in range(LENGTH)] for _ in range(ROWS)],
            "micro": MICRO[options.shape],
            "steps": options.steps,
        }
        own = {
            trl_env.label(precision, threads): own_seconds(
                job, directory / f"{precision}-{threads}", precision=precision, threads=threads
            )
            for precision, threads in itertools.product(("bf16", "fp32"), options.threads)
        }
        found = {"project": own, "trl": trl_env.run_variants(python, __file__, job, options)}
        config = {
            **work.described(),
            "trl": TRL,
            "pins": trl_env.PINS.name,
            "rows": ROWS,
            "length": LENGTH,
            "micro": job["micro"],
        }
    for irrelevant in ("ppo", "precision", "prompt_tokens", "response_tokens"):
        del config[irrelevant]
    best = {side: min(rows, key=lambda name: statistics.median(rows[name])) for side, rows in found.items()}
    tokens = {side: [ROWS * LENGTH / seconds for seconds in found[side][best[side]]] for side in found}
    measured = {
        "best": best,
        "tokens_per_s": {side: spread(values) for side, values in tokens.items()},
        "ratio": statistics.median(tokens["project"]) / statistics.median(tokens["trl"]),
        "step_s": {side: {name: spread(values) for name, values in rows.items()} for side, rows in found.items()},
        "warmup": trl_env.WARMUP,
    }
    print(best, {side: round(statistics.median(values), 1) for side, values in tokens.items()}, measured["ratio"])
    result = options.result or RESULTS / f"trl_{options.kind}_{options.shape}.json"
    write_result(result, measured, config=config, load=load)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        train(json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))
    else:
        main()
