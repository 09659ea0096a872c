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
import itertools
import re
import reprlib
import sys
from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_ray.data.user_code import blamed, check_names_free, own_sources
from rlhf_ray.errors import UserError, located

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
        UserError: there is no such module or function, importing it fails, it takes other arguments, or a module of
            `root` that it needs has the name of another one.
    """
    module_name, _, name = spec.partition(":")
    with located(spec):
        check_names_free(module_name, Path(root))
    if root not in sys.path:
        sys.path.append(root)  # last: what else lies there must not stand in for modules of Python and of libraries
    remedy = f"correct it, or give another module:function, found from {root}"
    with blamed(f"{spec}: cannot be imported", remedy=remedy):
        module = importlib.import_module(module_name)
    if not hasattr(module, name):
        raise UserError(f"{spec}: cannot be imported ({module_name} has no {name}); {remedy}")
    function = getattr(module, name)
    if not callable(function):
        raise UserError(f"{spec}: is no function but {type(function).__name__}; give module:function")
    try:
        inspect.signature(function).bind([], [])
    except TypeError as error:
        raise UserError(
            f"{spec}: is to be called with (dialogues, answers) ({error}); give it these arguments"
        ) from error
    except ValueError:
        pass  # one of C, whose arguments are not known
    found: Function = function
    return found


def function_version(spec: str, *, root: str) -> str:
    """A hash of the source of the function's module and of all that this imports from the user's own directory.

    Raises:
        UserError: as `find_function`.
    """
    find_function(spec, root=root)
    total = hashlib.sha256(spec.encode())
    for name, file in sorted(own_sources(spec.partition(":")[0]).items()):
        total.update(name.encode() + file.read_bytes())
    return total.hexdigest()[:12]


def score_with(function: Function, rollouts: "Rollouts", tokenizer: Any, *, name: str) -> "Tensor":
    """(B,) float32 scores of the rollouts' answers.

    Raises:
        UserError: the function raises, or does not return one finite number for each answer.
    """
    import torch

    from rlhf_ray.data.chat import decode_answer

    answers = [
        decode_answer(tokenizer, tokens[mask].tolist())
        for tokens, mask in zip(rollouts.tokens, rollouts.response_mask, strict=True)
    ]
    # Copies: what a function does to its arguments must not reach the next batch.
    dialogues = [[dict(message) for message in messages] for messages in rollouts.messages]
    most = len(answers) + 1  # an iterator may have no end
    with blamed(f"{name} failed", remedy="correct the function"):
        scores: Any = function(dialogues, list(answers))
        if isinstance(scores, Iterator):
            scores = list(itertools.islice(scores, most))
    try:
        numbers = [_number(score) for score in itertools.islice(_in_order(scores), most)]
    except Exception as error:  # the objects are the user's, and raise what they like
        returned = " ".join(reprlib.repr(scores).split())
        raise UserError(f"{name} returned {returned}; return a list of numbers, one for each answer") from error
    if len(numbers) != len(answers):
        count = len(numbers) if len(numbers) < most else f"more than {len(answers)}"
        raise UserError(f"{name} returned {count} scores for {len(answers)} answers; return one for each")
    result = torch.tensor(numbers, dtype=torch.float32, device="cpu")  # whatever defaults the function sets
    for row in (~torch.isfinite(result)).nonzero().flatten().tolist()[:1]:
        raise UserError(f"{name} returned {numbers[row]:g} for the answer {answers[row]!r:.60}; return finite numbers")
    return result


def _in_order(scores: Any) -> Iterator[Any]:
    """The elements, of what has them in an order."""
    if isinstance(scores, str | bytes | Mapping | Set):
        raise TypeError
    return iter(scores)


def _number(score: Any) -> float:
    if isinstance(score, str | bytes):  # which float() would read
        raise TypeError
    return float(score)
