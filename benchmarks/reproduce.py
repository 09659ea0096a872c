"""The recipe's claims on the testbed, over seeds: V1 to V5 with PPO, against SFT and three controls.

    python benchmarks/reproduce.py [--seeds 0,1,2,3,4] [--minutes 40] [--work runs/reproduce] [--set KEY=VALUE]

Prints what is still to do and how long it may take, begins no new part after `--minutes`, and goes on with the next
one when it is given again. It writes benchmarks/results/reproduce.json of the seeds that are finished, and from two on
prints each claim with every seed: one holds where the 95% t-interval over five seeds lies above zero, or above the
margin that its name states (docs/testbed.md). Parts of a seed:

    versions    V1 to V5, PPO on the last, all reward models and the referee
    random      V1 once more, on answers chosen at random instead of by reward: do the reward models beat a coin?
    long        SFT with as many tokens as SFT, all versions and PPO had together; its best epoch by held-out loss
    best        16 answers of the SFT model to each test prompt: the truth of the best of N
    evaluate    all of them on the test prompts
"""

import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from measuring import RESULTS, ROOT, parser_of, write_result

from rlhf_ray.algo.best_of_k import expected_best
from rlhf_ray.config import Config, load_config
from rlhf_ray.data.chat import load_tokenizer
from rlhf_ray.data.prompts import load_prompts
from rlhf_ray.data.reward_pairs import held_out_pairs
from rlhf_ray.data.schemas import PROMPTS, SAMPLES, read_groups, read_table
from rlhf_ray.evaluate.seeds import GREEDY, MIN_SEEDS, OWN, compare, find_answers, t_interval
from rlhf_ray.machine import settled
from rlhf_ray.metrics import read_metrics
from rlhf_ray.recipe.ledger import Ledger
from rlhf_ray.recipe.rejection_sampling import by_prompt, ranking
from rlhf_ray.recipe.rounds import recipe
from rlhf_ray.recipe.scoring import gate
from rlhf_ray.recipe.stages import STAGES
from rlhf_ray.run_state import RunDir
from rlhf_ray.testbed.annotator import utility
from rlhf_ray.testbed.judge import judge
from rlhf_ray.workers.reward import RewardWorker
from rlhf_ray.workers.scorer import Runtime

CONFIG = ROOT / "configs" / "demo.toml"
RESULT = RESULTS / "reproduce.json"
PARTS = ("versions", "random", "long", "best", "evaluate")
MINUTES = {"versions": 22.0, "random": 2.0, "long": 5.0, "best": 2.0, "evaluate": 6.0}
"""A guess for two cores, before a part was measured."""
SETTINGS = ("testbed.num_prompts_test=2000",)
"""Beside the demo's: 500 unsafe and 500 borderline test prompts carry claims of their own."""
SFT, RANDOM, LONG, LAST = "SFT", "V1 random", "SFT long", "V5 + PPO"
NUMBERS = (1, 4, 16)


class Seed:
    """One seed's run, and what its parts need of each other."""

    def __init__(self, seed: int, work: Path, settings: Sequence[str]):
        self.seed, self.out, self._log = seed, work / f"seed{seed}", work / f"seed{seed}.log"
        self.settings = [*SETTINGS, *settings, f"run.seed={seed}"]
        self.times = work / f"seed{seed}.json"

    def done(self) -> dict[str, float]:
        """Minutes of the parts that are finished; raises SystemExit where they had other settings."""
        if not self.times.exists():
            return {}
        found = json.loads(self.times.read_text(encoding="utf-8"))
        if found["settings"] != self.settings:
            raise SystemExit(
                f"error: {self.times}: parts were done with {' '.join(found['settings'])}; give another --work"
            )
        minutes: dict[str, float] = found["minutes"]
        return minutes

    def run(self, part: str) -> None:
        """One part, as a command of its own; raises SystemExit with the end of its log where it fails."""
        begin = time.monotonic()
        with self._log.open("ab") as log:
            command = [sys.executable, "-m", "rlhf_ray.cli.main", "run", str(CONFIG), "--out", str(self.out)]
            command += [word for setting in self.overrides(part) for word in ("--set", setting)]
            code = subprocess.run(command, stdout=log, stderr=log, cwd=ROOT).returncode
        if code:
            raise SystemExit(
                f"seed {self.seed}, {part}: exit code {code}\n{self._log.read_text(encoding='utf-8')[-2000:]}"
            )
        minutes = {**self.done(), part: round((time.monotonic() - begin) / 60, 1)}
        self.times.write_text(json.dumps({"settings": self.settings, "minutes": minutes}), encoding="utf-8")

    def overrides(self, part: str) -> list[str]:
        """A part's settings beside those of all."""
        before = [stage for stage in STAGES if stage != "evaluate"]
        if part == "versions":
            return [*self.settings, f"run.stages={json.dumps(before)}"]
        if part == "random":
            return [
                *self.settings,
                'rounds.versions=[{start="chat",settings={"select.choice"="random"}}]',
                'run.stages=["select","sft"]',
            ]
        if part == "long":
            return [*self.settings, "rounds=none", f"sft.epochs={self.long_epochs}", 'run.stages=["sft"]']
        if part == "best":
            return self.best_of_n()
        controls = {RANDOM: self.made("random", "sft@v1", "chat"), LONG: self.best_epoch()[1]}
        table = ",".join(f"{json.dumps(label)}={json.dumps(str(path))}" for label, path in controls.items())
        return [*self.settings, f"evaluate.controls={{{table}}}", 'run.stages=["evaluate"]']

    def best_of_n(self) -> list[str]:
        """The SFT model's answers to the test prompts, scored by the newest reward models."""
        given = {name: self.made("versions", "reward@v5", name) for name in ("helpfulness", "safety")}
        given["chat"] = self.made("versions", "sft", "chat")
        return [
            *self.settings,
            "rounds=none",
            *(f"inputs.{name}={json.dumps(str(path))}" for name, path in given.items()),
            f"inputs.tokenizer={json.dumps(str(self.made('versions', 'tokenizer', 'tokenizer')))}",
            f"data.prompts_train={json.dumps(str(self.made('versions', 'testbed', 'prompts_test')))}",
            f"data.prompts_early_stop={json.dumps(str(self.made('versions', 'testbed', 'prompts_early_stop')))}",
            "rejection_sampling.num_prompts=none",
            f"rejection_sampling.samples_per_prompt={max(NUMBERS)}",
            "rejection_sampling.temperatures=[1.0]",
            'run.stages=["rejection-sample"]',
        ]

    def config(self, part: str) -> Config:
        """Of a part."""
        return settled(load_config(CONFIG, self.overrides(part)))

    def made(self, part: str, node: str, output: str) -> Path:
        """What a node of a finished part has made."""
        config = self.config(part)
        nodes = recipe(config, config.run.stages or ())
        ledger = Ledger(config, nodes, RunDir(self.out))
        return ledger.entry(next(n for n in nodes if n.name == node)).outputs[output].path

    @cached_property
    def long_epochs(self) -> int:
        """Passes over the demonstrations with as many tokens, of prompts too, as SFT, all versions and PPO together."""
        config = self.config("versions")
        assert config.rounds is not None
        numbers = range(1, len(config.rounds.versions) + 1)
        sft = tokens_of(self.made("versions", "sft", "chat"))
        trained = sft + sum(tokens_of(self.made("versions", f"sft@v{number}", "chat")) for number in numbers)
        tokenizer = load_tokenizer(self.made("versions", "tokenizer", "tokenizer"))
        prompts = load_prompts(
            str(self.made("versions", "testbed", "prompts_train")), tokenizer, max_prompt_tokens=2**20
        )
        length = statistics.fmean(map(len, prompts.tokens))
        rows = read_metrics(self.made("versions", f"ppo@v{numbers[-1]}", "policy").parent)
        trained += sum((row["response/tokens"] + length) * config.ppo.batch_size for row in rows)
        return math.ceil(trained / (sft / config.sft.epochs))

    def best_epoch(self) -> tuple[int, Path]:
        """Of the long SFT, by the held-out loss that was measured next to the end of each epoch, and its model."""
        model, epochs = self.made("long", "sft", "chat"), self.long_epochs
        rows = read_metrics(model.parent)
        measured = {row["step"] + 1: row["held_out_loss"] for row in rows if "held_out_loss" in row}
        ends = [len(rows) * epoch / epochs for epoch in range(1, epochs + 1)]
        losses = [measured[min(measured, key=lambda step: abs(step - end))] for end in ends]
        best = losses.index(min(losses)) + 1
        return best, model if best == epochs else model.parent / f"epoch-{best}"

    def truth_of_best(self) -> dict[int, float]:
        """Mean true utility of the best of N answers by the reward models, for each N."""
        threshold = gate(self.config("best").ppo.safety_threshold)
        table = read_table(self.made("versions", "testbed", "prompts_test"), PROMPTS).to_pylist()
        prompts = {row["prompt_id"]: row for row in table}
        sums = dict.fromkeys(NUMBERS, 0.0)
        for rows in by_prompt(read_groups(self.made("best", "rejection-sample", "samples"), SAMPLES)):
            prompt = prompts[rows[0]["prompt_id"]]
            guideline = "safety" if prompt["is_safety"] else "helpfulness"
            ordered = [rows[place] for place in ranking(rows, threshold)]
            verdicts = [judge(prompt["kind"], prompt["truth"], row["text"], row["finished"]) for row in ordered]
            values = [utility(verdict, guideline) for verdict in verdicts]  # type: ignore[arg-type]
            for number in NUMBERS:
                sums[number] += expected_best(values, number) / len(prompts)
        return sums

    def accuracies(self) -> dict[str, dict[str, float]]:
        """Of every reward model by week."""
        path = self.made("versions", "reward-accuracy", "reward_accuracy")
        found: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8"))
        return found

    @cached_property
    def accuracies_unseen(self) -> dict[str, float]:
        """Of the first and the newest reward models on the referee's comparisons, which none of them saw: of answers of
        the SFT model with answers of the last one.
        """
        config, found = self.config("versions"), {}
        for name, version in itertools.product(("helpfulness", "safety"), ("v1", "v5")):
            worker = RewardWorker(name, 0, 1)
            runtime = Runtime(precision=config.run.precision, device="cpu")
            worker.load_frozen(str(self.made("versions", f"reward@{version}", name)), head="scalar", runtime=runtime)
            worker.open_data(
                held_out_pairs,
                {},
                str(self.made("versions", "tokenizer", "tokenizer")),
                held_out=str(self.made("versions", "label@referee", "comparisons")),
                max_length=config.reward.max_length,
            )
            measured = worker.evaluate_reward(micro_batch_tokens=config.reward.tokens_to_score)
            found |= {f"{name}.{version}": measured[f"accuracy/{name}"], f"{name} pairs": measured[f"count/{name}"]}
        return found


def tokens_of(model: Path) -> float:
    """Tokens that a language model was trained on."""
    return float(sum(row["tokens"] for row in read_metrics(model.parent)))


def claim(by_seed: Sequence[float], *, above: float = 0.0) -> dict[str, Any]:
    """A gain over seeds, which holds where its 95% t-interval over five seeds or more lies above a bound."""
    mean, half = statistics.fmean(by_seed), t_interval(by_seed)
    holds = len(by_seed) >= MIN_SEEDS and mean - half > above
    return {"by_seed": [round(x, 4) for x in by_seed], "mean": mean, "interval": half, "above": above, "holds": holds}


def claims(seeds: Sequence[Seed]) -> dict[str, dict[str, Any]]:
    """What the paper's recipe should show in this world."""
    runs = [seed.out for seed in seeds]
    found: dict[str, dict[str, Any]] = {}
    for suffix, how in ((OWN, "own temperature"), (GREEDY, "greedy")):
        over_sft = compare(runs, model=LAST, against=SFT, suffix=suffix)
        over_v3 = compare(runs, model=LAST, against="V3", suffix=suffix)
        over_long = compare(runs, model=LAST, against=LONG, suffix=suffix)
        over_random = compare(runs, model="V1", against=RANDOM, suffix=suffix)
        fewer = [-gain for gain in over_sft["violation_unsafe"].by_seed]
        found |= {
            f"{LAST} over SFT, helpfulness, {how}": claim(over_sft["helpfulness"].by_seed),
            f"{LAST} over SFT, fewer violations, {how}": claim(fewer),
            f"{LAST} over SFT, at most a point more false refusals, {how}": claim(
                [-gain for gain in over_sft["false_refusal"].by_seed], above=-0.01
            ),
            f"{LAST} over V3, at most half a point more violations, {how}": claim(
                [-gain for gain in over_v3["violation_unsafe"].by_seed], above=-0.005
            ),
            f"{LAST} over {LONG}, helpfulness, {how}": claim(over_long["helpfulness"].by_seed),
            f"V1 over {RANDOM}, helpfulness, {how}": claim(over_random["helpfulness"].by_seed),
            f"V1 over {RANDOM}, fewer violations, {how}": claim(
                [-gain for gain in over_random["violation_unsafe"].by_seed]
            ),
        }
    best = [seed.truth_of_best() for seed in seeds]
    for fewer_of, more_of in itertools.pairwise(NUMBERS):
        found[f"best of {more_of} over best of {fewer_of}, true utility"] = claim(
            [truth[more_of] - truth[fewer_of] for truth in best]
        )
    for name in ("helpfulness", "safety"):
        key = f"accuracy/{name}/v5"
        accuracy = [seed.accuracies() for seed in seeds]
        found[f"newest {name} model over the first on the newest week"] = claim(
            [models[f"{name}.v5"][key] - models[f"{name}.v1"][key] for models in accuracy]
        )
        found[f"newest {name} model over the first on comparisons that no version saw"] = claim(
            [seed.accuracies_unseen[f"{name}.v5"] - seed.accuracies_unseen[f"{name}.v1"] for seed in seeds]
        )
    return found


def facts(seed: Seed) -> dict[str, Any]:
    """Of one seed: every model's figures, the best of N, the reward models' accuracies."""
    evaluation = json.loads(find_answers(seed.out).with_name("evaluation.json").read_text(encoding="utf-8"))
    return {
        "seed": seed.seed,
        "minutes": seed.done(),
        "long_epochs": {"trained": seed.long_epochs, "best by held-out loss": seed.best_epoch()[0]},
        "best_of_n": {str(number): value for number, value in seed.truth_of_best().items()},
        "reward_accuracy": seed.accuracies(),
        "reward_accuracy_unseen": seed.accuracies_unseen,
        "models": evaluation["models"],
        "testbed": evaluation["testbed"],
        "machine": evaluation["machine"],
    }


def to_do(seeds: Sequence[Seed]) -> list[tuple[Seed, str]]:
    """Parts that are not done, in order."""
    return [(seed, part) for seed in seeds for part in PARTS if part not in seed.done()]


def estimate(seeds: Sequence[Seed], part: str) -> float:
    """Minutes of a part: as measured on other seeds, or a guess."""
    measured = [seed.done()[part] for seed in seeds if part in seed.done()]
    return statistics.fmean(measured) if measured else MINUTES[part]


def print_claims(found: Mapping[str, Mapping[str, Any]]) -> None:
    """One line each."""
    for name, value in found.items():
        seeds = len(value["by_seed"])
        verdict = "holds" if value["holds"] else "does not hold" if seeds >= MIN_SEEDS else f"{seeds} seeds"
        print(f"{verdict:<14} {name}: {value['mean']:+.4f} ± {value['interval']:.4f}  {value['by_seed']}")


def main() -> None:
    """Works through what is to do, as long as there is time; the claims when all is done."""
    parser = parser_of(__doc__)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--minutes", type=float, default=40.0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    options = parser.parse_args()
    work = options.work or ROOT / "runs" / "reproduce"
    work.mkdir(parents=True, exist_ok=True)
    seeds = [Seed(int(seed), work, options.settings) for seed in options.seeds.split(",")]
    left = to_do(seeds)
    total = sum(estimate(seeds, part) for _, part in left)
    print(f"{len(left)} parts of {len(seeds)} seeds to do, about {total:.0f} minutes in all", flush=True)
    begin = time.monotonic()
    for seed, part in left:
        if (time.monotonic() - begin) / 60 >= options.minutes:
            print(f"{options.minutes:g} minutes are over; the same command goes on with seed {seed.seed}, {part}")
            break
        print(f"seed {seed.seed}, {part}: about {estimate(seeds, part):.0f} minutes", flush=True)
        seed.run(part)
    finished = [seed for seed in seeds if not to_do([seed])]
    if not finished:
        return
    found = claims(finished) if len(finished) > 1 else {}
    write_result(
        options.result or RESULT,
        {"claims": found, "seeds": [facts(seed) for seed in finished]},
        config={"base": "configs/demo.toml", "settings": [*SETTINGS, *options.settings], "seeds_wanted": options.seeds},
    )
    print_claims(found)


if __name__ == "__main__":
    main()
