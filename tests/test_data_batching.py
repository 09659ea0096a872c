"""Micro-batch plans and draws of rows: every row once, within budget, from seed and step alone."""

from collections import Counter
from itertools import chain

import numpy as np
import pytest

from rlhf_ray.data.batching import (
    epoch_rows,
    minibatch_rows,
    mixture_rows,
    padding_share,
    plan_micro_batches,
    prompt_rows,
    steps_per_epoch,
)


def test_a_plan_by_hand():
    # Longest first: 8 | 4 4 | 2: a pair of 8 and 4 would be 16 padded tokens. Dealt out to ranks in turn.
    plan = plan_micro_batches([4, 2, 8, 4], token_budget=8, num_ranks=1)
    assert plan == [[[2], [0, 3], [1]]]
    plan = plan_micro_batches([4, 2, 8, 4], token_budget=8, num_ranks=2)
    # Three do not deal out to two ranks: the pair of 4 is split.
    assert plan == [[[2], [3]], [[0], [1]]]
    assert padding_share([[[2, 1], [0, 3]]], [4, 2, 8, 4]) == pytest.approx(1 - 18 / 24)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("num_rows", [0, 1, 5, 64])
@pytest.mark.parametrize("token_budget", [50, 400, 10**6])
def test_every_row_once_within_budget_and_equally_many_micro_batches(num_ranks, num_rows, token_budget):
    lengths = np.random.default_rng(num_rows).integers(1, 120, num_rows).tolist()
    plan = plan_micro_batches(lengths, token_budget=token_budget, num_ranks=num_ranks)
    assert len(plan) == num_ranks
    assert len({len(rank) for rank in plan}) == 1
    batches = [batch for rank in plan for batch in rank]
    assert sorted(row for batch in batches for row in batch) == list(range(num_rows))
    for batch in batches:
        if len(batch) > 1:
            assert len(batch) * max(lengths[row] for row in batch) <= token_budget
    assert padding_share(plan, lengths) <= 0.1
    assert plan == plan_micro_batches(lengths, token_budget=token_budget, num_ranks=num_ranks)


def test_no_rank_is_idle_while_another_could_share_its_rows():
    for num_rows in (8, 9, 100):
        plan = plan_micro_batches([10] * num_rows, token_budget=10**6, num_ranks=8)
        assert [len(rank) for rank in plan] == [1] * 8
        assert all(batch for rank in plan for batch in rank)


def test_with_fewer_rows_than_ranks_the_rest_run_an_empty_micro_batch():
    plan = plan_micro_batches([3, 5], token_budget=100, num_ranks=4)
    assert plan == [[[1]], [[0]], [[]], [[]]]
    assert plan_micro_batches([], token_budget=100, num_ranks=2) == [[], []]


def test_ranks_get_similar_work_at_the_same_time():
    lengths = np.random.default_rng(0).integers(20, 200, 256).tolist()
    plan = plan_micro_batches(lengths, token_budget=1600, num_ranks=4)
    padded = np.array([[len(b) * max(lengths[row] for row in b) for b in rank] for rank in plan])
    waiting = 1 - padded.sum() / (padded.max(axis=0).sum() * 4)
    assert waiting < 0.05
    assert (np.diff(padded.max(axis=0)) <= 0).all()  # the largest first


def test_uniform_rows_use_as_few_micro_batches_as_the_budget_allows():
    assert [len(batch) for batch in plan_micro_batches([10] * 16, token_budget=80, num_ranks=1)[0]] == [8, 8]


def test_without_padding_a_micro_batch_holds_as_many_tokens_as_its_rows_have():
    assert plan_micro_batches([4, 2, 8, 4], token_budget=12, num_ranks=1, padded=False) == [[[2, 0], [3, 1]]]
    lengths = list(range(1, 101))
    tight = plan_micro_batches(lengths, token_budget=10**6, num_ranks=1)
    loose = plan_micro_batches(lengths, token_budget=10**6, num_ranks=1, padded=False)
    assert len(loose[0]) == 1 < len(tight[0]) < 10
    assert padding_share(tight, lengths) <= 0.1
    # 5,050 tokens: by 500 in 11 micro-batches where the last has what is left over.
    sums = [sum(lengths[row] for row in batch) for batch in _all(lengths, token_budget=500, num_ranks=1)]
    assert len(sums) <= 12 and max(sums) <= 500 and sum(sums) == 5050


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_without_padding_every_row_once_and_ranks_take_as_many_micro_batches(num_ranks):
    for num_rows in (0, 1, 5, 64):
        lengths = np.random.default_rng(num_rows).integers(1, 120, num_rows).tolist()
        plan = plan_micro_batches(lengths, token_budget=300, num_ranks=num_ranks, padded=False)
        assert len(plan) == num_ranks and len({len(rank) for rank in plan}) == 1
        assert sorted(row for rank in plan for batch in rank for row in batch) == list(range(num_rows))
        assert all(sum(lengths[row] for row in batch) <= 300 for rank in plan for batch in rank)
        largest_first = [sum(lengths[row] for row in batch) for batch in chain(*zip(*plan, strict=True))]
        assert largest_first == sorted(largest_first, reverse=True)


def _all(lengths, **options):
    return list(chain(*plan_micro_batches(lengths, padded=False, **options)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": [1], "token_budget": 0, "num_ranks": 1}, "token_budget=0"),
        ({"lengths": [1], "token_budget": 1, "num_ranks": 0}, "num_ranks=0"),
        ({"lengths": [3, 0], "token_budget": 1, "num_ranks": 1}, "length=0"),
    ],
)
def test_senseless_plans_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"{message} must be at least 1"):
        plan_micro_batches(**arguments)


def test_minibatches_split_a_fresh_permutation_of_each_step():
    minibatches = minibatch_rows(10, 4, seed=1, step=7)
    assert [len(rows) for rows in minibatches] == [4, 4, 2]
    assert sorted(row for rows in minibatches for row in rows) == list(range(10))
    assert minibatches == minibatch_rows(10, 4, seed=1, step=7)
    assert minibatches != minibatch_rows(10, 4, seed=1, step=8)
    assert minibatches != minibatch_rows(10, 4, seed=2, step=7)


def test_prompts_come_in_epochs_without_replacement():
    steps = [prompt_rows(7, 3, seed=0, step=step) for step in range(14)]  # 42 draws, 6 epochs of 7
    assert {len(rows) for rows in steps} == {3}
    drawn = [row for rows in steps for row in rows]
    epochs = [drawn[start : start + 7] for start in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert steps[9] == prompt_rows(7, 3, seed=0, step=9)
    assert drawn != [row for step in range(14) for row in prompt_rows(7, 3, seed=1, step=step)]


def test_a_batch_larger_than_the_set_spans_epochs():
    counts = Counter(prompt_rows(4, 10, seed=0, step=0))
    assert sorted(counts.values()) == [2, 2, 3, 3]
    with pytest.raises(ValueError, match="num_prompts=0"):
        prompt_rows(0, 1, seed=0, step=0)


@pytest.mark.parametrize(
    ("num_rows", "batch_size", "sizes"), [(100, 64, [64, 36]), (128, 64, [64, 64]), (5, 64, [5]), (65, 64, [64, 1])]
)
def test_a_pass_takes_every_row_once_and_no_step_spans_two(num_rows, batch_size, sizes):
    steps = steps_per_epoch(num_rows, batch_size)
    assert steps == len(sizes)
    drawn = [epoch_rows(num_rows, batch_size, seed=3, step=step) for step in range(3 * steps)]
    assert [len(rows) for rows in drawn] == 3 * sizes
    epochs = [list(chain(*drawn[start : start + steps])) for start in range(0, 3 * steps, steps)]
    assert all(sorted(epoch) == list(range(num_rows)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert drawn[0] != epoch_rows(num_rows, batch_size, seed=4, step=0)
    if num_rows % batch_size == 0:
        assert drawn == [prompt_rows(num_rows, batch_size, seed=3, step=step) for step in range(3 * steps)]


def test_a_mix_keeps_its_shares_and_repeats_small_sources_evenly():
    mix = mixture_rows([1000, 3], [0.9, 0.1], 100, seed=0)
    counts = Counter(source for source, _ in mix)
    assert counts == {0: 90, 1: 10}
    large = Counter(row for source, row in mix if source == 0)
    assert len(large) == 90 == large.total()
    # 10 draws of 3 rows: three rounds of all, and one more.
    assert sorted(Counter(row for source, row in mix if source == 1).values()) == [3, 3, 4]
    assert [source for source, _ in mix] != sorted(source for source, _ in mix)
    assert mix == mixture_rows([1000, 3], [0.9, 0.1], 100, seed=0)
    assert mix != mixture_rows([1000, 3], [0.9, 0.1], 100, seed=1)


def test_shares_are_relative_and_rounded_by_largest_remainder():
    # 7 * (2, 1, 1) / 4 = 3.5, 1.75, 1.75: whole parts 3, 1, 1; two are left for the largest rests.
    counts = Counter(source for source, _ in mixture_rows([9, 9, 9], [2, 1, 1], 7, seed=0))
    assert counts == {0: 3, 1: 2, 2: 2}


def test_an_empty_source_may_only_have_share_zero():
    assert len(mixture_rows([0, 5], [0, 1], 4, seed=0)) == 4
    with pytest.raises(ValueError, match=r"source 0 has share 0\.5 but no rows"):
        mixture_rows([0, 5], [0.5, 0.5], 4, seed=0)
    for shares in ([1.0], [1.0, -1.0], [0.0, 0.0]):
        with pytest.raises(ValueError, match="must be one per source"):
            mixture_rows([5, 5], shares, 4, seed=0)
