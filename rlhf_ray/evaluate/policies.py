"""The final comparison: all versions of the chat model on prompts that nothing else has seen."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from rich.console import Console
from rich.table import Table

from cluster.worker_group import collect
from rlhf_ray.data.schemas import PROMPTS, read_table, write_table
from rlhf_ray.evaluate.seeds import GREEDY, TEMPERATURE
from rlhf_ray.progress import doing, progress_bar
from rlhf_ray.recipe.context import Context
from rlhf_ray.recipe.engines import check_swappable, decode, generate, read_prompts, start_engines
from rlhf_ray.recipe.scoring import READERS, SUMMARY_ROLES, ScoringSettings, load_frozen, score, summarize
from rlhf_ray.recipe.stages import Artefact
from rlhf_ray.records import PromptBatch
from rlhf_ray.run_state import Step, digest, read_facts, write_json
from rlhf_ray.testbed.judge import evaluate_answers, judge
from rlhf_ray.testbed.tasks import TASKS, name_content
from rlhf_ray.testbed.version import TESTBED_VERSION
from rlhf_ray.workers.rollout import RolloutWorker
from rlhf_ray.workers.scorer import ScorerWorker

ANSWERS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("kind", pa.string()),
        ("content", pa.string()),  # what the prompt is about, which other prompts may be too; "" where no truth tells
        ("model", pa.string()),
        ("prompt", pa.string()),
        ("answer", pa.string()),
        ("finished", pa.bool_()),
        ("reward_helpfulness", pa.float32()),
        ("reward_safety", pa.float32()),
        ("reward_combined", pa.float32()),
        # The judge's word where the prompt has a truth; null on prompts that a measure is not defined on.
        ("helpfulness", pa.float32()),
        ("violation", pa.bool_()),
        ("false_refusal", pa.bool_()),
    ]
)
COLUMNS = {
    "true_helpfulness": "true helpfulness",
    "violation_rate": "true violations",
    "false_refusal_rate": "false refusals",
    "reward_combined": "mean reward",
    "kl_per_sequence": "KL to SFT",
    "response_tokens": "tokens",
}


class Answer(NamedTuple):
    """One answer and its raw scores."""

    text: str
    finished: bool
    reward_helpfulness: float
    reward_safety: float
    reward_combined: float


def evaluate(context: Context, step: Step, inputs: Mapping[str, Artefact]) -> dict[str, Any]:
    """Samples, scores and judges answers of all models: evaluation.json and answers.parquet."""
    section = context.config.evaluate
    models = compared_models(inputs)
    work = step.begin()
    table = read_table(inputs["prompts_test"].path, PROMPTS).to_pylist()
    with doing(step.name, "starting the engine, loading models"):
        context.roles.work_together(*SUMMARY_ROLES)
        collect(load_frozen(context, inputs), timeout_s=context.roles.timeout_s, step="evaluate")
        start_engines(context, inputs["chat"].path, inputs["tokenizer"].path)
        prompts = read_prompts(
            inputs,
            "prompts_test",
            max_new_tokens=section.max_new_tokens,
            at_least=num_chunks(context),
            readers=READERS,
        )
    results: dict[str, dict[str, float]] = {}
    rows: list[dict[str, Any]] = []
    with progress_bar(step.name, total=len(models) * len(section.temperatures)) as bar:
        for temperature, (model, checkpoint) in itertools.product(section.temperatures, models.items()):
            label = model + temperature_suffix(temperature)
            with doing(step.name, label):
                make = partial(evaluate_model, context, checkpoint, prompts, table, temperature)
                results[label], answers = step.kept(digest(label), make)
            rows += [answer_row(prompt, label, Answer(*made)) for prompt, made in zip(table, answers, strict=True)]
            bar.advance(f"{label} reward {results[label]['reward_combined']:+.2f}")
    judged = TESTBED_VERSION if any("true_helpfulness" in row for row in results.values()) else None
    made_by = read_facts(inputs["prompts_test"].path.parent).get("testbed", TESTBED_VERSION)
    if judged is not None and made_by != TESTBED_VERSION:  # prompts of one, judged by another: both are told
        judged = f"{made_by}+{TESTBED_VERSION}"
    facts = {"testbed": judged, "prompts": len(table), "machine": context.run.machine}
    write_json(work / "evaluation.json", {**facts, "models": results})
    write_table(work / "answers.parquet", rows, ANSWERS)
    return {"results": results}


def compared_models(inputs: Mapping[str, Artefact]) -> dict[str, Path]:
    """Label -> checkpoint, of the run's own models and the controls that the config names.

    Raises:
        UserError: one has another shape than the SFT model.
    """
    models = {name.partition(".")[2]: inputs[name] for name in inputs if name.startswith("model.")}
    for model in models.values():
        check_swappable(model.maker, model.path, inputs["chat"].path)
    return {label: model.path for label, model in models.items()}


def answer_row(prompt: dict[str, Any], label: str, answer: Answer) -> dict[str, Any]:
    """One row of answers.parquet."""
    row = {
        "prompt_id": prompt["prompt_id"],
        "kind": prompt["kind"],
        "content": "",
        "model": label,
        "prompt": prompt["messages"][-1]["content"],
        "answer": answer.text,
        **{name: value for name, value in answer._asdict().items() if name != "text"},
        "helpfulness": None,
        "violation": None,
        "false_refusal": None,
    }
    if prompt["truth"]:
        verdict, kind = judge(prompt["kind"], prompt["truth"], answer.text, answer.finished), prompt["kind"]
        content = json.loads(prompt["truth"]).get("content")
        row["content"] = name_content(TASKS[kind].group, content) if content else ""
        row["helpfulness"] = None if kind == "unsafe" else verdict.helpfulness
        row["violation"] = not verdict.safe
        row["false_refusal"] = verdict.refusal if kind == "borderline" else None
    return row


def temperature_suffix(temperature: float) -> str:
    """How a table names a model's sampling; 1 goes without saying."""
    return "" if temperature == 1 else GREEDY if temperature == 0 else f"{TEMPERATURE}{temperature:g}"


def num_chunks(context: Context) -> int:
    """Parts the test prompts are answered in: as many for each engine as for each policy rank, and none without."""
    return math.lcm(context.config.roles.rollout.num_engines, context.config.roles.policy.num_ranks)


def evaluate_model(
    context: Context, checkpoint: Path, prompts: PromptBatch, table: Sequence[dict[str, Any]], temperature: float
) -> tuple[dict[str, float], list[Answer]]:
    """Metrics and answers of one checkpoint, one answer a prompt; `table` has the prompts' rows."""
    roles, section = context.roles, context.config.evaluate
    roles["policy"].call(ScorerWorker.load_frozen, str(checkpoint), head="lm", runtime=roles.runtime, step="evaluate")
    roles.work_together("rollout")
    roles["rollout"].call(RolloutWorker.load_checkpoint, str(checkpoint), step="evaluate")
    rollouts = generate(
        roles,
        prompts,
        num_chunks=num_chunks(context),
        seed=(context.config.run.seed, 0),
        temperature=temperature,
        max_new_tokens=section.max_new_tokens,
    )
    texts, finished = zip(*decode(roles, rollouts, step="evaluate"), strict=True)
    roles.work_together(*SUMMARY_ROLES)
    settings = ScoringSettings(
        temperature=temperature or 1.0,
        micro_batch_tokens=section.micro_batch_tokens,
        safety_threshold=context.config.ppo.safety_threshold,
    )
    scores = score(roles, settings, rollouts, roles_used=SUMMARY_ROLES)
    metrics, rewards = summarize(roles, settings, rollouts, scores)
    if temperature == 0:  # greedy answers are no sample of the policy: neither figure would be what its name says
        metrics = {name: value for name, value in metrics.items() if not name.startswith(("kl_", "logprob_"))}
    if all(row["truth"] for row in table):
        metrics |= evaluate_answers(table, texts, finished)
    return metrics, [Answer(text, end, *raw) for text, end, raw in zip(texts, finished, rewards, strict=True)]


def results_table(results: dict[str, dict[str, float]], *, title: str) -> Table:
    """The models as rows, the figures that matter as columns."""
    columns = {key: name for key, name in COLUMNS.items() if any(key in row for row in results.values())}
    table = Table(title=title)
    table.add_column("model")
    for name in columns.values():
        table.add_column(name, justify="right")
    for label, row in results.items():
        table.add_row(label, *(f"{row[key]:.3f}" if key in row else "-" for key in columns))
    return table


def print_evaluation(path: Path) -> None:
    """Prints an evaluation.json as a table on stdout."""
    report = json.loads(path.read_text(encoding="utf-8"))
    title = f"{report['prompts']} held-out prompts"
    if report["testbed"]:
        title += f", testbed {report['testbed']}"
    Console(width=110).print(results_table(report["models"], title=title))
