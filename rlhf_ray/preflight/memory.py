"""Whether an embedded run on CPU fits in the memory that this machine, or its container, lets it use.

Counts what is certain: processes as they are once up, and each model's weights, gradients and optimizer. A micro-batch
comes on top, and what the allocator keeps (docs/decisions.md).
"""

import math
from collections.abc import Collection, Mapping, Sequence

from cluster.hardware import memory_limit_bytes
from cluster.plan import Memory
from model.config import PRESETS, ModelConfig
from model.flops import num_parameters, weight_bytes
from rlhf_ray.backends.engine_limits import kv_cache_bytes
from rlhf_ray.config import Config, FrozenRole, RewardRole, RolloutRole, TrainRole, replicas
from rlhf_ray.data.reward_function import is_function
from rlhf_ray.errors import UserError
from rlhf_ray.planning.memory import Work, scoring_memory, training_memory, training_work
from rlhf_ray.preflight.inputs import REWARD_MODELS, Model
from rlhf_ray.progress import console
from rlhf_ray.recipe.stages import STAGES

GIB = 2**30
# Shares of memory (PSS) of the demo's processes once they are up, without their small models; rounded down.
DRIVER_AND_RAY = 0.7 * GIB
PROCESS: dict[type, float] = {
    RolloutRole: 0.7 * GIB,
    TrainRole: 0.3 * GIB,
    RewardRole: 0.3 * GIB,
    FrozenRole: 0.2 * GIB,
}


def check_memory(config: Config, running: Sequence[str], models: Mapping[str, Model]) -> None:
    """The roles that are up together fit in memory; says so where that is close.

    Args:
        running: the stages that will run, in their order; versions go through some of them again and again.
        models: checkpoints that the config names, by field.
    Raises:
        UserError: what is certain does not fit.
    """
    limit, started = memory_limit_bytes(), set[str]()
    shape = model_shape(config, models)
    if shape is None:
        return
    sizes: dict[str, dict[str, float]] = {}
    stages = [stage for stage in running if STAGES[stage].roles]
    for place, stage in enumerate(stages):
        started |= set(STAGES[stage].roles)
        # A role's processes stay as long as a later stage needs them.
        up = started & {role for later in stages[place:] for role in STAGES[later].roles}
        parts = needed(config, stage, up, shape, models)
        if sum(parts.values()) > sum(sizes.get(stage, {}).values()):
            sizes[stage] = parts
    if not sizes:
        return
    # What makes the largest fit does so for all.
    stage, parts = max(sizes.items(), key=lambda item: sum(item[1].values()))
    if (certain := sum(parts.values())) > limit:
        listed = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items() if size > 0.05 * GIB)
        raise UserError(
            f"{stage} needs {certain / GIB:.1f} GiB of memory at least ({listed}) and may use {limit / GIB:.1f} here; "
            + _remedy(config, stage, STAGES[stage].roles, shape, models, parts, limit)
        )
    for stage, parts in sizes.items():
        likely = sum(parts.values()) + sum(in_flight(config, stage, role, shape) for role in STAGES[stage].trains)
        if likely > limit:
            section = getattr(config, stage)
            keys = ("micro_batch_size", "micro_batch_tokens", "score_micro_batch_tokens")
            given = {key: value for key in keys if (value := getattr(section, key, None)) is not None}
            console.print(
                f"{stage} may need {likely / GIB:.1f} GiB of memory, and may use {limit / GIB:.1f} here: should it run "
                f"out, lower {' and '.join(f'{stage}.{key}={value}' for key, value in given.items())}",
                soft_wrap=True,
            )
            return


def needed(
    config: Config, stage: str, up: Collection[str], shape: ModelConfig, models: Mapping[str, Model]
) -> dict[str, float]:
    """Bytes that are certain: of all processes, and of the models that each role of the stage holds."""
    ranks = [getattr(config.roles, role).num_ranks * PROCESS[type(getattr(config.roles, role))] for role in up]
    return {"processes": DRIVER_AND_RAY + sum(ranks), **held(config, stage, shape, models)}


def _remedy(
    config: Config,
    stage: str,
    roles: Sequence[str],
    shape: ModelConfig,
    models: Mapping[str, Model],
    parts: Mapping[str, float],
    limit: int,
) -> str:
    """What makes the stage fit, the smallest change first."""
    larger = "give it more memory, or cluster.address of a larger cluster"
    cache, engines = config.roles.rollout.kv_cache_gib, config.roles.rollout.num_engines
    excess = sum(parts.values()) - limit
    if "rollout" in parts and cache is not None:
        less = math.floor(100 * (cache - excess / GIB / engines)) / 100
        if less * GIB >= kv_cache_bytes(shape, sequences=1, precision=config.run.precision):
            return f"lower roles.rollout.kv_cache_gib={cache:g} to {less:g}"
    several = [role for role in roles if role != "rollout" and getattr(config.roles, role).num_ranks > 1]
    ones = {role: getattr(config.roles, role).model_copy(update={"num_ranks": 1}) for role in several}
    single = config.model_copy(update={"roles": config.roles.model_copy(update=ones)})
    if several and sum(needed(single, stage, roles, shape, models).values()) <= limit:
        fields = " and ".join(f"roles.{role}.num_ranks" for role in several)
        return f"set {fields} to 1: each rank is a process with weights of its own"
    alone = needed(config, stage, roles, shape, models)
    if sum(alone.values()) <= limit:
        return f"run `rlhf-ray {stage}` in a command of its own: processes of earlier stages are gone then"
    if alone["processes"] > 0.9 * limit:
        return f"its processes alone need {alone['processes'] / GIB:.1f}; {larger}"
    share = (limit - alone["processes"]) / (sum(alone.values()) - alone["processes"])
    field = model_field(config, models)
    most, own = share * num_parameters(shape) / 1e6, num_parameters(shape) / 1e6
    return f"{field} has {own:,.0f} million parameters: take a model of {most:,.0f} million or less, or {larger}"


def model_field(config: Config, models: Mapping[str, Model]) -> str:
    """What in the config says the language model's shape, for a message."""
    return next((f for f in ("inputs.chat", "inputs.base") if f in models), f"model.preset={config.model.preset!r}")


def model_shape(config: Config, models: Mapping[str, Model]) -> ModelConfig | None:
    """Of the language model; None where nothing says it before the run."""
    given = models.get("inputs.chat") or models.get("inputs.base")
    if given or config.model.preset not in PRESETS:
        return given.config if given else None
    preset = PRESETS[config.model.preset]
    vocabulary = config.tokenizer.vocab_size if config.inputs.tokenizer is None else preset.vocab_size
    context = config.model.max_seq_len or preset.max_seq_len
    return preset.model_copy(update={"vocab_size": vocabulary, "max_seq_len": context})


def held(config: Config, stage: str, shape: ModelConfig, models: Mapping[str, Model]) -> dict[str, float]:
    """Bytes that all ranks of each role of a stage hold of models while they work, a micro-batch not counted."""
    size = _element_bytes(config)
    sizes: dict[str, float] = {}
    for role in STAGES[stage].trains:
        sizes[role] = getattr(config.roles, role).num_ranks * trained_bytes(
            config, role, _of_role(role, stage, shape, models), size
        )
    frozen = [role for role in STAGES[stage].roles if role not in (*STAGES[stage].trains, "rollout")]
    for role in frozen:
        if role not in REWARD_MODELS or not is_function(getattr(config.inputs, role) or ""):
            own, scalar = _of_role(role, stage, shape, models), role in REWARD_MODELS
            copy = weight_bytes(own, scalar_head=scalar, bytes_per_parameter=size)
            sizes[role] = len(replicas(getattr(config.roles, role))) * copy
    if "rollout" in STAGES[stage].roles:
        rollout = config.roles.rollout
        cache = rollout.kv_cache_gib
        if cache is None:
            options = {"sequences": rollout.max_num_seqs, "tensor_parallel_size": rollout.tensor_parallel_size}
            cache = kv_cache_bytes(shape, precision=config.run.precision, **options) / GIB
        engine = weight_bytes(shape, bytes_per_parameter=size) + cache * GIB
        sizes["rollout"] = config.roles.rollout.num_ranks * engine
    return sizes


def trained_bytes(config: Config, role: str, shape: ModelConfig, size: int) -> float:
    """Weights, gradients and AdamW's state of one rank; in fp32 the weights are their own masters at ZeRO 0 only."""
    settings = getattr(config.roles, role)
    parameters = num_parameters(shape, scalar_head=role != "policy")
    memory = training_memory(
        parameters, 0, Work(kept=0, block=0, head=0), zero_stage=settings.zero_stage, num_ranks=settings.num_ranks
    )["head"]
    if size == 2:
        return memory.weights + memory.gradients + memory.optimizer
    own = parameters / (settings.num_ranks if settings.zero_stage >= 2 else 1)
    return 2 * memory.weights + memory.optimizer - (4 * parameters if settings.zero_stage == 0 else 0) + 4 * own


def in_flight(config: Config, stage: str, role: str, shape: ModelConfig) -> float:
    """Bytes of a micro-batch, trained on or scored, on its way through all ranks of a trained role."""
    section, settings = getattr(config, stage), getattr(config.roles, role)
    packed = section.seq_len if stage in ("pretrain", "sft") else None
    tokens = section.micro_batch_size * packed if packed else section.micro_batch_tokens
    work = training_work(
        shape,
        tokens,
        targets=tokens if role == "policy" else None,
        recompute=settings.recompute,
        packed_row_length=packed,
        cpu_kernels=True,
    )
    most = work.kept + max(work.block, work.head)
    if not packed:
        scored = section.tokens_to_score
        scoring = scoring_memory(shape, scored, targets=scored if role == "policy" else None, held=Memory())
        most = max(most, scoring.total)
    return settings.num_ranks * most * _element_bytes(config) / 2


def _of_role(role: str, stage: str, shape: ModelConfig, models: Mapping[str, Model]) -> ModelConfig:
    source = "helpfulness" if role == "value" else role
    given = models.get(f"inputs.{source}") if source in REWARD_MODELS and stage != "reward" else None
    return given.config if given else shape


def _element_bytes(config: Config) -> int:
    return 2 if config.run.precision == "bf16" else 4
