"""Where a stage's roles fit on GPUs, and the settings that put them there.

Turns shapes and settings into byte counts (`planning.memory`) for `cluster.plan`. Plans bfloat16. Imports no torch;
docs/planning.md explains the search.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from cluster.layout import Host, PlacementError
from cluster.plan import GIB, Memory, Moments, Option, Placed, Placement, Role, all_on_all, apart, first_that_fits, put
from model.config import ModelConfig, Recompute
from model.flops import forward_working_bytes, kv_cache_bytes_per_token, num_parameters, weight_bytes
from rlhf_ray.backends.engine_limits import GPU_BUCKET_BYTES
from rlhf_ray.config import Config, TrainRole, can_sleep, config_with, dotted, replicas
from rlhf_ray.errors import UserError
from rlhf_ray.machine import on_device
from rlhf_ray.planning.batches import check_batches
from rlhf_ray.planning.memory import frozen_memory, largest_matrix, scoring_memory, training_memory, training_work
from rlhf_ray.recipe.rounds import node_of
from rlhf_ray.recipe.stages import STAGES

TRAINING = tuple(stage.name for stage in STAGES.values() if stage.trains)
FROZEN = ("reference", "helpfulness", "safety")
ZERO_STAGES = (1, 2, 3)
"""Stages the search tries. Stage 0 accumulates gradients in bfloat16, so it is taken only when asked for."""
OVERHEAD_GIB = 2.0
"""Allowance per process for CUDA context, NCCL, cuBLAS and allocator slack. Not measured."""
MAX_GPUS = 1024
NODE_GPUS = 8
SYNC = "sync"
"""The one turn that two roles on a GPU have together."""
KINDS = (("policy", "value"), FROZEN, ("rollout",))
"""Roles of PPO that are run in like ways where all are on all GPUs."""
TOGETHER: Mapping[str, Sequence[tuple[str, ...]]] = {
    "ppo": [FROZEN, ("helpfulness", "safety"), (), ("value", *FROZEN), ("policy", "value", *FROZEN)],
    "reward": [(), ("helpfulness", "safety")],
}
"""Sets of roles that may sit on one GPU where the others have some of their own, preferred first."""

ENGINE_BATCHED_TOKENS = 16_384  # the most of vLLM's defaults, by which it measures its workspace when it starts


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be planned."""

    stage: str
    model: ModelConfig
    reward_model: ModelConfig
    config: Config
    """Batch sizes, lengths and, where `given`, the placement."""
    given: bool
    """Take ranks, stages and shares as the config has them instead of searching."""
    gpus: int
    gpu_bytes: int
    prompt_tokens: int
    zero_stage: int | None = None
    """The only ZeRO stage to try."""
    overhead: int = int(OVERHEAD_GIB * GIB)
    """Bytes per process for what torch does not count."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A placement, the settings that make it, and what would fit where it does not."""

    request: Request
    placement: Placement
    settings: Mapping[str, object]
    """Dotted config key -> value."""
    verdict: str
    notes: Sequence[str] = ()

    @property
    def fits(self) -> bool:
        """There are enough GPUs and none is over full."""
        return self.placement.fits and len(self.placement.gpus) <= self.request.gpus

    @property
    def overrides(self) -> list[str]:
        """`--set` arguments that give this placement."""
        return [f"{key}={_toml(value)}" for key, value in self.settings.items()]


# --- the search ------------------------------------------------------------------------------------------------------


def make_plan(request: Request) -> Plan:
    """The placement asked for, or the best simple one, and whether it fits.

    Raises:
        UserError: batch sizes of a given placement do not divide, or the stage has no role.
    """
    if request.given:
        check_batches(request.config, [request.stage])
        return _plan(request, _given(request), request.config)
    found = _search(request)
    if found is not None:
        placement, config = found
        return _plan(request, placement, config)
    least = [
        Placed(role, min(role.options, key=lambda option: option.peak[1].total))
        for role in _roles(request, request.config)
    ]
    needed = sum(each.option.gpus for each in least)
    return _plan(
        request, put(least, nodes=_nodes(needed), gpu_bytes=request.gpu_bytes, engine_share=0.0), request.config
    )


def _nodes(gpus: int) -> list[Host]:
    """GPUs in nodes as they mostly come."""
    return [Host(gpus=min(NODE_GPUS, gpus - start)) for start in range(0, gpus, NODE_GPUS)]


def _given(request: Request) -> Placement:
    """As the config says.

    Raises:
        UserError: there are too few GPUs.
    """
    roles = request.config.roles
    placed = [
        Placed(role, role.options[0], getattr(roles, role.name).gpus or ()) for role in _roles(request, request.config)
    ]
    share = roles.rollout.gpu_memory_utilization
    try:
        return put(placed, nodes=_nodes(request.gpus), gpu_bytes=request.gpu_bytes, engine_share=share)
    except PlacementError as error:
        raise UserError(f"{error}; lower num_ranks, or plan for more GPUs") from error


def _search(request: Request) -> tuple[Placement, Config] | None:
    """The first that fits: all roles on all GPUs with models undivided, then by ever smaller micro-batches anything."""
    sizes = {"num_gpus": request.gpus, "gpu_bytes": request.gpu_bytes}
    together = TOGETHER.get(request.stage, [()])
    configs = _micro_batches(request)

    def everywhere(roles: Sequence[Role]) -> Iterator[Sequence[Placed]]:
        return all_on_all(roles, KINDS, **sizes) if request.stage == "ppo" else iter(())

    tries: list[tuple[Config, Callable[[list[Role]], Iterator[Sequence[Placed]]]]] = [
        *((config, lambda roles: everywhere([_undivided(role) for role in roles])) for config in configs),
        *(
            (config, lambda roles: itertools.chain(everywhere(roles), *(apart(roles, t, **sizes) for t in together)))
            for config in configs
        ),
    ]
    for config, candidates in tries:
        found = first_that_fits(
            candidates(_roles(request, config)), nodes=_nodes(request.gpus), gpu_bytes=request.gpu_bytes
        )
        if found is not None:
            return found, config
    return None


def _undivided(role: Role) -> Role:
    """In the ways in which a rank holds all weights: the others gather them layer by layer, again and again."""
    whole = [option for option in role.options if option.settings.get(f"roles.{role.name}.zero_stage") != 3]
    return replace(role, options=whole)


def _micro_batches(request: Request) -> list[Config]:
    """The config, then with micro-batches halved down to one row."""
    section = getattr(request.config, request.stage)
    if request.stage in ("pretrain", "sft"):
        keys: tuple[str, ...] = ("micro_batch_size",)
        least = 1
    else:
        keys = ("micro_batch_tokens", "score_micro_batch_tokens")
        least = _row_tokens(request, request.config)
    given = {f"{request.stage}.{key}": value for key in keys if (value := getattr(section, key)) is not None}
    configs = [request.config]
    while max(given.values()) // 2 >= least:
        given = {key: max(min(value, least), value // 2) for key, value in given.items()}
        configs.append(config_with(request.config, given))
    return configs


def _row_tokens(request: Request, config: Config) -> int:
    """Tokens that pass through a model at once at the least: a row, of comparisons a pair."""
    if request.stage == "ppo":
        return request.prompt_tokens + config.ppo.max_new_tokens
    return 2 * config.reward.max_length if request.stage == "reward" else getattr(config, request.stage).seq_len


def _roles(request: Request, config: Config) -> list[Role]:
    roles, names = [], on_device(config, node_of(config, request.stage).roles)
    if not names:  # the reward stage alone
        raise UserError(f"--stage {request.stage}: the config names both reward models; plan another stage")
    for name in names:
        if name == "rollout":
            roles.append(_engine_role(request, config))
        elif request.stage == "ppo" and name in FROZEN:
            roles.append(_frozen_role(request, config, name))
        else:
            roles.append(_trained_role(request, config, name))
    return roles


def _trained_role(request: Request, config: Config, name: str) -> Role:
    model = request.model if name == "policy" else request.reward_model
    if name == "value" and config.ppo.value_init == "policy":
        model = request.model
    scalar_head = name != "policy"
    parameters = num_parameters(model, scalar_head=scalar_head)
    tokens, targets = _micro_batch(request, config, scalar_head=scalar_head)
    scored = _micro_batch(request, config, scalar_head=scalar_head, scoring=True)
    current: TrainRole = getattr(config.roles, name)
    options = []
    for num_ranks in [current.num_ranks] if request.given else _rank_choices(request, config):
        for zero_stage, recompute in _ways(request, current):
            phases = training_memory(
                parameters,
                largest_matrix(model),
                training_work(model, tokens, targets=targets, recompute=recompute),
                zero_stage=zero_stage,
                num_ranks=num_ranks,
                overhead=request.overhead,
            )
            scoring = scoring_memory(model, scored[0], targets=scored[1], held=phases["idle"])
            moments = {**phases, "scoring": scoring}
            settings = {
                f"roles.{name}.num_ranks": num_ranks,
                f"roles.{name}.zero_stage": zero_stage,
                f"roles.{name}.recompute": recompute,
            }
            asleep = Memory(overhead=request.overhead) if can_sleep(zero_stage) else phases["idle"]
            turns: dict[str, Moments] = {name: moments}
            if name == "policy":
                turns[SYNC] = {"sending weights": _with_buckets(phases["idle"], model)}
            options.append(Option(settings=settings, num_ranks=num_ranks, phases=turns, asleep=asleep))
    return Role(name=name, options=options)


def _with_buckets(held: Memory, model: ModelConfig) -> Memory:
    """What is held, and the buckets in which weights go from GPU to GPU: one that is full, and one that is filled."""
    return replace(held, buffers=held.buffers + 2 * max(GPU_BUCKET_BYTES, 2 * largest_matrix(model)))


def _micro_batch(
    request: Request, config: Config, *, scalar_head: bool, scoring: bool = False
) -> tuple[int, int | None]:
    """Of training or of scoring (tokens, tokens that go through the language-model head or None)."""
    row = _row_tokens(request, config)
    if request.stage in ("pretrain", "sft"):
        tokens = row * getattr(config, request.stage).micro_batch_size
        return tokens, tokens
    section = getattr(config, request.stage)
    tokens = max(row, section.tokens_to_score if scoring else section.micro_batch_tokens)
    if scalar_head:
        return tokens, None
    return tokens, -(-tokens * config.ppo.max_new_tokens // row)


def _ways(request: Request, current: TrainRole) -> Sequence[tuple[int, Recompute]]:
    """ZeRO stages and what is computed again, best first: the model whole on each rank, little computed again, and the
    lower stage, which reduces gradients once a step and not once a micro-batch.
    """
    stages: Sequence[int] = [current.zero_stage] if request.given else ZERO_STAGES
    if request.zero_stage is not None:
        stages = [request.zero_stage]
    choices: Sequence[Recompute] = [current.recompute] if request.given else get_args(Recompute)
    return sorted(itertools.product(stages, choices), key=lambda way: (way[0] == 3, choices.index(way[1]), way[0]))


def _rank_choices(request: Request, config: Config) -> list[int]:
    """Ranks that the batches divide by. PPO takes few, what is left speeds generation up; the others take many."""
    if request.stage == "ppo":
        return _divisors(math.gcd(config.ppo.minibatch_size, config.ppo.batch_size), request.gpus)
    if request.stage == "reward":
        return list(range(max(1, min(request.gpus // 2, config.reward.batch_size)), 0, -1))
    return _divisors(getattr(config, request.stage).batch_size, request.gpus)[::-1]


def _divisors(number: int, limit: int) -> list[int]:
    return [n for n in range(1, min(number, limit) + 1) if number % n == 0]


def _frozen_role(request: Request, config: Config, name: str) -> Role:
    model, scalar_head = (request.model, False) if name == "reference" else (request.reward_model, True)
    tokens, targets = _micro_batch(request, config, scalar_head=scalar_head, scoring=True)
    current = getattr(config.roles, name)
    options = []
    for num_ranks in [current.num_ranks] if request.given else _rank_choices(request, config):
        for shards in [len(replicas(current)[0])] if request.given else (1, num_ranks):
            held = frozen_memory(model, scalar_head=scalar_head, shards=shards, overhead=request.overhead)
            scoring = scoring_memory(model, tokens, targets=targets, held=held)
            settings = {f"roles.{name}.num_ranks": num_ranks}
            if shards > 1:
                settings[f"roles.{name}.zero_stage"] = 3
            if 1 < shards < num_ranks:
                settings[f"roles.{name}.ranks_per_replica"] = shards
            options.append(
                Option(
                    settings=settings,
                    num_ranks=num_ranks,
                    phases={name: {"scoring": scoring}},
                    asleep=Memory(overhead=request.overhead),
                )
            )
    return Role(name=name, options=options)


def _engine_role(request: Request, config: Config) -> Role:
    model, rollout = request.model, config.roles.rollout
    sequences = min(rollout.max_num_seqs, -(-config.ppo.batch_size // config.ppo.num_chunks))
    per_token = kv_cache_bytes_per_token(model)
    length = request.prompt_tokens + config.ppo.max_new_tokens
    options = []
    for size in [rollout.tensor_parallel_size] if request.given else _tensor_parallel_sizes(model):
        engines = [rollout.num_engines]
        if not request.given:
            engines = _divisors(config.ppo.batch_size, request.gpus // size)[::-1]
        for num_engines in engines:
            weights = Memory(weights=-(-weight_bytes(model) // size), overhead=request.overhead)
            generating = replace(
                weights,
                activations=forward_working_bytes(model, ENGINE_BATCHED_TOKENS),
                # Of each sequence the logits in fp32, their log-softmax and a copy sorted out by temperature.
                logits=12 * rollout.max_num_seqs * model.vocab_size,
                # vLLM does not start unless one sequence of the whole context fits.
                kv_cache=-(-per_token * model.max_seq_len // size),
            )
            settings = {"roles.rollout.num_engines": num_engines, "roles.rollout.tensor_parallel_size": size}
            options.append(
                Option(
                    settings=settings,
                    num_ranks=num_engines,
                    gpus_per_rank=size,
                    phases={
                        "rollout": {"generating": generating},
                        SYNC: {"taking weights": _with_buckets(weights, model)},
                    },
                    asleep=Memory(overhead=request.overhead),
                )
            )
    return Role(name="rollout", options=options, kv_cache_wanted=sequences * length * per_token)


def _tensor_parallel_sizes(model: ModelConfig) -> list[int]:
    """GPUs an engine may spread over: its key/value heads divide by them."""
    return [size for size in (1, 2, 4, 8) if model.num_kv_heads % size == 0]


# --- the plan ---------------------------------------------------------------------------------------------------


def _plan(request: Request, placement: Placement, config: Config) -> Plan:
    settings = _settings(request, placement, config)
    return Plan(
        request=request,
        placement=placement,
        settings=settings,
        verdict=_verdict(request, placement),
        notes=_notes(request, placement, config, settings),
    )


def _settings(request: Request, placement: Placement, config: Config) -> dict[str, object]:
    """The placement as config keys, with the sizes it was planned for."""
    settings: dict[str, object] = {}
    for each in placement.placed:
        settings |= each.option.settings
        if each.gpus:
            settings[f"roles.{each.role.name}.gpus"] = list(each.gpus)
        if each.role.name == "rollout":
            share = config.roles.rollout.gpu_memory_utilization
            if not request.given:
                share = math.floor(100 * each.option.peak[1].total / request.gpu_bytes) / 100
            settings["roles.rollout.gpu_memory_utilization"] = share
    section = getattr(config, request.stage)
    keys = {
        "pretrain": ("batch_size", "micro_batch_size", "seq_len"),
        "sft": ("batch_size", "micro_batch_size", "seq_len"),
        "reward": ("batch_size", "micro_batch_tokens", "max_length"),
        "ppo": ("batch_size", "minibatch_size", "micro_batch_tokens", "max_new_tokens"),
    }
    settings |= {f"{request.stage}.{key}": getattr(section, key) for key in keys[request.stage]}
    if (scored := getattr(section, "score_micro_batch_tokens", None)) is not None:
        settings[f"{request.stage}.score_micro_batch_tokens"] = scored
    if request.stage == "ppo":
        settings["ppo.num_chunks"] = _num_chunks(request, settings, config)
    return settings


def _num_chunks(request: Request, settings: Mapping[str, object], config: Config) -> int:
    """The least number of chunks, no less than configured, that ranks and engines divide and that divides the batch."""
    sharded = [f"roles.{role}.num_ranks" for role in FROZEN if settings.get(f"roles.{role}.zero_stage") == 3]
    parts = ("roles.policy.num_ranks", "roles.value.num_ranks", "roles.rollout.num_engines", *sharded)
    step = math.lcm(*(int(str(settings[key])) for key in parts))
    fitting = (n for n in _divisors(config.ppo.batch_size, config.ppo.batch_size) if n % step == 0)
    return next((n for n in fitting if n >= config.ppo.num_chunks), config.ppo.num_chunks)


def _verdict(request: Request, placement: Placement) -> str:
    total = request.gpu_bytes / GIB
    names, phase, fullest = placement.fullest
    if placement.fits and len(placement.gpus) <= request.gpus:
        return f"fits: {fullest / GIB:.1f} of {total:.1f} GiB on the fullest GPU"
    if fullest > request.gpu_bytes:
        who = f"{names[0]} needs" if len(names) == 1 else f"{', '.join(names)} on one GPU need"
        why = f"{who} {fullest / GIB:.1f} of {total:.1f} GiB ({moments(placement, names, phase)})"
    else:
        why = f"the roles need {_count(len(placement.gpus))}, there are {request.gpus}"
    return f"does not fit: {why}; nearest fit: {_nearest(request)}"


def moments(placement: Placement, names: Sequence[str], phase: str) -> str:
    """When roles need most in a phase: "update: policy backward, value step"."""
    found = [f"{name} {placement.options[name].at(phase)[0]}" for name in names]
    return f"{phase}: {', '.join(found)}"


def _nearest(request: Request) -> str:
    """What makes it fit: another placement on the same GPUs, more GPUs, or larger ones."""
    free = replace(request, given=False)
    memory = f"{request.gpu_bytes / GIB:g} GiB"
    if request.given and (found := _search(free)) is not None:
        settings = _settings(free, *found)
        asked = {field: value for field, value in dotted(request.config.model_dump()).items() if field in settings}
        changed = [f"{key}={_toml(value)}" for key, value in settings.items() if asked.get(key) != value]
        return f"on the same GPUs with {' '.join(changed)}"
    if _fits_with(free, gpus=MAX_GPUS):
        gpus = _least(lambda n: _fits_with(free, gpus=n), request.gpus, MAX_GPUS)
        return f"{_count(gpus)} of {memory}" + (", with a searched placement" if request.given else "")
    # The smallest memory with which any number of GPUs is enough, then how few of those.
    gib = _least(lambda n: _fits_with(free, gpus=MAX_GPUS, gib=n), int(request.gpu_bytes / GIB), 2**20)
    gpus = _least(lambda n: _fits_with(free, gpus=n, gib=gib), 0, MAX_GPUS)
    return f"{_count(gpus)} of {gib} GiB; no number of GPUs of {memory} is enough: {_bottleneck(free)}"


def _bottleneck(request: Request) -> str:
    """The role that needs most on a GPU however many there are, and for what."""
    roles = _roles(replace(request, gpus=MAX_GPUS), _micro_batches(request)[-1])
    name, (phase, memory) = max(
        ((role.name, min((option.peak for option in role.options), key=_peak_bytes)) for role in roles),
        key=lambda item: _peak_bytes(item[1]),
    )
    return f"{name} needs {memory.total / GIB:.1f} GiB on each ({phase})"


def _peak_bytes(peak: tuple[str, Memory]) -> int:
    return peak[1].total


def _count(gpus: int) -> str:
    return "1 GPU" if gpus == 1 else f"{gpus} GPUs"


def _fits_with(request: Request, *, gpus: int | None = None, gib: int | None = None) -> bool:
    changed = replace(request, gpus=gpus or request.gpus, gpu_bytes=gib * GIB if gib is not None else request.gpu_bytes)
    return _search(changed) is not None


def _least(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The least number in (low, high] that fits, given that high does and that what fits still fits with more."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _notes(request: Request, placement: Placement, config: Config, settings: Mapping[str, object]) -> list[str]:
    notes = []
    if not placement.fits or len(placement.gpus) > request.gpus:
        if not request.given:
            notes.append("the table shows each role on GPUs of its own, in the way that needs least memory")
        return notes
    if idle := request.gpus - len(placement.gpus):
        notes.append(f"{idle} of {request.gpus} GPUs stay idle: batches do not divide by more ranks or engines")
    stays = [
        each.role.name
        for each in placement.placed
        if each.option.asleep.weights and placement.layout.neighbours(each.role.name)
    ]
    if stays:
        notes.append(f"{', '.join(stays)}: stays on its GPUs while others work there (ZeRO 0 and 1 cannot leave)")
    if host := max(_host_bytes(placement, node) for node in range(len(placement.layout.nodes))):
        notes.append(f"roles that sleep need up to {host / GIB:.0f} GiB of host memory on a node")
    for each in placement.placed:
        if each.role.name == "rollout":
            length = request.prompt_tokens + config.ppo.max_new_tokens
            size = each.option.gpus_per_rank
            cache = each.option.at("rollout")[1].kv_cache
            held = cache * size // (length * kv_cache_bytes_per_token(request.model))
            wanted = min(
                config.roles.rollout.max_num_seqs, config.ppo.batch_size // int(str(settings["ppo.num_chunks"]))
            )
            if held < wanted:
                notes.append(
                    f"an engine's KV cache holds {held} of {wanted} sequences at their full {length} tokens; "
                    "when it is full the others wait"
                )
    return notes


def _host_bytes(placement: Placement, node: int) -> int:
    """What the roles on a node hold in host memory when all are asleep; an engine forgets."""
    total = 0
    for seat in placement.layout.seats:
        option = placement.options[seat.role]
        sleeps = placement.layout.neighbours(seat.role) and not option.asleep.weights
        if seat.node == node and sleeps and seat.role != "rollout":
            memory = option.peak[1]
            total += memory.weights + memory.gradients + memory.optimizer
    return total


def _toml(value: object) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
