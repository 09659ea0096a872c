"""The files that a config names: checkpoints, tokenizers and tables are there, whole, and fit each other.

Reads headers, JSON and Parquet, and loads neither torch nor transformers.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from model.checkpoint_files import check_checkpoint
from model.checkpoint_values import check_finite
from model.config import ModelConfig
from rlhf_ray.config import Config, RolloutRole, sampling_temperature
from rlhf_ray.engine_limits import check_engine
from rlhf_ray.errors import UserError, located
from rlhf_ray.light_tokenizer import LightTokenizer

if TYPE_CHECKING:
    import pyarrow as pa

LANGUAGE_MODELS, REWARD_MODELS = ("base", "chat"), ("helpfulness", "safety")
SCORED = ("ppo", "evaluate")
"""Stages whose answers the reward models read."""

# As in recipe/tokenizer.py: vocabularies of models are often padded, a wider gap means another tokenizer.
MAX_UNUSED_IDS = 1024

READ_THROUGH_BYTES = 8 * 2**30
"""Size of a checkpoint up to which its numbers are looked at before the run; workers look at those of any."""

OWN_MODELS = ("SFT", "PPO")
"""How the evaluation names the run's own models."""

LONGEST_ROWS = 256
"""Rows whose tokens are counted before the run, those of most characters; the stages count all."""


def check_inputs(config: Config, running: Sequence[str]) -> dict[str, "Model"]:
    """Checks every file the config names; returns the checkpoints by field.

    Args:
        running: the stages that will run.
    Raises:
        UserError: the first thing that is wrong.
    """
    models = check_models(config, running)
    tokenizer = check_tokenizers(config, models)
    check_tables(config, running, tokenizer, models)
    return models


class Model(NamedTuple):
    """A checkpoint that the config names."""

    path: str
    config: ModelConfig


def check_models(config: Config, running: Sequence[str]) -> dict[str, Model]:
    """Checkpoints are whole and of the right kind; returns them by field."""
    named = {f"inputs.{name}": getattr(config.inputs, name) for name in (*LANGUAGE_MODELS, *REWARD_MODELS)}
    if "collect" in running:
        named |= {
            f"collect.versions[{place}]": version
            for place, version in enumerate(config.collect.versions)
            if version not in ("previous", "newest")
        }
    if "evaluate" in running:
        for label in OWN_MODELS:
            if label in config.evaluate.controls:
                raise UserError(f"evaluate.controls.{label}: the label is taken by this run's own; choose another")
        named |= {f"evaluate.controls.{label}": path for label, path in config.evaluate.controls.items()}
    functions = check_functions(config, running)
    return {
        field: Model(
            path,
            checkpoint_config(
                field, path, kind="reward" if field.removeprefix("inputs.") in REWARD_MODELS else "language"
            ),
        )
        for field, path in named.items()
        if path is not None and field not in functions
    }


def shortest_context(models: Mapping[str, Model], stage: str) -> int | None:
    """Context length of the given models that a stage works with, the shortest; None where none is given."""
    own = models.get("inputs.chat") or models.get("inputs.base")
    rewards = [models.get(f"inputs.{name}") for name in REWARD_MODELS] if stage in SCORED else []
    return min((model.config.max_seq_len for model in (own, *rewards) if model is not None), default=None)


def check_functions(config: Config, running: Sequence[str]) -> list[str]:
    """Rewards named as functions can be imported, and nothing takes them for models; returns their fields."""
    from rlhf_ray.data.reward_function import find_function, is_function

    fields = []
    for name in REWARD_MODELS:
        spec = getattr(config.inputs, name)
        if spec is not None and is_function(spec):
            fields.append(f"inputs.{name}")
            with located(f"inputs.{name}"):
                find_function(spec, root=os.getcwd())
            if name == "helpfulness" and "ppo" in running and config.ppo.value_init == "helpfulness":
                raise UserError(
                    f"ppo.value_init='helpfulness': inputs.helpfulness={spec!r} is a function, which has no weights to "
                    "start a value model from; set ppo.value_init=policy"
                )
    return fields


def checkpoint_config(field: str, path: str, *, kind: Literal["language", "reward"] | None = None) -> ModelConfig:
    """A checkpoint's config, once its files are found whole and of the wanted kind."""
    try:
        info = check_checkpoint(path)
    except ValueError as error:
        raise UserError(f"{field}={path!r}: {_without(str(error), path)}; give a Llama checkpoint") from error
    if kind == "language" and info.is_reward_model:
        raise UserError(
            f"{field}={path!r} is a reward model (LlamaForSequenceClassification) where a language model is "
            "needed; give a LlamaForCausalLM checkpoint"
        )
    if kind == "reward" and not info.is_reward_model:
        raise UserError(
            f"{field}={path!r} is a language model (LlamaForCausalLM) where a reward model is needed; "
            "give a LlamaForSequenceClassification checkpoint with one label"
        )
    try:
        check_finite(info, at_most=READ_THROUGH_BYTES)
    except ValueError as error:
        raise UserError(f"{field}={path!r}: {_without(str(error), path)}") from error
    return info.config


def check_tokenizers(config: Config, models: Mapping[str, Model]) -> LightTokenizer | None:
    """One tokenizer serves all models; returns it where the config names one."""
    inputs = config.inputs
    chosen = ("inputs.tokenizer", inputs.tokenizer)
    for name in ("chat", "base"):
        path = getattr(inputs, name)
        if chosen[1] is None and path is not None:
            chosen = (f"inputs.{name}", path)
            if not (Path(path) / "tokenizer.json").exists():
                raise UserError(f"inputs.{name}={path!r} has no tokenizer.json; set inputs.tokenizer to its tokenizer")
    field, directory = chosen
    if directory is None:
        return None
    with located(f"{field}={directory!r}"):
        files = LightTokenizer(directory)
        if files.eos_token is None:
            raise UserError("the tokenizer has no eos_token; set it to the token that closes an answer")
        if files.chat_template is None:
            raise UserError("the tokenizer has no chat_template; set one in its tokenizer_config.json")
    for model_field, (path, model) in models.items():
        _check_fit(field, files, model_field, model)
        if path != directory and (Path(path) / "tokenizer.json").exists():
            with located(f"{model_field}={path!r}"):
                own = LightTokenizer(path)
            if own.vocabulary != files.vocabulary:
                raise UserError(
                    f"{model_field}={path!r} has another tokenizer than {field}={directory!r}; "
                    "give models that share one tokenizer"
                )
    return files


def _check_fit(field: str, files: LightTokenizer, model_field: str, model: ModelConfig) -> None:
    size = max(files.vocabulary.values()) + 1
    if not size <= model.vocab_size < size + MAX_UNUSED_IDS:
        raise UserError(
            f"{model_field}: the model's vocab_size={model.vocab_size} does not fit the tokenizer of "
            f"{field}, which has "
            f"{size} ids: it must have as many, or fewer than {MAX_UNUSED_IDS} more; use the model's "
            "own tokenizer"
        )


def check_tables(
    config: Config, running: Sequence[str], tokenizer: LightTokenizer | None, models: Mapping[str, Model]
) -> None:
    """Tables have their columns, and every row keeps its rules."""
    named = {name: path for name, path in config.data.model_dump().items() if path is not None}
    if not named:
        return
    from rlhf_ray.data.schemas import SCHEMAS, check_rows, read_table

    for name, path in named.items():
        kind = table_kind(name)
        if kind == "comparisons":
            check_strengths_column(config, name, path)
        with located(f"data.{name}"):
            table = read_table(path, SCHEMAS[kind])
            if problems := check_rows(kind, table):
                more = f" (the first of {len(problems)} broken rows)" if len(problems) > 1 else ""
                raise UserError(f"{path} {problems[0]}{more}; see `rlhf-ray data check {kind} {path}`")
        if kind == "comparisons":
            check_strengths(config, name, path, table)
        if name == "prompts_annotation" and "collect" in running:
            check_truth(path, table)
        limit = token_limit(config, name, running, models)
        if kind != "corpus" and tokenizer is not None and limit is not None:
            with located(f"data.{name}"):
                check_row_lengths(path, table, tokenizer, *limit)


def table_kind(name: str) -> Any:
    """The schema of a key of `data`."""
    return "prompts" if name.startswith("prompts_") else name.removeprefix("public_").removesuffix("_held_out")


def check_strengths_column(config: Config, name: str, path: str) -> None:
    """A file without strengths is told by what asks for them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        columns = pq.read_schema(path).names
    except (OSError, pa.ArrowException):
        return  # reading the table says what is wrong with the file
    if "strength" not in columns and config.reward.margin != "none":
        raise UserError(
            f"data.{name}: {path} has no column strength and reward.margin={config.reward.margin} needs "
            "it; add it, or set reward.margin=none and fill it with nulls"
        )


def check_strengths(config: Config, name: str, path: str, table: "pa.Table") -> None:
    """A margin that goes by strength finds one in every row."""
    if config.reward.margin != "none" and table["strength"].null_count:
        row = table["strength"].to_pylist().index(None)
        raise UserError(
            f"data.{name}: {path} row {row} has no strength and reward.margin={config.reward.margin} "
            "needs it; fill the column in, or set reward.margin=none"
        )


def check_truth(path: str, table: "pa.Table") -> None:
    """The simulated annotator has something to judge by in every row."""
    for row, truth in enumerate(table["truth"].to_pylist()):
        if not truth:
            raise UserError(
                f"data.prompts_annotation: {path} row {row} has truth='' and the simulated annotator of "
                "collect judges testbed prompts only; give human comparisons as data.comparisons"
            )


def token_limit(
    config: Config, name: str, running: Sequence[str], models: Mapping[str, Model]
) -> tuple[int, str] | None:
    """(most tokens, the reason for it) of a row of a table, where a stage that runs sets one."""
    lengths = {
        "demonstrations": ("sft", "sft.seq_len", config.sft.seq_len),
        "public_demonstrations": ("sft", "sft.seq_len", config.sft.seq_len),
        "comparisons": ("reward", "reward.max_length", config.reward.max_length),
        "comparisons_held_out": ("reward", "reward.max_length", config.reward.max_length),
    }
    if name in lengths:
        stage, field, value = lengths[name]
        return (value, f"{field}={value}; raise it or shorten the row") if stage in running else None
    answers = {
        "prompts_train": ("ppo", config.ppo.max_new_tokens),
        "prompts_early_stop": ("ppo", config.ppo.max_new_tokens),
        "prompts_annotation": ("collect", config.collect.max_new_tokens),
        "prompts_test": ("evaluate", config.evaluate.max_new_tokens),
    }
    if name not in answers or answers[name][0] not in running:
        return None
    stage, answer = answers[name]
    if (context := shortest_context(models, stage)) is None:
        return None
    return context - answer, (
        f"the context of {context} less {stage}.max_new_tokens={answer}; shorten the prompt or lower that"
    )


def check_row_lengths(path: str, table: "pa.Table", tokenizer: LightTokenizer, limit: int, reason: str) -> None:
    """The longest rows fit, and none spells a special token."""
    from rlhf_ray.data.chat import encode_answer, encode_dialogue, encode_prompt

    as_real: Any = tokenizer  # it has what encoding needs
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    rows = table.to_pylist()
    sizes = []
    for number, row in enumerate(rows):
        text = "\0".join(_texts(row))
        sizes.append(len(text))
        if spelt := next((token for token in special if token in text), None):
            raise UserError(
                f"{path} row {number} holds the special token {spelt!r}, which would end or fake a turn; remove it"
            )
    for number in sorted(range(len(rows)), key=lambda n: -sizes[n])[:LONGEST_ROWS]:
        row = rows[number]
        with located(f"{path} row {number}"):
            if "chosen" in row:
                prompt = len(encode_prompt(as_real, row["messages"]))
                sides = [
                    encode_answer(as_real, row[side], finished=row[f"{side}_finished"])
                    for side in ("chosen", "rejected")
                ]
                length = prompt + max(len(side) for side in sides)
            elif row["messages"][-1]["role"] == "assistant":
                length = len(encode_dialogue(as_real, row["messages"])[0])
            else:
                length = len(encode_prompt(as_real, row["messages"]))
            if length > limit:
                raise UserError(f"has {length} tokens, at most {limit} fit: {reason}")


def _texts(row: Mapping[str, Any]) -> Iterator[str]:
    yield from (message["content"] for message in row["messages"])
    yield from (row[side] for side in ("chosen", "rejected") if side in row)


def check_chat_checkpoint(path: Path, *, temperature: float, max_new_tokens: int, on_gpu: bool) -> None:
    """A checkpoint to talk to is a whole language model, has its tokenizer, and room for an answer."""
    try:
        sampling_temperature(temperature)
    except ValueError as error:
        raise UserError(f"--temperature {temperature:g} {error}; give another") from error
    model = checkpoint_config("CHECKPOINT", str(path), kind="language")
    with located(f"CHECKPOINT={str(path)!r}"):
        files = LightTokenizer(path)
        if files.chat_template is None:
            raise UserError("the tokenizer has no chat_template; give a fine-tuned model")
    _check_fit("CHECKPOINT", files, f"CHECKPOINT={str(path)!r}", model)
    check_engine(RolloutRole(), {f"CHECKPOINT={str(path)!r}": model}, precision="bf16", on_gpu=on_gpu)
    if max_new_tokens >= model.max_seq_len:
        raise UserError(
            f"--max-new-tokens {max_new_tokens}: must be less than {model.max_seq_len}, the model's context; lower it"
        )


def _without(message: str, path: str) -> str:
    """The message without the path at its start, which the field before it names already."""
    return message.removeprefix(path).lstrip("/: ")
