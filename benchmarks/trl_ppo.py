"""Seconds and samples/s of TRL's PPO on the work of `ppo_round.py`, in an environment of its own.

    python benchmarks/trl_ppo.py 3.8m
    python scripts/fetch_smollm2.py models/smollm2 && python benchmarks/trl_ppo.py smollm2 --smollm2 models/smollm2

Options: [--steps 12] [--threads 1 2] [--variants fp32 autocast bf16] [--env .venv-trl] [--work DIR] [--result FILE];
`tiny --steps 2` tries the script out. Run it on an idle machine; the first call makes the environment (2 GB, minutes).

TRL 1.12.0, the last with PPO (`trl.experimental.ppo`), with pins of its own in benchmarks/requirements-trl.txt.
The same work: the same prompts, answers of exactly the same length, one epoch, one optimizer step, on the same
checkpoints. It differs where TRL does: it generates with transformers, has one reward model where the project has two,
one optimizer for policy and value model, and no weights to sync. Each of `trl_environment.VARIANTS` (bf16 has no fp32
master weights, less work than the project does) runs in a process of its own, with each number of threads; the fastest
counts.

Writes benchmarks/results/trl_ppo_SHAPE.json.
"""

import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import trl_environment as trl_env

TRL = "1.12.0"


def train(job: dict[str, Any]) -> None:
    """Runs TRL's PPO and writes the seconds of its steps. In TRL's environment, which has none of this project."""
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    torch.set_num_threads(job["threads"])
    dtype = torch.bfloat16 if job["variant"] == "bf16" else torch.float32
    ppo, optim = job["ppo"], job["ppo"]["optim"]

    def policy() -> Any:
        return AutoModelForCausalLM.from_pretrained(job["chat"], dtype=dtype)

    def scorer() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(job["reward"], num_labels=1, dtype=dtype)

    steps = trl_env.WARMUP + job["steps"]
    ends: list[float] = []
    arguments = PPOConfig(
        output_dir=str(Path(job["scratch"]) / "trl"),
        use_cpu=True,
        bf16=job["variant"] == "autocast",
        fp16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=ppo["batch_size"],  # one optimizer step, one micro-batch
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        local_rollout_forward_batch_size=ppo["batch_size"],
        num_ppo_epochs=ppo["inner_epochs"],
        total_episodes=steps * ppo["batch_size"],
        response_length=ppo["max_new_tokens"],
        temperature=ppo["temperature"],
        kl_coef=ppo["kl_coef"],
        cliprange=ppo["clip_ratio"],
        cliprange_value=ppo["clip_value"],
        gamma=ppo["gamma"],
        lam=ppo["gae_lambda"],
        whiten_rewards=False,
        learning_rate=optim["lr"],
        adam_beta1=optim["betas"][0],
        adam_beta2=optim["betas"][1],
        adam_epsilon=optim["eps"],
        weight_decay=optim["weight_decay"],
        max_grad_norm=optim["grad_clip"],
        lr_scheduler_type="constant",
        num_sample_generations=0,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_steps=10**9,
    )
    trainer = PPOTrainer(
        args=arguments,
        processing_class=trl_env.wordless_tokenizer(job["vocabulary"]),  # EOS is never sampled: no answer ends early
        model=policy(),
        ref_model=policy(),
        reward_model=scorer(),
        value_model=scorer(),
        train_dataset=datasets.Dataset.from_dict({"input_ids": job["prompts"]}),
        data_collator=lambda rows: {"input_ids": torch.tensor([row["input_ids"] for row in rows])},
        callbacks=[trl_env.step_clock(ends)],
    )
    trainer.train()
    trl_env.write_seconds(job, ends)


def main() -> None:
    """Measures every variant and writes the result."""
    sys.path.insert(0, str(trl_env.ROOT))
    from measuring import RESULTS, spread, work_directory, write_result
    from ppo_work import make_work

    from model.checkpoint import read_config

    parser = trl_env.trl_parser(__doc__, environment=".venv-trl", steps=12)
    parser.add_argument("shape", choices=("3.8m", "smollm2", "tiny"))
    options = parser.parse_args()
    python = trl_env.make_environment(options.env.absolute(), trl=TRL)
    load = os.getloadavg()
    with work_directory(options.work, prefix="trl-ppo-") as directory:
        work = make_work(options.shape, directory, smollm2=options.smollm2)
        assert work.section.minibatch_size == work.section.batch_size, "one optimizer step is what TRL is told to do"
        job = {
            "chat": str(work.chat),
            "reward": str(work.helpfulness),
            "vocabulary": read_config(work.chat).vocab_size,
            "prompts": work.prompts,
            "ppo": work.section.model_dump(mode="json"),
            "steps": options.steps,
        }
        found = trl_env.run_variants(python, __file__, job, options)
        config = {**work.described(), "trl": TRL, "pins": trl_env.PINS.name}
    best = min(found, key=lambda name: statistics.median(found[name]))
    batch = work.section.batch_size
    measured = {
        "best": best,
        "samples_per_s": spread([batch / seconds for seconds in found[best]]),
        "step_s": {name: spread(seconds) for name, seconds in found.items()},
        "warmup": trl_env.WARMUP,
    }
    config.pop("precision")
    write_result(options.result or RESULTS / f"trl_ppo_{options.shape}.json", measured, config=config, load=load)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        train(json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))
    else:
        main()
