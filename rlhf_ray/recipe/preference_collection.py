"""Preference collection (Llama 2 §3.2.1): two answers from two models at varied temperatures, one is chosen.

Helpfulness and safety are collected separately, with separate guidelines. Here the simulated annotator chooses.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

from cluster.worker_group import collect
from rlhf_ray.config import PairsSection
from rlhf_ray.data.schemas import COMPARISONS, PAIRS, PROMPTS, read_table, write_table
from rlhf_ray.data.shares import part_of_round
from rlhf_ray.errors import UserError
from rlhf_ray.progress import console, doing, progress_bar
from rlhf_ray.recipe.context import Context
from rlhf_ray.recipe.engines import check_swappable, read_prompts, request_seed, start_engines
from rlhf_ray.recipe.stages import Artefact
from rlhf_ray.records import PromptBatch
from rlhf_ray.run_state import Step
from rlhf_ray.testbed.annotator import Guideline, compare
from rlhf_ray.testbed.judge import judge
from rlhf_ray.workers.rollout import RolloutWorker

SIDES = ("first", "second")


@dataclass(frozen=True)
class Draw:
    """One pair to be sampled: a prompt, by whose rules it is judged, and who gives its two answers."""

    row: int
    """Of the prompt in its table."""
    prompt: dict[str, Any]
    guideline: Guideline
    models: list[int]
    """Of each side, a place in `pairs.models`."""
    temperatures: list[float]
    """Of each side."""


def sample_pairs(context: Context, step: Step, inputs: Mapping[str, Artefact]) -> dict[str, Any]:
    """Samples two answers to each prompt: pairs.parquet."""
    section, seed = context.config.pairs, context.config.run.seed
    models = [inputs[f"model.{place}"] for place in range(len(section.models))]
    for place, model in enumerate(models):
        check_swappable(f"pairs.models[{place}]", model.path, models[0].path)
    work = step.begin()
    prompts = read_table(inputs["prompts_annotation"].path, PROMPTS).to_pylist()
    number, rng = week(step.name), random.Random(f"{seed} {step.name}")
    draws = [
        draw_pair(row, prompts[row], rng, section)
        for row in part_of_round(len(prompts), section.num_prompts, number=number, seed=seed)
        for _ in range(section.pairs_per_prompt)
    ]
    with doing(step.name, "starting the engine"):
        start_engines(context, models[0].path, inputs["tokenizer"].path)
        readers = [name for name in inputs if name.startswith("model.")]
        batch = read_prompts(inputs, "prompts_annotation", max_new_tokens=section.max_new_tokens, readers=readers)
    answers: dict[tuple[int, int], tuple[str, bool]] = {}
    temperatures = sorted(set(section.temperatures))
    with progress_bar(step.name, total=len(models) * len(temperatures)) as bar:
        for place, model in enumerate(models):
            context.roles["rollout"].call(RolloutWorker.load_checkpoint, str(model.path), step=step.name)
            for temperature in temperatures:
                made = step.kept(
                    f"{place}-{temperature:g}", partial(sample, context, batch, draws, place, temperature, number)
                )
                answers |= {(index, side): (text, finished) for index, side, text, finished in made}
                bar.advance(f"{section.models[place]} at temperature {temperature:g}")
    labels = [model.label for model in models]
    rows = [
        pair_row(index, draw, (answers[index, 0], answers[index, 1]), labels, number)
        for index, draw in enumerate(draws)
        if answers[index, 0] != answers[index, 1]
    ]
    write_table(work / "pairs.parquet", rows, PAIRS)
    same = len(draws) - len(rows)
    console.print(f"{step.name}: {len(rows)} pairs, {same} left out: the same answer twice")
    return {"pairs": len(rows), "same_answer": same}


def week(name: str) -> int:
    """The batch of comparisons that a node makes: the number its scope ends in, 0 without."""
    number = re.search(r"@.*?(\d+)$", name)
    return int(number[1]) if number else 0


def draw_pair(row: int, prompt: dict[str, Any], rng: random.Random, section: PairsSection) -> Draw:
    """Who answers the prompt, and how: two models where there are two, and a temperature for each answer."""
    order = rng.sample(range(len(section.models)), 2) if len(section.models) > 1 else [0, 0]
    return Draw(
        row=row,
        prompt=prompt,
        guideline="safety" if prompt["is_safety"] else "helpfulness",
        models=order,
        temperatures=[rng.choice(section.temperatures) for _ in order],
    )


def sample(
    context: Context, prompts: PromptBatch, draws: list[Draw], model: int, temperature: float, number: int
) -> list[tuple[int, int, str, bool]]:
    """Answers of one model at one temperature: (draw, side, text, finished); `number` is the week's."""
    wanted = [
        (index, side)
        for index, draw in enumerate(draws)
        for side in (0, 1)
        if draw.models[side] == model and draw.temperatures[side] == temperature
    ]
    engines = context.roles["rollout"]
    parts = [wanted[rank :: engines.num_ranks] for rank in range(engines.num_ranks)]
    section, seed = context.config.pairs, context.config.run.seed
    model_of_week = number * len(section.models) + model
    sampled = {
        rank: engines.submit_one(
            rank,
            RolloutWorker.generate,
            prompts.select([draws[index].row for index, _ in part]),
            seeds=[
                request_seed(seed, model_of_week, draws[index].prompt["prompt_id"], 2 * index + side)
                for index, side in part
            ],
            temperature=temperature,
            max_new_tokens=section.max_new_tokens,
            num_data=1,
        )
        for rank, part in enumerate(parts)
        if part
    }
    decoded = [engines.submit_one(rank, RolloutWorker.decode, call.data[0]) for rank, call in sampled.items()]
    results = collect(decoded, timeout_s=context.roles.timeout_s, step="pairs")
    return [
        (*place, *answer)
        for rank, texts in zip(sampled, results, strict=True)
        for place, answer in zip(parts[rank], texts, strict=True)
    ]


def pair_row(
    index: int, draw: Draw, answers: Sequence[tuple[str, bool]], models: Sequence[str], batch: int
) -> dict[str, Any]:
    """One row of pairs.parquet; `answers` are (text, finished) of each side, `models` what tables call them."""
    prompt = draw.prompt
    sides = {
        **{side: text for side, (text, _) in zip(SIDES, answers, strict=True)},
        **{f"{side}_finished": finished for side, (_, finished) in zip(SIDES, answers, strict=True)},
        **{f"{side}_model": models[place] for side, place in zip(SIDES, draw.models, strict=True)},
        **{f"{side}_temperature": t for side, t in zip(SIDES, draw.temperatures, strict=True)},
    }
    return {
        "pair_id": f"{prompt['prompt_id']}-{index}" + (f"-week{batch}" if batch else ""),
        "prompt_id": prompt["prompt_id"],
        "messages": prompt["messages"],
        "is_safety": prompt["is_safety"],
        "guideline": draw.guideline,
        **sides,
        "batch": batch,
    }


def label_pairs(context: Context, step: Step, inputs: Mapping[str, Artefact]) -> dict[str, Any]:
    """Has pairs compared by the simulated annotator: comparisons.parquet."""
    noise, work = context.config.label.noise, step.begin()
    path = inputs["prompts_annotation"].path
    prompts = {row["prompt_id"]: row for row in read_table(path, PROMPTS).to_pylist()}
    pairs = read_table(inputs["pairs"].path, PAIRS).to_pylist()
    check_labels_possible(inputs["pairs"], inputs["prompts_annotation"], pairs, prompts)
    rng = random.Random(f"{context.config.run.seed} {step.name}")
    rows = [row for pair in pairs if (row := label(pair, prompts[pair["prompt_id"]], rng, noise))]
    if not rows:
        raise UserError(
            f"{inputs['pairs'].path}: no pair is left: the annotator prefers unsafe or empty answers in all"
        )
    write_table(work / "comparisons.parquet", rows, COMPARISONS)
    left_out = len(pairs) - len(rows)
    console.print(f"{step.name}: {len(rows)} comparisons, {left_out} pairs left out: an unsafe winner, or an empty one")
    return {"comparisons": len(rows), "left_out": left_out}


def check_labels_possible(
    pairs: Artefact, table: Artefact, rows: Sequence[Mapping[str, Any]], prompts: Mapping[str, Mapping[str, Any]]
) -> None:
    """Raises UserError where the simulated annotator has no truth to judge by."""
    for number, row in enumerate(rows):
        if row["prompt_id"] not in prompts:
            raise UserError(
                f"{pairs.path} row {number}: prompt_id={row['prompt_id']!r} is not in {table.path}, by whose truth the "
                "simulated annotator judges; give the prompts that were answered as data.prompts_annotation"
            )
        if not prompts[row["prompt_id"]]["truth"]:
            raise UserError(
                f"{table.path} prompt_id={row['prompt_id']!r}: truth is empty, and the simulated annotator judges "
                "testbed prompts only; give human comparisons as data.comparisons and leave label out of run.stages"
            )


def label(
    pair: Mapping[str, Any], prompt: Mapping[str, Any], rng: random.Random, noise: float
) -> dict[str, Any] | None:
    """One row of comparisons.parquet; none where the pair is left out (§3.2.2)."""
    verdicts = [judge(prompt["kind"], prompt["truth"], pair[side], pair[f"{side}_finished"]) for side in SIDES]
    verdict = compare(verdicts[0], verdicts[1], guideline=pair["guideline"], rng=rng, noise=noise)
    if verdict is None:
        return None
    won, lost = SIDES[verdict.choice], SIDES[1 - verdict.choice]
    if not pair[won].strip():  # a model may stop at once; nothing is no answer to learn from
        return None
    return {
        "comparison_id": pair["pair_id"],
        **{name: pair[name] for name in ("prompt_id", "messages", "is_safety", "guideline", "batch")},
        "chosen": pair[won],
        "rejected": pair[lost],
        **{f"chosen_{name}": pair[f"{won}_{name}"] for name in ("finished", "model", "temperature")},
        **{f"rejected_{name}": pair[f"{lost}_{name}"] for name in ("finished", "model", "temperature")},
        "strength": verdict.strength,
        "safety_bin": verdict.safety_bin,
        "annotator": "simulated",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
