"""A reward that is a Python function, named `module:function` where a reward model could stand.

    def short(dialogues: list[list[dict[str, str]]], answers: list[str]) -> list[float]:
        return [-len(answer) / 100 for answer in answers]

A dialogue is a list of {role, content} that ends with the user; an answer is decoded text without special tokens. One
float comes back for each answer. The gate reads a safety function's scores as it reads a safety model's: raw, with the
threshold at logit(`ppo.safety_threshold`).
"""

import hashlib
import importlib
import inspect
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_ray.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_ray.records import Rollouts

Function = Callable[[list[list[dict[str, str]]], list[str]], list[float]]

_SPEC = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_function(name: str | Path) -> bool:
    """Whether a reward is named as a function rather than as a directory."""
    return _SPEC.fullmatch(str(name)) is not None


def find_function(spec: str, *, root: str) -> Function:
    """The function `module:function`; modules are looked for in `root` too.

    Raises:
        UserError: there is no such module or function.
    """
    module_name, _, name = spec.partition(":")
    if root not in sys.path:
        sys.path.insert(0, root)
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise UserError(f"{spec}: cannot be imported ({error}); give module:function, found from {root}") from error
    if not callable(function):
        raise UserError(f"{spec}: is no function but {type(function).__name__}; give module:function")
    found: Function = function
    return found


def function_version(spec: str, *, root: str) -> str:
    """A hash of the source of the function's module.

    Raises:
        UserError: as `find_function`.
    """
    module = inspect.getmodule(find_function(spec, root=root))
    source = Path(inspect.getfile(module)).read_bytes() if module is not None else b""
    return hashlib.sha256(spec.encode() + source).hexdigest()[:12]


def score_with(function: Function, rollouts: "Rollouts", tokenizer: Any, *, name: str) -> "Tensor":
    """(B,) float32 scores of the rollouts' answers.

    Raises:
        UserError: the function does not return one number for each answer.
    """
    import torch

    dialogues = _dialogues(rollouts.prompts)
    answers = [
        tokenizer.decode(tokens[mask].tolist(), skip_special_tokens=True).strip()
        for tokens, mask in zip(rollouts.tokens, rollouts.response_mask, strict=True)
    ]
    scores = function([dialogues[row] for row in rollouts.prompt_rows.tolist()], answers)
    try:
        result = torch.tensor([float(score) for score in scores])
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} returned {scores!r:.80}; return a list of numbers, one for each answer") from error
    if len(result) != len(answers):
        raise UserError(f"{name} returned {len(result)} scores for {len(answers)} answers; return one for each")
    return result


@cache
def _dialogues(path: str) -> list[list[dict[str, str]]]:
    from rlhf_ray.data.schemas import PROMPTS, read_table  # not at the top: preflight reads names without pyarrow

    found: list[list[dict[str, str]]] = read_table(path, PROMPTS, columns=["messages"])["messages"].to_pylist()
    return found
