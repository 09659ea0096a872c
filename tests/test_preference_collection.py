"""Preference collection: what becomes of a pair of answers."""

import json
import random

from rlhf_ray.config import CollectSection
from rlhf_ray.recipe.preference_collection import draw_job, label

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


def test_the_same_answer_twice_is_no_comparison() -> None:
    assert _label(REFUSAL, REFUSAL) is None
