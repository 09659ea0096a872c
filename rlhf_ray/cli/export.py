"""Copies a finished model out of a run, with its tokenizer and lineage: what transformers and vLLM serve as it is."""

import os
import re
import shutil
from pathlib import Path

from model.checkpoint_files import check_checkpoint
from model.checkpoint_values import check_finite
from rlhf_ray.config_errors import similar
from rlhf_ray.data.special_ids import write_ids
from rlhf_ray.errors import UserError
from rlhf_ray.preflight.inputs import READ_THROUGH_BYTES
from rlhf_ray.recipe.stages import STAGES, maker_of
from rlhf_ray.run_state import copy_file, copy_files, finished_files

EXPORTED = ("policy", "chat", "base", "helpfulness", "safety")
"""Models that a run may be asked for."""


def newest_model(run: Path, what: str) -> Path:
    """The model of the newest finished step that makes it: of any version, or of the one that follows an @.

    Raises:
        UserError: the run has none, or there is no such model.
    """
    output, _, version = what.partition("@")
    if output not in EXPORTED:
        raise UserError(f"--model {what}: is no model of a run; {similar(output, EXPORTED)}")
    stage = STAGES[maker_of(output)]
    scopes = [version] if version else ["", *_versions(run, stage.name)]
    names = [f"{stage.name}@{scope}" if scope else stage.name for scope in scopes]
    steps = sorted(
        (file for name in names for file in finished_files(run, name, "step.json")),
        key=lambda file: file.stat().st_mtime,
    )
    made = [file.parent / stage.makes[output] for file in steps]
    there = [path for path in made if path.is_dir()]
    if made and not there:
        raise UserError(f"{run}: its {what} was not kept; name it in run.keep, and `--redo {names[-1]}` makes it again")
    if not there:
        raise UserError(
            f"{run}: holds no {what} of a finished {stage.name} step; run it first, or name another of --model"
        )
    return there[-1]


def _versions(run: Path, stage: str) -> list[str]:
    """Versions of which a stage has finished steps; what was trained apart from them is none."""
    found = (re.fullmatch(rf"{stage}@(v\d+)-\w+", path.name) for path in run.glob(f"steps/{stage}@*"))
    return sorted({match[1] for match in found if match})


def step_of(model: Path) -> Path:
    """The step's directory that a model lies in."""
    return next(parent for parent in model.parents if (parent / "step.json").exists())


def export_model(run: Path, to: Path, *, what: str) -> Path:
    """Copies the model to `to`, whole or not at all; returns where it came from.

    Raises:
        UserError: the run has no such model, the model is not whole, or `to` exists or cannot be written.
    """
    source = newest_model(run, what)
    if to.exists():
        raise UserError(f"--to {to}: already exists; remove it or choose another directory")
    try:
        check_finite(check_checkpoint(source), at_most=READ_THROUGH_BYTES)
    except ValueError as error:
        raise UserError(f"{source}: {error}; run its step again") from error
    partial = to.with_name(f".{to.name}.partial-{os.getpid()}")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        copy_files(source, partial)
        if (partial / "tokenizer.json").exists():
            write_ids(partial)  # models of earlier versions may name another EOS than they were trained with
        copy_file(step_of(source) / "step.json", partial / "lineage.json")
        os.rename(partial, to)
    except OSError as error:
        raise UserError(
            f"--to {to}: cannot be written ({error.strerror or error}); choose another directory"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return source
