"""Packed rows from a corpus and from dialogues, and the part that is held out."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_inputs import ANSWER, USER, write_rows, write_tokenizer

from rlhf_ray.data.batching import epoch_rows
from rlhf_ray.data.chat import encode_answer, encode_dialogue, load_tokenizer
from rlhf_ray.data.lm_rows import corpus_rows, dialogue_rows
from rlhf_ray.data.shares import hash_share, split_held_out
from rlhf_ray.errors import UserError
from rlhf_ray.recipe.sft import epoch_names
from rlhf_ray.workers.policy import PolicyWorker


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory):
    return str(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def dialogues(count):
    return [{"messages": [{**USER, "content": f"which is fish {n}?"}, ANSWER], "kind": "k"} for n in range(count)]


def test_a_text_never_stands_on_both_sides():
    texts = [f"text {n % 50}" for n in range(200)]  # each one four times
    train, rest = split_held_out(texts, texts, 0.3, "p")
    assert len(train) + len(rest) == 200 and set(train).isdisjoint(rest)


def test_the_share_held_out_is_about_the_one_asked_for():
    texts = [f"text {n}" for n in range(2000)]
    _, rest = split_held_out(texts, texts, 0.25, "p")
    # Binomial(2000, 1/4): mean 500, standard deviation sqrt(2000 * 3/16) = 19.4; five of them are 97.
    assert abs(len(rest) - 500) < 97
    assert min(map(hash_share, texts)) >= 0 and max(map(hash_share, texts)) < 1


def test_a_larger_share_holds_out_more_of_the_same():
    texts = [f"text {n}" for n in range(200)]
    small, large = (set(split_held_out(texts, texts, share, "p")[1]) for share in (0.1, 0.4))
    assert small.issubset(large) and len(small) < len(large)


def test_an_empty_part_is_refused():
    with pytest.raises(UserError, match=r"p: 3 rows leave 3 to train on and 0 held out at held_out=1e-09"):
        split_held_out([1, 2, 3], ["a", "b", "c"], 1e-9, "p")


def test_a_corpus_is_every_document_between_bos_and_eos(tmp_path, tokenizer_directory):
    texts = [f"the cat sat on mat {n}." for n in range(40)]
    path = write_rows(tmp_path / "c", "corpus", [{"text": text} for text in texts])
    data = corpus_rows(path, tokenizer_directory, 32, 0.25)
    tokenizer = load_tokenizer(tokenizer_directory)
    expected = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 2 for text in texts)
    rows = [list(range(len(part))) for part in (data.train, data.held_out)]
    assert data.train.num_tokens(rows[0]) + data.held_out.num_tokens(rows[1]) == expected
    batch = data.train.select(rows[0], "cpu")
    assert (batch.tokens == tokenizer.bos_token_id).sum() == (batch.tokens == tokenizer.eos_token_id).sum()
    assert batch.tokens[0, 0] == tokenizer.bos_token_id
    assert data.sizes() == {"train": len(rows[0]), "held_out": len(rows[1])}


def test_dialogues_are_learnt_on_answers_only(tmp_path, tokenizer_directory):
    rows = dialogues(40)
    data = dialogue_rows(
        {"demonstrations": write_rows(tmp_path / "d", "demonstrations", rows)}, tokenizer_directory, 64, 0.25
    )
    tokenizer = load_tokenizer(tokenizer_directory)
    answer_tokens = sum(sum(encode_dialogue(tokenizer, row["messages"])[1]) for row in rows)
    everything = [(part, list(range(len(part)))) for part in (data.train, data.held_out)]
    assert sum(part.num_targets(numbers) for part, numbers in everything) == answer_tokens
    batch = data.train.select([0], "cpu")
    learnt = tokenizer.decode(batch.tokens[batch.target_mask])
    assert "carp" in learnt and "which" not in learnt
    assert (batch.position_ids[batch.segment_ids == 2] == torch.arange(int((batch.segment_ids == 2).sum()))).all()


def test_turns_that_are_not_learnt_and_answers_that_were_cut_off(tmp_path, tokenizer_directory):
    rows = [{**row, "messages": [*row["messages"], USER, ANSWER]} for row in dialogues(40)]
    changed = [{**row, "learnt": [False, True], "finished": False} for row in rows]
    tokenizer, targets, tokens = load_tokenizer(tokenizer_directory), [], []
    for name, table in (("all", rows), ("some", changed)):
        data = dialogue_rows(
            {"demonstrations": write_rows(tmp_path / name, "demonstrations", table)}, tokenizer_directory, 64, 0.25
        )
        parts = [(part, list(range(len(part)))) for part in (data.train, data.held_out)]
        targets.append(sum(part.num_targets(numbers) for part, numbers in parts))
        tokens.append(sum(part.num_tokens(numbers) for part, numbers in parts))
    answer = len(encode_answer(tokenizer, ANSWER["content"], finished=True))
    assert targets == [40 * 2 * answer, 40 * (answer - 1)]  # the last answer alone, and no EOS
    assert tokens[0] - tokens[1] == 40


def test_selected_rows_are_cut_to_the_longest(tmp_path, tokenizer_directory):
    data = dialogue_rows(
        {"demonstrations": write_rows(tmp_path / "d", "demonstrations", dialogues(40))}, tokenizer_directory, 500, 0.25
    )
    batch = data.held_out.select([0], "cpu")
    assert batch.tokens.shape[1] == data.held_out.num_tokens([0]) < 500


def test_a_dialogue_that_is_too_long_is_named_by_its_row_in_the_file(tmp_path, tokenizer_directory):
    rows = dialogues(40)
    rows[17]["messages"][0]["content"] = "fish " * 60
    path = write_rows(tmp_path / "d", "demonstrations", rows)
    with pytest.raises(UserError, match=r"d row 17: the dialogue has \d+ tokens, sft.seq_len=64 is the limit"):
        dialogue_rows({"demonstrations": path}, tokenizer_directory, 64, 0.25)


@pytest.mark.parametrize(("num_ranks", "batch_size"), [(1, 4), (2, 4), (3, 4), (2, 64)])
def test_a_pass_trains_on_every_row_once_in_equally_many_micro_batches_a_rank(
    tmp_path, tokenizer_directory, num_ranks, batch_size
):
    path = write_rows(tmp_path / "d", "demonstrations", dialogues(40))
    data = dialogue_rows({"demonstrations": path}, tokenizer_directory, 32, 0.3)
    assert len(data.train) % 4  # the last step of a pass has fewer
    steps, seen = -(-len(data.train) // batch_size), []
    for step in range(steps):
        given: list[list[list[int]]] = []
        engine: Any = SimpleNamespace(step=lambda batches, loss, given=given: given.append(batches) or {})
        for rank in range(num_ranks):
            worker = PolicyWorker("policy", rank, num_ranks)
            worker._data = data
            worker._engine = engine
            worker.train_lm(step, batch_size=batch_size, micro_batch_size=2, seed=3, draw=epoch_rows)
        assert len({len(batches) for batches in given}) == 1  # or a sharded model's ranks wait for each other
        seen += [row for batches in given for batch in batches for row in batch]
    assert sorted(seen) == list(range(len(data.train)))


def test_an_empty_selection_has_nothing_to_learn(tmp_path, tokenizer_directory):
    path = write_rows(tmp_path / "d", "demonstrations", dialogues(40))
    rows = dialogue_rows({"demonstrations": path}, tokenizer_directory, 32, 0.3).train
    nothing = rows.select([], "cpu")
    assert nothing.tokens.shape[0] == 1 and not nothing.target_mask.any()
    assert rows.select([0], "cpu").target_mask.any()


def test_versions_are_kept_at_the_ends_of_passes():
    # 100 rows in batches of 64 are two steps a pass.
    assert epoch_names(3)(6) == {2: "epoch-1", 4: "epoch-2", 6: "model"}
    assert epoch_names(2)(2) == {1: "epoch-1", 2: "model"}


def selection(number, tokens, finished=True):
    return {
        "prompt_id": f"p{number}",
        "messages": [{"role": "user", "content": f"question {number}"}],
        "is_safety": False,
        "sample": 0,
        "tokens": tokens,
        "text": f"answer {number}",
        "finished": finished,
        "model": "m",
        "temperature": 1.0,
        "scope": "v1",
    }


def test_selections_are_learnt_by_the_tokens_that_were_sampled(tmp_path, tokenizer_directory):
    """Not by their text: an answer that was cut off gains no EOS, and other tokens of the same text stay."""
    tokenizer = load_tokenizer(tokenizer_directory)
    eos = tokenizer.eos_token_id
    rows = [selection(n, [5, 6, 7 + n] + [eos] * (n % 2), finished=n % 2 == 1) for n in range(40)]
    data = dialogue_rows({"selections": write_rows(tmp_path / "s", "samples", rows)}, tokenizer_directory, 64, 0.25)
    learnt = []
    for part in (data.train, data.held_out):
        batch = part.select(range(len(part)), "cpu")
        for tokens, segments, mask in zip(batch.tokens, batch.segment_ids, batch.target_mask, strict=True):
            for segment in range(1, int(segments.max()) + 1):
                learnt.append(tuple(tokens[(segments == segment) & mask].tolist()))
    assert sorted(learnt) == sorted(tuple(row["tokens"]) for row in rows)


@pytest.mark.parametrize(("share", "shown"), [(0.0, 0), (0.2, 10), (0.5, 30), (0.9, 30)])
def test_demonstrations_stand_beside_selections_by_their_share_as_far_as_they_suffice(
    tmp_path, tokenizer_directory, share, shown
):
    tables = {
        "demonstrations": write_rows(tmp_path / "d", "demonstrations", dialogues(30)),
        "selections": write_rows(tmp_path / "s", "samples", [selection(n, [999, 5, 6]) for n in range(40)]),
    }
    data = dialogue_rows(tables, tokenizer_directory, 64, 0.25, share)
    tokens = [part.select(range(len(part)), "cpu") for part in (data.train, data.held_out)]
    assert sum(int((batch.tokens == 999).sum()) for batch in tokens) == 40
    dialogues_in_all = sum(int(batch.segment_ids.amax(dim=1).sum()) for batch in tokens)
    assert dialogues_in_all == 40 + shown
