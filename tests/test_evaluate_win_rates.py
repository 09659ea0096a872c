"""Win rates by hand: who judges which prompts, what a tie is."""

from typing import Any

import pytest

from rlhf_ray.evaluate.win_rates import win_rate, win_rates

# Prompt -> is it tagged as safety.
TAGS = {"p0": False, "p1": False, "p2": True, "p3": True}


def answers(model: str, *, answer: str = "", **columns: list[float | None]) -> list[dict[str, Any]]:
    """A model's rows, one to a prompt; texts that no other model has, unless one is given."""
    missing = dict.fromkeys(("utility", "reward_helpfulness", "reward_safety", "reward_referee"))
    return [
        {
            **missing,
            "model": model,
            "prompt_id": prompt,
            "is_safety": tag,
            "answer": answer or f"{model} {prompt}",
            "finished": True,
            **{name: values[place] for name, values in columns.items()},
        }
        for place, (prompt, tag) in enumerate(TAGS.items())
    ]


def test_each_judge_counts_the_higher_values_of_its_own_prompts_and_half_of_the_ties() -> None:
    rows = answers(
        "A",
        utility=[1.05, 0.05, 1.3, 0.3],
        reward_helpfulness=[1, 3, 9, 9],
        reward_safety=[9, 9, 1, 1],
        reward_referee=[0, 0, 9, 9],
    ) + answers(
        "B",
        utility=[1.05, 0.85, 0.3, 0.3],
        reward_helpfulness=[0, 3, 0, 0],
        reward_safety=[0, 0, 2, 3],
        reward_referee=[1, -1, 0, 0],
    )
    by_judge = win_rates(rows, ["A", "B"], [""])["T=1"]
    # Of four prompts a tie, a loss, a win and a tie; then of two each: a win and a tie, two losses, a loss and a win.
    assert {judge: matrix["A"] for judge, matrix in by_judge.items()} == {
        "truth": {"B": (0.5 + 0 + 1 + 0.5) / 4},
        "helpfulness": {"B": (1 + 0.5) / 2},
        "safety": {"B": 0.0},
        "referee": {"B": (0 + 1) / 2},
    }
    assert all(matrix["B"]["A"] == 1 - matrix["A"]["B"] for matrix in by_judge.values())


def test_models_are_compared_within_a_decoding_and_judges_without_a_word_are_left_out() -> None:
    rows = [
        row
        for suffix, sign in ((" own", 1.0), (" greedy", -1.0))
        for place, model in enumerate(("A", "B", "C"))
        for row in answers(model + suffix, reward_helpfulness=[sign * place] * 4)
    ]
    found = win_rates(rows, ["A", "B", "C"], [" own", " greedy"])
    assert {name: list(by_judge) for name, by_judge in found.items()} == {
        "own": ["helpfulness"],
        "greedy": ["helpfulness"],
    }
    assert found["own"]["helpfulness"] == {"A": {"B": 0, "C": 0}, "B": {"A": 1, "C": 0}, "C": {"A": 1, "B": 1}}
    assert found["greedy"]["helpfulness"]["A"] == {"B": 1, "C": 1}


@pytest.mark.parametrize(("change", "rate"), [({}, 0.5), ({"finished": False}, 1.0), ({"answer": "no."}, 1.0)])
def test_the_same_answer_is_a_tie_however_its_scores_were_rounded(change: dict[str, Any], rate: float) -> None:
    own = answers("A", answer="yes.", reward_helpfulness=[1.0000001, None, None, None])[0]
    other = {**own, "reward_helpfulness": 1.0, **change}
    assert win_rate({"p0": own}, {"p0": other}, "reward_helpfulness") == rate
