"""What can be wrong with a run and be seen without running it: checked in seconds, nothing launched.

Each complaint is one line: field, value, rule, remedy. Here are the settings and what the stages need of each
other; `preflight.inputs` looks into the files that the config names.
"""

import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster import hardware
from cluster.layout import Host, PlacementError, lay_out
from model.config import PRESETS, ModelConfig
from rlhf_ray import machine
from rlhf_ray.backends.engine_limits import check_engine
from rlhf_ray.config import Config, config_with, stage_settings, teachers, version_configs
from rlhf_ray.config_errors import similar
from rlhf_ray.data.reward_function import is_function
from rlhf_ray.errors import UserError
from rlhf_ray.machine import EMBEDDED, demands, settled
from rlhf_ray.planning.batches import check_batches
from rlhf_ray.preflight.inputs import Model, check_inputs, shortest_context, weeks_of_people
from rlhf_ray.preflight.machine import check_machine, try_writing
from rlhf_ray.preflight.memory import check_memory, model_field, model_shape
from rlhf_ray.recipe.context import address_field, no_cluster
from rlhf_ray.recipe.ledger import Entry, Ledger, cannot_go_on, check_redo, missing_inputs, to_run
from rlhf_ray.recipe.rounds import node_of, recipe
from rlhf_ray.recipe.stages import STAGES, Made, Node, field_of, given_outputs, wanted_stages
from rlhf_ray.run_state import RunDir

SMALLEST_VOCABULARY = 286
"""Pieces `train_tokenizer` needs: special tokens, bytes, and room for digits to be learnt."""

CONNECT_TIMEOUT_S = 3.0


def check_run(config: Config, out: Path, stages: Sequence[str] | None = None, *, redo: Sequence[str] = ()) -> None:
    """Checks what the wanted stages depend on.

    Raises:
        UserError: the first thing that is wrong.
    """
    config = settled(config)
    wanted = wanted_stages(config, stages)
    nodes = recipe(config, wanted)
    check_redo(nodes, wanted, redo)
    running = stages_to_run(nodes, wanted)
    check_machine(config)
    check_cluster(config)
    check_ranks(config, running)
    variants = variants_of(config)
    for variant in variants:
        check_batches(variant, running)
    check_model(config, running)
    models = check_inputs(config, running)
    check_output(out)
    to_do = check_needs(config, out, nodes, wanted)
    for variant in variants:
        check_lengths(variant, running, models)
    check_rollout(config, running, models)
    if config.cluster.address == EMBEDDED and config.run.device == "cpu":
        names = running if redo else [entry.node.stage.name for entry in to_do]
        check_memory(config, names, models)


def variants_of(config: Config) -> list[Config]:
    """The config, and as it is for stages and versions that have settings of their own."""
    of_stages = [config_with(config, stage_settings(config, stage)) for stage in config.stage_roles]
    return [config, *of_stages, *version_configs(config).values()]


def check_rollout(config: Config, running: Sequence[str], models: Mapping[str, Model]) -> None:
    """The engine takes the model that it will generate with; `models` are those of `check_inputs`."""
    if not any("rollout" in STAGES[stage].roles for stage in running):
        return
    if (shape := model_shape(config, models)) is not None:
        check_shapes(config, {model_field(config, models): shape})


def check_shapes(config: Config, shapes: Mapping[str, ModelConfig]) -> None:
    """The run's engines take models of these shapes, by the fields that name them."""
    elsewhere, on_gpu = config.cluster.address != EMBEDDED, config.run.device == "cuda"
    check_engine(config.roles.rollout, shapes, precision=config.run.precision, on_gpu=on_gpu, elsewhere=elsewhere)


def check_submission(config: Config, out: Path) -> None:
    """Checks what can be known of a run of the config's stages that a cluster will do: not its files, not its cores.

    Raises:
        UserError: the first thing that is wrong.
    """
    wanted = wanted_stages(config)
    running = stages_to_run(recipe(config, wanted), wanted)
    for variant in variants_of(config):
        check_batches(variant, running)
    check_model(config, running)
    if not any(config.inputs.model_dump().values()):  # else the context is that of a checkpoint over there
        check_lengths(config, running, {})
    check_paths(config, out)


def check_paths(config: Config, out: Path) -> None:
    """Every path is absolute: a job does not start in the directory that it was submitted from.

    Rewards that are functions are looked for over there.
    """
    paths = {"--out": str(out)}
    for section in ("data", "inputs"):
        for key, path in getattr(config, section).model_dump().items():
            if path is not None and not (section == "inputs" and is_function(path)):
                paths[f"{section}.{key}"] = path
    paths.update(
        (f"pairs.models[{place}]", model)
        for place, model in enumerate(config.pairs.models)
        if model not in ("previous", "newest")
    )
    paths.update((f"evaluate.controls.{label}", path) for label, path in config.evaluate.controls.items())
    paths.update((f"rounds.versions[{place}].comparisons", path) for place, path in weeks_of_people(config).items())
    paths.update(teachers(config))
    for field, path in paths.items():
        if not Path(path).is_absolute():
            raise UserError(
                f"{field}={path!r} must be an absolute path, which every node of the cluster sees; "
                f"for example {Path(path).absolute()}"
            )


def stages_to_run(nodes: Sequence[Node], wanted: Sequence[str]) -> list[str]:
    """The wanted stages whose outputs the config does not all name."""
    making = {node.stage.name for node in nodes if node.makes}
    return [stage for stage in STAGES if stage in wanted and stage in making]


def check_cluster(config: Config) -> None:
    """A cluster given by address answers."""
    address = config.cluster.address or EMBEDDED
    if address.startswith("ray://"):
        raise UserError(
            f"{address_field(address)}={address!r}: is one of Ray Client, whose drivers run outside the cluster; "
            "give HOST:PORT or auto on a machine of the cluster, or use `rlhf-ray submit`"
        )
    if address in (EMBEDDED, "auto"):
        return  # an embedded cluster, or one that Ray finds by itself
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(
            f"{address_field(address)}={address!r}: must read HOST:PORT, or auto for the cluster of this machine; "
            "`ray start --head` prints it"
        )
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError, OverflowError) as error:
        raise no_cluster(address, error) from error


def check_ranks(config: Config, running: Sequence[str]) -> None:
    """This machine has the cores or GPUs that the roles of each stage of an embedded cluster ask for."""
    for stage in running:
        check_roles(config_with(config, stage_settings(config, stage)), sorted(node_of(config, stage).roles))


def check_roles(config: Config, roles: Sequence[str]) -> None:
    """As `check_ranks`, for roles of a settled config that are up together."""
    if config.cluster.address != EMBEDDED:
        return  # the cluster's own resources are checked when it is reached
    if config.run.device == "cpu":
        _check_cores(config, roles)
    elif not (gpus := hardware.count_gpus()):
        raise UserError("run.device='cuda': this machine has no NVIDIA GPU; set run.device=cpu or cluster.address")
    elif machine.is_cpu_build():
        raise UserError(
            "run.device='cuda': the torch installed here is built for CPUs; run DEVICE=cuda scripts/install.sh"
        )
    else:
        try:
            lay_out(demands(config, roles), [Host(gpus=gpus)])
        except PlacementError as error:
            raise UserError(f"{error}; lower num_ranks, or give cluster.address of a larger cluster") from error


def _check_cores(config: Config, roles: Sequence[str]) -> None:
    cores = config.cluster.cores or len(os.sched_getaffinity(0))
    for role in roles:
        field = f"roles.{role}." + ("num_engines" if role == "rollout" else "num_ranks")
        size = config.roles.rollout.tensor_parallel_size if role == "rollout" else 1
        if size > 1:
            field += " x tensor_parallel_size"
        if (ranks := getattr(config.roles, role).num_ranks * size) > cores:
            raise UserError(
                f"{field}={ranks} must be at most {cores}, the cores of this machine: ranks of a role "
                "compute at the same time; lower it, or give cluster.address of a larger cluster"
            )


def check_model(config: Config, running: Sequence[str]) -> None:
    """The preset exists, and the vocabulary has room."""
    if "pretrain" in running and config.model.preset not in PRESETS:
        raise UserError(f"model.preset={config.model.preset!r} is not known; {similar(config.model.preset, PRESETS)}")
    if "tokenizer" in running and config.tokenizer.vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"tokenizer.vocab_size={config.tokenizer.vocab_size} must be at least {SMALLEST_VOCABULARY}: "
            "special tokens, bytes and some room to learn; raise it"
        )


def check_lengths(config: Config, running: Sequence[str], models: Mapping[str, Model]) -> None:
    """Rows and answers fit the model's context; `models` are those of `check_inputs`."""
    rules = [
        ("pretrain", "pretrain.seq_len", config.pretrain.seq_len, 0),
        ("sft", "sft.seq_len", config.sft.seq_len, 0),
        ("reward", "reward.max_length", config.reward.max_length, 0),
        # A prompt has one token at least.
        ("pairs", "pairs.max_new_tokens", config.pairs.max_new_tokens, 1),
        ("rejection-sample", "rejection_sampling.max_new_tokens", config.rejection_sampling.max_new_tokens, 1),
        ("ppo", "ppo.max_new_tokens", config.ppo.max_new_tokens, 1),
        ("evaluate", "evaluate.max_new_tokens", config.evaluate.max_new_tokens, 1),
    ]
    for stage, field, value, prompt in rules:
        context = model_context(config, stage, models) if stage in running else None
        if context is not None and value > context - prompt:
            raise UserError(
                f"{field}={value} must be at most {context - prompt}: the model's context holds {context} "
                "tokens; lower it"
            )


def model_context(config: Config, stage: str, models: Mapping[str, Model]) -> int | None:
    """Context length of the models that a stage works with, the shortest, where it is known before the run."""
    given = shortest_context(models, stage)
    if config.inputs.chat or config.inputs.base:
        return given
    preset = PRESETS.get(config.model.preset)
    pretrained = config.model.max_seq_len or (preset.max_seq_len if preset else None)
    return min((length for length in (given, pretrained) if length is not None), default=None)


def check_needs(config: Config, out: Path, nodes: Sequence[Node], wanted: Sequence[str]) -> list[Entry]:
    """What each wanted stage works on is given, made by a stage before it, or in the run directory; returns those of
    the nodes that will run.
    """
    run = RunDir(out)
    running = to_run(Ledger(config, nodes, run).entries(), wanted)
    names = {entry.node.name for entry in running}
    own_language = [name for name in ("corpus", "demonstrations") if name in given_outputs(config)]
    # Testbed prompts would ask a model trained on other texts about a world it has never read of.
    asked = {s.output for e in running for s in e.node.inputs.values() if isinstance(s, Made) and s.node == "testbed"}
    if own_language and "testbed" in wanted and asked:
        missing = [name for name in STAGES["testbed"].makes if name in asked]
        raise UserError(
            f"{_keys(missing)}: must be given beside data.{own_language[0]}, or the testbed's would be mixed "
            "with it; give them too, or give the files of a run of `rlhf-ray testbed`"
        )
    for entry in running:
        sources = entry.node.inputs
        absent = [n for n in entry.missing if not (isinstance(made := sources[n], Made) and made.node in names)]
        if absent:
            raise UserError(missing_inputs(entry, run, absent))
        if problem := cannot_go_on(entry):
            raise UserError(problem)
    return running


def _keys(names: Sequence[str]) -> str:
    return ", ".join(str(field_of(name)) for name in names)


def check_output(out: Path) -> None:
    """The run directory can be written; nothing is left behind by finding out."""
    existing = out.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"--out {out}: {existing} is a file; choose a directory")
    try:
        try_writing(existing)
    except OSError as error:
        raise UserError(
            f"--out {out}: {existing} cannot be written ({error.strerror}); choose a directory you may write to"
        ) from error
