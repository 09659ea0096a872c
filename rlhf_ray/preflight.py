"""Everything that can be wrong with a run and be seen without running it: checked in seconds, nothing launched.

Each complaint is one line: field, value, rule, remedy.
"""

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from model.checkpoint_files import check_checkpoint
from model.config import PRESETS, ModelConfig
from rlhf_ray.config import STAGES, Config
from rlhf_ray.errors import UserError

TRAINED_ROLES = ("policy", "value", "helpfulness", "safety")


def check_run(config: Config, out: Path, stages: Sequence[str] | None = None) -> None:
    """Checks what the wanted stages depend on.

    Raises:
        UserError: the first thing that is wrong.
    """
    wanted = tuple(stages or config.run.stages)
    check_stages(wanted)
    check_ranks(config)
    check_batches(config, wanted)
    check_model(config, wanted)
    check_lengths(config, wanted)
    check_files(config)
    check_output(out)


def check_stages(wanted: Sequence[str]) -> None:
    """Stages are known."""
    for stage in wanted:
        if stage not in STAGES:
            raise UserError(f"run.stages has {stage!r}, which is no stage; choose from {', '.join(STAGES)}")


def check_ranks(config: Config) -> None:
    """An embedded cluster has the cores or GPUs that the roles ask for."""
    if config.cluster.address is not None:
        return  # the cluster's own resources are checked when it is reached
    if config.run.device == "cuda" or (config.run.device == "auto" and _has_nvidia()):
        return
    cores = config.cluster.cores or len(os.sched_getaffinity(0))
    if config.run.device != "cpu" and config.roles.rollout.tensor_parallel_size > 1:
        raise UserError(
            f"roles.rollout.tensor_parallel_size={config.roles.rollout.tensor_parallel_size} needs GPUs and this machine "
            f"has none; set it to 1"
        )
    for role in ("policy", "value", "reference", "helpfulness", "safety", "rollout"):
        name = "num_engines" if role == "rollout" else "num_ranks"
        ranks = getattr(getattr(config.roles, role), name)
        if ranks > cores:
            raise UserError(
                f"roles.{role}.{name}={ranks} must be at most {cores}, the cores of this machine: ranks of a role compute "
                f"at the same time; lower it, or give cluster.address of a larger cluster"
            )


def check_batches(config: Config, wanted: Sequence[str]) -> None:
    """Batches divide into minibatches, chunks and ranks."""
    ppo, roles = config.ppo, config.roles
    rules = [
        (
            "pretrain",
            "pretrain.batch_size",
            config.pretrain.batch_size,
            "roles.policy.num_ranks",
            roles.policy.num_ranks,
        ),
        ("sft", "sft.batch_size", config.sft.batch_size, "roles.policy.num_ranks", roles.policy.num_ranks),
        ("ppo", "ppo.batch_size", ppo.batch_size, "ppo.minibatch_size", ppo.minibatch_size),
        ("ppo", "ppo.batch_size", ppo.batch_size, "ppo.num_chunks", ppo.num_chunks),
        ("ppo", "ppo.num_chunks", ppo.num_chunks, "roles.policy.num_ranks", roles.policy.num_ranks),
        ("ppo", "ppo.num_chunks", ppo.num_chunks, "roles.value.num_ranks", roles.value.num_ranks),
        ("ppo", "ppo.num_chunks", ppo.num_chunks, "roles.rollout.num_engines", roles.rollout.num_engines),
        ("ppo", "ppo.minibatch_size", ppo.minibatch_size, "roles.policy.num_ranks", roles.policy.num_ranks),
    ]
    for stage, field, value, by_field, by in rules:
        if stage in wanted and value % by:
            raise UserError(
                f"{field}={value} must be divisible by {by_field}={by}; change one of them, for example "
                f"{field}={max(by, value // by * by)}"
            )


def check_model(config: Config, wanted: Sequence[str]) -> None:
    """The preset exists, and the vocabulary has room."""
    if "pretrain" in wanted and config.inputs.base is None and config.model.preset not in PRESETS:
        raise UserError(
            f"model.preset={config.model.preset!r} is not known; choose from {', '.join(PRESETS)}"
        )


def check_lengths(config: Config, wanted: Sequence[str]) -> None:
    """Rows and answers fit the model's context."""
    context = model_context(config)
    if context is None:
        return
    rules = [
        ("pretrain", "pretrain.seq_len", config.pretrain.seq_len),
        ("sft", "sft.seq_len", config.sft.seq_len),
        ("reward", "reward.max_length", config.reward.max_length),
        ("collect", "collect.max_new_tokens", config.collect.max_new_tokens + 1),
        ("ppo", "ppo.max_new_tokens", config.ppo.max_new_tokens + 1),
        ("evaluate", "evaluate.max_new_tokens", config.evaluate.max_new_tokens + 1),
    ]
    for stage, field, needed in rules:
        if stage in wanted and needed > context:
            raise UserError(
                f"{field} needs {needed} tokens, the model's context holds {context}; lower {field}"
            )


def model_context(config: Config) -> int | None:
    """Context length of the run's model, where it is known before the run."""
    checkpoint = config.inputs.chat or config.inputs.base
    if checkpoint is not None:
        return checkpoint_config(
            "inputs.chat" if config.inputs.chat else "inputs.base", checkpoint
        ).max_seq_len
    preset = PRESETS.get(config.model.preset)
    return config.model.max_seq_len or (preset.max_seq_len if preset else None)


def checkpoint_config(field: str, path: str) -> ModelConfig:
    """A checkpoint's config, once its files are found whole."""
    try:
        return check_checkpoint(path).config
    except ValueError as error:
        raise UserError(f"{field}: {error}") from error


def check_files(config: Config) -> None:
    """Checkpoints, tokenizers and tables that the config names are there, whole, and fit each other."""
    inputs = config.inputs
    models = {
        name: checkpoint_config(f"inputs.{name}", path)
        for name in ("base", "chat", "helpfulness", "safety")
        if (path := getattr(inputs, name)) is not None
    }
    tokenizer = inputs.tokenizer or inputs.chat or inputs.base
    if tokenizer is not None and (inputs.tokenizer or (Path(tokenizer) / "tokenizer.json").exists()):
        for name, model in models.items():
            check_tokenizer_fits(Path(tokenizer), name, model)
    kinds = {"corpus": "corpus", "demonstrations": "demonstrations", "comparisons": "comparisons"}
    named = {name: path for name, path in config.data.model_dump().items() if path is not None}
    if named:
        from rlhf_ray.data.schemas import SCHEMAS, check_rows, read_table

        for name, path in named.items():
            kind = kinds.get(name, "prompts")
            table = read_table(path, SCHEMAS[kind])  # type: ignore[index]
            problems = check_rows(kind, table)  # type: ignore[arg-type]
            if problems:
                raise UserError(
                    f"data.{name}: {path} {problems[0]} ({len(problems)} broken rows; `rlhf-ray data check {kind} {path}` lists them)"
                )
            if name == "comparisons" and config.reward.margin != "none" and table["strength"].null_count:
                row = table["strength"].to_pylist().index(None)
                raise UserError(
                    f"data.comparisons: {path} row {row} has no strength and reward.margin={config.reward.margin} needs one; "
                    f"fill the column in, or set reward.margin=none"
                )
    check_prompt_lengths(config)


def check_prompt_lengths(config: Config) -> None:
    """Prompts fit the context beside an answer, where tokenizer, model and prompts are all given."""
    context, tokenizer = (
        model_context(config),
        config.inputs.tokenizer or config.inputs.chat or config.inputs.base,
    )
    limits = {
        "prompts_train": config.ppo.max_new_tokens,
        "prompts_early_stop": config.ppo.max_new_tokens,
        "prompts_annotation": config.collect.max_new_tokens,
        "prompts_test": config.evaluate.max_new_tokens,
    }
    named = {name: path for name in limits if (path := getattr(config.data, name)) is not None}
    if not named or context is None or tokenizer is None:
        return
    from rlhf_ray.data.chat import load_tokenizer
    from rlhf_ray.data.prompts import load_prompts

    for name, path in named.items():
        load_prompts(path, load_tokenizer(tokenizer), max_prompt_tokens=context - limits[name])


def check_tokenizer_fits(tokenizer: Path, name: str, model: ModelConfig) -> None:
    """The tokenizer's ids all have a row in the model's embedding."""
    from rlhf_ray.recipe.tokenizer import check_tokenizer

    try:
        check_tokenizer(tokenizer, model.vocab_size)
    except UserError as error:
        raise UserError(f"inputs.{name}: {error}") from error


def check_output(out: Path) -> None:
    """The run directory can be written."""
    existing = out.resolve()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"--out {out}: {existing} is a file; choose a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: {existing} is not writable; choose a directory you may write to")


def check_chat_checkpoint(path: Path) -> None:
    """A checkpoint to talk to is whole and has its tokenizer."""
    checkpoint_config("CHECKPOINT", str(path))
    if not (path / "tokenizer.json").exists():
        raise UserError(
            f"CHECKPOINT {path}: has no tokenizer.json; copy the tokenizer's files beside the weights"
        )


def _has_nvidia() -> bool:
    return Path("/proc/driver/nvidia").exists() and importlib.util.find_spec("torch") is not None
