"""What a benchmark works on, and what can be wrong with it: checked before anything is launched."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from model.config import PRESETS, ModelConfig
from model.flops import forward_flops_per_token
from rlhf_ray.config import Config, DataSection
from rlhf_ray.data.reward_function import is_function
from rlhf_ray.errors import UserError
from rlhf_ray.machine import settled
from rlhf_ray.planning.batches import check_batches
from rlhf_ray.preflight.inputs import REWARD_MODELS, check_models, check_tokenizers
from rlhf_ray.preflight.machine import check_machine
from rlhf_ray.preflight.run import check_cluster, check_model, check_output, check_roles, check_shapes

Benchmark = Literal["rollout", "score", "train", "sync", "round"]

TRAINED = ("policy", "value")
SCORING = (*TRAINED, "reference", "helpfulness", "safety")
ROLES: Mapping[Benchmark, Sequence[str]] = {
    "rollout": ("rollout",),
    "score": SCORING,
    "train": TRAINED,
    "sync": ("policy", "rollout"),
    "round": ("rollout", *SCORING),
}
"""Benchmark -> the roles it starts."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One benchmark of one config."""

    what: Benchmark
    config: Config
    """The user's, less what a benchmark has of its own: data, answer length, number of steps, value warm-up."""
    shape: ModelConfig
    """Of the chat model, and of reward models that the config does not name."""
    repeats: int
    """Repeats that are measured."""
    warmup: int
    """Repeats before them that are not."""
    prompt_tokens: int
    """Of each prompt."""
    response_tokens: int
    """Of each answer."""

    @property
    def batch_size(self) -> int:
        """Prompts, hence answers, of a repeat."""
        return self.config.ppo.batch_size


def check_bench(
    what: Benchmark,
    config: Config,
    *,
    repeats: int,
    warmup: int,
    prompt_tokens: int,
    response_tokens: int,
    out: Path | None,
) -> Workload:
    """The workload, once all that can be wrong with it is found right.

    Raises:
        UserError: the first thing that is wrong.
    """
    config = _of_a_bench(settled(config), num_steps=warmup + repeats, response_tokens=response_tokens)
    rewards = [name for name in REWARD_MODELS if getattr(config.inputs, name) is not None]
    for name in rewards:
        if is_function(getattr(config.inputs, name)):
            raise UserError(
                f"inputs.{name}={getattr(config.inputs, name)!r} is a function, which cannot read random tokens; "
                "leave it out of a benchmark"
            )
    if rewards and config.inputs.chat is None:
        raise UserError(
            f"inputs.{rewards[0]} is given without inputs.chat; give both, since they share a tokenizer, or neither"
        )
    check_machine(config)
    check_cluster(config)
    check_roles(config, ROLES[what])
    check_batches(config, ["ppo"])
    models = check_models(config, ["ppo"])
    tokenizer = check_tokenizers(config, models)
    if "inputs.chat" in models:
        shape = models["inputs.chat"].config
    else:
        check_model(config, ["pretrain", "tokenizer"])
        vocab_size = config.tokenizer.vocab_size if tokenizer is None else max(tokenizer.vocabulary.values()) + 1
        preset = PRESETS[config.model.preset]
        changes = {"vocab_size": vocab_size, "max_seq_len": config.model.max_seq_len or preset.max_seq_len}
        shape = preset.model_copy(update=changes)
    if "rollout" in ROLES[what]:
        field = "inputs.chat" if "inputs.chat" in models else f"model.preset={config.model.preset!r}"
        check_shapes(config, {field: shape})
    context = min([shape.max_seq_len, *(model.config.max_seq_len for model in models.values())])
    if prompt_tokens + response_tokens > context:
        raise UserError(
            f"--prompt-tokens {prompt_tokens} and --response-tokens {response_tokens} are "
            f"{prompt_tokens + response_tokens} tokens together, and the model's context holds {context}; lower them"
        )
    if out is not None:
        if out.is_dir():
            raise UserError(f"--out {out}: is a directory; give the name of a JSON file")
        check_output(out.parent)
    return Workload(
        what=what,
        config=config,
        shape=shape,
        repeats=repeats,
        warmup=warmup,
        prompt_tokens=prompt_tokens,
        response_tokens=response_tokens,
    )


def _of_a_bench(config: Config, *, num_steps: int, response_tokens: int) -> Config:
    """The config with what a benchmark has of its own; a base model serves where there is no chat model."""
    inputs = config.inputs.model_copy(update={"chat": config.inputs.chat or config.inputs.base})
    # While the value model warms up the policy does not learn and there is nothing to sync.
    own = {"max_new_tokens": response_tokens, "num_steps": num_steps, "value_warmup_steps": 0}
    ppo = config.ppo.model_copy(update=own)
    return config.model_copy(update={"data": DataSection(), "inputs": inputs, "ppo": ppo})


def model_flops(work: Workload, shapes: Mapping[str, ModelConfig]) -> float:
    """FLOPs that the models need for one repeat; what is computed twice to save memory does not count.

    Args:
        shapes: of each role's model.
    """
    parts = {
        # The last token that is sampled does not pass through the model.
        "rollout": lambda: _forward(work, shapes["rollout"], length=_length(work) - 1, with_head=True),
        "score": lambda: sum(
            _forward(work, shapes[role], length=_length(work), with_head=role in ("policy", "reference"))
            for role in SCORING
        ),
        # A backward pass is two forward passes.
        "train": lambda: (
            3
            * work.config.ppo.inner_epochs
            * sum(_forward(work, shapes[role], length=_length(work), with_head=role == "policy") for role in TRAINED)
        ),
    }
    names = {"sync": (), "round": tuple(parts)}.get(work.what, (work.what,))
    return float(sum(parts[name]() for name in names))


def _length(work: Workload) -> int:
    return work.prompt_tokens + work.response_tokens


def _forward(work: Workload, shape: ModelConfig, *, length: int, with_head: bool) -> float:
    """FLOPs of a batch's rows of `length` tokens, the head on response tokens only."""
    body = length * forward_flops_per_token(shape, length, with_head=False)
    head = work.response_tokens * 2 * shape.vocab_size * shape.hidden_size if with_head else 0
    return work.batch_size * (body + head)
