"""Rejection sampling (Llama 2 §3.2.3): the newest model answers each prompt K times, and the answer that the reward
models like best is what the next version learns.

The temperature is found anew in each round, because training shifts the best one (Figure 8). Every answer is kept with
its token ids: what was sampled is what is trained on.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from cluster.worker_group import Call, collect
from rlhf_ray.algo.best_of_k import best_first, combine, expected_best
from rlhf_ray.config import RejectionSamplingSection
from rlhf_ray.data.light_tokenizer import LightTokenizer
from rlhf_ray.data.prompts import as_prompts
from rlhf_ray.data.schemas import SAMPLES, join_tables, read_groups, write_table
from rlhf_ray.data.shares import hash_share, part_of_round
from rlhf_ray.progress import console, doing, progress_bar
from rlhf_ray.recipe.context import Context
from rlhf_ray.recipe.engines import generate, read_prompts, start_engines
from rlhf_ray.recipe.preference_collection import week
from rlhf_ray.recipe.scoring import READERS, ScoringSettings, gate, load_frozen, score, score_samples, scored_answers
from rlhf_ray.recipe.stages import REWARDS, Artefact
from rlhf_ray.records import PromptBatch
from rlhf_ray.run_state import Step, write_json

SAMPLE_SEED, SWEEP_SEED = 2_000_003, 3_000_017
"""Where the rounds' sampling seeds begin, away from those of PPO's iterations."""
SELECT_ROWS = 8192
"""Samples that are scored anew together."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Sampling:
    """What each group of answers is sampled and scored with."""

    context: Context
    settings: ScoringSettings
    max_new_tokens: int
    seed: tuple[int, int]
    samples: int
    """Answers to a prompt."""


def rejection_sample(context: Context, step: Step, inputs: Mapping[str, Artefact]) -> dict[str, Any]:
    """Samples K answers to each of the round's prompts, and scores them: samples.parquet, and sweep.json."""
    section, number = context.config.rejection_sampling, week(step.name)
    work = step.begin()
    with doing(step.name, "starting workers, loading models"):
        roles = context.roles
        roles.start("rollout", *REWARDS)
        load_frozen(context, inputs, REWARDS, step=step.name)
        start_engines(context, inputs["chat"].path, inputs["tokenizer"].path)
        read = partial(read_prompts, inputs, max_new_tokens=section.max_new_tokens, readers=READERS)
        prompts, held_out = read("prompts_train"), read("prompts_early_stop") if len(section.temperatures) > 1 else None
    sweep = {} if held_out is None else temperature_sweep(context, step, held_out)
    temperature = best_temperature(sweep, section)
    write_json(work / "sweep.json", {"temperature": temperature, "curves": sweep})
    rows = part_of_round(len(prompts), section.num_prompts, number=number, seed=context.config.run.seed)
    sampling = sampling_at(context, temperature, SAMPLE_SEED + number, section.samples_per_prompt)
    groups = [rows[start : start + section.group_size] for start in range(0, len(rows), section.group_size)]
    # Parts from before an interruption are of the same groups only where these have the same size.
    parts = [work / "parts" / f"samples-{section.group_size}-{index:06}.parquet" for index in range(len(groups))]
    parts[0].parent.mkdir(exist_ok=True)
    made = [part.exists() for part in parts]
    to_do = [prompts.select(group) for group, there in zip(groups, made, strict=True) if not there]
    columns = {"model": inputs["chat"].label, "scope": step.name.partition("@")[2]}
    with progress_bar(step.name, total=len(groups), done=sum(made)) as bar:
        sampled = sample_groups(sampling, to_do)
        for part in (part for part, there in zip(parts, made, strict=True) if not there):
            group = [{**row, **columns} for row in next(sampled)]
            write_table(part, group, SAMPLES)
            bar.advance(f"T={temperature:g}  mean reward {statistics.fmean(row['combined'] for row in group):+.3f}")
    join_tables(parts, work / "samples.parquet", SAMPLES)
    curve = best_of_k_curve(by_prompt(read_groups(work / "samples.parquet", SAMPLES)), sampling.settings.gate)
    best = curve[max(curve)]
    console.print(
        f"{step.name}: {len(rows)} prompts x {section.samples_per_prompt} answers at temperature {temperature:g}; "
        f"mean reward {best['mean']:+.3f}, of the best {best['best']:+.3f}",
        highlight=False,
    )
    return {"prompts": len(rows), "temperature": temperature, "curve": curve, "sweep": sweep}


def temperature_sweep(context: Context, step: Step, prompts: PromptBatch) -> dict[str, dict[int, dict[str, float]]]:
    """For each temperature the curve of `best_of_k_curve` on the first of the held-out prompts (Figures 7 and 8)."""
    section, number = context.config.rejection_sampling, week(step.name)
    prompts = prompts.select(range(min(section.sweep_prompts, len(prompts))))
    curves = {}
    with progress_bar(step.name, total=len(section.temperatures)) as bar:
        for temperature in section.temperatures:

            def curve(temperature: float = temperature) -> dict[int, dict[str, float]]:
                sampling = sampling_at(context, temperature, SWEEP_SEED + number, section.sweep_samples)
                return best_of_k_curve(by_prompt(sample_groups(sampling, [prompts])), sampling.settings.gate)

            curves[f"{temperature:g}"] = step.kept(f"sweep-{temperature:g}", curve)
            bar.advance(f"tried T={temperature:g}")
    return {t: {int(k): values for k, values in curve.items()} for t, curve in curves.items()}


def best_temperature(
    sweep: Mapping[str, Mapping[int, Mapping[str, float]]], section: RejectionSamplingSection
) -> float:
    """The temperature whose best of K has the highest mean reward, for as large a K as was tried."""
    if not sweep:
        return section.temperatures[0]
    tried = min(section.samples_per_prompt, section.sweep_samples)

    def reward(temperature: float) -> float:
        curve = sweep[f"{temperature:g}"]
        return curve[max(k for k in curve if k <= tried)]["best"]

    return max(section.temperatures, key=reward)


def sampling_at(context: Context, temperature: float, draw: int, samples: int) -> Sampling:
    """The round's settings at one temperature; `draw` tells its kind of draw and number from others."""
    section = context.config.rejection_sampling
    settings = ScoringSettings(
        temperature=temperature,
        micro_batch_tokens=section.micro_batch_tokens,
        safety_threshold=context.config.ppo.safety_threshold,
    )
    return Sampling(context, settings, section.max_new_tokens, (context.config.run.seed, draw), samples)


def sample_groups(sampling: Sampling, groups: Sequence[PromptBatch]) -> Iterator[list[Row]]:
    """Rows of each group's answers, all of a prompt in turn.

    On CPU, and where they share GPUs, sampling and scoring take turns; on GPUs of their own the engines go on with the
    next two groups while one is scored.
    """
    roles = sampling.context.roles
    overlap = roles.can_overlap("rollout", REWARDS)
    begun: list[list[Call[Any]]] = []
    for index, prompts in enumerate(groups):
        roles.make_resident("rollout")
        for following in groups[index + len(begun) : index + (3 if overlap else 1)]:
            begun.append(start_group(sampling, following))
        rollouts = begun.pop(0)
        if not overlap:
            collect(rollouts, timeout_s=roles.timeout_s, step=roles.step)
        yield finish_group(sampling, prompts, rollouts)


def start_group(sampling: Sampling, prompts: PromptBatch) -> list[Call[Any]]:
    """Has the engines start on a group's answers."""
    roles = sampling.context.roles
    repeated = prompts.select([row for row in range(len(prompts)) for _ in range(sampling.samples)])
    return generate(
        roles,
        repeated,
        num_chunks=min(roles["rollout"].num_ranks, len(repeated)),
        seed=sampling.seed,
        temperature=sampling.settings.temperature,
        max_new_tokens=sampling.max_new_tokens,
    )


def finish_group(sampling: Sampling, prompts: PromptBatch, rollouts: Sequence[Call[Any]]) -> list[Row]:
    """Scores a group's answers; rows of `SAMPLES`, but for model and scope."""
    roles, settings = sampling.context.roles, sampling.settings
    scores = score(roles, settings, rollouts, roles_used=REWARDS)
    answers = scored_answers(roles, settings, rollouts, scores)
    return [
        {
            "prompt_id": prompts.ids[row],
            "messages": prompts.messages[row],
            "is_safety": prompts.is_safety[row],
            "sample": sample,
            "temperature": settings.temperature,
            **answers[row * sampling.samples + sample],
        }
        for row in range(len(prompts))
        for sample in range(sampling.samples)
    ]


def by_prompt(groups: Iterator[list[Row]]) -> Iterator[list[Row]]:
    """All answers to a prompt at a time; they stand together."""
    held: list[Row] = []
    for group in groups:
        for row in group:
            if held and held[0]["prompt_id"] != row["prompt_id"]:
                yield held
                held = []
            held.append(row)
    if held:
        yield held


def best_of_k_curve(prompts: Iterator[list[Row]], threshold: float) -> dict[int, dict[str, float]]:
    """Mean over prompts of the best of K answers' reward, for K = 1, 2, 4, ... and all (Figure 7); beside it the mean
    and the median of all answers.
    """
    sums: dict[int, dict[str, float]] = {}
    count = 0
    for rows in prompts:
        values = [rows[place]["combined"] for place in ranking(rows, threshold)]
        of_all = {"mean": statistics.fmean(values), "median": statistics.median(values)}
        for k in powers(len(values)):
            of_k = {"best": expected_best(values, k), **of_all}
            sums[k] = {name: value + sums.get(k, {}).get(name, 0.0) for name, value in of_k.items()}
        count += 1
    return {k: {name: value / count for name, value in of_k.items()} for k, of_k in sums.items()}


def powers(limit: int) -> list[int]:
    """1, 2, 4, ... below the limit, and the limit."""
    return [2**power for power in range(limit.bit_length()) if 2**power < limit] + [limit]


def ranking(rows: Sequence[Row], threshold: float) -> list[int]:
    """Places of a prompt's answers, the best first."""
    helpfulness, safety = ([row[name] for row in rows] for name in REWARDS)
    return best_first(helpfulness, safety, is_safety=rows[0]["is_safety"], threshold=threshold)


def select(context: Context, step: Step, inputs: Mapping[str, Artefact]) -> dict[str, Any]:
    """Chooses of each prompt the best answers of all rounds at hand: selections.parquet.

    Samples of earlier rounds are scored anew: the newest reward models choose.
    """
    section, threshold = context.config.select, context.config.ppo.safety_threshold
    work = step.begin()
    pools = {name: inputs[name] for name in inputs if name.partition(".")[0] == "samples"}
    stale = [n for n, pool in pools.items() if any(pool.parents.get(r) != inputs[r].key for r in REWARDS)]
    if stale:
        with doing(step.name, "loading reward models"):
            load_frozen(context, inputs, REWARDS, step=step.name)
    chosen: dict[str, list[Row]] = {}
    draw = f"{context.config.run.seed} {step.name}"
    for name, pool in pools.items():
        rows = read_groups(pool.path, SAMPLES, rows=SELECT_ROWS)
        if name in stale:
            rows = scored_anew(context, inputs, rows)
        for candidates in by_prompt(rows):
            held = chosen.get(candidates[0]["prompt_id"], []) + candidates
            if section.choice == "random":
                # By a number of its own an answer of each round has the same chance.
                held.sort(key=lambda row: hash_share(f"{draw} {row['prompt_id']} {row['scope']} {row['sample']}"))
            else:
                held = [held[place] for place in ranking(held, gate(threshold))]
            chosen[candidates[0]["prompt_id"]] = held[: section.per_prompt]
    selected = [row for rows in chosen.values() for row in rows]
    write_table(work / "selections.parquet", selected, SAMPLES)
    reward = statistics.fmean(row["combined"] for row in selected)
    scopes = {scope: sum(row["scope"] == scope for row in selected) for scope in sorted({r["scope"] for r in selected})}
    of_rounds = ", ".join(f"{count} of {scope}" for scope, count in scopes.items()) if len(scopes) > 1 else ""
    console.print(
        f"{step.name}: {len(selected)} answers, mean reward {reward:+.3f}{f'; {of_rounds}' if of_rounds else ''}",
        highlight=False,
    )
    return {"selected": len(selected), "reward": reward, "scopes": scopes}


def scored_anew(context: Context, inputs: Mapping[str, Artefact], groups: Iterator[list[Row]]) -> Iterator[list[Row]]:
    """The samples with the scores that the loaded reward models give them."""
    tokenizer, limit = LightTokenizer(inputs["tokenizer"].path), gate(context.config.ppo.safety_threshold)
    roles, budget = context.roles, context.config.rejection_sampling.micro_batch_tokens
    for rows in groups:
        prompts = as_prompts(rows, tokenizer)
        scores: dict[str, list[float]] = {}
        for turn in roles.turns(*REWARDS):
            roles.make_resident(*turn)
            calls = {name: score_samples(roles, name, prompts, rows, micro_batch_tokens=budget) for name in turn}
            for name in turn:
                parts = collect(calls[name], timeout_s=roles.timeout_s, step=roles.step)
                scores[name] = [value for part in parts for value in part]
        yield [
            {
                **row,
                "helpfulness": helpful,
                "safety": safe,
                "combined": combine(helpful, safe, is_safety=row["is_safety"], threshold=limit),
            }
            for row, helpful, safe in zip(rows, *(scores[name] for name in REWARDS), strict=True)
        ]
