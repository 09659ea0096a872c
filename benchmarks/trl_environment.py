"""TRL in environments of its own, pinned whole: made at the first call, one for each version of TRL."""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PINS = ROOT / "benchmarks" / "requirements-trl.txt"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"  # PyTorch's own, asked for torch alone
VARIANTS = ("fp32", "autocast", "bf16")
"""Everything in fp32; fp32 weights with matrix products in bf16; everything in bf16, without fp32 master weights."""
WARMUP = 3


def make_environment(directory: Path, *, trl: str) -> Path:
    """Creates the virtual environment with that version of TRL unless it is there; returns its interpreter."""
    python, stamp, pins = directory / "bin" / "python", directory / ".pins", directory / "requirements.txt"
    text = PINS.read_text(encoding="utf-8") + f"trl=={trl}\n"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == text:
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(directory)], check=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    pins.write_text(text, encoding="utf-8")
    [torch] = [line for line in text.splitlines() if line.startswith("torch==")]
    if subprocess.run([*pip, torch], stderr=subprocess.DEVNULL, check=False).returncode != 0:
        subprocess.run([*pip, "--index-url", TORCH_INDEX, torch], check=True)
    subprocess.run([*pip, "-r", str(pins)], check=True)
    stamp.write_text(text, encoding="utf-8")
    return python


def run_variant(python: Path, script: str, job: dict[str, Any], *, threads: int) -> list[float]:
    """Seconds of each step after warm-up, measured by `script --job FILE` in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="trl-") as scratch:
        out, description = Path(scratch) / "seconds.json", Path(scratch) / "job.json"
        description.write_text(
            json.dumps({**job, "threads": threads, "out": str(out), "scratch": scratch}), encoding="utf-8"
        )
        # TRL's own packages alone, none of this project's.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": str(threads),
            # PPOTrainer makes its Accelerator without PPOConfig's bf16, which by itself changes nothing there.
            "ACCELERATE_MIXED_PRECISION": "bf16" if job["variant"] == "autocast" else "no",
        }
        command = [str(python), str(Path(script).resolve()), "--job", str(description)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8", check=False)
        if done.returncode != 0:
            raise SystemExit(
                f"error: TRL, {job['variant']}, ended with exit code {done.returncode}:\n{done.stderr[-3000:]}"
            )
        return [float(value) for value in json.loads(out.read_text(encoding="utf-8"))]


def step_clock(ends: list[float]) -> Any:
    """A callback that notes when training begins and when each step ends. In TRL's environment."""
    import time

    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    return Clock()


def wordless_tokenizer(vocabulary: int) -> Any:
    """A tokenizer for data that is token ids already; padding and EOS are ids beyond the vocabulary, never sampled."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {str(number): number for number in range(vocabulary + 2)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="0")),
        pad_token=str(vocabulary),
        eos_token=str(vocabulary + 1),
    )


def write_seconds(job: dict[str, Any], ends: list[float]) -> None:
    """Writes the seconds of each step after warm-up, from when training began and each step ended."""
    seconds = [after - before for before, after in itertools.pairwise(ends)]
    Path(job["out"]).write_text(json.dumps(seconds[WARMUP:]), encoding="utf-8")


def trl_parser(doc: str | None, *, environment: str, steps: int) -> argparse.ArgumentParser:
    """A parser with the options that both scripts have, and two of their defaults."""
    from measuring import parser_of

    parser = parser_of(doc)
    parser.add_argument("--smollm2", type=Path, help="SmolLM2's checkpoint, for the shape smollm2")
    parser.add_argument("--steps", type=int, default=steps, help="measured, after warm-up")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--env", type=Path, default=ROOT / environment)
    return parser


def run_variants(python: Path, script: str, job: dict[str, Any], options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each step, by variant and number of threads."""
    found: dict[str, list[float]] = {}
    for variant, threads in itertools.product(options.variants, options.threads):
        name = label(variant, threads)
        found[name] = run_variant(python, script, {**job, "variant": variant}, threads=threads)
        print(name, f"{statistics.median(found[name]):.3f} s a step", flush=True)
    return found


def label(variant: str, threads: int) -> str:
    """How results name a setting."""
    return f"{variant}, {threads} threads" if threads > 1 else f"{variant}, 1 thread"
