"""Prompts tables as token ids."""

import pytest
from tiny_inputs import prompt, write_rows, write_tokenizer

from rlhf_ray.data.chat import encode_prompt, load_tokenizer
from rlhf_ray.data.prompts import load_prompts, random_prompts
from rlhf_ray.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_prompts_keep_their_order_and_tags(tmp_path, tokenizer):
    rows = [prompt(0), prompt(1, "the cat?", is_safety=True)]
    loaded = load_prompts(write_rows(tmp_path / "p", "prompts", rows), tokenizer, max_prompt_tokens=64)
    assert loaded.tokens == tuple(encode_prompt(tokenizer, row["messages"]) for row in rows)
    assert (loaded.ids, loaded.is_safety) == (("p0", "p1"), (False, True))
    assert loaded.messages == tuple(row["messages"] for row in rows) and loaded.ends_at_eos


def test_the_limit_is_the_longest_prompt_that_fits(tmp_path, tokenizer):
    path = write_rows(tmp_path / "p", "prompts", [prompt(0, "carp"), prompt(1, "the cat sat on the mat.")])
    longest = max(len(tokens) for tokens in load_prompts(path, tokenizer, max_prompt_tokens=64).tokens)
    assert len(load_prompts(path, tokenizer, max_prompt_tokens=longest).tokens) == 2
    with pytest.raises(UserError, match=rf"row 1: the prompt has {longest} tokens, at most {longest - 1} fit"):
        load_prompts(path, tokenizer, max_prompt_tokens=longest - 1)


def test_a_prompt_that_fakes_a_turn_is_named(tmp_path, tokenizer):
    path = write_rows(tmp_path / "p", "prompts", [prompt(0), prompt(1, "a [/INST] b")])
    with pytest.raises(UserError, match=r"p row 1: messages\[0\]\.content holds the special token '\[/INST\]'"):
        load_prompts(path, tokenizer, max_prompt_tokens=64)


def test_all_broken_prompts_are_told_at_once(tmp_path, tokenizer):
    rows = [prompt(n, "a </s> b" if n in (2, 4) else "carp " * 99 * (n == 5) + "carp") for n in range(7)]
    path = write_rows(tmp_path / "p", "prompts", rows)
    with pytest.raises(UserError, match=r"p row 2: messages.*; row 4: messages.*; row 5: the prompt has \d+") as told:
        load_prompts(path, tokenizer, max_prompt_tokens=64)
    assert "\n" not in str(told.value)
    path = write_rows(tmp_path / "q", "prompts", [prompt(n, f"{n} </s>") for n in range(12)])
    with pytest.raises(UserError, match=r"q row 0: messages.*; remove it from the text \(and 11 more rows\)"):
        load_prompts(path, tokenizer, max_prompt_tokens=64)


def test_random_prompts_have_one_length_and_are_the_same_again():
    prompts = random_prompts(50, length=7, vocab_size=300, seed=3)
    assert {len(tokens) for tokens in prompts.tokens} == {7}
    assert min(map(min, prompts.tokens)) >= 0 and 280 < max(map(max, prompts.tokens)) < 300
    assert len(set(map(tuple, prompts.tokens))) == len(set(prompts.ids)) == len(prompts.is_safety) == len(prompts) == 50
    assert prompts == random_prompts(50, length=7, vocab_size=300, seed=3)
    assert not prompts.ends_at_eos and not any(prompts.is_safety)
