"""PPO (Llama 2 §3.2.3): the policy against two gated reward models and the KL to where it started.

The driver holds object references and scalars only. An iteration reads top to bottom:
generate, score, build experience, update policy and value, send the weights.
"""

import itertools
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.worker_group import Call, collect
from model.checkpoint import iterate_tensors, save_checkpoint
from model.checkpoint_files import read_config
from rlhf_ray.config import PPOSection
from rlhf_ray.data.batching import prompt_rows
from rlhf_ray.data.reward_function import is_function
from rlhf_ray.errors import RunFailure
from rlhf_ray.metrics import MetricsWriter, PhaseClock, console, progress_bar
from rlhf_ray.recipe.context import Context
from rlhf_ray.recipe.early_stopping import EarlyStopping, best_directory, drop_others, keep_best, look_is_due
from rlhf_ray.recipe.engines import (
    SCORED_BY,
    generate,
    open_prompts,
    start_engines,
    sync_weights,
    verify_weight_channel,
)
from rlhf_ray.run_state import Due, Step, copy_files, write_json
from rlhf_ray.workers.policy import ExperienceRule, PolicyWorker
from rlhf_ray.workers.ppo_update import UpdateRule
from rlhf_ray.workers.roles import Roles
from rlhf_ray.workers.scorer import ScorerWorker
from rlhf_ray.workers.trainer import TrainerWorker
from rlhf_ray.workers.value import ValueWorker

FROZEN_ROLES = ("reference", "helpfulness", "safety")
SCORING_ROLES = ("policy", "value", *FROZEN_ROLES)
LOOKING_ROLES = ("policy", *FROZEN_ROLES)
"""Those that score answers nobody learns from."""
HELD_OUT_SEED = 1_000_003  # the held-out answers of every look share their sampling seeds


class LogprobGapError(RunFailure):
    """Engine and trainer disagree on the log-probs of what the engine sampled."""


def ppo(context: Context) -> Path:
    """Trains the policy; returns the step's directory, in which `model` is the best checkpoint."""
    section, seed = context.config.ppo, context.config.run.seed
    step = context.step(
        "ppo",
        sections=("ppo",),
        parents=("tokenizer", "chat", "helpfulness", "safety", "prompts_train", "prompts_early_stop"),
        code=("rlhf_ray.recipe.ppo", "rlhf_ray.recipe.early_stopping"),
        rollout=context.sampling_settings(),
    )
    if context.skip(step):
        return step.path
    work = step.begin()
    steps_done, state = step.latest_state()
    with console.status("ppo: starting workers, loading models"):
        roles = context.roles
        roles.start("rollout", *SCORING_ROLES)
        load_models(context, state)
        start_engines(context, context.outputs["chat"])
        num_prompts = open_prompts(context, "prompts_train", max_new_tokens=section.max_new_tokens, readers=SCORED_BY)
        num_held_out = open_prompts(
            context,
            "prompts_early_stop",
            max_new_tokens=section.max_new_tokens,
            at_least=section.num_chunks,
            readers=SCORED_BY,
        )
        buckets = sync_weights(roles)
        weight_check = verify_weight_channel(
            roles, buckets, prompts="prompts_train", precision=context.config.run.precision
        )
        del buckets
    stopping = EarlyStopping.load(state)
    if state is None:
        stopping.look(-1, evaluate_held_out(roles, section, num_held_out)["held_out/reward_combined"])
        keep_best(roles, work, stopping.best_step)
    metrics = MetricsWriter(work, steps_done=steps_done)
    due = Due(section.save_every, context.config.run.save_every_s)
    with progress_bar("ppo", total=section.num_steps, done=steps_done) as bar:
        while steps_done < section.num_steps and stopping.looks_since_best < section.patience:
            index = steps_done
            row = iteration(roles, section, index, num_prompts=num_prompts, seed=seed)
            if look_is_due(section, index):
                row |= evaluate_held_out(roles, section, num_held_out)
                if stopping.look(index, row["held_out/reward_combined"]):
                    keep_best(roles, work, index)
            metrics.write(index, row)
            bar.advance(
                f"reward {row['reward/combined']:+.2f}  kl {row['kl/per_sequence']:.2f}  {row['time/step_s']:.1f} s"
            )
            steps_done = index + 1
            if due.now(steps_done, section.num_steps) or stopping.looks_since_best >= section.patience:
                with due.writing():
                    save_state(roles, step, steps_done, stopping)
                drop_others(work / "best", best_directory(work, stopping.best_step))
    if stopping.looks_since_best >= section.patience:
        console.print(
            f"ppo: no better held-out reward in {section.patience} looks, stopped after step {steps_done - 1}"
        )
    metrics.close()
    save_models(context, work, stopping, steps_done)
    done = step.finish(
        steps=steps_done, best_step=stopping.best_step, best_reward=stopping.best, weight_check=weight_check
    )
    shutil.rmtree(done / "best", ignore_errors=True)
    return done


def save_models(context: Context, work: Path, stopping: EarlyStopping, steps_done: int) -> None:
    """Puts the best policy at `model` and the newest at `last`; what an interrupted attempt put there stays."""
    model, last = work / "model", work / "last"
    if not model.exists():
        if stopping.best_step >= 0:
            best_directory(work, stopping.best_step).rename(model)
        else:
            chat = context.outputs["chat"]
            save_checkpoint(model, read_config(chat), iterate_tensors(chat))
    if not last.exists():
        if stopping.best_step == steps_done - 1:
            half = work / ".last.partial-"
            copy_files(model, half, link=True)
            half.rename(last)
        else:
            context.roles["policy"].call(TrainerWorker.save_model, str(last), step="after PPO")
    for directory in (model, last):
        context.add_tokenizer(directory)


def iteration(roles: Roles, section: PPOSection, index: int, *, num_prompts: int, seed: int) -> dict[str, float]:
    """One PPO iteration; returns its metrics."""
    label, clock = f"ppo step {index}", PhaseClock()
    roles.step = label
    rows = prompt_rows(num_prompts, section.batch_size, seed=seed, step=index)
    with clock.phase("rollout"):
        roles.work_together("rollout")
        rollouts = generate(roles, "prompts_train", rows, seed=(seed, index), **sampling(section))
        if roles.runtime.device == "cuda":  # scoring of a chunk starts while later ones are still being generated
            scores = score(roles, section, rollouts)
        collect(rollouts, timeout_s=roles.timeout_s, step=label)
    with clock.phase("score"):
        if roles.runtime.device == "cpu":  # here it would only take the engine's cores away
            roles.work_together(*SCORING_ROLES)
            scores = score(roles, section, rollouts)
        built = build_experience(roles, section, rollouts, scores)
        # All in one, producers first: where one of them dies it is named, not the policy that misses its data.
        made = [*rollouts, *itertools.chain(*scores.values()), *built]
        experience_metrics = collect(made, timeout_s=roles.timeout_s, step=label)[-len(built)]
    check_logprob_gap(experience_metrics["logprob_gap_per_token"], section.max_logprob_gap, label)
    with clock.phase("update"):
        policy_metrics, value_metrics = update(roles, section, index, built, seed=seed)
    with clock.phase("sync"):
        if policy_metrics:
            sync_weights(roles, step=label)
    tokens = experience_metrics["response_tokens_total"]
    return {
        **named_metrics(experience_metrics),
        **{f"policy/{name}": value for name, value in policy_metrics.items()},
        **{f"value/{name}": value for name, value in value_metrics.items()},
        **clock.seconds(),
        "throughput/rollout_tokens_per_s": tokens / clock.times["rollout"],
        "throughput/samples_per_s": section.batch_size / sum(clock.times.values()),
        **roles.memory(),
    }


def score(
    roles: Roles,
    section: PPOSection,
    rollouts: Sequence[Call[Any]],
    *,
    roles_used: Sequence[str] = SCORING_ROLES,
) -> dict[str, list[Call[Any]]]:
    """Starts the log-probs of policy and reference, values and both rewards of every chunk, by reference."""
    budget = {"micro_batch_tokens": section.micro_batch_tokens}
    methods: dict[str, tuple[Any, dict[str, Any]]] = {
        "policy": (ScorerWorker.logprobs, {"temperature": section.temperature, **budget}),
        "reference": (ScorerWorker.logprobs, {"temperature": section.temperature, **budget}),
        "value": (ValueWorker.values, budget),
        "helpfulness": (ScorerWorker.score, budget),
        "safety": (ScorerWorker.score, budget),
    }
    return {
        role: [
            roles[role].submit_one(chunk % roles[role].num_ranks, method, call.data[0], **options, num_data=1)
            for chunk, call in enumerate(rollouts)
        ]
        for role, (method, options) in methods.items()
        if role in roles_used
    }


def build_experience(
    roles: Roles, section: PPOSection, rollouts: Sequence[Call[Any]], scores: dict[str, list[Call[Any]]]
) -> list[Call[dict[str, float]]]:
    """Starts rewards, advantages and returns on the policy's ranks, each over its own chunks."""
    policy = roles["policy"]
    calls: list[Call[Any]] = []
    for rank in range(policy.num_ranks):
        own = range(rank, len(rollouts), policy.num_ranks)
        inputs = inputs_of(own, rollouts, scores, SCORING_ROLES)
        calls.append(
            policy.submit_one(
                rank, PolicyWorker.build_experience, len(own), experience_rule(section), *inputs, num_data=len(own)
            )
        )
    return calls


def summarize(
    roles: Roles, section: PPOSection, rollouts: Sequence[Call[Any]], scores: dict[str, list[Call[Any]]]
) -> dict[str, float]:
    """Mean rewards, KL and lengths of some rollouts, computed by the policy's ranks."""
    policy = roles["policy"]
    calls: list[Call[Any]] = []
    for rank in range(policy.num_ranks):
        own = range(rank, len(rollouts), policy.num_ranks)
        inputs = inputs_of(own, rollouts, scores, LOOKING_ROLES)
        calls.append(policy.submit_one(rank, PolicyWorker.summarize, len(own), experience_rule(section), *inputs))
    made = [*rollouts, *itertools.chain(*scores.values()), *calls]
    return collect(made, timeout_s=roles.timeout_s, step=roles.step)[len(made) - len(calls)]


def inputs_of(
    chunks: Sequence[int], rollouts: Sequence[Call[Any]], scores: dict[str, list[Call[Any]]], scorers: Sequence[str]
) -> list[Any]:
    """References of the chunks' rollouts, then of each scorer's output for them: what the policy's ranks take in."""
    made = [rollouts, *(scores[role] for role in scorers)]
    return [calls[chunk].data[0] for calls in made for chunk in chunks]


def update(
    roles: Roles, section: PPOSection, index: int, built: Sequence[Call[Any]], *, seed: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Updates policy and value at the same time; the policy waits while the value model warms up."""
    # Chunk c was built by rank c % ranks: back into the order of the batch, so that rows number the same on any ranks.
    experiences = [built[chunk % len(built)].data[chunk // len(built)] for chunk in range(section.num_chunks)]
    rule, label = update_rule(section, seed), f"ppo step {index}"
    roles.work_together("policy", "value")
    values = roles["value"].submit(ValueWorker.train_value, index, rule, *experiences)
    if index < section.value_warmup_steps:
        return {}, collect(values, timeout_s=roles.timeout_s, step=label)[0]
    policies = roles["policy"].submit(PolicyWorker.train_policy, index, rule, *experiences)
    results = collect([*policies, *values], timeout_s=roles.timeout_s, step=label)
    return results[0], results[-1]


def evaluate_held_out(roles: Roles, section: PPOSection, num_prompts: int) -> dict[str, float]:
    """Both rewards and the KL of the policy on the held-out prompts, for early stopping."""
    roles.work_together("rollout")
    rollouts = generate(roles, "prompts_early_stop", range(num_prompts), seed=(HELD_OUT_SEED, 0), **sampling(section))
    collect(rollouts, timeout_s=roles.timeout_s, step=roles.step)
    roles.work_together(*LOOKING_ROLES)
    metrics = summarize(roles, section, rollouts, score(roles, section, rollouts, roles_used=LOOKING_ROLES))
    kept = ("reward_helpfulness", "reward_safety", "reward_combined", "kl_per_sequence", "response_tokens")
    return {f"held_out/{name}": metrics[name] for name in kept}


def load_models(context: Context, state: Path | None, *, roles_used: Sequence[str] = SCORING_ROLES) -> None:
    """Puts the roles' models in place: from the stage's parents, or from a checkpoint of this stage."""
    config, roles, outputs = context.config, context.roles, context.outputs
    section, runtime = config.ppo, roles.runtime
    label = "loading models"
    roles.work_together(*roles_used)
    trained = {"policy": section.optim, "value": section.value_optim}
    trained = {role: optim for role, optim in trained.items() if role in roles_used}
    calls = load_frozen(context, [role for role in roles_used if role in FROZEN_ROLES])
    for role in trained:
        calls += roles[role].submit(
            TrainerWorker.build,
            str(outputs[source_of(role, section)]),
            head="lm" if role == "policy" else "scalar",
            seed=config.run.seed,
            runtime=runtime,
            fresh_head=role == "value" and section.value_init == "policy",
        )
    collect(calls, timeout_s=roles.timeout_s, step=label)
    if section.value_head == "zero" and "value" in trained:
        roles["value"].call(TrainerWorker.zero_head, step=label)
    begun = []
    for role, optim in trained.items():
        updates = num_updates(section, role)
        begun += roles.begin_training(role, optim=optim, num_steps=updates, state=state / role if state else None)
    collect(begun, timeout_s=roles.timeout_s, step=label)


def num_updates(section: PPOSection, role: str) -> int:
    """Optimizer steps of policy or value over all of PPO: the length of its learning-rate schedule."""
    iterations = section.num_steps - (section.value_warmup_steps if role == "policy" else 0)
    return iterations * section.inner_epochs * (section.batch_size // section.minibatch_size)


def load_frozen(context: Context, roles_used: Sequence[str] = FROZEN_ROLES) -> list[Call[None]]:
    """Starts loading the reference policy and both rewards, models or functions."""
    roles, outputs = context.roles, context.outputs
    calls: list[Call[None]] = []
    for role in roles_used:
        source = str(outputs[source_of(role, context.config.ppo)])
        if role != "reference" and is_function(source):
            tokenizer = str(outputs["tokenizer"])
            calls += roles[role].submit(ScorerWorker.load_function, source, root=os.getcwd(), tokenizer=tokenizer)
        else:
            head = "lm" if role == "reference" else "scalar"
            calls += roles[role].submit(ScorerWorker.load_frozen, source, head=head, runtime=roles.runtime)
    return calls


def source_of(role: str, section: PPOSection) -> str:
    """The output whose weights a role starts from."""
    if role == "value":
        return "helpfulness" if section.value_init == "helpfulness" else "chat"
    return role if role in ("helpfulness", "safety") else "chat"


def save_state(roles: Roles, step: Step, steps_done: int, stopping: EarlyStopping) -> None:
    """A checkpoint from which this stage resumes bit for bit."""
    with step.new_state(steps_done) as directory:
        for role in ("policy", "value"):
            roles[role].call(TrainerWorker.save_state, str(directory / role), step=f"ppo checkpoint {steps_done}")
        write_json(directory / "early_stopping.json", stopping.__dict__)


def sampling(section: PPOSection) -> dict[str, Any]:
    """What `generate` needs of the section."""
    return {name: getattr(section, name) for name in ("num_chunks", "temperature", "max_new_tokens")}


def experience_rule(section: PPOSection) -> ExperienceRule:
    """What the policy's ranks need of the section to build experience."""
    threshold = section.safety_threshold
    return ExperienceRule(
        safety_threshold_raw=math.log(threshold / (1 - threshold)),
        **{
            name: getattr(section, name)
            for name in ExperienceRule.__dataclass_fields__
            if name != "safety_threshold_raw"
        },
    )


def update_rule(section: PPOSection, seed: int) -> UpdateRule:
    """What the trained ranks need of the section to update."""
    return UpdateRule(
        seed=seed,
        **{name: getattr(section, name) for name in UpdateRule.__dataclass_fields__ if name != "seed"},
    )


def named_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """Experience metrics under their slashed keys (docs/metrics.md)."""
    groups = ("reward", "kl", "value", "logprob")
    named = {}
    for name, value in metrics.items():
        group = next((g for g in groups if name.startswith(g + "_")), "response")
        named[f"{group}/{name.removeprefix(group + '_')}"] = value
    return named


def check_logprob_gap(gap: float, limit: float, label: str) -> None:
    """Raises LogprobGapError above the limit (or for NaN)."""
    if not gap <= limit:
        raise LogprobGapError(
            f"{label}: engine and trainer log-probs differ by {gap:.4f} nats on average, above "
            f"ppo.max_logprob_gap={limit:g}; the engine may hold other weights, or another precision is needed"
        )
