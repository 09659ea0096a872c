"""Roles on GPUs: byte counts in, a placement out."""

import pytest

from cluster.layout import Host, PlacementError
from cluster.plan import GIB, Memory, Option, Placed, Role, all_on_all, apart, first_that_fits, put


def option(gib, *, role="work", ranks=1, gpus=1, asleep=0.0, **parts):
    parts = parts or {"weights": gib}
    memory = Memory(**{part: int(size * GIB) for part, size in parts.items()})
    return Option(
        settings={"ranks": ranks},
        num_ranks=ranks,
        gpus_per_rank=gpus,
        phases={role: {"working": memory}},
        asleep=Memory(overhead=int(asleep * GIB)),
    )


def trained(name, gib, *, most=8, asleep=0.0):
    """A role whose state divides evenly over its ranks."""
    sizes = [ranks for ranks in (1, 2, 4, 8) if ranks <= most]
    return Role(name=name, options=[option(gib / n, role=name, ranks=n, asleep=asleep) for n in sizes])


def fixed(name, gib, *, asleep=0.0):
    return Role(name=name, options=[option(gib, role=name, asleep=asleep)])


def engine(gib, *, kv=1.0, wanted=10.0, most=8):
    options = [option(0, role="rollout", ranks=n, weights=gib, kv_cache=kv) for n in range(most, 0, -1)]
    return Role(name="rollout", options=options, kv_cache_wanted=int(wanted * GIB))


def on_nodes(roles, *, gpus, gib, together=()):
    candidates = apart(roles, together, num_gpus=gpus, gpu_bytes=int(gib * GIB))
    return first_that_fits(candidates, nodes=[Host(gpus=gpus)], gpu_bytes=int(gib * GIB))


def test_a_peak_is_the_moment_that_needs_most_and_parts_add_up():
    moments = {"loading": Memory(weights=5), "step": Memory(weights=2, optimizer=3, kv_cache=1, overhead=4)}
    way = Option(
        settings={}, phases={"policy": moments, "sync": {"sending": Memory(weights=2)}}, asleep=Memory(weights=1)
    )
    assert way.peak == way.at("policy") == ("step", moments["step"])
    assert way.at("sync") == ("sending", Memory(weights=2)) and way.at("rollout") == ("asleep", Memory(weights=1))
    assert moments["step"].total == 10


def test_fixed_roles_take_few_gpus_and_the_engine_the_rest():
    roles = [trained("policy", 30), fixed("reference", 5), engine(4)]
    placement = on_nodes(roles, gpus=8, gib=16)
    ranks = {role: way.num_ranks for role, way in placement.options.items()}
    assert ranks == {"policy": 2, "reference": 1, "rollout": 5}  # 30 / 2 = 15 of 16 GiB; 8 - 2 - 1 = 5
    assert placement.fits and len(placement.gpus) == 8
    assert placement.fullest == (("policy",), "policy", 15 * GIB)


def test_roles_that_share_a_gpu_take_turns_there():
    frozen = [fixed(name, 6, asleep=1) for name in "abc"]
    placement = on_nodes(frozen, gpus=1, gib=8, together="abc")
    assert placement.gpus == [("a", "b", "c")] and placement.layout.neighbours("a") == {"b", "c"}
    assert placement.fullest == (("a", "b", "c"), "a", 8 * GIB)  # one is awake, two asleep
    assert on_nodes(frozen, gpus=1, gib=7.9, together="abc") is None
    stays = [fixed(name, 6, asleep=6) for name in "abc"]  # as trained roles of ZeRO 1 do
    assert on_nodes(stays, gpus=1, gib=17.9, together="abc") is None
    assert on_nodes(stays, gpus=2, gib=17.9, together="ab").gpus == [("c",), ("a", "b")]


def test_sharing_roles_leave_room_for_each_other():
    # The first way of `big` would leave too little for `small`, which cannot sleep.
    big = Role(name="big", options=[option(9, role="big", asleep=9), option(7, role="big", asleep=7)])
    placement = on_nodes([big, fixed("small", 2, asleep=2)], gpus=1, gib=10, together=("big", "small"))
    assert placement.options["big"].peak[1].total == 7 * GIB and placement.fullest[2] == 9 * GIB


def test_two_roles_may_have_a_phase_together():
    policy = Option(settings={}, phases={"policy": {"step": Memory(weights=8)}, "sync": {"send": Memory(weights=6)}})
    rollout = Option(settings={}, phases={"rollout": {"run": Memory(weights=7)}, "sync": {"take": Memory(weights=4)}})
    both = [Placed(Role(name=n, options=[o]), o) for n, o in (("policy", policy), ("rollout", rollout))]
    assert put(both, nodes=[Host(gpus=1)], gpu_bytes=10).fullest == (("policy", "rollout"), "sync", 10)


def test_the_cache_grows_to_what_is_of_use_or_to_what_is_left():
    for wanted, cache in ((3.0, 3.0), (100.0, 0.9 * 20 - 4)):
        placement = on_nodes([engine(4, wanted=wanted, most=1)], gpus=1, gib=20)
        assert placement.options["rollout"].peak[1].kv_cache == pytest.approx(cache * GIB, abs=8)
    # Beside another role it grows as long as a twentieth of the GPU stays free.
    roles = [fixed("a", 6, asleep=6), engine(4, wanted=100, most=1)]
    placement = on_nodes(roles, gpus=1, gib=20, together=("a", "rollout"))
    assert placement.options["rollout"].peak[1].kv_cache == 9 * GIB and placement.fullest[2] == 19 * GIB


def test_an_engine_that_spreads_counts_its_gpus():
    way = option(8, role="rollout", ranks=2, gpus=2)
    spread = Role(name="rollout", options=[way], kv_cache_wanted=1)
    placement = on_nodes([spread], gpus=4, gib=10)
    assert len(placement.gpus) == 4 and [seat.gpus for seat in placement.layout.of("rollout")] == [(0, 1), (2, 3)]
    assert on_nodes([spread], gpus=3, gib=10) is None
    assert on_nodes([spread], gpus=4, gib=8.8) is None  # over nine tenths


def test_all_on_all_takes_the_first_ways_that_fit_alike():
    ways = {name: [option(9, role=name, ranks=2), option(5, role=name, ranks=2)] for name in "ab"}
    roles = [Role(name=name, options=ways[name]) for name in "ab"] + [engine(4, most=2)]
    for gib, total in ((10, 9), (8, 5)):
        [first, *_] = all_on_all(roles, [("a", "b"), ("rollout",)], num_gpus=2, gpu_bytes=gib * GIB)
        assert [each.option.peak[1].total // GIB for each in first] == [total, total, 5]
        placement = put(first, nodes=[Host(gpus=2)], gpu_bytes=gib * GIB)
        assert placement.gpus == [("a", "b", "rollout")] * 2
    [more, *_] = all_on_all(roles, [("a", "b"), ("rollout",)], num_gpus=4, gpu_bytes=10 * GIB)
    assert [each.option.gpus for each in more] == [2, 2, 2]  # as many as all can use
    assert not list(all_on_all(roles, [("a", "b"), ("rollout",)], num_gpus=1, gpu_bytes=10 * GIB))


@pytest.mark.parametrize("gib", [10, 16, 24, 60])
def test_more_gpus_never_need_more_memory_and_never_stop_fitting(gib):
    roles = [trained("policy", 40), trained("value", 30), fixed("reference", 9), engine(5)]
    found = [on_nodes(roles, gpus=n, gib=gib, together=("reference",)) for n in range(1, 16)]
    fits = [placement is not None for placement in found]
    assert fits == sorted(fits) and fits[-1]
    assert all(placement.fits for placement in found if placement)


def test_a_given_placement_is_told_as_it_is():
    a, b, c = (fixed(name, 6, asleep=6) for name in "abc")
    asked = [Placed(a, a.options[0], (0,)), Placed(b, b.options[0], (0,)), Placed(c, c.options[0])]
    placement = put(asked, nodes=[Host(gpus=2)], gpu_bytes=13 * GIB, engine_share=0.5)
    assert placement.gpus == [("a", "b"), ("c",)] and placement.fits
    assert placement.fullest == (("a", "b"), "a", 12 * GIB)
    assert not put(asked, nodes=[Host(gpus=2)], gpu_bytes=11 * GIB, engine_share=0.5).fits
    two = Role(name="two", options=[option(6, ranks=2)])
    with pytest.raises(PlacementError):
        put([Placed(two, two.options[0])], nodes=[Host(gpus=1)], gpu_bytes=8 * GIB, engine_share=0.5)
    # An engine takes its share, whether the others leave it or not.
    rollout = engine(2, wanted=100, most=1)
    asked = [Placed(rollout, rollout.options[0]), Placed(a, a.options[0])]
    placement = put(asked, nodes=[Host(gpus=1)], gpu_bytes=10 * GIB, engine_share=0.5)
    assert placement.options["rollout"].peak[1].total == 5 * GIB and placement.fullest[2] == 11 * GIB
