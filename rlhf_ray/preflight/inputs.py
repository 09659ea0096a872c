"""The files that a config names: checkpoints, tokenizers and tables are there, whole, and fit each other.

Reads headers, JSON and Parquet, and loads neither torch nor transformers.
"""

import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from model.checkpoint_files import check_checkpoint, stray_files
from model.checkpoint_values import check_finite
from model.config import ModelConfig
from rlhf_ray.backends.engine_limits import check_engine
from rlhf_ray.config import OF_ALL, Config, RolloutRole, config_with, own_settings, sampling_temperature, teachers
from rlhf_ray.data.light_tokenizer import LightTokenizer
from rlhf_ray.errors import UserError, located
from rlhf_ray.progress import console
from rlhf_ray.recipe.stages import REFEREE, REWARDS

if TYPE_CHECKING:
    import pyarrow as pa

LANGUAGE_MODELS, REWARD_MODELS = ("base", "chat"), REWARDS
JUDGES = (*REWARDS, REFEREE)
"""Reward models, or functions, that a config may name."""
SCORED = ("rejection-sample", "ppo", "evaluate")
"""Stages whose answers the reward models read."""

FIRST_WEEK = "rounds.versions[0].comparisons"
WIDE_GAP = 1024
"""Ids of a model that its tokenizer does not use, from which on padding is not the likeliest reason."""

READ_THROUGH_BYTES = 8 * 2**30
"""Size of a checkpoint up to which its numbers are looked at before the run; workers look at those of any."""

LONGEST_ROWS = 256
"""Rows of most characters whose tokens are counted before the run, if all of them fit; the stages count all."""


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
    named = {f"inputs.{name}": getattr(config.inputs, name) for name in (*LANGUAGE_MODELS, *JUDGES)}
    if "pairs" in running:
        named |= {
            f"pairs.models[{place}]": model
            for place, model in enumerate(config.pairs.models)
            if model not in ("previous", "newest")
        }
    if "evaluate" in running:
        named |= {f"evaluate.controls.{label}": path for label, path in config.evaluate.controls.items()}
    if "rejection-sample" in running:
        named |= teachers(config)
    functions = check_functions(config, running)
    return {
        field: Model(
            path,
            checkpoint_config(field, path, kind="reward" if field.removeprefix("inputs.") in JUDGES else "language"),
        )
        for field, path in named.items()
        if path is not None and field not in functions
    }


def shortest_context(models: Mapping[str, Model], stage: str) -> int | None:
    """Context length of the given models that a stage works with, the shortest; None where none is given."""
    own = models.get("inputs.chat") or models.get("inputs.base")
    judges = () if stage not in SCORED else JUDGES if stage == "evaluate" else REWARD_MODELS
    rewards = [models.get(f"inputs.{name}") for name in judges]
    return min((model.config.max_seq_len for model in (own, *rewards) if model is not None), default=None)


def check_functions(config: Config, running: Sequence[str]) -> list[str]:
    """Rewards named as functions can be imported, and nothing takes them for models; returns their fields."""
    from rlhf_ray.data.reward_function import find_function, is_function

    fields = []
    for name in JUDGES:
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
    if strays := stray_files(path):
        names = ", ".join(sorted(stray.name for stray in strays))
        read = ", ".join(sorted(file.name for file in info.files)[:2])
        console.print(
            f"{field}={path!r}: {names}: not read, only {read}; an adapter must be merged into the model first"
        )
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
        if files.chat_template is None:
            raise UserError("the tokenizer has no chat_template; set one in its tokenizer_config.json")
        check_turns(files)
    for model_field, (path, model) in models.items():
        size = _check_fit(field, files, model_field, model)
        if not (Path(path) / "tokenizer.json").exists():
            if model.vocab_size - size >= WIDE_GAP:
                console.print(
                    f"{model_field}: vocab_size={model.vocab_size} is far more than the {size} ids of the tokenizer of "
                    f"{field}: right for a padded vocabulary, wrong for a model of another tokenizer"
                )
        elif path != directory:
            with located(f"{model_field}={path!r}"):
                own = LightTokenizer(path)
            reads_answers = model_field.removeprefix("inputs.") in JUDGES
            if difference := _difference(files, own, reads_answers=reads_answers):
                raise UserError(
                    f"{model_field}={path!r} has another tokenizer than {field}={directory!r} ({difference}); "
                    "give models that share one tokenizer"
                )
    return files


def check_turns(tokenizer: LightTokenizer) -> None:
    """The template closes answers with one token and takes a question and an answer; of more turns and of system
    messages, which not every template takes, the tables tell whether they are met.

    Raises:
        UserError: as `data.chat.encode_dialogue`.
    """
    from rlhf_ray.data.chat import check_template
    from rlhf_ray.data.template import settle_eos

    as_real: Any = tokenizer  # it has what encoding needs
    settle_eos(as_real)
    check_template(as_real, ("user", "assistant"))


def _difference(files: LightTokenizer, own: LightTokenizer, *, reads_answers: bool) -> str | None:
    """In what a model's tokenizer differs from the run's, whose tokens it must know; more of its own do no harm."""
    known = own.vocabulary
    for token, number in sorted(files.vocabulary.items(), key=lambda item: item[1]):
        if known.get(token) != number:
            return f"{token!r} is {known.get(token, 'none of its tokens')} there and {number} here"
    if reads_answers and own.chat_template is not None and own.eos_token != files.eos_token:
        return f"its answers end in {own.eos_token!r}, not in {files.eos_token!r}"
    return None


def _check_fit(field: str, files: LightTokenizer, model_field: str, model: ModelConfig) -> int:
    """The tokenizer's size, which the model's vocabulary has room for."""
    size = max(files.vocabulary.values()) + 1
    if size > model.vocab_size:
        raise UserError(
            f"{model_field}: the model's vocab_size={model.vocab_size} does not fit the tokenizer of {field}, which "
            f"has {size} ids: it must have as many, or more; use the model's own tokenizer"
        )
    return size


def check_tables(
    config: Config, running: Sequence[str], tokenizer: LightTokenizer | None, models: Mapping[str, Model]
) -> None:
    """Tables have their columns, and every row keeps its rules."""
    named = [(f"data.{name}", name, path) for name, path in config.data.model_dump().items() if path is not None]
    named += [  # a version waits for one that is not there
        (f"rounds.versions[{place}].comparisons", "comparisons", path)
        for place, path in weeks_of_people(config).items()
        if os.path.exists(path)
    ]
    if not named:
        return
    from rlhf_ray.data.row_checks import refuse_broken, token_problems
    from rlhf_ray.data.schemas import SCHEMAS, check_rows, read_table, unused_columns

    tables = {}
    learning = config_with(config, own_settings(config).get(OF_ALL, {}))
    for field, name, path in named:
        kind = table_kind(name)
        if kind == "comparisons":
            check_strengths_column(learning, field, path)
        with located(field):
            table = read_table(path, SCHEMAS[kind])
            if unused := unused_columns(path, SCHEMAS[kind]):
                print(f"{field}: {path}: columns that are not used: {', '.join(unused)}", file=sys.stderr)
            problems = check_rows(kind, table)
            if tokenizer is not None and (found := token_limit(config, name, running, models)):
                limit, reason = found
                problems += token_problems(kind, table, tokenizer, limit=limit, reason=reason, patience=LONGEST_ROWS)
            refuse_broken(path, problems, table.num_rows)
        if kind == "comparisons":
            check_strengths(learning, field, path, table)
        if name == "prompts_annotation" and "label" in running:
            remedy = "data.comparisons" if config.rounds is None else "the comparisons of rounds.versions"
            check_truth(path, table, remedy)
        tables[field.removeprefix("data.")] = table
    check_parts(learning, running, tables)


def weeks_of_people(config: Config) -> dict[int, str]:
    """Place of a version -> the table that people are to write for it."""
    versions = config.rounds.versions if config.rounds is not None else ()
    return {place: version.comparisons for place, version in enumerate(versions) if version.comparisons is not None}


def check_parts(config: Config, running: Sequence[str], tables: Mapping[str, "pa.Table"]) -> None:
    """What trains on a table leaves some of it to measure on, and the other way round."""
    from rlhf_ray.data.shares import check_mix, mix, split_comparisons, split_held_out

    stages = {"corpus": "pretrain", "demonstrations": "sft", "public_demonstrations": "sft"}
    for name, stage in stages.items():
        if name in tables and stage in running:
            column = tables[name]["text" if name == "corpus" else "messages"].to_pylist()
            share = getattr(config, stage).held_out
            with located(f"data.{name}"):
                split_held_out(column, list(map(str, column)), share, str(getattr(config.data, name)))
    engines_and_ranks = math.lcm(config.roles.rollout.num_engines, config.roles.policy.num_ranks)
    for name, stage, least in (
        ("prompts_early_stop", "ppo", config.ppo.num_chunks),
        ("prompts_test", "evaluate", engines_and_ranks),
    ):
        if name in tables and stage in running and tables[name].num_rows < least:
            raise UserError(
                f"data.{name}: {getattr(config.data, name)} has {tables[name].num_rows} prompts, at least {least} are "
                "needed, one for each chunk, engine and rank; give more, or fewer of these"
            )
    names = first_to_learn(config, tables)
    if names and "reward" in running and ("label" in running or names != ["prompts_annotation"]):
        rows = [
            {**row, "guideline": row.get("guideline", "safety" if row["is_safety"] else "helpfulness")}
            for name in names
            for row in tables[name].to_pylist()
        ]
        apart = tables.get("comparisons_held_out")
        held_out = config.reward.held_out if apart is None else apart.to_pylist()
        field, path = names[-1], getattr(config.data, names[-1], None) or weeks_of_people(config)[0]
        with located(field if field == FIRST_WEEK else f"data.{field}"):
            train, rest = split_comparisons(rows, held_out)
            for model in (model for model in REWARD_MODELS if getattr(config.inputs, model) is None):
                check_mix(model, mix(model, config.reward), train, rest, str(path))


def first_to_learn(config: Config, tables: Mapping[str, "pa.Table"]) -> list[str]:
    """The tables at hand that hold all that the first reward models learn, where there are such; prompts that are to be
    annotated become comparisons.
    """
    given = ["comparisons"] if "comparisons" in tables else []
    if config.rounds is not None and config.rounds.versions[0].comparisons is not None:
        return [*given, FIRST_WEEK] if FIRST_WEEK in tables else []
    if config.rounds is None and given:
        return given
    return ["prompts_annotation"] if "prompts_annotation" in tables and not given else []


def table_kind(name: str) -> Any:
    """The schema of a key of `data`."""
    if name == "selections":
        return "samples"
    return "prompts" if name.startswith("prompts_") else name.removeprefix("public_").removesuffix("_held_out")


def check_strengths_column(config: Config, field: str, path: str) -> None:
    """A file without strengths is told by what asks for them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        columns = pq.read_schema(path).names
    except (OSError, pa.ArrowException):
        return  # reading the table says what is wrong with the file
    if "strength" not in columns and config.reward.margin != "none":
        raise UserError(
            f"{field}: {path} has no column strength and reward.margin={config.reward.margin} needs "
            "it; add it, or set reward.margin=none and fill it with nulls"
        )


def check_strengths(config: Config, field: str, path: str, table: "pa.Table") -> None:
    """A margin that goes by strength finds one in every row."""
    if config.reward.margin != "none" and table["strength"].null_count:
        row, num = table["strength"].to_pylist().index(None), table["strength"].null_count
        others = f" (and {num - 1} others)" if num > 1 else ""
        raise UserError(
            f"{field}: {path} row {row}{others} has no strength and reward.margin={config.reward.margin} "
            "needs it; fill the column in, or set reward.margin=none"
        )


def check_truth(path: str, table: "pa.Table", remedy: str) -> None:
    """The simulated annotator has something to judge by in every row."""
    if empty := [row for row, truth in enumerate(table["truth"].to_pylist()) if not truth]:
        others = f" (and {len(empty) - 1} others)" if len(empty) > 1 else ""
        raise UserError(
            f"data.prompts_annotation: {path} row {empty[0]}{others} has truth='' and the simulated annotator of "
            f"label judges testbed prompts only; give human comparisons as {remedy}"
        )


def token_limit(
    config: Config, name: str, running: Sequence[str], models: Mapping[str, Model]
) -> tuple[int | None, str] | None:
    """(most tokens, the reason for it) of a row of a table that a stage tokenises, where such a stage runs.

    The most is None where it is that of a model which the run has yet to make.
    """
    lengths = {
        "demonstrations": ("sft", "sft.seq_len", config.sft.seq_len),
        "public_demonstrations": ("sft", "sft.seq_len", config.sft.seq_len),
        "selections": ("sft", "sft.seq_len", config.sft.seq_len),
        "comparisons": ("reward", "reward.max_length", config.reward.max_length),
        "comparisons_held_out": ("reward", "reward.max_length", config.reward.max_length),
    }
    if name in lengths:
        stage, field, value = lengths[name]
        return (value, f"{field}={value}; raise it or shorten the row") if stage in running else None
    sampled = ("rejection-sample", "rejection_sampling"), ("ppo", "ppo")
    readers = {
        "prompts_train": sampled,
        "prompts_early_stop": (*sampled, *((("evaluate", "evaluate"),) if config.evaluate.own_temperatures else ())),
        "prompts_annotation": (("pairs", "pairs"),),
        "prompts_test": (("evaluate", "evaluate"),),
    }.get(name, ())
    limits = [(shortest_context(models, stage), section) for stage, section in readers if stage in running]
    if not limits:
        return None
    known = [(c - getattr(config, s).max_new_tokens, c, s) for c, s in limits if c is not None]
    if not known:
        return None, ""
    limit, context, section = min(known)
    answer = getattr(config, section).max_new_tokens
    return limit, (f"the context of {context} less {section}.max_new_tokens={answer}; shorten the prompt or lower that")


def check_chat_checkpoint(path: Path, *, temperature: float, max_new_tokens: int, on_gpu: bool, precision: str) -> None:
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
        check_turns(files)
    _check_fit("CHECKPOINT", files, f"CHECKPOINT={str(path)!r}", model)
    check_engine(RolloutRole(), {f"CHECKPOINT={str(path)!r}": model}, precision=precision, on_gpu=on_gpu)
    if max_new_tokens >= model.max_seq_len:
        raise UserError(
            f"--max-new-tokens {max_new_tokens}: must be less than {model.max_seq_len}, the model's context; lower it"
        )


def _without(message: str, path: str) -> str:
    """The message without the path at its start, which the field before it names already."""
    return message.removeprefix(path).lstrip("/: ")
