"""Rollout engines and the weight channel, as the drivers of several stages use them."""

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.worker_group import Call, collect
from model.checkpoint_files import read_config
from rlhf_ray.data.light_tokenizer import LightTokenizer
from rlhf_ray.data.prompts import load_prompts
from rlhf_ray.data.reward_function import is_function
from rlhf_ray.errors import RunFailure, UserError
from rlhf_ray.recipe.context import Context
from rlhf_ray.recipe.stages import Artefact
from rlhf_ray.records import PromptBatch
from rlhf_ray.workers.policy import PolicyWorker
from rlhf_ray.workers.roles import Roles
from rlhf_ray.workers.rollout import RolloutWorker
from rlhf_ray.workers.scorer import ScorerWorker

MAX_SYNCED_GAP = {"bf16": 0.1, "fp32": 1e-3}
"""Mean |engine - trainer| log-prob, nats, above which a sync counts as failed. SmolLM2 in bf16 shows 0.046."""


class WeightChannelError(RunFailure):
    """The engine does not compute what the trainer does after a weight sync."""


def start_engines(context: Context, checkpoint: Path, tokenizer: Path) -> None:
    """Has every engine up with the weights of `checkpoint`; started once for models of a shape, later only reloaded."""
    roles, config, way = context.roles, context.config, context.roles.weights_way()
    kind = read_config(checkpoint).shape(), way
    if roles.engine_kind not in (None, kind):
        roles.end("rollout")
    roles.engine_kind = kind
    roles.make_resident("rollout")
    settings = config.roles.rollout
    roles.engine_ids = roles["rollout"].call(
        RolloutWorker.start,
        str(checkpoint),
        tokenizer=str(tokenizer),
        max_num_seqs=settings.max_num_seqs,
        tensor_parallel_size=settings.tensor_parallel_size,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        kv_cache_gib=settings.kv_cache_gib,
        every_id=context.every_id,
        precision=config.run.precision,
        on_gpu=roles.runtime.device == "cuda",
        shares_device=roles.shares_gpus("rollout"),
        way=way,
        step="engine start",
    )[0]


def read_prompts(
    inputs: Mapping[str, Artefact], name: str, *, max_new_tokens: int, readers: Iterable[str], at_least: int = 1
) -> PromptBatch:
    """A stage's prompts table, ready for engines.

    Args:
        name: the input.
        readers: those inputs whose models, as far as they are no functions, read prompts and answers.
    Raises:
        UserError: there are fewer prompts than `at_least`, the chunks they are split into, or one is too long.
    """
    path = inputs[name].path
    checkpoints = [inputs[reader].path for reader in readers if not is_function(inputs[reader].path)]
    room = min(read_config(checkpoint).max_seq_len for checkpoint in checkpoints) - max_new_tokens
    tokenizer: Any = LightTokenizer(inputs["tokenizer"].path)  # it has what encoding needs
    prompts = load_prompts(str(path), tokenizer, max_prompt_tokens=room)
    if len(prompts) < at_least:
        raise UserError(
            f"{path}: has {len(prompts)} prompts, at least {at_least} are needed: one for each chunk; "
            f"give more, or fewer chunks, ranks or engines"
        )
    return prompts


def check_swappable(field: str, checkpoint: Path, first: Path) -> None:
    """An engine that was started on `first` can answer with this checkpoint's weights.

    Raises:
        UserError: it has another shape.
    """
    if read_config(checkpoint).shape() != read_config(first).shape():
        raise UserError(
            f"{field}={str(checkpoint)!r}: has another shape than {first}, and the engine that answers with one "
            f"takes the other's weights; give a checkpoint of the same shape"
        )


def generate(
    roles: Roles,
    prompts: PromptBatch,
    *,
    num_chunks: int,
    seed: tuple[int, int],
    temperature: float,
    max_new_tokens: int,
    stream: bool = False,
) -> list[Call[list[int]]]:
    """Starts sampling one answer to each prompt, in chunks; engine and seeds depend on config, step and ids alone.

    Args:
        stream: an engine has its chunks one after another, so that others can begin on the first; else all at once,
            which is faster.
    Returns:
        of each chunk the call that makes it, with the rollouts as data; the result is each answer's number of tokens.
    """
    engines = roles["rollout"]
    seeds = request_seeds(seed, prompts.ids)
    bounds = [len(prompts) * chunk // num_chunks for chunk in range(num_chunks + 1)]
    rows = [range(start, end) for start, end in itertools.pairwise(bounds)]
    options: dict[str, Any] = {"temperature": temperature, "max_new_tokens": max_new_tokens}
    made: dict[int, Call[list[int]]] = {}
    for rank in range(min(engines.num_ranks, num_chunks)):
        own = list(range(rank, num_chunks, engines.num_ranks))
        for chunks in [[chunk] for chunk in own] if stream else [own]:
            together = [row for chunk in chunks for row in rows[chunk]]
            call = engines.submit_one(
                rank,
                RolloutWorker.generate,
                prompts.select(together),
                seeds=[seeds[row] for row in together],
                sizes=[len(rows[chunk]) for chunk in chunks],
                num_data=len(chunks),
                **options,
            )
            made |= {chunk: replace(call, data=(data,)) for chunk, data in zip(chunks, call.data, strict=True)}
    return [made[chunk] for chunk in range(num_chunks)]


def decode(roles: Roles, rollouts: Sequence[Call[Any]], *, step: str) -> list[tuple[str, bool]]:
    """(text, finished) of every answer of `generate`, in the order of its rows."""
    engines = roles["rollout"]
    calls = [
        engines.submit_one(chunk % engines.num_ranks, RolloutWorker.decode, call.data[0])
        for chunk, call in enumerate(rollouts)
    ]
    return [answer for part in collect(calls, timeout_s=roles.timeout_s, step=step) for answer in part]


def sync_weights(roles: Roles, *, step: str = "weight sync", scrambled: bool = False) -> None:
    """Sends the policy's weights to all engines.

    Args:
        scrambled: in a form in which they compute something else, to prove the channel by.
    """
    _empty_engines(roles, step)
    roles.make_resident("policy", "rollout")
    policy, engines = roles["policy"], roles["rollout"]
    if (channel := roles.channel()) is None:
        buckets = policy.call(PolicyWorker.export_weights, step=step)[0]
        engines.call(RolloutWorker.load_weights, buckets, scrambled=scrambled, step=step)
    else:
        calls = policy.submit(PolicyWorker.send_weights, channel, scrambled=scrambled)
        collect(calls, timeout_s=roles.timeout_s, step=step, partners=engines)
    roles.engines_forgot = False


def _empty_engines(roles: Roles, step: str) -> None:
    """Engines that share GPUs leave them, so that they wake with room for weights alone and without those they had."""
    if roles.shares_gpus("rollout"):
        roles["rollout"].call(RolloutWorker.expect_weights, step=step)
        roles.make_resident("policy")


def ready_engines(roles: Roles) -> None:
    """Has the engines ready to sample from the policy: with its weights, which they forget when they sleep."""
    if roles.engines_forgot:
        sync_weights(roles)
    roles.make_resident("rollout")


def verify_weight_channel(roles: Roles, prompts: PromptBatch, *, precision: str) -> dict[str, float]:
    """Sends scrambled weights, then true ones, and holds every engine's log-probs against the trainer's.

    Returns:
        mean |difference| in nats after the scrambled ("scrambled_gap": large, or the channel does nothing) and after
        the true ones ("synced_gap", with "synced_gap_max": small), of the worst engine.
    Raises:
        WeightChannelError: scrambling changed nothing, or the synced engine differs from the trainer.
    """
    step, engines, policy = "weight check", roles["rollout"], roles["policy"]
    _empty_engines(roles, step)
    roles.make_resident("policy")
    probe = engines.submit_one(0, RolloutWorker.probe, prompts, num_data=1)
    # Every policy rank computes the same: under ZeRO-3 one alone would wait for the others.
    options: dict[str, Any] = {"temperature": 1.0, "micro_batch_tokens": 4096, "num_data": 1}
    trainer: list[Call[Any]] = [
        policy.submit_one(rank, ScorerWorker.logprobs, probe.data[0], **options) for rank in range(policy.num_ranks)
    ]
    collect([probe, *trainer], timeout_s=roles.timeout_s, step=step)
    gaps = {}
    for scrambled in (True, False):
        sync_weights(roles, step=step, scrambled=scrambled)
        roles.make_resident("rollout")
        gaps[scrambled] = engines.call(RolloutWorker.probe_gap, probe.data[0], trainer[0].data[0], step=step)
    limit = MAX_SYNCED_GAP[precision]
    for rank, (moved, synced) in enumerate(zip(gaps[True], gaps[False], strict=True)):
        if not synced["mean"] <= limit:
            raise WeightChannelError(
                f"rollout rank {rank}: after a weight sync its log-probs differ from the policy's by "
                f"{synced['mean']:.4f} nats on average, more than {limit} for {precision}"
            )
        if not moved["mean"] > 2 * synced["mean"]:
            raise WeightChannelError(
                f"rollout rank {rank}: scrambled weights moved its log-probs by {moved['mean']:.4f} nats only, "
                f"the weight channel does not reach the engine"
            )
    return {
        "scrambled_gap": max(gap["mean"] for gap in gaps[True]),
        "synced_gap": max(gap["mean"] for gap in gaps[False]),
        "synced_gap_max": max(gap["max"] for gap in gaps[False]),
    }


def request_seeds(seed: tuple[int, int], prompts: Sequence[str]) -> list[int]:
    """The sampling seed of each prompt's answer: another one each time that a prompt occurs.

    Args:
        seed: of the run, and the step.
        prompts: ids of the whole batch, so that chunks and engines change nothing.
    """
    occurred: Counter[str] = Counter()
    seeds = []
    for prompt in prompts:
        seeds.append(request_seed(*seed, prompt, occurred[prompt]))
        occurred[prompt] += 1
    return seeds


def request_seed(seed: int, step: int, prompt: str, sample: int) -> int:
    """The sampling seed of one answer; `sample` counts the answers to one prompt."""
    text = f"{seed} {step} {prompt} {sample}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
