"""Comparisons as pairs: what is held out, what is mixed, what the tensors hold."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_inputs import comparison, write_rows, write_tokenizer

from rlhf_ray.config import RewardSection
from rlhf_ray.data.chat import encode_answer, encode_prompt, load_tokenizer
from rlhf_ray.data.reward_pairs import Pairs, reward_pairs
from rlhf_ray.errors import UserError
from rlhf_ray.recipe.reward_modeling import accuracy_line, num_steps
from rlhf_ray.workers.reward import RewardWorker

OPTIONS = {"model": "safety", "margin": "small", "epochs": 1, "held_out": 0.25, "max_length": 64, "seed": 0}


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory):
    return str(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def tokenizer(tokenizer_directory):
    return load_tokenizer(tokenizer_directory)


def pairs(rows, tokenizer, **options):
    return Pairs(rows, tokenizer, **{"margin": "small", "max_length": 64, "path": "p", **options})


def mixed_rows(helpfulness=60, safety=60):
    return [comparison(n) for n in range(helpfulness)] + [
        comparison(n, guideline="safety", safety_bin="chosen_safe") for n in range(1000, 1000 + safety)
    ]


def test_a_batch_holds_chosen_rows_then_rejected_rows(tokenizer):
    rows = [comparison(0), comparison(1, chosen="the cat sat on the mat.", rejected_finished=False)]
    batch = pairs(rows, tokenizer).select([1, 0], "cpu")
    for place, (row, side) in enumerate([(1, "chosen"), (0, "chosen"), (1, "rejected"), (0, "rejected")]):
        tokens = encode_prompt(tokenizer, rows[row]["messages"])
        tokens += encode_answer(tokenizer, rows[row][side], finished=rows[row][f"{side}_finished"])
        length = int(batch.lengths[place])
        assert batch.tokens[place, :length].tolist() == tokens
        assert (batch.tokens[place, length:] == 0).all()
        assert (tokens[-1] == tokenizer.eos_token_id) == rows[row][f"{side}_finished"]


def test_margins_and_safety_labels_follow_their_rows(tokenizer):
    rows = [
        comparison(0, strength="significantly", safety_bin="chosen_safe"),
        comparison(1, strength="negligibly", safety_bin="both_unsafe"),
        comparison(2, strength="slightly"),
    ]
    batch = pairs(rows, tokenizer, margin="large").select([0, 1, 2], "cpu")
    assert batch.margin.tolist() == [3.0, 0.0, 1.0]  # Table 27, large: 3, 2, 1, 0
    assert batch.labelled.tolist() == [True, True, False]
    assert batch.chosen_safe[:2].tolist() == [True, False]
    assert batch.rejected_safe[:2].tolist() == [False, False]
    assert batch.mask.all()


def test_an_empty_selection_is_one_masked_pair(tokenizer):
    batch = pairs([comparison(0, safety_bin="both_safe")], tokenizer).select([], "cpu")
    assert batch.tokens.shape[0] == 2 and not batch.mask.any() and not batch.labelled.any()


def test_a_pair_counts_in_its_groups(tokenizer):
    given = pairs([comparison(0), comparison(1, strength=None)], tokenizer, margin="none")
    assert given.groups(0) == ["all", "helpfulness", "helpfulness/better"]
    assert given.groups(1) == ["all", "helpfulness"]
    assert given.lengths(0) == tuple(len(side) for side in given._sides[0])


def test_broken_rows_are_named(tokenizer):
    for row, options, message in (
        (comparison(7, strength=None), {}, r"p c7: strength is missing and reward.margin=small needs it"),
        (
            comparison(7, chosen="carp " * 99),
            {},
            r"p c7: dialogue and answer have \d+ tokens, reward.max_length=64",
        ),
        (comparison(7, chosen="</s>"), {}, r"p c7: messages\[1\]\.content holds the special token '</s>'"),
    ):
        with pytest.raises(UserError, match=message):
            pairs([comparison(0), row], tokenizer, **options)


def test_all_own_rows_once_and_the_share_of_the_others(tmp_path, tokenizer_directory):
    path = write_rows(tmp_path / "c", "comparisons", mixed_rows(60, 60))
    data = reward_pairs({"": path}, tokenizer_directory, shares={"safety": 0.9, "helpfulness": 0.1}, **OPTIONS)
    drawn = Counter(data.train.guidelines[row] for row in data.order[0])
    own = [row for row in range(len(data.train)) if data.train.guidelines[row] == "safety"]
    assert sorted(row for row in data.order[0] if data.train.guidelines[row] == "safety") == own
    # n own rows are nine tenths of the mix, so the others are n / 9, to the rounding of the whole.
    assert abs(drawn["helpfulness"] - len(own) / 9) <= 1


def test_epochs_repeat_the_mix_in_another_order(tmp_path, tokenizer_directory):
    path = write_rows(tmp_path / "c", "comparisons", mixed_rows(30, 0))
    shares = {"helpfulness": 1.0, "safety": 0.0}
    data = reward_pairs({"": path}, tokenizer_directory, shares=shares, **{**OPTIONS, "epochs": 2})
    first, second = data.order
    assert sorted(first) == sorted(second) == list(range(len(data.train)))
    assert first != second
    assert data.sizes()["train"] == 2 * len(data.train)


@pytest.mark.parametrize("batch_size", [4, 10, 512])
def test_every_pair_of_an_epoch_is_trained_on_once(tmp_path, tokenizer_directory, batch_size):
    path = write_rows(tmp_path / "c", "comparisons", mixed_rows(30, 0))
    shares = {"helpfulness": 1.0, "safety": 0.0}
    worker = RewardWorker("helpfulness", 0, 1)
    worker._data = data = reward_pairs({"": path}, tokenizer_directory, shares=shares, **{**OPTIONS, "epochs": 2})
    assert len(data.train) % 4 and len(data.train) > 10  # a last step of an epoch has fewer
    steps = []
    engine: Any = SimpleNamespace(padded=True, step=lambda plan, loss: steps.append(sum(map(len, plan))) or {})
    worker._engine = engine
    section = RewardSection(batch_size=batch_size, epochs=2)
    options = {"batch_size": batch_size, "micro_batch_tokens": 100, "safety_loss_coef": 0.0}
    for step in range(num_steps(data.sizes()["train"], section)):
        worker.train_reward(step, **options)
    per_epoch = len(steps) // 2
    assert sum(steps[:per_epoch]) == sum(steps[per_epoch:]) == len(data.train)
    assert max(steps) == min(batch_size, len(data.train))


@pytest.mark.parametrize(("padded", "planned"), [(True, [[[0], [1]]]), (False, [[[0, 1]]])])
def test_a_pair_counts_with_its_padding_or_without(padded, planned):
    worker = RewardWorker("helpfulness", 0, 1)
    engine: Any = SimpleNamespace(padded=padded)
    worker._engine = engine
    pairs: Any = SimpleNamespace(lengths=[(30, 10), (5, 20)].__getitem__)
    # 40 and 25 tokens; as rows of 30 and of 20, 60 and 40 positions
    assert worker._plan(pairs, range(2), 70) == planned


def test_answers_to_one_prompt_stay_on_one_side(tmp_path, tokenizer_directory):
    rows = [comparison(n, messages=comparison(n % 20)["messages"]) for n in range(80)]
    path = write_rows(tmp_path / "c", "comparisons", rows)
    data = reward_pairs({"": path}, tokenizer_directory, shares={"helpfulness": 1.0, "safety": 0.0}, **OPTIONS)
    # Each prompt has four rows, so that both parts are whole fours.
    assert len(data.train) % 4 == 0 and len(data.held_out) % 4 == 0
    assert data.sizes() == {"train": len(data.order[0]), "held_out": len(data.held_out)}
    sides = [{tuple(pair[0]) for pair in part._sides} for part in (data.train, data.held_out)]
    assert sides[0].isdisjoint(sides[1])


def test_a_missing_guideline_is_made_up_for_by_the_other(tmp_path, tokenizer_directory):
    path = write_rows(tmp_path / "c", "comparisons", mixed_rows(40, 0))
    data = reward_pairs({"": path}, tokenizer_directory, shares={"helpfulness": 0.5, "safety": 0.5}, **OPTIONS)
    assert sorted(data.order[0]) == list(range(len(data.train)))
    with pytest.raises(UserError, match=r"0 safety comparisons to train on"):
        reward_pairs({"": path}, tokenizer_directory, shares={"safety": 0.9, "helpfulness": 0.1}, **OPTIONS)


def test_tensors_are_of_the_stated_types(tokenizer):
    batch = pairs([comparison(0)], tokenizer).select([0], "cpu")
    assert batch.tokens.dtype == batch.lengths.dtype == torch.int64
    assert batch.margin.dtype == torch.float32 and batch.chosen_safe.dtype == torch.bool


def test_a_table_of_its_own_is_held_out_whole(tokenizer_directory, tmp_path):
    path = write_rows(tmp_path / "c.parquet", "comparisons", mixed_rows(20, 5))
    rest = write_rows(tmp_path / "h.parquet", "comparisons", mixed_rows(3, 4))
    shares = {"helpfulness": 1.0, "safety": 0.0}
    data = reward_pairs({"": path}, tokenizer_directory, shares=shares, **{**OPTIONS, "held_out": rest})
    assert (len(data.train), len(data.held_out), sorted(data.order[0])) == (25, 7, list(range(20)))


def test_accuracies_are_told_by_guideline_the_models_own_first():
    shares = {"all": (0.5, 112), "helpfulness": (0.25, 12), "safety": (0.5, 100), "safety/better": (0.5, 4)}
    accuracy = {f"accuracy/{group}": share for group, (share, _) in shares.items()}
    accuracy |= {f"count/{group}": float(count) for group, (_, count) in shares.items()}
    # 1.96 sqrt(0.25 / 100) and 1.96 sqrt(0.1875 / 12)
    safety, helpfulness = "0.500 ± 0.098 (100 pairs) on safety", "0.250 ± 0.245 (12 pairs) on helpfulness"
    assert accuracy_line(accuracy, "safety") == f"{safety}, {helpfulness}"
    del accuracy["accuracy/safety"]
    assert accuracy_line(accuracy, "safety") == helpfulness
