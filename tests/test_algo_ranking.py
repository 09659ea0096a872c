"""Reward-model losses: hand arithmetic, Table 27, extreme scores, additivity."""

import math

import pytest
import torch

from rlhf_ray.algo.ranking import ranking_loss, safety_labels, safety_loss, strength_margin


def test_ranking_loss_by_hand():
    chosen, rejected = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 3.0])
    margin = torch.tensor([1.0, 0.0, 0.0])
    loss, metrics = ranking_loss(chosen, rejected, margin)
    # softplus(1 - 1) = ln 2; softplus(0) = ln 2; softplus(3) = ln(1 + e^3)
    assert loss.item() == pytest.approx((2 * math.log(2) + math.log1p(math.exp(3))) / 3)
    # Right, tied, wrong: (1 + 1/2 + 0) / 3; gaps 1, 0, -3.
    assert metrics["accuracy"].item() == pytest.approx(0.5)
    assert metrics["score_gap"].item() == pytest.approx(-2 / 3)


@pytest.mark.parametrize(("margin", "loss_at_zero", "pull"), [(0, 0.69, 0.50), (1, 1.31, 0.73), (3, 3.05, 0.95)])
def test_margin_raises_loss_and_pull_at_zero_gap(margin, loss_at_zero, pull):
    # softplus(m) and its slope sigmoid(m), at equal scores.
    chosen = torch.zeros(1, requires_grad=True)
    loss, _ = ranking_loss(chosen, torch.zeros(1), torch.tensor([float(margin)]))
    loss.backward()
    assert loss.item() == pytest.approx(loss_at_zero, abs=0.005)
    assert chosen.grad.item() == pytest.approx(-pull, abs=0.005)


def test_extreme_scores_stay_finite():
    chosen = torch.tensor([1e4, -1e4], requires_grad=True)
    loss, _ = ranking_loss(chosen, -chosen.detach(), torch.zeros(2))
    loss.backward()
    # softplus(-2e4) = 0 and softplus(2e4) = 2e4
    assert loss.item() == pytest.approx(1e4)
    assert chosen.grad.tolist() == [0.0, -0.5]


def test_table_27():
    strengths = ["significantly", "better", "slightly", "negligibly"]
    assert strength_margin(strengths, kind="small").tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0])
    assert strength_margin(strengths, kind="large").tolist() == [3, 2, 1, 0]
    assert strength_margin([*strengths, None], kind="none").tolist() == [0, 0, 0, 0, 0]
    assert strength_margin([], kind="small").shape == (0,)


@pytest.mark.parametrize("strength", [None, "much"])
def test_a_missing_or_unknown_strength_names_its_row(strength):
    with pytest.raises(ValueError, match=f"comparison 1: strength={strength!r} must be one of significantly"):
        strength_margin(["better", strength], kind="small")


def test_unknown_margin_kind_is_refused():
    with pytest.raises(ValueError, match="margin kind 'medium' must be one of none, small, large"):
        strength_margin(["better"], kind="medium")


def test_labels_from_the_three_bins():
    chosen_safe, rejected_safe, labelled = safety_labels(["chosen_safe", "both_safe", "both_unsafe", None])
    assert chosen_safe.tolist() == [True, True, False, False]
    assert rejected_safe.tolist() == [False, True, False, False]
    assert labelled.tolist() == [True, True, True, False]
    with pytest.raises(ValueError, match="comparison 1: safety_bin='rejected_safe' must be one of"):
        safety_labels([None, "rejected_safe"])


def test_safety_loss_by_hand():
    chosen, rejected = torch.tensor([1.0, 0.0, 5.0]), torch.tensor([-2.0, 3.0, 5.0])
    labels = safety_labels(["chosen_safe", "both_unsafe", None])
    loss, metrics = safety_loss(chosen, rejected, *labels)
    # Pair 0: -ln sigmoid(1) and -ln(1 - sigmoid(-2)) = ln(1 + e^-1), ln(1 + e^-2)
    # Pair 1: ln(1 + e^0), ln(1 + e^3).  Halves of both pairs, over 2 labelled pairs; pair 2 plays no part.
    expected = sum(math.log1p(math.exp(x)) for x in (-1, -2, 0, 3)) / 4
    assert loss.item() == pytest.approx(expected)
    # Right, right, on the fence, wrong.
    assert metrics["safety_accuracy"].item() == pytest.approx(2.5 / 4)


def test_safety_loss_agrees_with_torch_cross_entropy():
    chosen, rejected = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    chosen_safe, rejected_safe, labelled = safety_labels(
        ["both_safe", "chosen_safe", "both_unsafe", "both_safe", "chosen_safe"]
    )
    scores, labels = torch.cat([chosen, rejected]), torch.cat([chosen_safe, rejected_safe]).float()
    expected = torch.nn.functional.binary_cross_entropy(scores.sigmoid(), labels)
    torch.testing.assert_close(safety_loss(chosen, rejected, chosen_safe, rejected_safe, labelled)[0], expected)


def test_micro_batches_of_pairs_add_up():
    scores = torch.randn(2, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
    margin = strength_margin(["better", "slightly"] * 3, kind="large")
    labels = safety_labels(["both_safe", None, None, "chosen_safe", "both_unsafe", None])  # 3 labelled
    parts = [slice(0, 1), slice(1, 3), slice(3, 6)]  # the second has no label
    whole = ranking_loss(*scores, margin)
    pieces = [ranking_loss(*scores[:, rows], margin[rows], denominator=6) for rows in parts]
    safety = safety_loss(*scores, *labels)
    safety_pieces = [safety_loss(*scores[:, rows], *(label[rows] for label in labels), denominator=3) for rows in parts]
    for (loss, metrics), split in ((whole, pieces), (safety, safety_pieces)):
        torch.testing.assert_close(sum(piece for piece, _ in split), loss)
        for name, value in metrics.items():
            torch.testing.assert_close(sum(piece[name] for _, piece in split), value)


def test_a_batch_without_labels_has_zero_safety_loss_and_gradient():
    scores = torch.ones(2, 3, requires_grad=True)
    loss, _ = safety_loss(*scores, *safety_labels([None, None, None]))
    loss.backward()
    assert loss.item() == 0
    assert torch.count_nonzero(scores.grad) == 0
