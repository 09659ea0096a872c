"""What models say of answers: log-probs, values, rewards, and their summary. PPO and the evaluation share it.

Everything is by reference: the driver holds no tensor.
"""

import itertools
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.worker_group import Call, collect
from rlhf_ray.data.reward_function import is_function
from rlhf_ray.recipe.context import Context
from rlhf_ray.recipe.stages import REWARDS, Artefact
from rlhf_ray.records import Completion, PromptBatch
from rlhf_ray.workers.policy import PolicyWorker
from rlhf_ray.workers.roles import Roles
from rlhf_ray.workers.rollout import RolloutWorker
from rlhf_ray.workers.scorer import ScorerWorker
from rlhf_ray.workers.value import ValueWorker

FROZEN_ROLES = ("reference", *REWARDS)
SUMMARY_ROLES = ("policy", *FROZEN_ROLES)
"""Those that score answers nobody learns from."""
SCORING_ROLES = ("policy", "value", *FROZEN_ROLES)
TURNS = (*FROZEN_ROLES, "policy", "value")
"""The order of those that must take turns, before value and policy are trained."""
READERS = ("chat", *REWARDS)
"""Inputs of a stage whose models read prompts and answers."""

Scores = Mapping[str, Sequence[Call[Any]]]
"""Role -> what it says of each chunk, by reference; behind them calls of ranks that only took part."""


@dataclass(frozen=True, kw_only=True)
class ScoringSettings:
    """How answers are scored."""

    temperature: float
    """That they were sampled at; log-probs are taken at it."""
    micro_batch_tokens: int
    """Tokens a rank passes through the model at once, padding included where there is any."""
    safety_threshold: float
    """Sigmoid score below which the safety model rules (§3.2.3)."""

    @property
    def gate(self) -> float:
        """The threshold as a raw score."""
        return gate(self.safety_threshold)


def gate(threshold: float) -> float:
    """A sigmoid score as a raw one."""
    return math.log(threshold / (1 - threshold))


def load_frozen(
    context: Context, inputs: Mapping[str, Artefact], roles_used: Sequence[str] = FROZEN_ROLES, *, step: str
) -> None:
    """Loads the reference policy and both rewards, models or functions."""
    for turn in context.roles.turns(*roles_used):
        context.roles.make_resident(*turn)
        calls = start_loading(context, inputs, turn)
        collect(calls, timeout_s=context.roles.timeout_s, step=step)


def start_loading(context: Context, inputs: Mapping[str, Artefact], roles_used: Sequence[str]) -> list[Call[None]]:
    """Starts loading those of one turn."""
    roles = context.roles
    calls: list[Call[None]] = []
    for role in roles_used:
        source = str(inputs["chat" if role == "reference" else role].path)
        if role != "reference" and is_function(source):
            named = {"field": inputs[role].maker, "root": os.getcwd(), "tokenizer": str(inputs["tokenizer"].path)}
            calls += roles[role].submit(ScorerWorker.load_function, source, **named)
        else:
            head = "lm" if role == "reference" else "scalar"
            calls += roles[role].submit(ScorerWorker.load_frozen, source, head=head, **roles.frozen(role))
    return calls


def score(
    roles: Roles, settings: ScoringSettings, rollouts: Sequence[Call[Any]], *, roles_used: Sequence[str] = SCORING_ROLES
) -> Scores:
    """Starts the log-probs of policy and reference, values and both rewards of every chunk; on return the last turn is
    under way.
    """
    budget = {"micro_batch_tokens": settings.micro_batch_tokens}
    likely = (ScorerWorker.logprobs, {"temperature": settings.temperature, **budget})
    methods: dict[str, tuple[Any, dict[str, Any]]] = {
        "policy": likely,
        "reference": likely,
        "value": (ValueWorker.values, budget),
        "helpfulness": (ScorerWorker.score, budget),
        "safety": (ScorerWorker.score, budget),
    }
    scores: dict[str, list[Call[Any]]] = {}
    for turn in roles.turns(*(role for role in TURNS if role in roles_used)):
        if scores:  # producers first: where one of them dies it is named, not those that miss its data
            before = [*rollouts, *itertools.chain(*scores.values())]
            collect(before, timeout_s=roles.timeout_s, step=roles.step)
        roles.make_resident(*turn)
        for role in turn:
            method, options = methods[role]
            group = roles[role]
            dealt = [chunk % group.num_ranks for chunk in range(len(rollouts))]
            scores[role] = [
                *(
                    group.submit_one(rank, method, call.data[0], **options, num_data=1)
                    for rank, call in zip(dealt, rollouts, strict=True)
                ),
                *(group.submit_one(rank, ScorerWorker.join_in) for rank in joining(roles.replicas(role), dealt)),
            ]
    return scores


def joining(replicas: Sequence[range], dealt: Sequence[int]) -> list[int]:
    """Ranks that join in, as often as they must: those of a replica take part in what any of them computes.

    Args:
        replicas: ranks of each.
        dealt: the rank of each piece of work.
    """
    own = Counter(dealt)
    return [rank for ranks in replicas for rank in ranks for _ in range(max(own[each] for each in ranks) - own[rank])]


def summarize(
    roles: Roles, settings: ScoringSettings, rollouts: Sequence[Call[Any]], scores: Scores
) -> dict[str, float]:
    """Of some rollouts mean rewards, KL and lengths; computed by the policy's ranks, each over its own chunks."""
    policy = roles["policy"]
    calls: list[Call[Any]] = []
    for rank in range(policy.num_ranks):
        own = range(rank, len(rollouts), policy.num_ranks)
        inputs = inputs_of(own, rollouts, scores, SUMMARY_ROLES)
        calls.append(policy.submit_one(rank, PolicyWorker.summarize, len(own), settings.gate, *inputs))
    made = [*rollouts, *itertools.chain(*scores.values()), *calls]
    metrics: dict[str, float] = collect(made, timeout_s=roles.timeout_s, step=roles.step)[-1]
    return metrics


def scored_answers(
    roles: Roles, settings: ScoringSettings, rollouts: Sequence[Call[Any]], scores: Scores
) -> list[dict[str, Any]]:
    """Each answer, in the order of its prompts, as the columns of `SAMPLES` that are about it."""
    engines = roles["rollout"]
    calls = [
        engines.submit_one(
            chunk % engines.num_ranks,
            RolloutWorker.samples,
            call.data[0],
            *(scores[name][chunk].data[0] for name in REWARDS),
            gate=settings.gate,
        )
        for chunk, call in enumerate(rollouts)
    ]
    made = [*rollouts, *(call for name in REWARDS for call in scores[name]), *calls]
    chunks = collect(made, timeout_s=roles.timeout_s, step=roles.step)[-len(calls) :]
    return [answer for chunk in chunks for answer in chunk]


def score_samples(
    roles: Roles, role: str, prompts: PromptBatch, samples: Sequence[Mapping[str, Any]], *, micro_batch_tokens: int
) -> list[Call[list[float]]]:
    """Starts a reward model's ranks on their shares of answers that are rows, with "tokens" as they were sampled."""
    group = roles[role]
    answers = [Completion(row["tokens"], [0.0] * len(row["tokens"]), row["finished"]) for row in samples]
    bounds = [len(answers) * rank // group.num_ranks for rank in range(group.num_ranks + 1)]
    shares = {rank: range(*share) for rank, share in enumerate(itertools.pairwise(bounds)) if share[0] < share[1]}
    calls = [
        group.submit_one(
            rank,
            ScorerWorker.score_answers,
            prompts.select(rows),
            [answers[row] for row in rows],
            micro_batch_tokens=micro_batch_tokens,
        )
        for rank, rows in shares.items()
    ]
    return calls + [group.submit_one(rank, ScorerWorker.join_in) for rank in joining(roles.replicas(role), [*shares])]


def inputs_of(
    chunks: Sequence[int], rollouts: Sequence[Call[Any]], scores: Scores, scorers: Sequence[str]
) -> list[Any]:
    """References of the chunks' rollouts, then of each scorer's output for them: what the policy's ranks take in."""
    made = [rollouts, *(scores[role] for role in scorers)]
    return [calls[chunk].data[0] for calls in made for chunk in chunks]
