"""How work is dealt to the ranks of frozen models."""

import pytest

from rlhf_ray.config import FrozenRole, replicas
from rlhf_ray.recipe.scoring import joining

WHOLE = [range(0, 1), range(1, 2), range(2, 3), range(3, 4)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_ranks": 4}, WHOLE),
        ({"num_ranks": 4, "zero_stage": 3}, [range(0, 4)]),
        ({"num_ranks": 4, "zero_stage": 3, "ranks_per_replica": 2}, [range(0, 2), range(2, 4)]),
        ({"num_ranks": 4, "zero_stage": 3, "ranks_per_replica": 1}, WHOLE),
        ({"zero_stage": 3}, [range(0, 1)]),
    ],
)
def test_ranks_of_each_replica(settings, expected):
    assert replicas(FrozenRole(**settings)) == expected


@pytest.mark.parametrize(
    ("size", "dealt", "ranks"),
    [
        (1, [0, 1, 2, 3, 0], []),
        (4, [0, 1, 2, 3, 0], [1, 2, 3]),
        (2, [0, 1, 2, 3, 0], [1]),
        (2, [2], [3]),
        (2, [1, 1, 2, 3], [0, 0]),
        (2, [], []),
    ],
)
def test_those_of_a_replica_join_in_what_any_of_them_computes(size, dealt, ranks):
    assert joining([range(first, first + size) for first in range(0, 4, size)], dealt) == ranks
