"""What needs a GPU, in order of value: each step a command with its own limit, and a line of JSON when it ends.

    python scripts/gpu_check.py [PART ...] [--out DIR] [--device cpu] [--set KEY=VALUE ...]

Parts: numeric, demo, train, rollout, sync, round, ranks, two; by default all, in this order. A step takes four minutes
at most; one that fails or runs out of time ends alone. DIR/check.jsonl holds a line of each, and what was run is not
run again. `--set` changes what every run and benchmark of the project is given. With `--device cpu` small shapes
stand in, and everything but the figures is as on a GPU. Where torch is older than the project's, scripts/older_stack
has it and its vLLM understand what they are asked.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 240
NOT_RUN = "not run"
"""In place of an exit status, for want of GPUs."""
TORCH = (2, 13)
"""The project's; with an older one comes an older vLLM."""


@dataclass(frozen=True)
class Step:
    """One command of a part."""

    name: str
    command: list[str]
    limit_s: int = LIMIT_S
    result: str = ""
    """File below DIR with figures, which go into the line."""
    gpus: int = 1
    env: dict[str, str] = field(default_factory=dict)


def set_options(settings: Iterable[str]) -> list[str]:
    """Settings as the command line takes them."""
    return [word for setting in settings for word in ("--set", setting)]


def parts(device: str, out: Path, given: Sequence[str] = ()) -> dict[str, list[Step]]:
    """All steps; `given` are settings as of `--set`."""
    on_gpu = device == "cuda"
    rlhf_ray, python = [sys.executable, "-m", "rlhf_ray.cli.main"], [sys.executable]
    pytest = [*python, "-m", "pytest", "-q"]
    shape = "1b" if on_gpu else "tiny"
    small = [] if on_gpu else ["--micro-tokens", "256", "--micro-batches", "2", "--steps", "2"]
    settings = {
        "run.device": device,
        "model.preset": shape,
        "tokenizer.vocab_size": 32_000 if on_gpu else 512,
        "roles.policy.zero_stage": 2,  # so that they can leave the GPU to others
        "roles.value.zero_stage": 2,
        "ppo.batch_size": 64 if on_gpu else 4,
        "ppo.minibatch_size": 32 if on_gpu else 4,
    }
    chosen = set_options(f"{key}={value}" for key, value in settings.items())
    tokens = "256" if on_gpu else "8"
    lengths = ["--prompt-tokens", tokens, "--response-tokens", tokens, "--repeats", "3", "--warmup", "1"]
    empty = out / "empty.toml"
    empty.write_text("", encoding="utf-8")

    def bench(name: str, *more: str, gpus: int = 1) -> Step:
        """`name` begins with the benchmark; `more` are settings."""
        file = f"bench_{name.replace(' ', '_').replace(',', '')}.json"
        what, own = name.split()[0].strip(","), set_options((*more, *given))
        command = [*rlhf_ray, "bench", what, str(empty), *chosen, *own, *lengths, "--out", str(out / file)]
        return Step(f"bench {name}", command, result=file, gpus=gpus)

    def train(shape: str, *more: str) -> Step:
        """More: what is different, then options."""
        name = " ".join(["train", shape, *more[:1]]).strip()
        file = f"{name.replace(' ', '_')}.json"
        command = [*python, "benchmarks/train_speed.py", shape, *small, *more[1:], "--result", str(out / file)]
        return Step(name, command, result=file)

    def two_ranks(what: str, stage: int, *more: str) -> Step:
        settings = [f"roles.policy.zero_stage={stage}", "roles.policy.num_ranks=2", "ppo.num_chunks=2", *more]
        settings += ["roles.rollout.num_engines=2"] if what == "round" else []
        return bench(f"{what}, two ranks, ZeRO {stage}", *settings, gpus=2)

    sizes = ["--batch", str(settings["ppo.batch_size"]), "--vocab-size", str(settings["tokenizer.vocab_size"])]
    command = [*python, "benchmarks/rollout_speed.py", shape, *sizes, *lengths, "--result", str(out / "alone.json")]
    alone = Step("vLLM alone", command, result="alone.json")
    demo = {
        "run.device": device,
        "rounds": "none",
        "pretrain.num_steps": 300 if on_gpu else 5,
        "sft.epochs": 1,
        "pairs.num_prompts": 1000 if on_gpu else 40,
        "ppo.num_steps": 6 if on_gpu else 1,
        "testbed.num_prompts_test": 200 if on_gpu else 20,
    }
    if not on_gpu:
        demo |= {"testbed.num_corpus": 500, "testbed.num_demonstrations": 200}
        demo |= {"ppo.batch_size": 8, "ppo.minibatch_size": 8}
    demo_settings = set_options((*(f"{key}={value}" for key, value in demo.items()), *given))
    return {
        "numeric": [
            Step("attention", [*pytest, "tests/test_model_llama.py", "-k", "end_to_end"]),
            Step("kernels", [*pytest, "tests/test_model_fused.py", "-k", "cuda"]),
        ],
        "demo": [Step("demo", [*rlhf_ray, "run", "configs/demo.toml", "--out", str(out / "demo"), *demo_settings])],
        "train": [
            train(shape),
            train(shape, "recompute", "--kinds", "sft", "--zero", "2", "--recompute", "none,selective,full"),
            replace(
                train(shape, "without kernels", "--kinds", "sft", "--zero", "2"), env={"TORCH_COMPILE_DISABLE": "1"}
            ),
            *([train("3b", "", "--zero", "2", "--steps", "4")] if on_gpu else []),
        ],
        "rollout": [bench("rollout"), alone],
        "sync": [bench("sync"), bench("sync store", 'roles.rollout.weights="store"')],
        "round": [bench("round")],
        "ranks": [two_ranks("train", stage, f"ppo.micro_batch_tokens={2048 if on_gpu else 16}") for stage in (1, 2)],
        "two": [
            *(two_ranks("round", stage) for stage in (2, 3)),
            bench("sync from GPU to GPU", gpus=2),  # two roles on two GPUs: each has its own
            # Iterations compare the engine's log-probs with the policy's, so that what NCCL brings is proved too.
            bench("round from GPU to GPU", "roles.policy.gpus=[0]", "roles.rollout.gpus=[1]", gpus=2),
            bench("rollout, tensor parallel", "roles.rollout.tensor_parallel_size=2", gpus=2),
        ],
    }


def environment() -> dict[str, str]:
    """Of this process; and what every other needs where libraries are older."""
    torch = tuple(int(part) for part in importlib.metadata.version("torch").split(".")[:2])
    older = [str(ROOT / "scripts" / "older_stack")] if torch < TORCH else []
    paths = [*older, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, **({"PYTHONPATH": os.pathsep.join(paths)} if paths else {})}


def run(step: Step, out: Path) -> dict[str, object]:
    """Runs one; its output goes to a log of its name."""
    log = out / f"{step.name.replace(' ', '_').replace(',', '')}.log"
    begin = time.monotonic()
    # Where there are more GPUs, roles would have some of their own.
    env = {**environment(), **step.env, "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(step.gpus)))}
    with log.open("wb") as file:
        process = subprocess.Popen(step.command, stdout=file, stderr=file, cwd=ROOT, env=env, start_new_session=True)
        try:
            code: int | str = process.wait(step.limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 15)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
            code = f"over {step.limit_s} s"
    line: dict[str, object] = {"step": step.name, "rc": code, "seconds": round(time.monotonic() - begin, 1)}
    if code != 0:
        line["end"] = log.read_text(encoding="utf-8", errors="replace")[-600:]
    elif step.result and (out / step.result).exists():
        line["result"] = json.loads((out / step.result).read_text(encoding="utf-8"))
    return line


def main() -> None:
    """The parts that are asked for and not done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu_check")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    known = parts(options.device, out, options.set)
    if unknown := [part for part in options.parts if part not in known]:
        raise SystemExit(f"error: PART {unknown[0]} is not known; there are {', '.join(known)}")
    lines = out / "check.jsonl"
    told = lines.read_text(encoding="utf-8").splitlines() if lines.exists() else []
    done = {line["step"] for line in map(json.loads, told) if line["rc"] != NOT_RUN}
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    for part in options.parts or known:
        for step in known[part]:
            if step.name in done:
                continue
            if options.device == "cuda" and gpus < step.gpus:
                why = f"needs {step.gpus} GPUs, there are {gpus}"
                line: dict[str, object] = {"step": step.name, "rc": NOT_RUN, "end": why}
            else:
                line = run(step, out)
            with lines.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            shown = {name: value for name, value in line.items() if name != "result"}
            print(json.dumps(shown), flush=True)


if __name__ == "__main__":
    main()
