"""A simulated annotator: compares two answers through the judge, with Bradley-Terry noise.

    utility = w_h * helpfulness + w_s * safe
    perceived gap = utility(a) - utility(b) + noise * e,   e ~ Logistic(0, 1)

Choosing by the sign of the perceived gap is exactly P(a chosen) = sigmoid((u_a - u_b) / noise), and its size
gives the strength, so that a slip of judgement is usually a slight preference. Rows made this way must say
annotator = "simulated".
"""

import math
import random
from dataclasses import dataclass
from typing import Literal

from rlhf_ray.testbed.judge import Verdict

ANNOTATOR = "simulated"
NOISE = 0.1

Guideline = Literal["helpfulness", "safety"]
# The safety guideline puts safety first and lets helpfulness decide among equally safe answers. The
# helpfulness guideline hardly looks at safety: the annotators of Llama 2 §3.1 judge the two apart.
WEIGHTS: dict[Guideline, tuple[float, float]] = {"helpfulness": (1.0, 0.05), "safety": (0.3, 1.0)}

# Least perceived gap of each strength; below the last it is "negligibly".
STRENGTH_THRESHOLDS = (("significantly", 0.6), ("better", 0.35), ("slightly", 0.15))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One judgement.

    Attributes:
        choice: 0 if `a` was preferred, 1 if `b`.
        strength: "significantly", "better", "slightly" or "negligibly".
        safety_bin: "chosen_safe" (the other is not), "both_safe" or "both_unsafe". The paper speaks of the label
            in safety collection; here it is asked for under both guidelines, so that the safety model also sees
            harmless prompts labelled safe. None where no bin fits: an unsafe winner, a safe loser.
        annotator: always "simulated".
    """

    choice: Literal[0, 1]
    strength: str
    safety_bin: str | None
    annotator: str = ANNOTATOR


def utility(verdict: Verdict, guideline: Guideline) -> float:
    """What an answer is worth under a guideline."""
    helpfulness_weight, safety_weight = WEIGHTS[guideline]
    return helpfulness_weight * verdict.helpfulness + safety_weight * verdict.safe


def grade_strength(gap: float) -> str:
    """The strength level of a perceived gap in utility, whatever its sign."""
    for strength, threshold in STRENGTH_THRESHOLDS:
        if abs(gap) >= threshold:
            return strength
    return "negligibly"


def compare(
    a: Verdict, b: Verdict, *, guideline: Guideline, rng: random.Random, noise: float = NOISE
) -> Comparison | None:
    """Choose between two answers to one prompt.

    Args:
        noise: Bradley-Terry temperature in units of utility; 0 never errs, and gives ties to `a`.
    Returns:
        None under the safety guideline if the chosen answer is unsafe and the other safe: such pairs are left
        out (Llama 2 §3.1).
    """
    uniform = max(rng.random(), 1e-12)  # random() may return 0, whose logit is -inf
    error = noise * math.log(uniform / (1 - uniform))
    gap = utility(a, guideline) - utility(b, guideline) + error
    chosen, other = (a, b) if gap >= 0 else (b, a)
    if guideline == "safety" and other.safe and not chosen.safe:
        return None
    return Comparison(
        choice=0 if gap >= 0 else 1,
        strength=grade_strength(gap),
        safety_bin=_bin_safety(chosen, other),
    )


def _bin_safety(chosen: Verdict, other: Verdict) -> str | None:
    if chosen.safe:
        return "both_safe" if other.safe else "chosen_safe"
    return None if other.safe else "both_unsafe"
