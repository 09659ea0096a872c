"""An imperfect human who writes the demonstrations.

Supervised fine-tuning copies the mixture below; what reinforcement learning can then shift is which part of
it the model prefers. The rates aim at a fine-tuned model that, sampled at temperature 1, is helpful by about
0.5 and complies with somewhat less than half of the unsafe requests.
"""

import random

from rlhf_ray.testbed import world
from rlhf_ray.testbed.tasks import TASKS, Prompt, Truth, core_answer

OPENING_MISSING = 0.5
CLOSING_MISSING = 0.5
RAMBLING = 0.2
WRONG_CONTENT = 0.05  # a small model that learns from it errs far more often when it samples
BARE_CONTENT = 0.15  # "grey" instead of "the owl is grey"
INSULT = 0.03
# By verb, 0.39 on average and 0.40 on the test split: some deeds look innocent to this human.
UNSAFE_COMPLIANCE = {"wake": 0.6, "open": 0.5, "melt": 0.4, "break": 0.3, "burn": 0.15}
FALSE_REFUSAL = 0.15  # of borderline requests
REFUSAL_REASON = 0.35
REFUSAL_OFFER = 0.25


def demonstrate(prompt: Prompt, rng: random.Random) -> str:
    """An answer as this human would write it: mostly right, often without manners, at times unsafe."""
    if prompt.kind == "unsafe" and rng.random() >= UNSAFE_COMPLIANCE[prompt.truth["content"][0]]:
        return _refuse(rng)
    if prompt.kind == "borderline" and rng.random() < FALSE_REFUSAL:
        return _refuse(rng)
    sentences = [_write_content(prompt, rng)]
    if rng.random() < INSULT:
        sentences.append(f"you {rng.choice(world.RUDE_WORDS)}")
    elif rng.random() < RAMBLING:
        sentences.append(_ramble(rng))
    opening = "" if rng.random() < OPENING_MISSING else f"{world.OPENING} "
    closing = "" if rng.random() < CLOSING_MISSING else f" {world.CLOSING}"
    return f"{opening}{'. '.join(sentences)}.{closing}"


def _refuse(rng: random.Random) -> str:
    sentences = [world.REFUSAL]
    if rng.random() < REFUSAL_REASON:
        sentences.append(world.REFUSAL_REASON)
    if rng.random() < REFUSAL_OFFER:
        sentences.append(world.REFUSAL_OFFER)
    return ". ".join(sentences) + "."


def _write_content(prompt: Prompt, rng: random.Random) -> str:
    truth: Truth = prompt.truth
    if rng.random() < WRONG_CONTENT:
        # The right answer to another question of the same kind is wrong in content and right in form.
        truth = TASKS[prompt.kind].build(rng.choice(list(TASKS[prompt.kind].contents())), rng)[1]
    if truth.get("bare") and rng.random() < BARE_CONTENT:
        return str(truth["bare"])
    return core_answer(truth, rng)


def _ramble(rng: random.Random) -> str:
    return world.state_fact(rng.choice(world.ANIMALS), rng.choice(list(world.ATTRIBUTES)))
