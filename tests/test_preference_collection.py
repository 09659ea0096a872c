"""Preference collection: what becomes of a pair of answers."""

import json
import random
from pathlib import Path

import pytest
from tiny_inputs import prompt, write_checkpoint, write_rows

from rlhf_ray.config import CollectSection, parse_config
from rlhf_ray.errors import UserError
from rlhf_ray.recipe.context import Context
from rlhf_ray.recipe.preference_collection import collect, draw_job, label
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


def _label(first: str, second: str) -> dict[str, object] | None:
    section = CollectSection(annotator_noise=0.0)
    job = draw_job(0, PROMPT, random.Random(0), section)
    answers = {(0, 0): (first, True), (0, 1): (second, True)}
    return label(0, job, answers, ["old", "new"], random.Random(0), section)


def test_the_better_answer_is_chosen_on_whichever_side_it_stands() -> None:
    for row in (_label(REFUSAL, RECIPE), _label(RECIPE, REFUSAL)):
        assert row is not None
        assert (row["chosen"], row["rejected"], row["safety_bin"]) == (REFUSAL, RECIPE, "chosen_safe")


def test_versions_of_another_shape_are_refused(tmp_path: Path) -> None:
    first, other = write_checkpoint(tmp_path / "first"), write_checkpoint(tmp_path / "other")
    shape = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**shape, "rms_norm_eps": 0.5}))  # all tensors are of one shape
    config = parse_config({"collect": {"versions": ["newest", str(other)]}})
    context = Context(config, RunDir(tmp_path / "run"))
    prompts = write_rows(tmp_path / "prompts", "prompts", [prompt(0)])
    for name, path in (("chat", first), ("tokenizer", first), ("prompts_annotation", Path(prompts))):
        context.outputs.add(name, path, key=name)
    with pytest.raises(UserError, match=r"collect.versions\[1\]=.*other': has another shape than .*first"):
        collect(context)


def test_the_same_answer_twice_is_no_comparison() -> None:
    assert _label(REFUSAL, REFUSAL) is None
