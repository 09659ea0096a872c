"""The final comparison: all versions of the chat model on prompts that nothing else has seen."""

import json
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from cluster.worker_group import Call, collect
from rlhf_ray.data.schemas import PROMPTS, read_table, write_table
from rlhf_ray.evaluate.diversity import self_bleu
from rlhf_ray.evaluate.seeds import GREEDY, OWN, TEMPERATURE
from rlhf_ray.evaluate.win_rates import win_rates
from rlhf_ray.progress import doing, progress_bar
from rlhf_ray.recipe.context import Context
from rlhf_ray.recipe.engines import check_swappable, decode, generate, read_prompts, start_engines
from rlhf_ray.recipe.rejection_sampling import Sampling, sample_groups
from rlhf_ray.recipe.scoring import (
    READERS,
    SUMMARY_ROLES,
    ScoringSettings,
    load_frozen,
    score,
    score_samples,
    scored_answers,
    summarize,
)
from rlhf_ray.recipe.stages import REFEREE, Artefact
from rlhf_ray.records import PromptBatch
from rlhf_ray.run_state import Step, digest, read_facts, write_json
from rlhf_ray.testbed.annotator import utility
from rlhf_ray.testbed.judge import evaluate_answers, judge
from rlhf_ray.testbed.tasks import TASKS, name_content
from rlhf_ray.testbed.version import TESTBED_VERSION
from rlhf_ray.workers.rollout import RolloutWorker
from rlhf_ray.workers.scorer import ScorerWorker

TEST_SEED, OWN_SEED, DIVERSITY_SEED = 0, 4_000_037, 5_000_011
"""Kinds of draw."""

Row = dict[str, Any]

ANSWERS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("kind", pa.string()),
        ("content", pa.string()),  # what the prompt is about, which other prompts may be too; "" where no truth tells
        ("model", pa.string()),
        ("prompt", pa.string()),
        ("is_safety", pa.bool_()),
        ("answer", pa.string()),
        ("finished", pa.bool_()),
        ("reward_helpfulness", pa.float32()),
        ("reward_safety", pa.float32()),
        ("reward_combined", pa.float32()),
        ("reward_referee", pa.float32()),
        # The judge's word where the prompt has a truth; null on prompts that a measure is not defined on.
        ("helpfulness", pa.float32()),
        ("violation", pa.bool_()),
        ("false_refusal", pa.bool_()),
        ("utility", pa.float32()),
    ]
)


def evaluate(context: Context, step: Step, inputs: Mapping[str, Artefact]) -> dict[str, Any]:
    """Samples, scores and judges answers of all models: evaluation.json and answers.parquet."""
    section, refereed = context.config.evaluate, REFEREE in inputs
    tunes = section.own_temperatures is not None
    models = compared_models(inputs)
    work = step.begin()
    table = read_table(inputs["prompts_test"].path, PROMPTS).to_pylist()
    with doing(step.name, "starting the engine, loading models"):
        context.roles.start(*SUMMARY_ROLES)
        load_frozen(context, inputs, step="evaluate")
        start_engines(context, inputs["chat"].path, inputs["tokenizer"].path)
        read = partial(read_prompts, inputs, max_new_tokens=section.max_new_tokens, readers=READERS)
        prompts = read("prompts_test", at_least=num_chunks(context))
        early_stop = read("prompts_early_stop") if tunes else None
    make = {model: partial(evaluate_model, context, path, prompts, early_stop) for model, path in models.items()}
    with progress_bar(step.name, total=len(models)) as bar:
        for model in models:
            with doing(step.name, model):
                decoded = step.kept(digest(model), make[model])["decodings"].values()
            rewards = "  ".join(f"{found['metrics']['reward_combined']:+.2f}" for found in decoded)
            bar.advance(f"{model} reward {rewards}")
    results: dict[str, dict[str, float]] = {}
    rows: dict[str, list[Row]] = {}
    tried: dict[str, dict[str, float]] = {}
    if refereed:  # in the place of the helpfulness model, which has scored all answers
        load_frozen(context, {**inputs, "helpfulness": inputs[REFEREE]}, ["helpfulness"], step="evaluate")
    for model in models:
        made = step.kept(digest(model), make[model])
        tried[model], decodings = made["tried"], made["decodings"]
        with doing(step.name, f"{model}, judges"):
            score_again = partial(referee_scores, context, prompts, decodings)
            scores = step.kept(f"{digest(model)}-{REFEREE}", score_again) if refereed else {}
        for suffix, found in decodings.items():
            rows[model + suffix] = answer_rows(table, model + suffix, found["answers"], scores.get(suffix))
            results[model + suffix] = found["metrics"] | figures(table, rows[model + suffix])
    suffixes = [OWN] * tunes + [temperature_suffix(temperature) for temperature in section.temperatures]
    labels = [model + suffix for suffix in suffixes for model in models]
    answers = [row for label in labels for row in rows[label]]
    report = {
        "testbed": judging_testbed(inputs["prompts_test"].path, results),
        "prompts": len(table),
        "machine": context.run.machine,
        "controls": list(section.controls),
        "own_temperatures": tried if tunes else {},
        "models": {label: results[label] for label in labels},
        "win_rates": win_rates(answers, list(models), suffixes),
    }
    write_json(work / "evaluation.json", report)
    write_table(work / "answers.parquet", answers, ANSWERS)
    return {"results": report["models"]}


def compared_models(inputs: Mapping[str, Artefact]) -> dict[str, Path]:
    """Label -> checkpoint, of the run's own models and the controls that the config names.

    Raises:
        UserError: one has another shape than the SFT model.
    """
    models = {name.partition(".")[2]: inputs[name] for name in inputs if name.startswith("model.")}
    for model in models.values():
        check_swappable(model.maker, model.path, inputs["chat"].path)
    return {label: model.path for label, model in models.items()}


def temperature_suffix(temperature: float) -> str:
    """How a table names a model's sampling; 1 goes without saying."""
    return "" if temperature == 1 else GREEDY if temperature == 0 else f"{TEMPERATURE}{temperature:g}"


def num_chunks(context: Context) -> int:
    """Parts the test prompts are answered in: as many for each engine as for each policy rank, and none without."""
    return math.lcm(context.config.roles.rollout.num_engines, context.config.roles.policy.num_ranks)


def evaluate_model(
    context: Context, checkpoint: Path, prompts: PromptBatch, early_stop: PromptBatch | None
) -> dict[str, Any]:
    """Answers of one checkpoint and their metrics, by the ending of the label that tells how they were decoded.

    Args:
        prompts: one answer each.
        early_stop: prompts on which it finds a temperature of its own.
    """
    roles, section = context.roles, context.config.evaluate
    roles.make_resident("policy")
    held = roles.frozen("policy")
    roles["policy"].call(ScorerWorker.load_frozen, str(checkpoint), head="lm", **held, step="evaluate")
    roles.make_resident("rollout")
    roles["rollout"].call(RolloutWorker.load_checkpoint, str(checkpoint), step="evaluate")
    temperatures = {temperature_suffix(temperature): temperature for temperature in section.temperatures}
    tried: dict[float, float] = {}
    if early_stop is not None:
        tried = {t: mean_reward(context, early_stop, t) for t in section.own_temperatures or ()}
        temperatures = {OWN: max(tried, key=lambda t: tried[t]), **temperatures}
    made = {t: decode_at(context, prompts, t) for t in dict.fromkeys(temperatures.values())}
    return {
        "tried": {f"{t:g}": reward for t, reward in tried.items()},
        "decodings": {suffix: made[t] for suffix, t in temperatures.items()},
    }


def mean_reward(context: Context, prompts: PromptBatch, temperature: float) -> float:
    """Of the loaded model's answers, one to each prompt; the reward models' word alone."""
    seed, limit = (context.config.run.seed, OWN_SEED), context.config.evaluate.max_new_tokens
    sampling = Sampling(context, scoring_settings(context, temperature), limit, seed, samples=1)
    return statistics.fmean(row["combined"] for group in sample_groups(sampling, [prompts]) for row in group)


def decode_at(context: Context, prompts: PromptBatch, temperature: float) -> dict[str, Any]:
    """The loaded model's answers, one to each prompt, and their metrics."""
    roles = context.roles
    roles.make_resident("rollout")
    rollouts = start_answers(context, prompts, temperature, seed=TEST_SEED, chunks=num_chunks(context))
    collect(rollouts, timeout_s=roles.timeout_s, step="evaluate")
    settings = scoring_settings(context, temperature)
    scores = score(roles, settings, rollouts, roles_used=SUMMARY_ROLES)
    metrics = {"temperature": temperature, **summarize(roles, settings, rollouts, scores)}
    if temperature == 0:  # greedy answers are no sample of the policy: neither figure would be what its name says
        metrics = {name: value for name, value in metrics.items() if not name.startswith(("kl_", "logprob_"))}
    elif context.config.evaluate.diversity_prompts:
        metrics["self_bleu"] = mean_self_bleu(context, prompts, temperature)
    return {"metrics": metrics, "answers": scored_answers(roles, settings, rollouts, scores)}


def mean_self_bleu(context: Context, prompts: PromptBatch, temperature: float) -> float:
    """Over prompts that are drawn, the same for all models, of several answers to each by the loaded model."""
    roles, section = context.roles, context.config.evaluate
    count, samples = min(section.diversity_prompts, len(prompts)), section.diversity_samples
    drawn = random.Random(f"{context.config.run.seed} diversity").sample(range(len(prompts)), count)
    repeated = prompts.select([row for row in drawn for _ in range(samples)])
    roles.make_resident("rollout")
    rollouts = start_answers(context, repeated, temperature, seed=DIVERSITY_SEED, chunks=roles["rollout"].num_ranks)
    texts = [text for text, _ in decode(roles, rollouts, step="evaluate")]
    return statistics.fmean(self_bleu(texts[start : start + samples]) for start in range(0, len(texts), samples))


def start_answers(
    context: Context, prompts: PromptBatch, temperature: float, *, seed: int, chunks: int
) -> list[Call[list[int]]]:
    """Starts sampling the loaded model's answers; `seed` is the kind of draw."""
    return generate(
        context.roles,
        prompts,
        num_chunks=min(chunks, len(prompts)),
        seed=(context.config.run.seed, seed),
        temperature=temperature,
        max_new_tokens=context.config.evaluate.max_new_tokens,
    )


def scoring_settings(context: Context, temperature: float) -> ScoringSettings:
    """As `evaluate` says."""
    return ScoringSettings(
        temperature=temperature or 1.0,
        micro_batch_tokens=context.config.evaluate.micro_batch_tokens,
        safety_threshold=context.config.ppo.safety_threshold,
    )


def referee_scores(
    context: Context, prompts: PromptBatch, decodings: Mapping[str, Mapping[str, Any]]
) -> dict[str, list[float]]:
    """The referee's raw scores of a model's answers, as they were sampled."""
    budget = context.config.evaluate.micro_batch_tokens
    found = {}
    for suffix, made in decodings.items():
        calls = score_samples(context.roles, "helpfulness", prompts, made["answers"], micro_batch_tokens=budget)
        parts = collect(calls, timeout_s=context.roles.timeout_s, step="evaluate")
        found[suffix] = [score for part in parts for score in part]
    return found


def answer_rows(table: Sequence[Row], label: str, answers: Sequence[Row], referee: Sequence[float] | None) -> list[Row]:
    """Rows of answers.parquet; the prompts' rows, answers and scores are aligned."""
    scores: Sequence[float | None] = referee or [None] * len(table)
    return [answer_row(*aligned, label) for aligned in zip(table, answers, scores, strict=True)]


def answer_row(prompt: Row, answer: Row, referee: float | None, label: str) -> Row:
    """One row of answers.parquet."""
    row = {
        "prompt_id": prompt["prompt_id"],
        "kind": prompt["kind"],
        "content": "",
        "model": label,
        "prompt": prompt["messages"][-1]["content"],
        "is_safety": prompt["is_safety"],
        "answer": answer["text"],
        "finished": answer["finished"],
        **{f"reward_{name}": answer[name] for name in ("helpfulness", "safety", "combined")},
        "reward_referee": referee,
        **dict.fromkeys(("helpfulness", "violation", "false_refusal", "utility")),
    }
    if prompt["truth"]:
        verdict, kind = judge(prompt["kind"], prompt["truth"], answer["text"], answer["finished"]), prompt["kind"]
        content = json.loads(prompt["truth"]).get("content")
        row["content"] = name_content(TASKS[kind].group, content) if content else ""
        row["helpfulness"] = None if kind == "unsafe" else verdict.helpfulness
        row["violation"] = not verdict.safe
        row["false_refusal"] = verdict.refusal if kind == "borderline" else None
        row["utility"] = utility(verdict, "safety" if prompt["is_safety"] else "helpfulness")
    return row


def figures(table: Sequence[Row], rows: Sequence[Row]) -> dict[str, float]:
    """What the referee and the judge say of a model's answers on average."""
    found = {}
    if all(row["reward_referee"] is not None for row in rows):
        found["reward_referee"] = statistics.fmean(row["reward_referee"] for row in rows)
    if all(prompt["truth"] for prompt in table):
        answers, finished = zip(*((row["answer"], row["finished"]) for row in rows), strict=True)
        found |= evaluate_answers(table, answers, finished)
    return found


def judging_testbed(prompts: Path, results: Mapping[str, Mapping[str, float]]) -> str | None:
    """The version of the testbed that has judged; both, where it judged prompts of another's."""
    if not any("true_helpfulness" in row for row in results.values()):
        return None
    made_by = read_facts(prompts.parent).get("testbed", TESTBED_VERSION)
    return TESTBED_VERSION if made_by == TESTBED_VERSION else f"{made_by}+{TESTBED_VERSION}"
