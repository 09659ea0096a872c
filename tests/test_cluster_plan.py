"""Placing roles on GPUs: byte counts in, a placement out."""

import pytest

from cluster.plan import GIB, Memory, Option, Role, place, place_given


def option(gib, *, ranks=1, gpus=1, **parts):
    parts = parts or {"weights": gib}
    return Option(
        settings={"ranks": ranks},
        num_ranks=ranks,
        gpus_per_rank=gpus,
        phases={"working": Memory(**{part: int(size * GIB) for part, size in parts.items()})},
    )


def trained(name, gib, *, most=8):
    """A role whose state divides evenly over its ranks."""
    return Role(name=name, options=[option(gib / ranks, ranks=ranks) for ranks in (1, 2, 4, 8) if ranks <= most])


def engine(gib, *, kv=1.0, wanted=10.0, most=8):
    options = [option(0, ranks=n, weights=gib, kv_cache=kv) for n in range(most, 0, -1)]
    return Role(name="rollout", options=options, is_engine=True, kv_cache_wanted=int(wanted * GIB))


def places(placement):
    return {each.role: each for each in placement.roles}


def test_a_peak_is_the_moment_that_needs_most_and_parts_add_up():
    phases = {"loading": Memory(weights=5), "step": Memory(weights=2, optimizer=3, kv_cache=1, overhead=4)}
    assert Option(settings={}, phases=phases).peak == ("step", phases["step"])
    assert phases["step"].total == 10


def test_fixed_roles_take_few_gpus_and_the_engine_the_rest():
    roles = [trained("policy", 30), Role(name="reference", options=[option(5)]), engine(4)]
    placement = place(roles, [()], gpus=8, gpu_bytes=16 * GIB)
    ranks = {role: each.option.num_ranks for role, each in places(placement).items()}
    assert ranks == {"policy": 2, "reference": 1, "rollout": 5}  # 30 / 2 = 15 of 16 GiB; 8 - 2 - 1 = 5
    assert placement.fits and len(placement.gpus) == 8
    assert placement.fullest == (("policy",), 15 * GIB)


def test_the_first_way_of_sharing_that_fits_is_taken():
    frozen = [Role(name=name, options=[option(6)]) for name in ("a", "b", "c")]
    for gib, together in ((18, {"a", "b", "c"}), (17, {"a", "b"}), (11, set())):
        placement = place(frozen, [("a", "b", "c"), ("a", "b"), ()], gpus=3, gpu_bytes=gib * GIB)
        assert {role for role, each in places(placement).items() if each.gpu_share < 1} == together
    assert place(frozen, [("a", "b", "c"), ("a", "b"), ()], gpus=2, gpu_bytes=11 * GIB) is None
    shares = [each.gpu_share for each in place(frozen, [("a", "b", "c")], gpus=1, gpu_bytes=18 * GIB).roles]
    assert shares == [0.33] * 3 and sum(shares) <= 1


def test_sharing_roles_leave_room_for_each_other():
    # The first option of `big` would leave too little for `small`.
    big = Role(name="big", options=[option(9), option(7)])
    small = Role(name="small", options=[option(2)])
    placement = place([big, small], [("big", "small")], gpus=1, gpu_bytes=10 * GIB)
    assert places(placement)["big"].memory.total == 7 * GIB and placement.fullest[1] == 9 * GIB


def test_the_cache_grows_to_what_is_of_use_or_to_the_engines_share():
    for wanted, cache in ((3.0, 3.0), (100.0, 0.9 * 20 - 4)):
        [each] = place([engine(4, wanted=wanted, most=1)], [()], gpus=1, gpu_bytes=20 * GIB).roles
        assert each.memory.kv_cache == pytest.approx(cache * GIB, abs=8)
    # Beside another role it grows to what that one leaves.
    roles = [Role(name="a", options=[option(6)]), engine(4, wanted=100, most=1)]
    placement = place(roles, [("a", "rollout")], gpus=1, gpu_bytes=20 * GIB)
    assert places(placement)["rollout"].memory.kv_cache == 10 * GIB and placement.fullest[1] == 20 * GIB


def test_an_engine_that_spreads_counts_its_gpus():
    spread = Role(name="rollout", options=[option(8, ranks=2, gpus=2)], is_engine=True)
    placement = place([spread], [()], gpus=4, gpu_bytes=10 * GIB)
    assert len(placement.gpus) == 4 and places(placement)["rollout"].gpu_share == 2
    assert place([spread], [()], gpus=3, gpu_bytes=10 * GIB) is None
    assert place([spread], [()], gpus=4, gpu_bytes=int(8.8 * GIB)) is None  # over nine tenths


@pytest.mark.parametrize("gib", [10, 16, 24, 60])
def test_more_gpus_never_need_more_memory_and_never_stop_fitting(gib):
    roles = [trained("policy", 40), trained("value", 30), Role(name="reference", options=[option(9)]), engine(5)]
    found = [
        place(roles, [("reference",), ("policy", "value", "reference", "rollout")], gpus=n, gpu_bytes=gib * GIB)
        for n in range(1, 16)
    ]
    fits = [placement is not None for placement in found]
    assert fits == sorted(fits) and fits[-1]
    assert all(placement.fits for placement in found if placement)


def test_a_given_placement_is_told_as_it_is():
    a, b, c = (Role(name=name, options=[option(6)]) for name in "abc")
    asked = [(a, a.options[0], 0.5), (b, b.options[0], 0.5), (c, c.options[0], 0.5)]
    placement = place_given(asked, gpus=2, gpu_bytes=13 * GIB, engine_share=0.5)
    assert placement.gpus == [("a", "b"), ("c",)] and placement.fits
    assert placement.fullest == (("a", "b"), 12 * GIB)
    assert not place_given(asked, gpus=1, gpu_bytes=13 * GIB, engine_share=0.5).fits
    assert not place_given(asked, gpus=2, gpu_bytes=11 * GIB, engine_share=0.5).fits
    two = Role(name="two", options=[option(6, ranks=2)])
    assert len(place_given([(two, two.options[0], 1.0)], gpus=2, gpu_bytes=8 * GIB, engine_share=0.5).gpus) == 2
    rollout = engine(2, wanted=100, most=1)
    placement = place_given([(rollout, rollout.options[0], 1.0)], gpus=1, gpu_bytes=10 * GIB, engine_share=0.5)
    assert placement.fullest[1] == 5 * GIB
