"""The reward models' losses: ranking with a margin, and the auxiliary loss of the safety model."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from rlhf_ray.algo.losses import Metrics
from rlhf_ray.algo.masked import Denominator, masked_mean

MarginKind = Literal["none", "small", "large"]

# Llama 2 Table 27, strongest first.
MARGINS: dict[str, dict[str | None, float]] = {
    "small": {"significantly": 1.0, "better": 2 / 3, "slightly": 1 / 3, "negligibly": 0.0},
    "large": {"significantly": 3.0, "better": 2.0, "slightly": 1.0, "negligibly": 0.0},
}

# Bin of a pair -> (is the chosen answer safe, is the rejected one). A safe loser under an unsafe winner is
# left out of the data, as in the paper.
SAFETY_BINS: dict[str, tuple[bool, bool]] = {
    "chosen_safe": (True, False),
    "both_safe": (True, True),
    "both_unsafe": (False, False),
}


def ranking_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor, *, denominator: Denominator | None = None
) -> tuple[Tensor, Metrics]:
    """Ranking loss with a margin: mean of softplus(margin - (chosen - rejected)).

    This is -log sigmoid(chosen - rejected - margin), in a form that overflows nowhere.

    Args:
        chosen, rejected: (B,) float32 raw scores, with gradient.
        margin: (B,) float32, see `strength_margin`.
        denominator: of the mean; B by default.
    Returns:
        (loss, metrics): ranking_loss; accuracy, share of pairs with chosen above rejected, where a tie counts
        half (the margin plays no part); score_gap, mean of chosen - rejected.
    Source: Llama 2 section 3.2.2, eq. 1 and 2.
    """
    gap = chosen - rejected
    every_pair = torch.ones_like(gap, dtype=torch.bool)
    loss = masked_mean(softplus(margin - gap), every_pair, denominator=denominator)
    gap = gap.detach()
    return loss, {
        "ranking_loss": loss.detach(),
        "accuracy": masked_mean(_right_side(gap), every_pair, denominator=denominator),
        "score_gap": masked_mean(gap, every_pair, denominator=denominator),
    }


def strength_margin(strengths: Sequence[str | None], *, kind: MarginKind) -> Tensor:
    """The margin of each pair from its rating, Table 27.

    Args:
        strengths: a key of MARGINS[kind] per pair; anything, None too, with kind "none".
        kind: "none" gives zeros, "small" 1 to 0 in thirds, "large" 3 to 0.
    Returns:
        (B,) float32.
    Raises:
        ValueError: unknown kind, or a pair without a known strength though a margin is asked for.
    Source: Llama 2 Table 27. Which kind the final models used is not in the paper.
    """
    if kind == "none":
        return torch.zeros(len(strengths))
    if kind not in MARGINS:
        raise ValueError(f"margin kind {kind!r} must be one of none, {', '.join(MARGINS)}")
    margins = MARGINS[kind]
    for row, strength in enumerate(strengths):
        if strength not in margins:
            raise ValueError(
                f"comparison {row}: strength={strength!r} must be one of {', '.join(map(str, margins))} "
                f"for the {kind} margin; rate the pair, leave it out, or train with margin none"
            )
    return torch.tensor([margins[strength] for strength in strengths], dtype=torch.float32)


def safety_labels(bins: Sequence[str | None]) -> tuple[Tensor, Tensor, Tensor]:
    """Labels for `safety_loss` from the annotators' three bins.

    Args:
        bins: a key of SAFETY_BINS per pair, or None where the pair was not judged for safety.
    Returns:
        (chosen_safe, rejected_safe, labelled), each (B,) bool; both labels are False where not labelled.
    Raises:
        ValueError: unknown bin.
    Source: Llama 2 section 3.2.1 (the bins).
    """
    for row, safety_bin in enumerate(bins):
        if safety_bin is not None and safety_bin not in SAFETY_BINS:
            raise ValueError(
                f"comparison {row}: safety_bin={safety_bin!r} must be one of {', '.join(SAFETY_BINS)}; "
                "correct it, or set it to null if the pair was not judged for safety"
            )
    labels = [(False, False) if b is None else SAFETY_BINS[b] for b in bins]
    chosen_safe = torch.tensor([chosen for chosen, _ in labels], dtype=torch.bool)
    rejected_safe = torch.tensor([rejected for _, rejected in labels], dtype=torch.bool)
    return chosen_safe, rejected_safe, torch.tensor([b is not None for b in bins], dtype=torch.bool)


def safety_loss(
    chosen: Tensor,
    rejected: Tensor,
    chosen_safe: Tensor,
    rejected_safe: Tensor,
    labelled_mask: Tensor,
    *,
    denominator: Denominator | None = None,
) -> tuple[Tensor, Metrics]:
    """Auxiliary loss that teaches the safety model to tell safe answers from unsafe ones.

    loss = mean over labelled pairs of (BCE(chosen) + BCE(rejected)) / 2
    BCE(r) = softplus(-r) for a safe answer, softplus(r) for an unsafe one

    The paper names and ablates such a loss but prints no formula, label mapping or weight: this form is ours.

    Args:
        chosen, rejected: (B,) float32 raw scores, with gradient.
        chosen_safe, rejected_safe: (B,) bool.
        labelled_mask: (B,) bool, True where the pair carries a safety label.
        denominator: of the mean, in pairs; the number of labelled pairs by default.
    Returns:
        (loss, metrics): safety_loss; safety_accuracy, share of answers scored on the right side of 0, where a
        score of exactly 0 counts half.
    Source: the idea, Llama 2 section 3.2.2; the formula, ours.
    """
    # A score times +1 for safe answers and -1 for unsafe ones is a margin that should be positive.
    signed_chosen = torch.where(chosen_safe, chosen, -chosen)
    signed_rejected = torch.where(rejected_safe, rejected, -rejected)
    per_pair = 0.5 * (softplus(-signed_chosen) + softplus(-signed_rejected))
    loss = masked_mean(per_pair, labelled_mask, denominator=denominator)
    right = 0.5 * (_right_side(signed_chosen.detach()) + _right_side(signed_rejected.detach()))
    accuracy = masked_mean(right, labelled_mask, denominator=denominator)
    return loss, {"safety_loss": loss.detach(), "safety_accuracy": accuracy}


def _right_side(gap: Tensor) -> Tensor:
    """1 where positive, 1/2 where zero, 0 where negative."""
    return 0.5 * (gap.sign() + 1)
