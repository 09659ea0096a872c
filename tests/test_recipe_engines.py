"""Sampling seeds: one for each answer, whatever chunk and engine it comes from."""

import hashlib
from typing import Any

import pytest

from cluster.worker_group import Call
from rlhf_ray.recipe.engines import generate, request_seed, request_seeds

ROWS = [3, 1, 3, 2, 3, 1]
"""A batch in which prompt 3 stands three times and prompt 1 twice."""


class Engines:
    """Stands in for the group of engines and notes what each request was given."""

    def __init__(self, num_ranks: int):
        self.num_ranks = num_ranks
        self.asked: list[tuple[int, int]] = []

    def submit_one(self, rank: int, method: Any, prompts: str, rows: list[int], **options: Any) -> Call[Any]:
        self.asked += zip(rows, options["seeds"], strict=True)
        return Call("rollout", rank, method.__name__, None)


@pytest.mark.parametrize(("num_chunks", "num_engines"), [(1, 1), (2, 1), (3, 3), (6, 2)])
def test_every_answer_of_a_batch_has_its_own_seed_whatever_the_chunks(num_chunks: int, num_engines: int) -> None:
    engines = Engines(num_engines)
    roles: Any = {"rollout": engines}
    generate(roles, "prompts", ROWS, num_chunks=num_chunks, seed=(7, 4), temperature=1.0, max_new_tokens=8)
    assert engines.asked == list(zip(ROWS, request_seeds((7, 4), ROWS), strict=True))
    assert len({seed for _, seed in engines.asked}) == len(ROWS)


def test_the_first_answer_to_a_prompt_keeps_its_seed_and_later_ones_count_on() -> None:
    seeds = request_seeds((7, 4), ROWS)
    # Prompts 3, 1, 2 where they stand for the first time.
    assert [seeds[0], seeds[1], seeds[3]] == [request_seed(7, 4, row) for row in (3, 1, 2)]
    assert [seeds[2], seeds[4], seeds[5]] == [request_seed(7, 4, *of) for of in ((3, 1), (3, 2), (1, 1))]
    # 31 bits, as vLLM takes them.
    assert request_seed(7, 4, 3) == int(hashlib.sha256(b"7 4 3").hexdigest()[:8], 16) // 2
