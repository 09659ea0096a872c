"""Preference collection (Llama 2 §3.2.1): two answers from two model versions at varied temperatures, one is chosen.

Helpfulness and safety are collected separately, with separate guidelines. Here the simulated annotator chooses.
"""

import random
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from cluster.worker_group import collect as collect_calls
from rlhf_ray.config import CollectSection
from rlhf_ray.data.schemas import COMPARISONS, PROMPTS, read_table, write_table
from rlhf_ray.errors import UserError
from rlhf_ray.metrics import console, progress_bar
from rlhf_ray.recipe.context import Context
from rlhf_ray.recipe.engines import check_swappable, open_prompts, request_seed, start_engines
from rlhf_ray.run_state import fingerprint
from rlhf_ray.testbed.annotator import Guideline, compare
from rlhf_ray.testbed.judge import judge
from rlhf_ray.workers.rollout import RolloutWorker


@dataclass(frozen=True)
class Job:
    """One comparison to be made: a prompt, by whose rules it is judged, and who gives its two answers."""

    row: int
    """Of the prompt in its table."""
    prompt: dict[str, Any]
    guideline: Guideline
    versions: list[int]
    """Of each side, a place in `collect.versions`."""
    temperatures: list[float]
    """Of each side."""


def collect(context: Context) -> Path:
    """Samples pairs and has them labelled; returns the step's directory with `comparisons.parquet`."""
    section = context.config.collect
    versions = [version_checkpoint(context, name) for name in section.versions]
    step = context.step(
        "collect",
        sections=("collect",),
        parents=("tokenizer", "chat", "prompts_annotation"),
        code=("rlhf_ray.recipe.preference_collection", "rlhf_ray.testbed"),
        rollout=context.sampling_settings(),
        versions=[name if name in ("newest", "previous") else fingerprint(name) for name in section.versions],
    )
    if context.skip(step):
        return step.path
    for place, path in enumerate(versions):
        check_swappable(f"collect.versions[{place}]", path, versions[0])
    work = step.begin()
    prompts = read_table(context.outputs["prompts_annotation"], PROMPTS).to_pylist()
    check_labels_possible(context, prompts)
    rng = random.Random(f"{context.config.run.seed} collect")
    jobs = [
        draw_job(row, prompt, rng, section)
        for row, prompt in enumerate(prompts)
        for _ in range(section.pairs_per_prompt)
    ]
    with console.status("collect: starting the engine"):
        start_engines(context, versions[0])
        open_prompts(context, "prompts_annotation", max_new_tokens=section.max_new_tokens)
    answers: dict[tuple[int, int], tuple[str, bool]] = {}
    temperatures = sorted(set(section.temperatures))
    with progress_bar("collect", total=len(versions) * len(temperatures)) as bar:
        for version, checkpoint in enumerate(versions):
            context.roles["rollout"].call(RolloutWorker.load_checkpoint, str(checkpoint), step="collect")
            for temperature in temperatures:
                made = step.kept(f"{version}-{temperature:g}", partial(sample, context, jobs, version, temperature))
                answers |= {(index, side): (text, finished) for index, side, text, finished in made}
                bar.advance(f"{section.versions[version]} at temperature {temperature:g}")
    names = [step_name(path) for path in versions]
    rows = [row for row in (label(i, job, answers, names, rng, section) for i, job in enumerate(jobs)) if row]
    write_table(work / "comparisons.parquet", rows, COMPARISONS)
    left_out = len(jobs) - len(rows)
    console.print(
        f"collect: {len(rows)} comparisons, {left_out} pairs left out (same answer twice, or an unsafe winner)"
    )
    return step.finish(comparisons=len(rows), left_out=left_out)


def version_checkpoint(context: Context, name: str) -> Path:
    """The checkpoint that a name in `collect.versions` stands for."""
    chat = context.outputs["chat"]
    if name == "newest":
        return chat
    if name == "previous":
        if chat.parent.parent != context.run.path / "steps":
            return chat  # the user's own: what stands beside it is none of ours
        earlier = sorted(chat.parent.glob("epoch-*"), key=lambda path: int(path.name.removeprefix("epoch-")))
        return earlier[-1] if earlier else chat
    return Path(name)


def step_name(checkpoint: Path) -> str:
    """How a comparison names the version that answered, e.g. sft-1a2b3c/model."""
    return f"{checkpoint.parent.name}/{checkpoint.name}"


def check_labels_possible(context: Context, prompts: list[dict[str, Any]]) -> None:
    """Raises UserError where the simulated annotator has no truth to judge by."""
    for row, prompt in enumerate(prompts):
        if not prompt["truth"]:
            raise UserError(
                f"{context.outputs['prompts_annotation']} row {row}: truth is empty, and the simulated annotator "
                f"judges testbed prompts only; give human comparisons as data.comparisons and leave collect out of "
                f"run.stages"
            )


def draw_job(row: int, prompt: dict[str, Any], rng: random.Random, section: CollectSection) -> Job:
    """Who answers the prompt, and how: two versions where there are two, and a temperature for each answer."""
    order = rng.sample(range(len(section.versions)), 2) if len(section.versions) > 1 else [0, 0]
    return Job(
        row=row,
        prompt=prompt,
        guideline="safety" if prompt["is_safety"] else "helpfulness",
        versions=order,
        temperatures=[rng.choice(section.temperatures) for _ in order],
    )


def sample(context: Context, jobs: list[Job], version: int, temperature: float) -> list[tuple[int, int, str, bool]]:
    """Answers of one version at one temperature: (job, side, text, finished)."""
    wanted = [
        (index, side)
        for index, job in enumerate(jobs)
        for side in (0, 1)
        if job.versions[side] == version and job.temperatures[side] == temperature
    ]
    engines = context.roles["rollout"]
    parts = [wanted[rank :: engines.num_ranks] for rank in range(engines.num_ranks)]
    section, seed = context.config.collect, context.config.run.seed
    sampled = {
        rank: engines.submit_one(
            rank,
            RolloutWorker.generate,
            "prompts_annotation",
            [jobs[index].row for index, _ in part],
            seeds=[request_seed(seed, 2 * index + side, version) for index, side in part],
            temperature=temperature,
            max_new_tokens=section.max_new_tokens,
            num_data=1,
        )
        for rank, part in enumerate(parts)
        if part
    }
    decoded = [engines.submit_one(rank, RolloutWorker.decode, call.data[0]) for rank, call in sampled.items()]
    results = collect_calls(decoded, timeout_s=context.roles.timeout_s, step="collect")
    return [
        (*place, *answer)
        for rank, texts in zip(sampled, results, strict=True)
        for place, answer in zip(parts[rank], texts, strict=True)
    ]


def label(
    index: int,
    job: Job,
    answers: dict[tuple[int, int], tuple[str, bool]],
    names: list[str],
    rng: random.Random,
    section: CollectSection,
) -> dict[str, Any] | None:
    """One labelled row; none where both answers are the same or the pair is left out (§3.2.2)."""
    prompt, sides = job.prompt, [answers[index, 0], answers[index, 1]]
    if sides[0] == sides[1]:
        return None
    verdicts = [judge(prompt["kind"], prompt["truth"], text, finished) for text, finished in sides]
    verdict = compare(verdicts[0], verdicts[1], guideline=job.guideline, rng=rng, noise=section.annotator_noise)
    if verdict is None:
        return None
    won, lost = verdict.choice, 1 - verdict.choice
    return {
        "comparison_id": f"{prompt['prompt_id']}-{index}",
        "prompt_id": prompt["prompt_id"],
        "messages": prompt["messages"],
        "is_safety": prompt["is_safety"],
        "guideline": job.guideline,
        "chosen": sides[won][0],
        "rejected": sides[lost][0],
        "chosen_finished": sides[won][1],
        "rejected_finished": sides[lost][1],
        "chosen_model": names[job.versions[won]],
        "rejected_model": names[job.versions[lost]],
        "chosen_temperature": job.temperatures[won],
        "rejected_temperature": job.temperatures[lost],
        "strength": verdict.strength,
        "safety_bin": verdict.safety_bin,
        "annotator": "simulated",
        "batch": 0,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
