"""Would longer supervised fine-tuning have done as well as PPO?

    python benchmarks/sft_control.py runs/demo-seed0 runs/demo-seed1 runs/demo-seed2

For each finished run: fine-tunes the same base model on the same demonstrations for as many more epochs as PPO's
compute would have paid for, has SFT, PPO and this control answer the run's test prompts, and compares PPO with both
over the seeds by the rule of docs/testbed.md. Writes benchmarks/results/sft_control.json.

Compute is counted in forward passes of a token through the model, a backward pass as two: PPO takes twelve for each
token of prompt and answer (sampling; policy, reference, value and both rewards; two models trained at three each), SFT
three. Collecting comparisons and training reward models is not counted: it would only lengthen the control.
"""

import argparse
import json
import math
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measuring import RESULTS, write_result

from rlhf_ray.config import Config, parse_config
from rlhf_ray.data.chat import load_tokenizer
from rlhf_ray.data.prompts import load_prompts
from rlhf_ray.evaluate.seeds import GREEDY, MEASURES, compare, print_comparison
from rlhf_ray.metrics import read_metrics
from rlhf_ray.recipe.run import run_recipe
from rlhf_ray.recipe.stages import Artefact

RESULT = RESULTS / "sft_control.json"
LABEL = "SFT long"
PPO_PASSES, SFT_PASSES = 12, 3


def control_epochs(config: Config, made: dict[str, Artefact]) -> tuple[int, dict[str, float]]:
    """Epochs of SFT that cost what the run's SFT and PPO cost together, and the counts behind it."""
    prompts = load_prompts(str(made["prompts_train"].path), load_tokenizer(made["chat"].path), max_prompt_tokens=2**20)
    prompt_tokens = statistics.fmean(len(tokens) for tokens in prompts.tokens)
    ppo_tokens = sum(
        config.ppo.batch_size * (prompt_tokens + row["response/tokens"])
        for row in read_metrics(made["policy"].path.parent)
    )
    epoch_tokens = sum(row["tokens"] for row in read_metrics(made["chat"].path.parent)) / config.sft.epochs
    more = math.ceil(PPO_PASSES * ppo_tokens / (SFT_PASSES * epoch_tokens))
    return config.sft.epochs + more, {"ppo_tokens": ppo_tokens, "sft_tokens_per_epoch": epoch_tokens}


def run_control(run: Path) -> dict[str, Any]:
    """Trains and evaluates one run's control."""
    raw = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["config"]
    config = parse_config(raw)
    made = run_recipe(config, run, stages=("evaluate",))
    epochs, counts = control_epochs(config, made)
    longer = parse_config({**raw, "sft": {**raw["sft"], "epochs": epochs}})
    control = run_recipe(longer, run, stages=("sft",))["chat"].path
    compared = parse_config({**raw, "evaluate": {**raw["evaluate"], "controls": {LABEL: str(control)}}})
    found = run_recipe(compared, run, stages=("evaluate",))["evaluation"].path
    evaluation = json.loads(found.read_text(encoding="utf-8"))
    losses = {
        name: [row["held_out_loss"] for row in read_metrics(path.parent) if "held_out_loss" in row]
        for name, path in (("SFT", made["chat"].path), (LABEL, control))
    }
    return {"seed": config.run.seed, "epochs": epochs, **counts, "held_out_loss": losses, **evaluation}


def main() -> None:
    """Runs the controls and writes the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="finished runs of one config, one per seed")
    runs = parser.parse_args().runs
    start = time.perf_counter()
    seeds = [run_control(run) for run in runs]
    gains = {
        f"PPO against {against}{suffix}": {
            name: asdict(gain)
            | {"mean": gain.mean, "interval": gain.interval, "verdict": gain.verdict(MEASURES[name].direction)}
            for name, gain in compare(runs, against=against, suffix=suffix).items()
        }
        for against in ("SFT", LABEL)
        for suffix in ("", GREEDY)
    }
    measured = {"seconds": time.perf_counter() - start, "gains": gains, "seeds": seeds}
    write_result(RESULT, measured, config={"runs": [str(run) for run in runs]})
    for against in ("SFT", LABEL):
        print_comparison(runs, against=against)


if __name__ == "__main__":
    main()
