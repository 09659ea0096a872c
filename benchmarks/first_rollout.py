"""Seconds from the command `rlhf-ray ppo` to the first answers, and to those of the first PPO step.

    python benchmarks/first_rollout.py testbed
    python scripts/fetch_smollm2.py DIR && python benchmarks/first_rollout.py smollm2 --smollm2 DIR

Options: [--repeats 3] [--precision bf16] [--work DIR] [--result FILE]; `tiny --repeats 1` tries the script out.

Each repeat is a new process, which starts Ray, six roles, DeepSpeed and vLLM on models and prompts made before. The
first answers are those to the held-out prompts, by which early stopping knows the policy before its first step. The
clock runs from before the process starts until an engine has the answers; then the run is stopped. Files are in the
page cache from the second repeat on; `first` tells the first apart. Writes benchmarks/results/first_rollout_SHAPE.json.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from measuring import RESULTS, per_phase, work_directory, write_result
from ppo_work import Work, make_work, work_parser

import rlhf_ray.workers.roles as roles_module
from model.checkpoint_files import read_config
from rlhf_ray.data.chat import load_tokenizer
from rlhf_ray.data.schemas import PROMPTS, write_table
from rlhf_ray.workers.rollout import RolloutWorker

STAMPS = "FIRST_ROLLOUT_STAMPS"
MOMENTS = ("first_answers", "first_step_answers")
TIMEOUT_S = 600


class StampingRollout(RolloutWorker):
    """Writes down when it has answers."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        answers = super().generate(*args, **kwargs)
        with Path(os.environ[STAMPS]).open("a", encoding="utf-8") as stamps:
            stamps.write(f"{time.time()}\n")
        return answers


def write_prompts(work: Work, directory: Path) -> dict[str, Path]:
    """The work's prompts as tables of text, as the PPO stage reads them."""
    tokenizer = load_tokenizer(work.chat)
    longest = read_config(work.chat).max_seq_len - work.response_tokens
    rows = []
    for i, tokens in enumerate(work.prompts[: work.section.batch_size]):
        text = tokenizer.decode(tokens, skip_special_tokens=True)[: longest // 4]
        message = {"role": "user", "content": text.strip() or "which is a fish?"}
        rows.append({"prompt_id": f"p{i}", "messages": [message], "is_safety": False, "kind": "random", "truth": ""})
    tables = {name: directory / f"{name}.parquet" for name in ("prompts_train", "prompts_early_stop")}
    for path in tables.values():
        write_table(path, rows, PROMPTS)
    return tables


def command(work: Work, tables: dict[str, Path], out: Path) -> list[str]:
    """The arguments of `rlhf-ray` for PPO on this work."""
    config = out.with_suffix(".toml")
    ppo = work.section
    settings = {
        "run.precision": work.precision,
        "inputs.tokenizer": work.chat,
        "inputs.chat": work.chat,
        "inputs.helpfulness": work.helpfulness,
        "inputs.safety": work.safety,
        **{f"data.{name}": path for name, path in tables.items()},
        "ppo.batch_size": ppo.batch_size,
        "ppo.minibatch_size": ppo.minibatch_size,
        "ppo.micro_batch_tokens": ppo.micro_batch_tokens,
        "ppo.max_new_tokens": ppo.max_new_tokens,
    }
    config.write_text("", encoding="utf-8")
    overrides = [text for key, value in settings.items() for text in ("--set", f"{key}={value}")]
    return ["ppo", str(config), "--out", str(out), *overrides]


def seconds_of(arguments: list[str], stamps: Path, log: Path) -> dict[str, float]:
    """One repeat: seconds from before the command to each of MOMENTS.

    Raises:
        SystemExit: the command ended, or ten minutes passed, before the answers were there.
    """
    start = time.time()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, __file__, "--child", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {STAMPS: str(stamps)},
        )
    try:
        while not stamps.exists() or len(stamps.read_text(encoding="utf-8").splitlines()) < len(MOMENTS):
            if process.poll() is not None or time.time() - start > TIMEOUT_S:
                raise SystemExit(f"error: the run gave no answers; it said:\n{log.read_text(encoding='utf-8')[-2000:]}")
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    return {
        name: float(text) - start
        for name, text in zip(MOMENTS, stamps.read_text(encoding="utf-8").splitlines(), strict=False)
    }


def main() -> None:
    """Measures one shape and writes the result."""
    parser = work_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    load = os.getloadavg()
    rows = []
    with work_directory(options.work, prefix="first-rollout-") as directory:
        work = make_work(options.shape, directory, smollm2=options.smollm2, precision=options.precision)
        tables = write_prompts(work, directory)
        for repeat in range(options.repeats):
            out = directory / f"run-{os.getpid()}-{repeat}"
            rows.append(seconds_of(command(work, tables, out), out.with_suffix(".stamps"), out.with_suffix(".log")))
            print({name: round(value, 1) for name, value in rows[-1].items()}, flush=True)
        config = work.described()
    measured = {"seconds": per_phase(rows), "first": {name: round(value, 2) for name, value in rows[0].items()}}
    path = options.result or RESULTS / f"first_rollout_{options.shape}.json"
    write_result(path, measured, config=config, load=load)


def child(arguments: list[str]) -> None:
    """`rlhf-ray` with an engine that writes down when it has answers."""
    from rlhf_ray.cli.main import main as rlhf_ray

    roles_module.WORKER_CLASSES["rollout"] = StampingRollout
    sys.argv = ["rlhf-ray", *arguments]
    rlhf_ray()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    else:
        main()
