"""Rewards that are Python functions: found, called with dialogues and answers, checked."""

import math
import sys
from pathlib import Path

import pytest
import torch
from tiny_inputs import prompt, write_rows, write_tokenizer

from rlhf_ray.backends.deepspeed import NonFiniteError
from rlhf_ray.config import parse_config
from rlhf_ray.data.chat import encode_answer, encode_prompt, load_tokenizer
from rlhf_ray.data.reward_function import find_function, function_version, is_function
from rlhf_ray.errors import UserError
from rlhf_ray.preflight_inputs import check_functions
from rlhf_ray.records import Rollouts
from rlhf_ray.workers.scorer import ScorerWorker

SOURCE = """
import math
def words(dialogues, answers):
    return [len(answer.split()) + 100 * len(dialogue[-1]["content"]) for dialogue, answer in zip(dialogues, answers)]
def short(dialogues, answers):
    return [1.0]
def text(dialogues, answers):
    return ["good" for _ in answers]
def infinite(dialogues, answers):
    return [math.inf for _ in answers]
number = 3
"""
QUESTIONS = ("which is a fish?", "is it a bird?")
ANSWERS = ("a cod is.", "no.")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A directory with a module of rewards."""
    (tmp_path / "my_rewards.py").write_text(SOURCE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    return str(tmp_path)


def scored(root: str, name: str) -> torch.Tensor:
    """What a worker makes of two answers, given in another order than their prompts'."""
    directory = write_tokenizer(Path(root) / "tokenizer")
    path = write_rows(Path(root) / "prompts.parquet", "prompts", [prompt(i, q) for i, q in enumerate(QUESTIONS)])
    tokenizer = load_tokenizer(directory)
    rows = []
    for number in (1, 0):
        given = encode_prompt(tokenizer, [{"role": "user", "content": QUESTIONS[number]}])
        rows.append((given, encode_answer(tokenizer, ANSWERS[number], finished=True)))
    longest = max(len(given) + len(answer) for given, answer in rows)
    tokens = torch.zeros(2, longest, dtype=torch.int64)
    mask = torch.zeros(2, longest, dtype=torch.bool)
    for i, (given, answer) in enumerate(rows):
        tokens[i, : len(given) + len(answer)] = torch.tensor(given + answer)
        mask[i, len(given) : len(given) + len(answer)] = True
    rollouts = Rollouts(
        tokens=tokens,
        response_mask=mask,
        rollout_logprobs=torch.zeros(2, longest),
        finished=torch.ones(2, dtype=torch.bool),
        is_safety=torch.zeros(2, dtype=torch.bool),
        prompts=path,
        prompt_rows=torch.tensor([1, 0]),
        policy_version=1,
    )
    worker = ScorerWorker("helpfulness", 0, 1)
    worker.load_function(f"my_rewards:{name}", root=root, tokenizer=str(directory))
    return worker.score(rollouts, micro_batch_tokens=100)[1]


def test_only_module_and_function_is_a_function() -> None:
    assert is_function("my_rewards:words") and is_function("a.b:c")
    assert not any(map(is_function, ("models/reward", "C:/models", "module:", ":function", "a:b:c")))


def test_a_function_gets_the_dialogue_and_the_answer(root: str) -> None:
    # "is it a bird?" has 13 characters and its answer one word, "which is a fish?" 16 and three.
    assert scored(root, "words").tolist() == [1301.0, 1603.0]


@pytest.mark.parametrize(
    ("name", "error", "line"),
    [
        ("short", UserError, "my_rewards:short returned 1 scores for 2 answers; return one for each"),
        ("text", UserError, "my_rewards:text returned ['good', 'good']; return a list of numbers"),
        ("infinite", NonFiniteError, "helpfulness scored an answer inf"),
        ("nothing", UserError, "my_rewards:nothing: cannot be imported"),
        ("number", UserError, "my_rewards:number: is no function but int"),
    ],
)
def test_what_is_no_reward(root: str, name: str, error: type[Exception], line: str) -> None:
    with pytest.raises(error) as raised:
        scored(root, name)
    assert str(raised.value).startswith(line)


def test_a_module_that_is_no_python_is_told(root: str) -> None:
    (Path(root) / "my_rewards.py").write_text("def short(:")
    with pytest.raises(UserError, match=r"my_rewards:short: cannot be imported \(invalid syntax"):
        find_function("my_rewards:short", root=root)


def test_the_version_follows_the_source(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = function_version("my_rewards:words", root=root)
    assert first == function_version("my_rewards:words", root=root) != function_version("my_rewards:short", root=root)
    with (Path(root) / "my_rewards.py").open("a") as file:
        file.write("# changed\n")
    assert function_version("my_rewards:words", root=root) != first
    assert find_function("math:floor", root=root) is math.floor


def test_a_value_model_cannot_start_from_a_function(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    named = {"inputs": {"helpfulness": "my_rewards:words", "safety": "my_rewards:words"}}
    with pytest.raises(UserError, match=r"ppo.value_init='helpfulness': inputs.helpfulness='my_rewards:words' is a"):
        check_functions(parse_config(named), ["ppo"])
    from_policy = parse_config(named | {"ppo": {"value_init": "policy"}})
    assert check_functions(from_policy, ["ppo"]) == ["inputs.helpfulness", "inputs.safety"]
    with pytest.raises(UserError, match=r"inputs.safety: nowhere:f: cannot be imported"):
        check_functions(parse_config({"inputs": {"safety": "nowhere:f"}}), [])
