"""Self-BLEU by hand."""

import math
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from rlhf_ray.config import Config
from rlhf_ray.evaluate import policies
from rlhf_ray.evaluate.diversity import bleu, self_bleu
from rlhf_ray.records import PromptBatch


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("a b c d e", ["a b c d e"], 1.0),
        ("a b", ["x y", "a b"], 1.0),  # too short for the orders 3 and 4, which are left out
        # Words 3 of 4; pairs ab, bc of 3; threes abc of 2; the only four is in neither.
        ("a b c x", ["a b c d", "q q q q"], (3 / 4 * 2 / 3 * 1 / 2 * 0.1 / 1) ** (1 / 4)),
        # A word counts as often as the one reference that has it most often: 2 of 3; pairs aa, aa: 1 of 2.
        ("a a a", ["a a b", "a b b"], (2 / 3 * 1 / 2 * 0.1 / 1) ** (1 / 3)),
        # All of a and b is there, and the nearest reference is twice as long: exp(1 - 4 / 2).
        ("a b", ["a b c d", "a b c d e f"], math.exp(-1)),
        # Lengths 1 and 3 are equally near to 2: the shorter counts, so nothing is taken off.
        ("a b", ["b", "b a b"], 1.0),
        ("", ["", "a"], 1.0),
        ("", ["a"], 0.0),
        ("a", [""], 0.1),
    ],
)
def test_bleu(answer: str, references: list[str], expected: float) -> None:
    assert bleu(answer.split(), [reference.split() for reference in references]) == pytest.approx(expected)


def test_the_prompts_of_self_bleu_are_of_all_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kinds of a test set come in turn, every fourth is unsafe: rows at even distances would all be of one kind."""
    prompts = PromptBatch(
        ids=tuple(map(str, range(800))),
        tokens=([1],) * 800,
        messages=([],) * 800,
        is_safety=tuple(row % 4 == 0 for row in range(800)),
    )
    asked: list[PromptBatch] = []

    def answer(context: object, batch: PromptBatch, *_: object, **__: object) -> list[object]:
        asked.append(batch)
        return []

    monkeypatch.setattr(policies, "start_answers", answer)
    monkeypatch.setattr(policies, "decode", lambda *_, **__: [("a b", True)] * len(asked[-1]))
    roles = MagicMock()
    context = SimpleNamespace(config=Config(), roles=roles)
    assert policies.mean_self_bleu(context, prompts, 1.0) == pytest.approx(1.0)
    section = context.config.evaluate
    assert len(asked[0]) == section.diversity_prompts * section.diversity_samples
    assert len(set(asked[0].ids)) == section.diversity_prompts
    assert 0 < sum(asked[0].is_safety) < len(asked[0]) / 2
    policies.mean_self_bleu(context, prompts, 0.5)
    assert asked[1].ids == asked[0].ids  # the same for every model


def test_self_bleu_is_the_mean_of_each_answer_against_the_others() -> None:
    assert self_bleu(["sure: the owl is red. thanks."] * 3) == pytest.approx(1.0)
    # "A" is like "a" in the eyes of BLEU; "q" against both shares no word: (1 + 1 + 0.1) / 3.
    assert self_bleu(["a", "A", "q"]) == pytest.approx(0.7)
    # Punctuation stands by itself: of "a." the words a and . are in "a !" and "b." each, the pair in neither.
    assert self_bleu(["a.", "b.", "a !"]) == pytest.approx(
        ((2 / 2 * 0.1) ** 0.5 + (1 / 2 * 0.1) ** 0.5 + (1 / 2 * 0.1) ** 0.5) / 3
    )
