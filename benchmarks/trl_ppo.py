"""Seconds and samples/s of TRL's PPO on the work of `ppo_round.py`, in an environment of its own.

    python benchmarks/trl_ppo.py 3.8m
    python scripts/fetch_smollm2.py models/smollm2 && python benchmarks/trl_ppo.py smollm2 --smollm2 models/smollm2

Options: [--steps 12] [--threads 1 2] [--variants fp32 autocast bf16] [--env .venv-trl] [--work DIR] [--result FILE];
`tiny --steps 2` tries the script out. Run it on an idle machine; the first call makes the environment (2 GB, minutes).

TRL 1.12.0, the last with PPO (`trl.experimental.ppo`), with pins of its own in benchmarks/requirements-trl.txt.
The same work: the same prompts, answers of exactly the same length, one epoch, one optimizer step, on the same
checkpoints. It differs where TRL does: it generates with transformers, has one reward model where the project has two,
one optimizer for policy and value model, and no weights to sync. Each variant runs in a process of its own, with each
number of threads; the fastest counts:

    fp32       everything in fp32
    autocast   fp32 weights, matrix products in bf16
    bf16       everything in bf16, without fp32 master weights (less work than the project does)

Writes benchmarks/results/trl_ppo_SHAPE.json.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PINS = ROOT / "benchmarks" / "requirements-trl.txt"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"  # PyTorch's own, asked for torch alone
VARIANTS = ("fp32", "autocast", "bf16")
WARMUP = 3


def make_environment(directory: Path) -> Path:
    """Creates the virtual environment unless it is there with these pins; returns its interpreter."""
    python, stamp = directory / "bin" / "python", directory / ".pins"
    if stamp.exists() and stamp.read_text() == PINS.read_text():
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(directory)], check=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    [torch] = [line for line in PINS.read_text().splitlines() if line.startswith("torch==")]
    if subprocess.run([*pip, torch], stderr=subprocess.DEVNULL, check=False).returncode != 0:
        subprocess.run([*pip, "--index-url", TORCH_INDEX, torch], check=True)
    subprocess.run([*pip, "-r", str(PINS)], check=True)
    stamp.write_text(PINS.read_text())
    return python


def run_variant(python: Path, job: dict[str, Any], *, threads: int) -> list[float]:
    """Seconds of each step after warm-up, measured in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="trl-ppo-") as scratch:
        out, description = Path(scratch) / "seconds.json", Path(scratch) / "job.json"
        description.write_text(json.dumps({**job, "threads": threads, "out": str(out), "scratch": scratch}))
        # TRL's own packages alone, none of this project's.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": str(threads),
            # PPOTrainer makes its Accelerator without PPOConfig's bf16, which by itself changes nothing.
            "ACCELERATE_MIXED_PRECISION": "bf16" if job["variant"] == "autocast" else "no",
        }
        command = [str(python), str(Path(__file__).resolve()), "--job", str(description)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(
                f"error: TRL, {job['variant']}, ended with exit code {done.returncode}:\n{done.stderr[-3000:]}"
            )
        return [float(value) for value in json.loads(out.read_text())]


def train(job: dict[str, Any]) -> None:
    """Runs TRL's PPO and writes the seconds of its steps. In TRL's environment, which has none of this project."""
    import datasets
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        PreTrainedTokenizerFast,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    torch.set_num_threads(job["threads"])
    dtype = torch.bfloat16 if job["variant"] == "bf16" else torch.float32
    ppo, optim = job["ppo"], job["ppo"]["optim"]

    def policy() -> Any:
        return AutoModelForCausalLM.from_pretrained(job["chat"], dtype=dtype)

    def scorer() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(job["reward"], num_labels=1, dtype=dtype)

    # Padding is an id beyond the vocabulary, and EOS another: neither is ever sampled, so no answer ends early.
    words = {str(number): number for number in range(job["vocabulary"] + 2)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="0")),
        pad_token=str(job["vocabulary"]),
        eos_token=str(job["vocabulary"] + 1),
    )
    steps = WARMUP + job["steps"]
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

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
        processing_class=tokenizer,
        model=policy(),
        ref_model=policy(),
        reward_model=scorer(),
        value_model=scorer(),
        train_dataset=datasets.Dataset.from_dict({"input_ids": job["prompts"]}),
        data_collator=lambda rows: {"input_ids": torch.tensor([row["input_ids"] for row in rows])},
        callbacks=[Clock()],
    )
    trainer.train()
    seconds = [after - before for before, after in itertools.pairwise(ends)]
    Path(job["out"]).write_text(json.dumps(seconds[WARMUP:]))


def main() -> None:
    """Measures every variant and writes the result."""
    sys.path.insert(0, str(ROOT))
    from measuring import RESULTS, parser_of, spread, work_directory, write_result
    from ppo_work import make_work

    from model.checkpoint import read_config

    parser = parser_of(__doc__)
    parser.add_argument("shape", choices=("3.8m", "smollm2", "tiny"))
    parser.add_argument("--steps", type=int, default=12, help="measured, after warm-up")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--env", type=Path, default=ROOT / ".venv-trl")
    parser.add_argument("--smollm2", type=Path, help="SmolLM2's checkpoint, for the shape smollm2")
    options = parser.parse_args()
    python = make_environment(options.env.absolute())
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
        found: dict[str, list[float]] = {}
        for variant, threads in itertools.product(options.variants, options.threads):
            name = f"{variant}, {threads} threads" if threads > 1 else f"{variant}, 1 thread"
            found[name] = run_variant(python, {**job, "variant": variant}, threads=threads)
            print(name, f"{statistics.median(found[name]):.3f} s a step", flush=True)
        config = {**work.described(), "trl": "1.12.0", "pins": PINS.name}
    best = min(found, key=lambda name: statistics.median(found[name]))
    batch = work.section.batch_size
    measured = {
        "best": best,
        "samples_per_s": spread([batch / seconds for seconds in found[best]]),
        "step_s": {name: spread(seconds) for name, seconds in found.items()},
        "warmup": WARMUP,
    }
    config.pop("precision")
    write_result(options.result or RESULTS / f"trl_ppo_{options.shape}.json", measured, config=config, load=load)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        train(json.loads(Path(sys.argv[2]).read_text()))
    else:
        main()
