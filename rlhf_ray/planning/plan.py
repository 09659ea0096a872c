"""Where a stage's roles fit on GPUs, and the settings that put them there.

Turns shapes and settings into byte counts (`planning.memory`) for `cluster.plan`. Plans bfloat16. Imports no torch;
docs/planning.md explains the search.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.plan import GIB, Memory, Option, Placement, Role, place, place_given
from model.config import ModelConfig
from model.flops import forward_working_bytes, kv_cache_bytes_per_token, num_parameters, weight_bytes
from rlhf_ray.config import Config, TrainRole, config_with, dotted
from rlhf_ray.errors import UserError
from rlhf_ray.machine import on_device
from rlhf_ray.planning.batches import check_batches
from rlhf_ray.planning.memory import largest_matrix, scoring_memory, training_memory, training_work
from rlhf_ray.recipe.rounds import node_of
from rlhf_ray.recipe.stages import STAGES

TRAINING = tuple(stage.name for stage in STAGES.values() if stage.trains)
FROZEN = ("reference", "helpfulness", "safety")
ZERO_STAGES = (1, 2, 3)
"""Stages the search tries. Stage 0 accumulates gradients in bfloat16, so it is taken only when asked for."""
OVERHEAD_GIB = 2.0
"""Allowance per process for CUDA context, NCCL, cuBLAS and allocator slack. Not measured."""
MAX_GPUS = 1024

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
        return _given_plan(request)
    found = _search(request)
    if found is not None:
        placement, config = found
        return _plan(request, placement, config)
    roles = _roles(request, request.config)
    least = [(role, min(role.options, key=lambda option: option.peak[1].total)) for role in roles]
    placement = place_given(
        [(role, option, float(option.gpus_per_rank)) for role, option in least],
        gpus=request.gpus,
        gpu_bytes=request.gpu_bytes,
        engine_share=0.0,
    )
    return _plan(request, placement, request.config)


def _given_plan(request: Request) -> Plan:
    check_batches(request.config, [request.stage])
    roles = []
    for role in _roles(request, request.config):
        settings = getattr(request.config.roles, role.name)
        share = float(role.options[0].gpus_per_rank)
        roles.append((role, role.options[0], share if share > 1 else settings.gpus_per_rank or 1.0))
    placement = place_given(
        roles,
        gpus=request.gpus,
        gpu_bytes=request.gpu_bytes,
        engine_share=request.config.roles.rollout.gpu_memory_utilization,
    )
    return _plan(request, placement, request.config)


def _search(request: Request) -> tuple[Placement, Config] | None:
    """The first that fits: micro-batches as configured, then ever smaller ones."""
    if request.stage == "ppo":
        sharing: list[tuple[str, ...]] = [
            FROZEN,
            ("helpfulness", "safety"),
            (),
            ("value", *FROZEN),
            ("policy", "value", *FROZEN),
            STAGES["ppo"].roles,
        ]
    else:
        sharing = [(), STAGES[request.stage].roles]
    for config in _micro_batches(request):
        placement = place(_roles(request, config), sharing, gpus=request.gpus, gpu_bytes=request.gpu_bytes)
        if placement is not None:
            return placement, config
    return None


def _micro_batches(request: Request) -> list[Config]:
    """The config, then with micro-batches halved down to one row."""
    section = getattr(request.config, request.stage)
    if request.stage in ("pretrain", "sft"):
        key, value, least = "micro_batch_size", section.micro_batch_size, 1
    else:
        key, value, least = "micro_batch_tokens", section.micro_batch_tokens, _row_tokens(request, request.config)
    values = [value]
    while values[-1] // 2 >= least:
        values.append(values[-1] // 2)
    return [config_with(request.config, {f"{request.stage}.{key}": value}) for value in values]


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
    tokens, targets, packed = _micro_batch(request, config, scalar_head=scalar_head)
    current: TrainRole = getattr(config.roles, name)
    options = []
    for num_ranks in [current.num_ranks] if request.given else _rank_choices(request, config):
        for zero_stage in _stage_choices(request, current):
            for checkpointing in [current.activation_checkpointing] if request.given else [False, True]:
                work = training_work(
                    model,
                    tokens,
                    targets=targets,
                    activation_checkpointing=checkpointing,
                    packed_row_length=packed,
                )
                phases = training_memory(
                    parameters,
                    largest_matrix(model),
                    work,
                    zero_stage=zero_stage,
                    num_ranks=num_ranks,
                    overhead=request.overhead,
                )
                settings = {
                    f"roles.{name}.num_ranks": num_ranks,
                    f"roles.{name}.zero_stage": zero_stage,
                    f"roles.{name}.activation_checkpointing": checkpointing,
                }
                options.append(Option(settings=settings, num_ranks=num_ranks, phases=phases))
    return Role(name=name, options=options)


def _micro_batch(request: Request, config: Config, *, scalar_head: bool) -> tuple[int, int | None, int | None]:
    """(padded tokens, tokens that go through the language-model head or None, length of a packed row or None)."""
    row = _row_tokens(request, config)
    if request.stage in ("pretrain", "sft"):
        tokens = row * getattr(config, request.stage).micro_batch_size
        return tokens, tokens, row
    tokens = max(row, getattr(config, request.stage).micro_batch_tokens)
    if scalar_head:
        return tokens, None, None
    return tokens, -(-tokens * config.ppo.max_new_tokens // row), None


def _stage_choices(request: Request, current: TrainRole) -> Sequence[int]:
    if request.zero_stage is not None:
        return [request.zero_stage]
    return [current.zero_stage] if request.given else ZERO_STAGES


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
    model = request.model if name == "reference" else request.reward_model
    tokens, targets, _ = _micro_batch(request, config, scalar_head=name != "reference")
    num_ranks = getattr(config.roles, name).num_ranks if request.given else 1
    memory = scoring_memory(model, tokens, targets=targets, overhead=request.overhead)
    settings = {f"roles.{name}.num_ranks": num_ranks}
    return Role(name=name, options=[Option(settings=settings, num_ranks=num_ranks, phases={"scoring": memory})])


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
            memory = Memory(
                weights=-(-weight_bytes(model) // size),
                activations=forward_working_bytes(model, ENGINE_BATCHED_TOKENS),
                # Of each sequence the logits in fp32, their log-softmax and a copy sorted out by temperature.
                logits=12 * rollout.max_num_seqs * model.vocab_size,
                # vLLM does not start unless one sequence of the whole context fits.
                kv_cache=-(-per_token * model.max_seq_len // size),
                overhead=request.overhead,
            )
            settings = {"roles.rollout.num_engines": num_engines, "roles.rollout.tensor_parallel_size": size}
            options.append(
                Option(settings=settings, num_ranks=num_engines, gpus_per_rank=size, phases={"generating": memory})
            )
    return Role(name="rollout", options=options, is_engine=True, kv_cache_wanted=sequences * length * per_token)


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
    for each in placement.roles:
        settings |= each.option.settings
        if each.option.gpus_per_rank == 1:
            settings[f"roles.{each.role}.gpus_per_rank"] = each.gpu_share
        if each.role == "rollout":
            share = config.roles.rollout.gpu_memory_utilization
            if not request.given:
                needed = math.ceil(100 * each.memory.total / request.gpu_bytes) / 100
                share = min(1.0, needed) if each.gpu_share < 1 else 0.9
            settings["roles.rollout.gpu_memory_utilization"] = share
    section = getattr(config, request.stage)
    keys = {
        "pretrain": ("batch_size", "micro_batch_size", "seq_len"),
        "sft": ("batch_size", "micro_batch_size", "seq_len"),
        "reward": ("batch_size", "micro_batch_tokens", "max_length"),
        "ppo": ("batch_size", "minibatch_size", "micro_batch_tokens", "max_new_tokens"),
    }
    settings |= {f"{request.stage}.{key}": getattr(section, key) for key in keys[request.stage]}
    if request.stage == "ppo":
        settings["ppo.num_chunks"] = _num_chunks(request, settings, config)
    return settings


def _num_chunks(request: Request, settings: Mapping[str, object], config: Config) -> int:
    """The least number of chunks, no less than configured, that ranks and engines divide and that divides the batch."""
    parts = ("roles.policy.num_ranks", "roles.value.num_ranks", "roles.rollout.num_engines")
    step = math.lcm(*(int(str(settings[key])) for key in parts))
    fitting = (n for n in _divisors(config.ppo.batch_size, config.ppo.batch_size) if n % step == 0)
    return next((n for n in fitting if n >= config.ppo.num_chunks), config.ppo.num_chunks)


def _verdict(request: Request, placement: Placement) -> str:
    total = request.gpu_bytes / GIB
    names, fullest = placement.fullest
    if placement.fits:
        return f"fits: {fullest / GIB:.1f} of {total:.1f} GiB on the fullest GPU"
    if fullest > request.gpu_bytes:
        phases = {each.role: each.phase for each in placement.roles}
        if len(names) == 1:
            who = f"{names[0]} ({phases[names[0]]}) needs"
        else:
            who = f"{', '.join(names)} on one GPU need"
        why = f"{who} {fullest / GIB:.1f} of {total:.1f} GiB"
    else:
        why = f"the roles need {_count(len(placement.gpus))}, there are {request.gpus}"
    return f"does not fit: {why}; nearest fit: {_nearest(request)}"


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
    if not placement.fits:
        if not request.given:
            notes.append("the table shows each role on GPUs of its own, in the way that needs least memory")
        return notes
    if idle := request.gpus - len(placement.gpus):
        notes.append(f"{idle} of {request.gpus} GPUs stay idle: batches do not divide by more ranks or engines")
    for each in placement.roles:
        if each.role == "rollout":
            length = request.prompt_tokens + config.ppo.max_new_tokens
            size = each.option.gpus_per_rank
            held = each.memory.kv_cache * size // (length * kv_cache_bytes_per_token(request.model))
            wanted = min(
                config.roles.rollout.max_num_seqs, config.ppo.batch_size // int(str(settings["ppo.num_chunks"]))
            )
            if held < wanted:
                notes.append(
                    f"an engine's KV cache holds {held} of {wanted} sequences at their full {length} tokens; "
                    "when it is full the others wait"
                )
    return notes


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
