"""PPO's bookkeeping: when the policy is evaluated, and how long its schedule is."""

import pytest

from rlhf_ray.config import PPOSection
from rlhf_ray.recipe.early_stopping import evaluation_is_due
from rlhf_ray.recipe.ppo import num_updates


@pytest.mark.parametrize(
    ("num_steps", "eval_every", "warmup", "indices"),
    [
        (7, 3, 0, [2, 5]),  # where training ends counts in no checkpoint: a longer run goes on from it
        (6, 3, 0, [2, 5]),
        (2, 10, 0, []),
        (1, 1, 0, [0]),
        (9, 2, 4, [5, 7]),  # the policy of iterations 0 to 3 is the one PPO starts from: nothing counts against it
    ],
)
def test_regular_evaluations(num_steps: int, eval_every: int, warmup: int, indices: list[int]) -> None:
    section = PPOSection(num_steps=num_steps, eval_every=eval_every, value_warmup_steps=warmup)
    assert [index for index in range(num_steps) if evaluation_is_due(section, index)] == indices


def test_the_policys_schedule_is_as_long_as_it_learns() -> None:
    section = PPOSection(num_steps=10, value_warmup_steps=4, batch_size=32, minibatch_size=8, inner_epochs=3)
    # 32 / 8 minibatches, 3 passes: 12 an iteration, of which the value model has 10 and the policy 6.
    assert (num_updates(section, "value"), num_updates(section, "policy")) == (120, 72)
