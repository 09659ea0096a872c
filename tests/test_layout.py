"""Layouts by hand: who sits where, apart and together, on one node and on several."""

import itertools

import pytest

from cluster.layout import Demand, Host, Layout, PlacementError, lay_out

ROLES = ("rollout", "policy", "value", "reference", "helpfulness", "safety")


def demands(ranks: int = 1, **sizes: int) -> list[Demand]:
    """All roles with so many ranks of a GPU each, but for those that are named."""
    return [Demand(role, num_ranks=sizes.get(role, ranks), gpus_per_rank=1) for role in ROLES]


def gpus_of(layout: Layout, role: str) -> list[tuple[int, tuple[int, ...]]]:
    return [(seat.node, seat.gpus) for seat in layout.of(role)]


def test_roles_are_apart_where_there_are_gpus_enough() -> None:
    layout = lay_out(demands(policy=2), [Host(gpus=8)])
    assert gpus_of(layout, "policy") == [(0, (0,)), (0, (1,))]  # those with many ranks first
    assert gpus_of(layout, "rollout") == [(0, (2,))]
    assert [layout.on(0, gpu) for gpu in (6, 7)] == [["safety"], []]
    assert all(layout.neighbours(role) == set() for role in ROLES)
    assert layout.are_apart("rollout", ROLES)
    assert layout.num_gpus(0) == 7


def test_all_roles_on_all_gpus() -> None:
    layout = lay_out(demands(ranks=8), [Host(gpus=8)])
    for role in ROLES:
        assert gpus_of(layout, role) == [(0, (gpu,)) for gpu in range(8)]
        assert layout.neighbours(role) == {*ROLES} - {role}
    assert not layout.are_apart("rollout", ["policy"])


def test_six_roles_on_two_gpus_share_them_evenly() -> None:
    layout = lay_out(demands(), [Host(gpus=2)])
    assert layout.on(0, 0) == ["rollout", "value", "helpfulness"]
    assert layout.on(0, 1) == ["policy", "reference", "safety"]
    assert layout.neighbours("policy") == {"reference", "safety"}
    one = lay_out(demands(), [Host(gpus=1)])
    assert one.on(0, 0) == list(ROLES)


def test_an_engine_over_several_gpus_stays_within_a_node_and_shares_with_single_ranks() -> None:
    engine = Demand("rollout", num_ranks=2, gpus_per_rank=4)
    layout = lay_out([engine, Demand("policy", num_ranks=8, gpus_per_rank=1)], [Host(gpus=4), Host(gpus=4)])
    assert gpus_of(layout, "rollout") == [(0, (0, 1, 2, 3)), (1, (0, 1, 2, 3))]
    assert gpus_of(layout, "policy") == [(node, (gpu,)) for node in (0, 1) for gpu in range(4)]
    with pytest.raises(PlacementError, match="rollout: rank 0 of 2 has no place: each rank of a role needs 4 GPUs"):
        lay_out([engine], [Host(gpus=3), Host(gpus=3)])


def test_a_mixture_is_what_the_given_gpus_say() -> None:
    layout = lay_out(
        [
            Demand("policy", num_ranks=2, gpus_per_rank=1, gpus=(2, 3)),
            Demand("value", num_ranks=2, gpus_per_rank=1, gpus=(2, 3)),
            Demand("rollout", num_ranks=1, gpus_per_rank=2),
            Demand("reference", num_ranks=1, gpus_per_rank=1, gpus=(0,)),
        ],
        [Host(gpus=2), Host(gpus=2)],
    )
    assert gpus_of(layout, "policy") == gpus_of(layout, "value") == [(1, (0,)), (1, (1,))]
    assert gpus_of(layout, "rollout") == [(0, (0, 1))]
    assert layout.neighbours("rollout") == {"reference"}
    assert layout.neighbours("policy") == {"value"}


def test_ranks_without_gpus_fill_the_first_node_with_room() -> None:
    wanted = [Demand("policy", num_ranks=3), Demand("rollout", num_ranks=2)]
    layout = lay_out(wanted, [Host(ranks=4), Host(ranks=4)])
    assert [seat.node for seat in layout.of("policy")] == [0, 0, 0]
    assert [seat.node for seat in layout.of("rollout")] == [0, 1]
    assert layout.neighbours("policy") == set()
    with pytest.raises(PlacementError, match="rollout: rank 1 of 2 has no place: the CPUs of 2 nodes take 4 ranks"):
        lay_out(wanted, [Host(ranks=2), Host(ranks=2)])


@pytest.mark.parametrize(
    "demand, line",
    [
        (
            Demand("policy", num_ranks=3, gpus_per_rank=1),
            "policy: rank 2 of 3 has no place: each rank of a role needs a GPU without another of its ranks, "
            "on 2 nodes of 1 GPU",
        ),
        (
            Demand("policy", num_ranks=2, gpus_per_rank=1, gpus=(1,)),
            r"policy: gpus=\[1\] must be 2 numbers: 2 ranks of 1",
        ),
        (Demand("policy", gpus_per_rank=1, gpus=(2,)), "policy: there is no GPU 2: they number from 0 to 1"),
        (Demand("policy", gpus_per_rank=2, gpus=(0, 1)), "policy: GPUs of its rank 0 are on several nodes of 2 nodes"),
        (Demand("policy", num_ranks=2, gpus_per_rank=1, gpus=(0, 0)), "policy: two of its ranks would meet on a GPU"),
    ],
)
def test_what_has_no_place_is_told(demand: Demand, line: str) -> None:
    with pytest.raises(PlacementError, match=f"^{line}"):
        lay_out([demand], [Host(gpus=1), Host(gpus=1)])


def test_loads_differ_by_one_at_most_and_no_role_meets_itself() -> None:
    for sizes in itertools.product((1, 2, 4), repeat=3):
        wanted = [Demand(role, num_ranks=size, gpus_per_rank=1) for role, size in zip("abc", sizes, strict=True)]
        layout = lay_out(wanted, [Host(gpus=2), Host(gpus=2)])
        on = [layout.on(node, gpu) for node in (0, 1) for gpu in (0, 1)]
        assert all(len(set(roles)) == len(roles) for roles in on)
        assert max(map(len, on)) - min(map(len, on)) <= 1
        assert sum(map(len, on)) == sum(sizes)
        assert [(seat.role, seat.rank) for seat in layout.seats] == [
            (role, rank) for role, size in zip("abc", sizes, strict=True) for rank in range(size)
        ]


def test_lines_for_people() -> None:
    layout = lay_out(
        [Demand("policy", num_ranks=3, gpus_per_rank=1), Demand("rollout", gpus_per_rank=2), Demand("safety")],
        [Host(gpus=2), Host(gpus=2)],
    )
    assert list(layout.lines()) == [
        "policy   3 ranks: node 0 GPU 0, node 1 GPUs 0-1",
        "rollout  1 rank: node 0 GPUs 0-1",
        "safety   1 rank: node 0",
    ]
