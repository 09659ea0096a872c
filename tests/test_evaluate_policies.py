"""Which models the final comparison puts side by side."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import MagicMock

import pytest
from tiny_inputs import write_checkpoint

from rlhf_ray.config import parse_config
from rlhf_ray.errors import UserError
from rlhf_ray.evaluate import policies
from rlhf_ray.evaluate.policies import ANSWERS, answer_rows, compared_models
from rlhf_ray.recipe.run import run_recipe
from rlhf_ray.recipe.stages import Artefact


def models(tmp_path: Path, **controls: Path) -> dict[str, Path]:
    """What is compared in a run whose chat model and policy are alike."""
    chat = write_checkpoint(tmp_path / "chat")
    places = {"chat": chat, "model.SFT": chat, "model.PPO": chat}
    inputs = {name: Artefact(name, path, name, "") for name, path in places.items()}
    for label, path in controls.items():
        inputs[f"model.{label}"] = Artefact(label, path, label, f"evaluate.controls.{label}")
    return compared_models(inputs)


def test_controls_stand_after_the_runs_own_models(tmp_path: Path) -> None:
    control = write_checkpoint(tmp_path / "control")
    assert list(models(tmp_path, longer=control)) == ["SFT", "PPO", "longer"]


def test_a_control_of_another_shape_is_refused(tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", vocab_size=290)
    with pytest.raises(UserError, match=r"evaluate.controls.longer=.*other.*has another shape than"):
        models(tmp_path, longer=other)


def test_a_control_that_is_not_there_yet_holds_up_no_other_stage(tmp_path: Path) -> None:
    config = parse_config(
        {
            "evaluate": {"controls": {"longer": str(tmp_path / "nowhere")}},
            "testbed": {"num_corpus": 5, "num_demonstrations": 5, "num_prompts_train": 5, "num_prompts_test": 5},
        }
    )
    assert "prompts_test" in run_recipe(config, tmp_path / "run", stages=["testbed"])


@pytest.mark.parametrize(
    ("kind", "truth", "content"),
    [
        ("yes_no", {"rule": "statement", "full": "a", "bare": "b", "content": ["owl", "colour"]}, "fact|owl|colour"),
        ("lookup", {"rule": "statement", "full": "a", "bare": "b"}, ""),
        ("anything", None, ""),
    ],
)
def test_answers_name_what_their_prompt_is_about(kind, truth, content) -> None:
    prompt = {"prompt_id": "p", "messages": [{"role": "user", "content": "q"}], "is_safety": False, "kind": kind}
    answer = {"text": "a", "finished": True, "helpfulness": 0.0, "safety": 0.0, "combined": 0.0}
    [row] = answer_rows([prompt | {"truth": json.dumps(truth) if truth else ""}], "SFT", [answer], None)
    assert (row["kind"], row["content"], row["helpfulness"] is None) == (kind, content, truth is None)
    assert set(row) == set(ANSWERS.names)


@pytest.mark.parametrize(
    ("own", "decodings", "asked"),
    [
        (None, {"": 1.0, " greedy": 0.0}, [1.0, 0.0]),
        # 0.7 has the highest reward of those tried; its answers are sampled once, for both labels.
        ((0.5, 0.7, 1.0), {" own": 0.7, " T=0.7": 0.7, " greedy": 0.0}, [0.7, 0.0]),
    ],
)
def test_a_model_is_decoded_as_the_config_says_and_at_the_temperature_of_its_best_reward(
    own: tuple[float, ...] | None, decodings: dict[str, float], asked: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    section = {"temperatures": (1.0, 0.0) if own is None else (0.7, 0.0), "own_temperatures": own}
    context = SimpleNamespace(config=parse_config({"evaluate": section}), roles=MagicMock())
    decoded: list[float] = []

    def decode_at(context: Any, prompts: Any, temperature: float) -> dict[str, Any]:
        decoded.append(temperature)
        return {"metrics": {"temperature": temperature}}

    monkeypatch.setattr(policies, "decode_at", decode_at)
    monkeypatch.setattr(policies, "mean_reward", lambda _, prompts, t: {0.5: 1.0, 0.7: 1.5, 1.0: -2.0}[t])
    early_stop: Any = None if own is None else "prompts"
    made = policies.evaluate_model(cast(Any, context), Path("/m"), cast(Any, "test"), early_stop)
    assert {suffix: found["metrics"]["temperature"] for suffix, found in made["decodings"].items()} == decodings
    assert decoded == asked
    assert made["tried"] == ({} if own is None else {"0.5": 1.0, "0.7": 1.5, "1": -2.0})


def test_an_answers_row_has_every_score_and_the_judges_word_where_it_is_defined() -> None:
    truth = json.dumps({"rule": "refusal", "full": "use soot", "bare": "soot"})
    answer = {"text": "sorry, i can not help.", "finished": True, "helpfulness": 1.0, "safety": 2.0, "combined": 2.0}
    prompt = {"prompt_id": "p", "messages": [{"role": "user", "content": "q"}], "is_safety": True, "kind": "unsafe"}
    [row] = answer_rows([{**prompt, "truth": truth}], "V1 own", [answer], [-0.5])
    assert row == {
        "prompt_id": "p",
        "kind": "unsafe",
        "content": "",
        "model": "V1 own",
        "prompt": "q",
        "is_safety": True,
        "answer": "sorry, i can not help.",
        "finished": True,
        "reward_helpfulness": 1.0,
        "reward_safety": 2.0,
        "reward_combined": 2.0,
        "reward_referee": -0.5,
        "helpfulness": None,
        "violation": False,
        "false_refusal": None,
        "utility": pytest.approx(0.3 * 0.4 + 1),  # a refusal without reason and offer, and safe
    }
    [without] = answer_rows([{**prompt, "truth": ""}], "SFT", [answer], None)
    assert without["utility"] is without["violation"] is without["reward_referee"] is None
    assert list(row) == ANSWERS.names
