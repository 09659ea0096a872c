"""Which models the final comparison puts side by side."""

import json
from pathlib import Path

import pytest
from tiny_inputs import write_checkpoint

from rlhf_ray.config import parse_config
from rlhf_ray.errors import UserError
from rlhf_ray.evaluate.policies import ANSWERS, Answer, answer_row, compared_models, print_evaluation
from rlhf_ray.recipe.run import run_recipe
from rlhf_ray.recipe.stages import Artefact
from rlhf_ray.run_state import write_json


def models(tmp_path: Path, **controls: Path) -> dict[str, Path]:
    """What is compared in a run whose chat model and policy are alike."""
    chat = write_checkpoint(tmp_path / "chat")
    places = {"chat": chat, "model.SFT": chat, "model.PPO": chat}
    places |= {f"model.{label}": path for label, path in controls.items()}
    return compared_models(
        {name: Artefact(name, path, name, "evaluate.controls.longer") for name, path in places.items()}
    )


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
    prompt = {"prompt_id": "p", "messages": [{"role": "user", "content": "q"}], "kind": kind}
    row = answer_row(prompt | {"truth": json.dumps(truth) if truth else ""}, "SFT", Answer("a", True, 0.0, 0.0, 0.0))
    assert (row["kind"], row["content"], row["helpfulness"] is None) == (kind, content, truth is None)
    assert set(row) == set(ANSWERS.names)


@pytest.mark.parametrize(
    ("testbed", "title"), [("abc123", "7 held-out prompts, testbed abc123"), (None, "7 held-out prompts")]
)
def test_the_table_names_the_testbed_only_where_it_judged(testbed, title, tmp_path: Path, capsys) -> None:
    report = {"testbed": testbed, "prompts": 7, "models": {"SFT": {"reward_combined": 0.25}}}
    write_json(tmp_path / "evaluation.json", report)
    print_evaluation(tmp_path / "evaluation.json")
    printed = capsys.readouterr().out
    assert " ".join(printed.partition("┏")[0].split()) == title
