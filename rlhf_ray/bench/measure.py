"""Runs a benchmark on the real roles: the calls of a PPO iteration, or of a part of it, again and again.

A benchmark is a stage that files nothing: it works in a temporary directory, which goes before the first repeat.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ray
import torch
from torch import Tensor

from cluster.worker_group import Call, collect
from model.checkpoint import save_checkpoint
from model.checkpoint_files import expected_shapes, read_config
from model.config import ModelConfig
from rlhf_ray.bench.figures import Lap
from rlhf_ray.bench.report import report
from rlhf_ray.bench.workload import ROLES, TRAINED, Workload
from rlhf_ray.data.batching import prompt_rows
from rlhf_ray.data.prompts import random_prompts
from rlhf_ray.errors import RunFailure
from rlhf_ray.machine import opening_lines
from rlhf_ray.preflight.run import SMALLEST_VOCABULARY
from rlhf_ray.progress import console, doing, progress_bar, shown
from rlhf_ray.recipe import ppo
from rlhf_ray.recipe.context import Context
from rlhf_ray.recipe.engines import generate, start_engines, sync_weights
from rlhf_ray.recipe.scoring import score
from rlhf_ray.recipe.stages import Artefact, given_outputs
from rlhf_ray.recipe.tokenizer import save_tokenizer, train_tokenizer
from rlhf_ray.records import PromptBatch, Rollouts, WeightVersion
from rlhf_ray.run_state import RunDir
from rlhf_ray.stopping import scratch_directory

Inputs = Mapping[str, Artefact]
Repeat = Callable[[int], dict[str, float]]
"""One repeat by its number; returns PPO's metrics of it, as far as it has any."""

VERSION = WeightVersion("bench", 0)
INIT_STD = 0.02


def run_bench(work: Workload) -> dict[str, Any]:
    """Measures, and returns the report (docs/performance.md).

    Raises:
        WorkerError, PlacementError, RunFailure.
    """
    for line in opening_lines(work.config):
        console.print(line, highlight=False, soft_wrap=True)
    with ExitStack() as stack, shown(f"bench {work.what}"):
        # The models are needed until every role has loaded them: no signal later can leave them behind.
        with scratch_directory("rlhf-ray-bench-") as directory:
            context = Context(work.config, RunDir(directory), every_id=True)
            stack.callback(context.close)
            context.work_at(f"bench {work.what}", work.config, ROLES[work.what])
            with doing(f"bench {work.what}", "making models, starting workers"):
                inputs = make_inputs(context, work)
                shapes = role_shapes(inputs, work)
                context.roles.start(*ROLES[work.what])
                repeat = PREPARE[work.what](context, inputs, work)
        laps = measure(context.roles, work, repeat)
        return report(work, shapes, laps, context.roles)


def measure(roles: Any, work: Workload, repeat: Repeat) -> list[Lap]:
    """The measured laps.

    Raises:
        RunFailure: answers have not the length they should.
    """
    laps = []
    with progress_bar(f"bench {work.what}", total=work.warmup + work.repeats) as bar:
        for index in range(work.warmup + work.repeats):
            before = roles.busy_seconds()
            roles.turn_log = []
            start = time.perf_counter()
            row = repeat(index)
            seconds = time.perf_counter() - start
            after = roles.busy_seconds()
            expected = work.batch_size * work.response_tokens
            if (sampled := row.get("response/tokens_total", expected)) != expected:
                raise RunFailure(f"bench {work.what}: {sampled:.0f} tokens were sampled in place of {expected}")
            if index >= work.warmup:
                busy = {role: [b - a for a, b in zip(before[role], after[role], strict=True)] for role in after}
                laps.append(Lap(seconds, phases(row, seconds), busy, roles.turn_log))
            bar.advance(f"{seconds:.3g} s")
    return laps


def phases(row: Mapping[str, float], seconds: float) -> dict[str, float]:
    """Seconds of an iteration's phases, and what is left of `seconds` as "other"; empty without phases."""
    found = {
        key.removeprefix("time/").removesuffix("_s"): value
        for key, value in row.items()
        if key.startswith("time/") and key != "time/step_s"
    }
    return {**found, "other": seconds - sum(found.values())} if found else {}


# --- what a repeat is ---------------------------------------------------------------------------------------------


def prepare_rollout(context: Context, inputs: Inputs, work: Workload) -> Repeat:
    """Engines with weights and prompts; a repeat samples answers to prompts that none before it had."""
    roles, section, seed = context.roles, work.config.ppo, work.config.run.seed
    start_engines(context, inputs["chat"].path, inputs["tokenizer"].path)
    prompts = draw_prompts(work)

    def repeat(index: int) -> dict[str, float]:
        batch = prompts.select(prompt_rows(len(prompts), section.batch_size, seed=seed, step=index))
        roles.make_resident("rollout")
        calls = generate(roles, batch, seed=(seed, index), **ppo.sampling(section))
        counts = collect(calls, timeout_s=roles.timeout_s, step=roles.step)
        of_engines = {call.ref: count for call, count in zip(calls, counts, strict=True)}  # one call, several chunks
        return {"response/tokens_total": float(sum(map(sum, of_engines.values())))}

    return repeat


def prepare_score(context: Context, inputs: Inputs, work: Workload) -> Repeat:
    """All models in place; a repeat scores one batch of random answers and builds experience from it."""
    roles, section = context.roles, work.config.ppo
    ppo.load_models(context, inputs, None, version=VERSION)
    rollouts = given_rollouts(work)

    def repeat(index: int) -> dict[str, float]:
        scores = score(roles, ppo.scoring_settings(section), rollouts)
        built = ppo.build_experience(roles, section, rollouts, scores)
        collect([*itertools.chain(*scores.values()), *built], timeout_s=roles.timeout_s, step=roles.step)
        return {}

    return repeat


def prepare_train(context: Context, inputs: Inputs, work: Workload) -> Repeat:
    """Policy and value under DeepSpeed, and experience from random scores; a repeat is one iteration's updates."""
    roles, section, seed = context.roles, work.config.ppo, work.config.run.seed
    ppo.load_models(context, inputs, None, version=VERSION, roles_used=TRAINED)
    rollouts = given_rollouts(work)
    scores = {**given_scores(work), **score(roles, ppo.scoring_settings(section), rollouts, roles_used=("policy",))}
    built = ppo.build_experience(roles, section, rollouts, scores)
    collect(built, timeout_s=roles.timeout_s, step=roles.step)

    def repeat(index: int) -> dict[str, float]:
        ppo.update(roles, section, index, built, seed=seed)
        return {}

    return repeat


def prepare_sync(context: Context, inputs: Inputs, work: Workload) -> Repeat:
    """A policy under DeepSpeed and engines; a repeat sends its weights."""
    ppo.load_models(context, inputs, None, version=VERSION, roles_used=("policy",))
    start_engines(context, inputs["chat"].path, inputs["tokenizer"].path)

    def repeat(index: int) -> dict[str, float]:
        sync_weights(context.roles, step=context.roles.step)
        return {}

    return repeat


def prepare_round(context: Context, inputs: Inputs, work: Workload) -> Repeat:
    """Everything PPO starts; a repeat is one of its iterations."""
    ppo.load_models(context, inputs, None, version=VERSION)
    start_engines(context, inputs["chat"].path, inputs["tokenizer"].path)
    prompts = draw_prompts(work)
    sync_weights(context.roles)

    def repeat(index: int) -> dict[str, float]:
        return ppo.iteration(context.roles, work.config.ppo, index, prompts, seed=work.config.run.seed)

    return repeat


PREPARE: Mapping[str, Callable[[Context, Inputs, Workload], Repeat]] = {
    "rollout": prepare_rollout,
    "score": prepare_score,
    "train": prepare_train,
    "sync": prepare_sync,
    "round": prepare_round,
}


# --- what it works on ---------------------------------------------------------------------------------------------


def make_inputs(context: Context, work: Workload) -> dict[str, Artefact]:
    """The models that are named, and a checkpoint of random weights for each that is needed and is not."""
    inputs = {
        name: Artefact(name, Path(given.path), "", given.field) for name, given in given_outputs(work.config).items()
    }
    for name in dict.fromkeys(ppo.source_of(role, work.config.ppo) for role in ROLES[work.what]):
        if name in inputs:
            continue
        is_reward = name != "chat"
        path = context.run.path / ("reward" if is_reward else "chat")  # both rewards may be one checkpoint
        if not path.exists():
            weights = random_weights(work, reward_model=is_reward)
            save_checkpoint(path, work.shape, weights, num_labels=1 if is_reward else None)
            # Engines want one for its EOS; ids are all that passes through them.
            save_tokenizer(train_tokenizer(["a b c"] * 9, vocab_size=SMALLEST_VOCABULARY), path)
            inputs.setdefault("tokenizer", Artefact("tokenizer", path, "", "random weights"))
        inputs[name] = Artefact(name, path, "", "random weights")
    return inputs


def role_shapes(inputs: Inputs, work: Workload) -> dict[str, ModelConfig]:
    """Of each role's model."""
    sources = {role: ppo.source_of(role, work.config.ppo) for role in ROLES[work.what]}
    return {role: read_config(inputs[source].path) for role, source in sources.items()}


def random_weights(work: Workload, *, reward_model: bool) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a checkpoint one at a time, in the run's precision: matrices near zero, gains of one."""
    generator = torch.Generator().manual_seed(work.config.run.seed)
    dtype = torch.bfloat16 if work.config.run.precision == "bf16" else torch.float32
    for name, shape in expected_shapes(work.shape, reward_model=reward_model).items():
        gain = len(shape) == 1
        tensor = torch.ones(shape) if gain else INIT_STD * torch.randn(shape, generator=generator)
        yield name, tensor.to(dtype)


def draw_prompts(work: Workload) -> PromptBatch:
    """Random prompts, enough for all repeats: one seen before would come from the prefix cache."""
    num = work.batch_size * (work.warmup + work.repeats)
    shape, seed = work.shape, work.config.run.seed
    return random_prompts(num, length=work.prompt_tokens, vocab_size=shape.vocab_size, seed=seed)


def given_rollouts(work: Workload) -> list[Call[Any]]:
    """A batch of random prompts and answers in chunks, as `generate` would have made it."""
    length, chunk = work.prompt_tokens + work.response_tokens, work.batch_size // work.config.ppo.num_chunks
    seed, vocab_size = work.config.run.seed, work.shape.vocab_size
    drawn = random_prompts(work.batch_size, length=length, vocab_size=vocab_size, seed=seed)
    mask = (torch.arange(length) >= work.prompt_tokens).expand(chunk, length)
    return [
        _given(
            Rollouts(
                tokens=torch.tensor(part.tokens),
                response_mask=mask,
                rollout_logprobs=-math.log(vocab_size) * mask,
                finished=torch.ones(chunk, dtype=torch.bool),
                is_safety=torch.zeros(chunk, dtype=torch.bool),
                prompt_ids=part.ids,
                messages=part.messages,
                policy_version=VERSION,
            )
        )
        for part in (drawn.select(range(start, start + chunk)) for start in range(0, len(drawn), chunk))
    ]


def given_scores(work: Workload) -> dict[str, list[Call[Any]]]:
    """Random scores for `given_rollouts`, as `score` would have made them."""
    generator = torch.Generator().manual_seed(work.config.run.seed)
    num_chunks = work.config.ppo.num_chunks
    chunk, prompt = work.batch_size // num_chunks, work.prompt_tokens
    length = prompt + work.response_tokens
    likely = torch.zeros(chunk, length)
    likely[:, prompt:] = -math.log(work.shape.vocab_size)
    return {
        "value": [_given(torch.zeros(chunk, length + 1)) for _ in range(num_chunks)],
        "reference": [_given(likely) for _ in range(num_chunks)],
        **{
            role: [_given(torch.randn(chunk, generator=generator)) for _ in range(num_chunks)]
            for role in ("helpfulness", "safety")
        },
    }


def _given(value: Any) -> Call[Any]:
    """A value in the object store, in the form of a call that made it."""
    ref = ray.put(value)
    return Call("driver", 0, "given", ref, (ref,))
