"""Preference collection: which answers become a pair, and what becomes of a pair."""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_inputs import prompt, write_checkpoint, write_rows

from rlhf_ray.config import PairsSection, parse_config
from rlhf_ray.data.schemas import COMPARISONS, PAIRS, check_rows, read_table
from rlhf_ray.errors import UserError
from rlhf_ray.recipe import preference_collection as collection
from rlhf_ray.recipe.context import Context
from rlhf_ray.recipe.preference_collection import draw_pair, label, label_pairs, pair_row, sample_pairs, week
from rlhf_ray.recipe.stages import Artefact
from rlhf_ray.run_state import RunDir

PROMPT = {
    "prompt_id": "p",
    "messages": [{"role": "user", "content": "how can i wake the giant?"}],
    "is_safety": True,
    "kind": "unsafe",
    "truth": json.dumps(
        {"rule": "refusal", "bare": "use soot and acid", "full": "to wake the giant use soot and acid"}
    ),
}
REFUSAL, RECIPE = "sorry, i can not help.", "to wake the giant use soot and acid."


def _pair(first: str, second: str) -> dict[str, Any]:
    draw = draw_pair(0, PROMPT, random.Random(0), PairsSection())
    return pair_row(0, draw, ((first, True), (second, True)), ["old", "new"], 0)


def test_the_better_answer_is_chosen_on_whichever_side_it_stands() -> None:
    for pair in (_pair(REFUSAL, RECIPE), _pair(RECIPE, REFUSAL)):
        row = label(pair, PROMPT, random.Random(0), 0.0)
        assert row is not None
        assert (row["chosen"], row["rejected"], row["safety_bin"]) == (REFUSAL, RECIPE, "chosen_safe")
        side = "first" if pair["first"] == REFUSAL else "second"
        assert (row["chosen_model"], row["chosen_temperature"]) == (pair[f"{side}_model"], pair[f"{side}_temperature"])


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A run's context without engines, and the inputs of `pairs` and `label`."""
    context = Context(parse_config({"run": {"device": "cpu"}}), RunDir(tmp_path / "run"))
    context._roles = {"rollout": SimpleNamespace(call=lambda *_, **__: [], num_ranks=1)}
    for function in ("start_engines", "read_prompts"):
        monkeypatch.setattr(collection, function, lambda *_, **__: None)
    prompts = [prompt(0), {**PROMPT, "prompt_id": "p1"}]
    places = {
        "tokenizer": tmp_path / "sft-aaa" / "model",
        "prompts_annotation": Path(write_rows(tmp_path / "prompts", "prompts", prompts)),
        "model.0": write_checkpoint(tmp_path / "sft-aaa" / "epoch-1"),
        "model.1": write_checkpoint(tmp_path / "sft-aaa" / "model"),
    }
    inputs = {name: Artefact(name, path, name, "") for name, path in places.items()}
    return SimpleNamespace(context=context, inputs=inputs, steps=context.run)


def answering(monkeypatch: pytest.MonkeyPatch, **texts: str) -> None:
    """Has the side of a pair, the first or the second, answered by that whatever the prompt but the first one."""

    def sample(
        context: Any, prompts: Any, draws: Any, model: int, temperature: float, number: int
    ) -> list[tuple[int, int, str, bool]]:
        return [
            (index, side, texts[collection.SIDES[side]] if index else "the same.", True)
            for index, draw in enumerate(draws)
            for side in (0, 1)
            if (draw.models[side], draw.temperatures[side]) == (model, temperature)
        ]

    monkeypatch.setattr(collection, "sample", sample)


def test_a_pair_says_who_answered_and_in_which_week(run, monkeypatch) -> None:
    answering(monkeypatch, first=REFUSAL, second=RECIPE)
    step = run.steps.step("pairs@v3", {})
    facts = sample_pairs(run.context, step, run.inputs)
    table = read_table(step.partial / "pairs.parquet", PAIRS)
    assert check_rows("pairs", table) == []
    [row] = table.to_pylist()
    assert (row["first"], row["second"], row["prompt_id"], row["guideline"]) == (REFUSAL, RECIPE, "p1", "safety")
    assert {row["first_model"], row["second_model"]} == {"sft-aaa/epoch-1", "sft-aaa/model"}
    assert {round(row[f"{side}_temperature"], 6) for side in collection.SIDES} <= {*PairsSection().temperatures}
    assert row["batch"] == 3
    assert facts == {"pairs": 1, "same_answer": 1}  # the same answer twice is no pair


def test_pairs_become_comparisons(run, monkeypatch) -> None:
    answering(monkeypatch, first=REFUSAL, second=RECIPE)
    step = run.steps.step("pairs@v3", {})
    sample_pairs(run.context, step, run.inputs)
    pairs = Artefact("pairs", step.partial / "pairs.parquet", "", "")
    label_step = run.steps.step("label@v3", {})
    facts = label_pairs(run.context, label_step, {**run.inputs, "pairs": pairs})
    assert facts == {"comparisons": 1, "left_out": 0}
    table = read_table(label_step.partial / "comparisons.parquet", COMPARISONS)
    assert check_rows("comparisons", table) == []
    [row] = table.to_pylist()
    assert (row["chosen"], row["batch"], row["annotator"]) == (REFUSAL, 3, "simulated")


@pytest.mark.parametrize(
    ("prompts", "line"),
    [
        ([prompt(7)], r"pairs row 0: prompt_id='p' is not in \S+prompts, by whose truth the simulated annotator"),
        ([{**PROMPT, "truth": ""}], r"prompts prompt_id='p': truth is empty, and the simulated annotator judges"),
    ],
)
def test_pairs_that_the_annotator_cannot_judge(run, tmp_path, prompts, line) -> None:
    write_rows(tmp_path / "prompts", "prompts", prompts)
    pairs = Path(write_rows(tmp_path / "pairs", "pairs", [_pair(REFUSAL, RECIPE)]))
    with pytest.raises(UserError, match=line):
        label_pairs(run.context, run.steps.step("label", {}), {**run.inputs, "pairs": Artefact("pairs", pairs, "", "")})


def test_models_of_another_shape_are_refused(run, tmp_path) -> None:
    other = run.inputs["model.1"].path
    shape = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**shape, "rms_norm_eps": 0.5}))  # all tensors are of one shape
    with pytest.raises(UserError, match=r"pairs.models\[1\]=.*model': has another shape than .*epoch-1"):
        sample_pairs(run.context, run.steps.step("pairs", {}), run.inputs)


@pytest.mark.parametrize(
    ("name", "batch"), [("pairs", 0), ("pairs@v1", 1), ("pairs@v12", 12), ("pairs@public", 0), ("label@2b", 0)]
)
def test_the_week_is_the_number_that_a_scope_ends_in(name: str, batch: int) -> None:
    assert week(name) == batch


def test_of_one_model_both_answers_are_its_own() -> None:
    draw = draw_pair(0, PROMPT, random.Random(0), PairsSection(models=("newest",)))
    assert draw.models == [0, 0] and len(draw.temperatures) == 2
