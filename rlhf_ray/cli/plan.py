"""`rlhf-ray plan`: from the command line to a plan, and the plan as a table or as JSON."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from pydantic import BaseModel
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cluster.plan import GIB, Memory, held_in
from model.checkpoint_files import read_config
from model.config import PRESETS, ModelConfig
from rlhf_ray.config import Config, apply_overrides, config_with, parse_config, read_toml, stage_settings
from rlhf_ray.config_errors import similar
from rlhf_ray.errors import UserError
from rlhf_ray.planning.plan import TRAINING, Plan, Request

PARTS = tuple(field.name for field in fields(Memory))
SHORT = {"gradients": "grads", "optimizer": "optim", "activations": "activ", "kv_cache": "KV", "overhead": "other"}
"""Headings that leave the table within 100 columns."""


def plan_request(
    *,
    model: str,
    reward_model: str | None,
    stage: str,
    gpus: int,
    gpu_memory_gib: float,
    overhead_gib: float,
    zero_stage: int | None,
    batch: int | None,
    prompt_tokens: int | None,
    response_tokens: int | None,
    config_path: Path | None,
    overrides: Sequence[str],
) -> Request:
    """What the command line asks for, checked.

    Sizes that are not given are the config's, cut to the model's context; prompts fill what answers leave of it. A
    config or an override that says anything about `roles` gives the placement; otherwise it is searched.

    Raises:
        UserError: one line that names the argument, its value, the rule and the remedy.
    """
    shape = model_shape("--model", model)
    reward_shape = model_shape("--reward-model", reward_model) if reward_model is not None else shape
    if stage not in TRAINING:
        raise UserError(f"--stage {stage} is not planned for; {similar(stage, TRAINING)}")
    _at_least("--gpus", gpus, 1)
    _at_least("--batch", batch, 1)
    _at_least("--prompt-tokens", prompt_tokens, 1)
    _at_least("--response-tokens", response_tokens, 1)
    for name, gib in (("--gpu-memory", gpu_memory_gib), ("--overhead", overhead_gib)):
        if not (math.isfinite(gib) and (gib > 0 or (gib == 0 and name == "--overhead"))):
            raise UserError(f"{name} {gib:g} must be a positive number of GiB")
    if zero_stage not in (None, 0, 1, 2, 3):
        raise UserError(f"--zero-stage {zero_stage} must be 0, 1, 2 or 3")
    raw = read_toml(config_path) if config_path is not None else {}
    set_here = apply_overrides(raw, overrides)
    config = parse_config(raw, source=str(config_path or "config"), set_here=set_here)
    given = "roles" in raw
    if given and zero_stage is not None:
        raise UserError("--zero-stage cannot be given beside a placement (roles in --config or --set); leave one out")
    if config.run.precision == "fp32":
        raise UserError("run.precision=fp32 is not planned for, bf16 is; leave it out, or --set run.precision=bf16")
    context = min(shape.max_seq_len, reward_shape.max_seq_len) if stage in ("reward", "ppo") else shape.max_seq_len
    config = config_with(config, stage_settings(config, stage))
    config = _cut_to_context(config, stage, raw, context, batch, response_tokens)
    answer = config.ppo.max_new_tokens
    if stage == "ppo" and (prompt_tokens or 1) + answer > context:
        raise UserError(
            f"--prompt-tokens {prompt_tokens or 1} and ppo.max_new_tokens={answer} (--response-tokens) exceed the "
            f"model's context of {context} tokens; lower one of them"
        )
    return Request(
        stage=stage,
        model=shape,
        reward_model=reward_shape,
        config=config,
        given=given,
        gpus=gpus,
        gpu_bytes=int(gpu_memory_gib * GIB),
        prompt_tokens=prompt_tokens or context - answer,
        zero_stage=zero_stage,
        overhead=int(overhead_gib * GIB),
    )


def model_shape(option: str, name: str) -> ModelConfig:
    """The shape of a preset or of a checkpoint directory.

    Raises:
        UserError: neither is of that name, or the checkpoint is not a Llama.
    """
    if name in PRESETS:
        return PRESETS[name]
    if not Path(name).exists():
        raise UserError(f"{option} {name}: neither a checkpoint directory nor a preset; {similar(name, PRESETS)}")
    try:
        return read_config(name)
    except ValueError as error:
        raise UserError(f"{option} {error}; give a Llama checkpoint or a preset") from error


def _at_least(option: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise UserError(f"{option} {value} must be at least {least}")


def _cut_to_context(
    config: Config, stage: str, raw: dict[str, object], context: int, batch: int | None, response_tokens: int | None
) -> Config:
    """The config with the sizes of the command line, and lengths that were left at their defaults cut to the context.

    Raises:
        UserError: a length that was given is longer than the context.
    """
    key, most = {
        "pretrain": ("seq_len", context),
        "sft": ("seq_len", context),
        "reward": ("max_length", context),
        "ppo": ("max_new_tokens", context - 1),
    }[stage]
    settings: dict[str, object] = {}
    if batch is not None:
        settings[f"{stage}.batch_size"] = batch
        if stage == "ppo" and batch % config.ppo.minibatch_size:
            settings["ppo.minibatch_size"] = math.gcd(batch, config.ppo.minibatch_size)
    if response_tokens is not None and stage == "ppo":
        settings["ppo.max_new_tokens"] = response_tokens
    config = config_with(config, settings)
    section: BaseModel = getattr(config, stage)
    length = getattr(section, key)
    if length <= most:
        return config
    table = raw.get(stage)
    if (isinstance(table, dict) and key in table) or (response_tokens is not None and stage == "ppo"):
        option = "--response-tokens" if response_tokens is not None else f"{stage}.{key}"
        raise UserError(f"{option} {length} must be at most {most}: the model's context holds {context} tokens")
    return config_with(config, {f"{stage}.{key}": context // 2 if stage == "ppo" else most})


def print_plan(plan: Plan) -> None:
    """A table of the roles, the verdict, and the settings that give the placement."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 160  # a file or a pipe has no edge to wrap at
    request = plan.request
    placement = plan.placement
    table = Table(title=f"{request.stage}: GiB on each GPU of a role, when it needs most", box=SIMPLE_HEAD)
    table.add_column("role", no_wrap=True)
    for column in ("ranks", "GPUs", "ZeRO"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("when", no_wrap=True)
    peaks = {each.role.name: each.option.peak for each in placement.placed}
    shown = [part for part in PARTS if any(getattr(memory, part) for _, memory in peaks.values())]
    for part in shown:
        table.add_column(SHORT.get(part, part), justify="right", no_wrap=True)
    table.add_column("total", justify="right", no_wrap=True)
    for role, (moment, memory) in peaks.items():
        option = placement.options[role]
        table.add_row(
            role,
            str(option.num_ranks),
            f"{option.num_ranks} x {option.gpus_per_rank}",
            str(option.settings.get(f"roles.{role}.zero_stage", "-")),
            moment,
            *(f"{getattr(memory, part) / GIB:.1f}" for part in shown),
            f"{memory.total / GIB:.1f}",
        )
    console.print(table)
    for line in placement.layout.lines():
        console.print(line)
    console.print(phase_table(plan))
    for note in plan.notes:
        console.print(f"note: {note}")
    console.print(plan.verdict)
    if plan.fits:
        console.print("settings:")
        for override in plan.overrides:
            console.print(f"  --set {override}")


def phase_table(plan: Plan) -> Table:
    """What the roles on a GPU hold in each phase; GPUs that hold the same roles are one row."""
    placement = plan.placement
    groups = Counter(placement.gpus)
    phases = dict.fromkeys(phase for option in placement.options.values() for phase in option.phases)
    table = Table(title="GiB on a GPU in each turn", box=SIMPLE_HEAD)
    table.add_column("GPUs", justify="right", no_wrap=True)
    table.add_column("roles")
    for phase in phases:
        table.add_column(phase, justify="right", no_wrap=True)
    for names, count in groups.items():
        options = [placement.options[name] for name in names]
        held = [held_in(phase, options) for phase in phases]
        table.add_row(str(count), ", ".join(names), *(f"{total / GIB:.1f}" for total in held))
    return table


def plan_json(plan: Plan) -> str:
    """The plan for machines; all sizes in bytes."""
    request, placement = plan.request, plan.placement
    names, phase, fullest = placement.fullest
    return json.dumps(
        {
            "stage": request.stage,
            "fits": plan.fits,
            "verdict": plan.verdict,
            "notes": list(plan.notes),
            "gpus": request.gpus,
            "gpu_bytes": request.gpu_bytes,
            "gpus_used": len(placement.gpus),
            "fullest_gpu": {"roles": list(names), "phase": phase, "bytes": fullest},
            "roles": {
                each.role.name: {
                    "num_ranks": each.option.num_ranks,
                    "zero_stage": each.option.settings.get(f"roles.{each.role.name}.zero_stage"),
                    "seats": [[seat.node, list(seat.gpus)] for seat in placement.layout.of(each.role.name)],
                    "bytes": _parts(each.option.peak[1]),
                    "phases": {
                        name: {moment: _parts(memory) for moment, memory in moments.items()}
                        for name, moments in each.option.phases.items()
                    },
                    "asleep": _parts(each.option.asleep),
                }
                for each in placement.placed
            },
            "settings": dict(plan.settings),
            "overrides": plan.overrides,
        },
        indent=2,
    )


def _parts(memory: Memory) -> dict[str, int]:
    return {**{part: getattr(memory, part) for part in PARTS}, "total": memory.total}
