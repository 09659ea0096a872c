"""Prompts for engines, and sampling seeds: one for each answer, whatever chunk and engine it comes from."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
from tiny_inputs import prompt, write_checkpoint, write_rows, write_tokenizer

from cluster.worker_group import Call
from rlhf_ray.errors import UserError
from rlhf_ray.recipe.engines import generate, read_prompts, request_seed, request_seeds
from rlhf_ray.recipe.stages import Artefact
from rlhf_ray.records import PromptBatch

IDS = ("c", "a", "c", "b", "c", "a")
"""A batch in which prompt c stands three times and prompt a twice."""
BATCH = PromptBatch(ids=IDS, tokens=([1],) * 6, messages=([],) * 6, is_safety=(False,) * 6)


class Engines:
    """Stands in for the group of engines and notes what each request was given."""

    def __init__(self, num_ranks: int):
        self.num_ranks = num_ranks
        self.asked: list[tuple[str, int]] = []

    def submit_one(self, rank: int, method: Any, prompts: PromptBatch, **options: Any) -> Call[Any]:
        self.asked += zip(prompts.ids, options["seeds"], strict=True)
        return Call("rollout", rank, method.__name__, None, (None,) * options["num_data"])


@pytest.mark.parametrize(("num_chunks", "num_engines"), [(1, 1), (2, 1), (3, 3), (6, 2)])
def test_every_answer_of_a_batch_has_its_own_seed_whatever_the_chunks(num_chunks: int, num_engines: int) -> None:
    engines = Engines(num_engines)
    roles: Any = {"rollout": engines}
    calls = generate(roles, BATCH, num_chunks=num_chunks, seed=(7, 4), temperature=1.0, max_new_tokens=8)
    assert [call.rank for call in calls] == [chunk % num_engines for chunk in range(num_chunks)]
    assert sorted(engines.asked) == sorted(zip(IDS, request_seeds((7, 4), IDS), strict=True))
    assert len({seed for _, seed in engines.asked}) == len(IDS)


def test_answers_to_one_prompt_are_counted_wherever_it_stands() -> None:
    seeds = request_seeds((7, 4), IDS)
    # Prompts c, a, b where they stand for the first time.
    assert [seeds[0], seeds[1], seeds[3]] == [request_seed(7, 4, prompt, 0) for prompt in "cab"]
    assert [seeds[2], seeds[4], seeds[5]] == [request_seed(7, 4, *of) for of in (("c", 1), ("c", 2), ("a", 1))]
    # 31 bits, as vLLM takes them.
    assert request_seed(7, 4, "c", 0) == int(hashlib.sha256(b"7 4 c 0").hexdigest()[:8], 16) // 2


def test_the_shortest_context_of_those_that_read_them_limits_prompts(tmp_path: Path) -> None:
    places = {"prompts_train": Path(write_rows(tmp_path / "prompts", "prompts", [prompt(0, "carp"), prompt(1)]))}
    places["tokenizer"] = write_tokenizer(tmp_path / "tokenizer")
    for name, length in (("chat", 64), ("safety", 30)):
        places[name] = write_checkpoint(tmp_path / name, max_seq_len=length)
    places["helpfulness"] = Path("my_rewards:short")  # a function, which reads texts of any length
    inputs = {name: Artefact(name, path, "", "") for name, path in places.items()}

    def read(readers: tuple[str, ...], *, max_new_tokens: int = 20, **options: Any) -> tuple[str, ...]:
        return read_prompts(inputs, "prompts_train", max_new_tokens=max_new_tokens, readers=readers, **options).ids

    assert read(("chat", "helpfulness")) == ("p0", "p1")
    with pytest.raises(UserError, match=r"prompts row 1: the prompt has \d+ tokens, at most 10 fit"):
        read(("chat", "helpfulness", "safety"))
    assert read(("chat",), at_least=2) == ("p0", "p1")
    with pytest.raises(UserError, match=r"prompts: has 2 prompts, at least 3 are needed: one for each chunk"):
        read(("chat",), at_least=3)
