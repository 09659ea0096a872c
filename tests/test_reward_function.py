"""Rewards that are Python functions: found, called with dialogues and answers, checked."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_inputs import write_tokenizer

from rlhf_ray.config import parse_config
from rlhf_ray.data.chat import encode_answer, encode_prompt, load_tokenizer
from rlhf_ray.data.reward_function import find_function, is_function, score_with
from rlhf_ray.errors import UserError
from rlhf_ray.preflight.inputs import check_functions
from rlhf_ray.records import Rollouts, WeightVersion
from rlhf_ray.stopping import Stopped
from rlhf_ray.workers.scorer import ScorerWorker

SOURCE = """
import itertools, math, sys
import numpy, torch
def words(dialogues, answers):
    return [len(answer.split()) + 100 * len(dialogue[-1]["content"]) for dialogue, answer in zip(dialogues, answers)]
def short(dialogues, answers):
    return [1.0]
def alone(answers):
    return [1.0]
def named(*, dialogues, answers):
    return [1.0]
def endless(dialogues, answers):
    return itertools.count()
def text(dialogues, answers):
    return ["good" for _ in answers]
def numerals(dialogues, answers):
    return "12"
def quoted(dialogues, answers):
    return ["1", "2"]
def mapping(dialogues, answers):
    return {1: 0.5, 2: 0.5}
def none(dialogues, answers):
    return None
def one(dialogues, answers):
    return numpy.float32(1)
def wide(dialogues, answers):
    return torch.ones(len(answers), 2)
def infinite(dialogues, answers):
    return [math.inf for _ in answers]
def nan(dialogues, answers):
    return numpy.full(len(answers), numpy.nan)
def huge(dialogues, answers):
    return [0, 1e39]
def generated(dialogues, answers):
    yield from words(dialogues, answers)
def array(dialogues, answers):
    return numpy.array(words(dialogues, answers), dtype=numpy.int64)
def tensor(dialogues, answers):
    return torch.tensor(words(dialogues, answers), dtype=torch.bfloat16)
def greedy(dialogues, answers):
    result = words(dialogues, answers)
    for dialogue in dialogues:
        dialogue.pop()["content"] = "gone"
    answers.clear()
    return result
number = 3
"""
QUESTIONS = ("which is a fish?", "is it a bird?")
ANSWERS = ("a cod is.", "no.")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A directory with a module of rewards."""
    (tmp_path / "my_rewards.py").write_text(SOURCE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("my_rewards", "my_helper"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return str(tmp_path)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Rollouts, Any, str]:
    """Two answers, given in another order than their prompts'; the tokenizer, and its directory."""
    directory = write_tokenizer(tmp_path_factory.mktemp("asked") / "tokenizer")
    dialogues = [[{"role": "user", "content": question}] for question in QUESTIONS]
    tokenizer = load_tokenizer(directory)
    rows = []
    for number in (1, 0):
        given = encode_prompt(tokenizer, dialogues[number])
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
        prompt_ids=("1", "0"),
        messages=(dialogues[1], dialogues[0]),
        policy_version=WeightVersion("ppo", 1),
    )
    return rollouts, tokenizer, str(directory)


Score = Callable[[str], torch.Tensor]


@pytest.fixture
def score(root: str, asked: tuple[Rollouts, Any, str]) -> Score:
    """What a function of the module makes of the two answers."""
    rollouts, tokenizer, _ = asked

    def scored(name: str) -> torch.Tensor:
        spec = f"my_rewards:{name}"
        return score_with(find_function(spec, root=root), rollouts, tokenizer, name=spec)

    return scored


def test_only_module_and_function_is_a_function() -> None:
    assert is_function("my_rewards:words") and is_function("a.b:c")
    assert not any(map(is_function, ("models/reward", "C:/models", "module:", ":function", "a:b:c")))


def test_a_function_gets_the_dialogue_and_the_answer(root: str, asked: tuple[Rollouts, Any, str]) -> None:
    rollouts, _, tokenizer = asked
    worker = ScorerWorker("helpfulness", 0, 1)
    worker.load_function("my_rewards:words", field="inputs.referee", root=root, tokenizer=tokenizer)
    # "is it a bird?" has 13 characters and its answer one word, "which is a fish?" 16 and three.
    assert worker.score(rollouts, micro_batch_tokens=100)[1].tolist() == [1301.0, 1603.0]
    assert worker.join_in() == []  # as its role's ranks may be asked to, if it is set to be divided
    worker.load_function("my_rewards:short", field="inputs.referee", root=root, tokenizer=tokenizer)
    with pytest.raises(UserError, match=r"^inputs.referee: my_rewards:short returned 1 scores"):
        worker.score(rollouts, micro_batch_tokens=100)
    with pytest.raises(UserError, match=r"^inputs.referee: my_rewards:nothing: cannot be imported"):
        worker.load_function("my_rewards:nothing", field="inputs.referee", root=root, tokenizer=tokenizer)


@pytest.mark.parametrize("name", ["generated", "array", "tensor", "greedy"])
def test_numbers_of_any_kind_are_scores(score: Score, name: str) -> None:
    exact = [1304.0, 1600.0] if name == "tensor" else [1301.0, 1603.0]  # bf16 has steps of 8 there
    scores = score(name)
    assert scores.tolist() == exact and scores.dtype == torch.float32
    assert score("words").tolist() == [1301.0, 1603.0]  # whatever the other one did to its arguments


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("short", "my_rewards:short returned 1 scores for 2 answers; return one for each"),
        ("endless", "my_rewards:endless returned more than 2 scores for 2 answers; return one for each"),
        ("text", "my_rewards:text returned ['good', 'good']; return a list of numbers"),
        ("numerals", "my_rewards:numerals returned '12'; return a list of numbers"),
        ("quoted", "my_rewards:quoted returned ['1', '2']; return a list of numbers"),
        ("mapping", "my_rewards:mapping returned {1: 0.5, 2: 0.5}; return a list of numbers"),
        ("none", "my_rewards:none returned None; return a list of numbers"),
        ("one", "my_rewards:one returned np.float32(1.0); return a list of numbers"),
        ("wide", "my_rewards:wide returned tensor("),
        ("infinite", "my_rewards:infinite returned inf for the answer 'no.'; return finite numbers"),
        ("nan", "my_rewards:nan returned nan for the answer 'no.'; return finite numbers"),
        ("huge", "my_rewards:huge returned 1e+39 for the answer 'a cod is.'; return finite numbers"),
        ("nothing", "my_rewards:nothing: cannot be imported (my_rewards has no nothing); correct it, or give"),
        ("alone", "my_rewards:alone: is to be called with (dialogues, answers) (too many positional arguments); give"),
        ("named", "my_rewards:named: is to be called with (dialogues, answers) (too many positional arguments); give"),
        ("number", "my_rewards:number: is no function but int"),
    ],
)
def test_what_is_no_reward(score: Score, name: str, line: str) -> None:
    with pytest.raises(UserError) as raised:
        score(name)
    assert str(raised.value).startswith(line)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("{}['reward']", "KeyError: 'reward'"),
        ("assert not answers", "AssertionError"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
        ("sys.exit(3)", "SystemExit: 3"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("raise type('Mine', (BaseException,), {'lock': sys.stdin})('no')", "Mine: no"),
        ("raise type('Mute', (Exception,), {'__str__': lambda self: 1 / 0})", "Mute"),
        ("json.loads('{')", "JSONDecodeError: Expecting property name"),  # raised in Python's own code
        ("raise StopIteration", "StopIteration"),
        ("[float(answer) for answer in answers]", "ValueError: could not convert string to float"),
        ("helper.fail()", "my_helper.py line 2: RuntimeError: mine"),
    ],
)
@pytest.mark.parametrize("when", ["called", "imported", "generating"])
def test_whatever_it_raises_is_one_line_with_its_place(
    root: str, score: Score, when: str, body: str, told: str
) -> None:
    (Path(root) / "my_helper.py").write_text("def fail():\n    raise RuntimeError('mine')\n")
    lines = {
        "called": ["def f(dialogues, answers):", f"    {body}"],
        "imported": ["answers = ['no']", body],
        "generating": ["def f(dialogues, answers):", f"    {body}; yield 1"],
    }[when]
    if when == "generating" and body == "raise StopIteration":
        told = "RuntimeError: generator raised StopIteration"
    source = "\n".join(["import json, sys, my_helper as helper", *lines])
    (Path(root) / "my_rewards.py").write_text(source)
    with pytest.raises(UserError) as raised:
        score("f")
    line = str(raised.value)
    assert "\n" not in line
    what = "cannot be imported" if when == "imported" else "failed"
    place = "" if "helper" in body else "my_rewards.py line 3: "
    assert line.startswith("my_rewards:f")
    assert f"{what} ({root}/{place}{told}" in line


def test_what_a_signal_brings_is_not_the_functions_doing(root: str) -> None:
    def stop(number: int, frame: object) -> None:
        raise Stopped(number)

    stop = type(stop)(stop.__code__, {"__name__": "rlhf_ray.stopping", "Stopped": Stopped})
    before = signal.signal(signal.SIGUSR1, stop)
    (Path(root) / "my_rewards.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGUSR1)\nf = print\n")
    try:
        with pytest.raises(Stopped):
            find_function("my_rewards:f", root=root)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_module_that_is_no_python_is_told(root: str) -> None:
    (Path(root) / "my_rewards.py").write_text("import sys\ndef short(:")
    line = r"my_rewards:short: cannot be imported \(.*my_rewards.py line 2: SyntaxError: invalid syntax\); correct it"
    with pytest.raises(UserError, match=line):
        find_function("my_rewards:short", root=root)


def test_a_value_model_cannot_start_from_a_function(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    named = {"inputs": {"helpfulness": "my_rewards:words", "safety": "my_rewards:words"}}
    with pytest.raises(UserError, match=r"ppo.value_init='helpfulness': inputs.helpfulness='my_rewards:words' is a"):
        check_functions(parse_config(named), ["ppo"])
    from_policy = parse_config(named | {"ppo": {"value_init": "policy"}})
    assert check_functions(from_policy, ["ppo"]) == ["inputs.helpfulness", "inputs.safety"]
    with pytest.raises(UserError, match=r"inputs.safety: nowhere:f: cannot be imported"):
        check_functions(parse_config({"inputs": {"safety": "nowhere:f"}}), [])
