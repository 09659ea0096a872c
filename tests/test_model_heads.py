"""Reading rewards and values off per-position scores."""

import torch

from model.heads import last_token_scores, state_values

SCORES = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])


def test_reward_is_the_score_at_the_last_token():
    assert last_token_scores(SCORES, torch.tensor([2, 4])).tolist() == [2.0, 8.0]
    assert last_token_scores(SCORES, torch.tensor([1, 1])).tolist() == [1.0, 5.0]


def test_value_of_a_token_is_the_score_before_it():
    assert state_values(SCORES).tolist() == [[0.0, 1.0, 2.0, 3.0], [0.0, 5.0, 6.0, 7.0]]
