"""PPO (Llama 2 §3.2.3): the policy against two gated reward models and the KL to where it started.

The driver holds object references and scalars only. An iteration reads top to bottom:
generate, score, build experience, update policy and value, send the weights.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from cluster.worker_group import Call, collect
from model.checkpoint import iterate_tensors, save_checkpoint
from model.checkpoint_files import read_config
from rlhf_ray.config import PPOSection
from rlhf_ray.data.batching import prompt_rows
from rlhf_ray.errors import RunFailure
from rlhf_ray.metrics import MetricsWriter, PhaseClock
from rlhf_ray.progress import console, doing, progress_bar
from rlhf_ray.recipe.context import Context, add_tokenizer
from rlhf_ray.recipe.early_stopping import (
    EarlyStopping,
    best_directory,
    drop_others,
    evaluation_is_due,
    keep_best,
    link_whole,
    take_best,
)
from rlhf_ray.recipe.engines import (
    generate,
    read_prompts,
    ready_engines,
    start_engines,
    sync_weights,
    verify_weight_channel,
)
from rlhf_ray.recipe.scoring import (
    FROZEN_ROLES,
    READERS,
    SCORING_ROLES,
    SUMMARY_ROLES,
    Scores,
    ScoringSettings,
    inputs_of,
    score,
    start_loading,
    summarize,
)
from rlhf_ray.recipe.stages import Artefact
from rlhf_ray.records import PromptBatch, WeightVersion
from rlhf_ray.run_state import Due, Step, write_json
from rlhf_ray.workers.policy import ExperienceSettings, PolicyWorker
from rlhf_ray.workers.ppo_update import UpdateSettings
from rlhf_ray.workers.roles import Roles
from rlhf_ray.workers.trainer import TrainerWorker
from rlhf_ray.workers.value import ValueWorker

HELD_OUT_SEED = 1_000_003  # the held-out answers of every evaluation share their sampling seeds


class LogprobGapError(RunFailure):
    """Engine and trainer disagree on the log-probs of what the engine sampled."""


def ppo(context: Context, step: Step, inputs: Mapping[str, Artefact]) -> dict[str, Any]:
    """Trains the policy; in the step's directory `model` is the best checkpoint, `last` the newest."""
    section, seed = context.config.ppo, context.config.run.seed
    work = step.begin()
    steps_done, state = step.latest_state()
    with doing(step.name, "starting workers, loading models"):
        roles = context.roles
        roles.start("rollout", *SCORING_ROLES)
        load_models(context, inputs, state, version=WeightVersion(f"{step.name}-{step.key}", steps_done))
        start_engines(context, inputs["chat"].path, inputs["tokenizer"].path)
        read = partial(read_prompts, inputs, max_new_tokens=section.max_new_tokens, readers=READERS)
        prompts, prompts_held_out = read("prompts_train"), read("prompts_early_stop", at_least=section.num_chunks)
        weight_check = verify_weight_channel(roles, prompts, precision=context.config.run.precision)
    held_out = partial(evaluate_held_out, roles, section, prompts_held_out)
    stopping = EarlyStopping.load(state)
    if state is None:
        stopping.update(-1, held_out()["held_out/reward_combined"])
    elif (shorter := step.continued()) is not None:
        take_best(shorter, work, stopping.best_step)
    metrics = MetricsWriter(work, steps_done=steps_done)
    due = Due(section.save_every, context.config.run.save_every_s)
    with progress_bar(step.name, total=section.num_steps, done=steps_done) as bar:
        while steps_done < section.num_steps and stopping.evaluations_since_best < section.patience:
            index = steps_done
            row = iteration(roles, section, index, prompts, seed=seed)
            if evaluation_is_due(section, index):
                row |= held_out()
                if stopping.update(index, row["held_out/reward_combined"]):
                    keep_best(roles, work, index)
            metrics.write(index, row)
            bar.advance(
                f"reward {row['reward/combined']:+.2f}  kl {row['kl/per_sequence']:.2f}  {row['time/step_s']:.1f} s"
            )
            steps_done = index + 1
            if due.now(steps_done, section.num_steps) or stopping.evaluations_since_best >= section.patience:
                with due.writing():
                    save_state(roles, step, steps_done, stopping)
                drop_others(work / "best", best_directory(work, stopping.best_step))
    if stopping.evaluations_since_best >= section.patience:
        console.print(
            f"ppo: no better held-out reward in {section.patience} evaluations, stopped after step {steps_done - 1}"
        )
    metrics.close()
    chosen = replace(stopping)
    if not evaluation_is_due(section, steps_done - 1):
        # Where training ends stands for choice too, but not in the checkpoint: a longer run would not have looked here.
        chosen.update(steps_done - 1, step.kept("last", held_out)["held_out/reward_combined"])
    save_models(context, inputs, work, chosen, steps_done)
    return {
        "steps": steps_done,
        "best_step": chosen.best_step,
        "best_reward": chosen.best,
        "weight_check": weight_check,
    }


def save_models(
    context: Context, inputs: Mapping[str, Artefact], work: Path, stopping: EarlyStopping, steps_done: int
) -> None:
    """Puts the best policy at `model` and the newest at `last`; what an interrupted attempt put there stays."""
    model, last = work / "model", work / "last"
    best = best_directory(work, stopping.best_step)
    if not last.exists():
        if stopping.best_step == steps_done - 1 and best.exists():
            link_whole(best, last)
        else:
            context.roles.make_resident("policy")
            context.roles["policy"].call(TrainerWorker.save_model, str(last), step="after PPO")
    if not model.exists():
        if stopping.best_step == steps_done - 1:
            link_whole(last, model)
        elif stopping.best_step >= 0:
            link_whole(best, model)
        else:
            chat = inputs["chat"].path
            save_checkpoint(model, read_config(chat), iterate_tensors(chat))
    for directory in (model, last):
        add_tokenizer(inputs["tokenizer"].path, directory)


def iteration(roles: Roles, section: PPOSection, index: int, prompts: PromptBatch, *, seed: int) -> dict[str, float]:
    """One PPO iteration on some of the prompts; returns its metrics."""
    label, clock, scoring = f"ppo step {index}", PhaseClock(), scoring_settings(section)
    roles.step = label
    batch = prompts.select(prompt_rows(len(prompts), section.batch_size, seed=seed, step=index))
    with clock.phase("rollout"):
        ready_engines(roles)
        overlap = roles.can_overlap("rollout", SCORING_ROLES)
        rollouts = generate(roles, batch, seed=(seed, index), stream=overlap, **sampling(section))
        if overlap:  # scoring of a chunk starts while later ones are still being generated
            scores = score(roles, scoring, rollouts)
        collect(rollouts, timeout_s=roles.timeout_s, step=label)
    with clock.phase("score"):
        if not overlap:
            scores = score(roles, scoring, rollouts)
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


def build_experience(
    roles: Roles, section: PPOSection, rollouts: Sequence[Call[Any]], scores: Scores
) -> list[Call[dict[str, float]]]:
    """Starts rewards, advantages and returns on the policy's ranks, each over its own chunks."""
    policy, gate = roles["policy"], scoring_settings(section).gate
    calls: list[Call[Any]] = []
    for rank in range(policy.num_ranks):
        own = range(rank, len(rollouts), policy.num_ranks)
        inputs = inputs_of(own, rollouts, scores, SCORING_ROLES)
        settings = (len(own), experience_settings(section), gate)
        calls.append(policy.submit_one(rank, PolicyWorker.build_experience, *settings, *inputs, num_data=len(own)))
    return calls


def update(
    roles: Roles, section: PPOSection, index: int, built: Sequence[Call[Any]], *, seed: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Updates value and policy, at the same time where they can; the policy waits while the value model warms up."""
    # Chunk c was built by rank c % ranks: back into the order of the batch, so that rows number the same on any ranks.
    experiences = [built[chunk % len(built)].data[chunk // len(built)] for chunk in range(section.num_chunks)]
    settings, label = update_settings(section, seed), f"ppo step {index}"
    train: dict[str, Any] = {"value": ValueWorker.train_value, "policy": PolicyWorker.train_policy}
    if index < section.value_warmup_steps:
        del train["policy"]
    metrics: dict[str, dict[str, float]] = {"policy": {}}
    for turn in roles.turns(*train):
        roles.make_resident(*turn)
        calls = [call for role in turn for call in roles[role].submit(train[role], index, settings, *experiences)]
        results = collect(calls, timeout_s=roles.timeout_s, step=label)
        metrics |= {call.role: result for call, result in zip(calls, results, strict=True)}
    return metrics["policy"], metrics["value"]


def evaluate_held_out(roles: Roles, section: PPOSection, prompts: PromptBatch) -> dict[str, float]:
    """Both rewards and the KL of the policy on the held-out prompts, for early stopping."""
    ready_engines(roles)
    rollouts = generate(roles, prompts, seed=(HELD_OUT_SEED, 0), **sampling(section))
    collect(rollouts, timeout_s=roles.timeout_s, step=roles.step)
    scoring = scoring_settings(section)
    metrics = summarize(roles, scoring, rollouts, score(roles, scoring, rollouts, roles_used=SUMMARY_ROLES))
    kept = ("reward_helpfulness", "reward_safety", "reward_combined", "kl_per_sequence", "response_tokens")
    return {f"held_out/{name}": metrics[name] for name in kept}


def load_models(
    context: Context,
    inputs: Mapping[str, Artefact],
    state: Path | None,
    *,
    version: WeightVersion,
    roles_used: Sequence[str] = SCORING_ROLES,
) -> None:
    """Puts the roles' models in place: from the stage's inputs, or from a checkpoint of this stage.

    Args:
        version: of the policy.
    """
    config, roles = context.config, context.roles
    section, runtime = config.ppo, roles.runtime
    label = "loading models"
    trained = {"policy": section.optim, "value": section.value_optim}
    trained = {role: optim for role, optim in trained.items() if role in roles_used}
    for turn in roles.turns(*roles_used):
        roles.make_resident(*turn)
        calls = start_loading(context, inputs, [role for role in turn if role in FROZEN_ROLES])
        for role in [role for role in turn if role in trained]:
            calls += roles[role].submit(
                TrainerWorker.build,
                str(inputs[source_of(role, section)].path),
                head="lm" if role == "policy" else "scalar",
                seed=config.run.seed,
                runtime=runtime,
                fresh_head=role == "value" and section.value_init == "policy",
            )
        collect(calls, timeout_s=roles.timeout_s, step=label)
        if section.value_head == "zero" and "value" in turn:
            roles["value"].call(TrainerWorker.zero_head, step=label)
        begun = []
        for role in [role for role in turn if role in trained]:
            updates, own = num_updates(section, role), state / role if state else None
            begun += roles.begin_training(role, optim=trained[role], num_steps=updates, state=own)
        collect(begun, timeout_s=roles.timeout_s, step=label)
    if "policy" in trained:
        roles["policy"].call(PolicyWorker.set_version, version, step=label)


def num_updates(section: PPOSection, role: str) -> int:
    """Optimizer steps of policy or value over all of PPO: the length of its learning-rate schedule."""
    iterations = section.num_steps - (section.value_warmup_steps if role == "policy" else 0)
    return iterations * section.inner_epochs * (section.batch_size // section.minibatch_size)


def source_of(role: str, section: PPOSection) -> str:
    """The input whose weights a role starts from."""
    if role == "value":
        return "helpfulness" if section.value_init == "helpfulness" else "chat"
    return role if role in ("helpfulness", "safety") else "chat"


def save_state(roles: Roles, step: Step, steps_done: int, stopping: EarlyStopping) -> None:
    """A checkpoint from which this stage resumes bit for bit."""
    with step.new_state(steps_done) as directory:
        for turn in roles.turns("policy", "value"):
            roles.make_resident(*turn)
            calls = [c for role in turn for c in roles[role].submit(TrainerWorker.save_state, str(directory / role))]
            collect(calls, timeout_s=roles.timeout_s, step=f"ppo checkpoint {steps_done}")
        write_json(directory / "early_stopping.json", stopping.__dict__)


def sampling(section: PPOSection) -> dict[str, Any]:
    """What `generate` needs of the section."""
    return {name: getattr(section, name) for name in ("num_chunks", "temperature", "max_new_tokens")}


def scoring_settings(section: PPOSection) -> ScoringSettings:
    """What scoring needs of the section."""
    return ScoringSettings(**_fields(ScoringSettings, section) | {"micro_batch_tokens": section.tokens_to_score})


def experience_settings(section: PPOSection) -> ExperienceSettings:
    """What the policy's ranks need of the section to build experience."""
    return ExperienceSettings(**_fields(ExperienceSettings, section))


def update_settings(section: PPOSection, seed: int) -> UpdateSettings:
    """What the trained ranks need of the section to update."""
    return UpdateSettings(**_fields(UpdateSettings, section), seed=seed)


def _fields(of: type, section: PPOSection) -> dict[str, Any]:
    """The section's values of the fields that a class shares with it."""
    return {field.name: getattr(section, field.name) for field in fields(of) if hasattr(section, field.name)}


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
