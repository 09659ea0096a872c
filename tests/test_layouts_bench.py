"""The benchmark of layouts: its arithmetic by hand, and one role of a layout launched and counted as it does."""

import pytest
import torch
from layouts import CASES, MOST_OFF, PARTS, cell, deviation, launched, plan_of, side_by_side

from cluster.layout import Demand, Host, lay_out
from cluster.plan import Memory
from model.config import ModelConfig

SHAPE = ModelConfig(
    vocab_size=100, hidden_size=16, num_layers=1, num_heads=4, num_kv_heads=2, ffn_size=24, max_seq_len=8
)
NAMED = {case.name: case for case in CASES}


@pytest.mark.parametrize(
    ("size", "elements"),
    [
        # Embedding and head of 128 rows (100 padded), q and o of 16 rows, k and v of 2 heads of 4, gate, up and down
        # of 24, each by 16; three norms.
        (1, 2 * 128 * 16 + 2 * 16 * 16 + 2 * 8 * 16 + 3 * 24 * 16 + 3 * 16),
        # Half of all but the norms.
        (2, 2 * 64 * 16 + 2 * 8 * 16 + 2 * 4 * 16 + 3 * 12 * 16 + 3 * 16),
        # A quarter, but of keys and values a head each.
        (4, 2 * 32 * 16 + 2 * 4 * 16 + 2 * 4 * 16 + 3 * 6 * 16 + 3 * 16),
    ],
)
def test_elements_of_an_engine_by_hand(size, elements, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # as other tests have DeepSpeed, which is imported once
    from meta_rank import engine_elements

    from model.llama import Llama

    with torch.device("meta"):
        module = Llama(SHAPE, head="lm")
    assert engine_elements(module, SHAPE, size) == elements


def test_the_part_that_is_furthest_off_counts():
    counted = {"weights": 100, "gradients": 50, "optimizer": 400}
    assert deviation(Memory(weights=105, gradients=50, optimizer=360, activations=7), counted) == 0.1
    assert deviation(Memory(weights=100), {"weights": 100, "gradients": 0, "optimizer": 0}) == 0.0


def test_roles_are_up_together_while_there_is_memory():
    layout = lay_out([Demand(f"r{n}", ranks, 1) for n, ranks in enumerate((40, 24, 1, 70, 2))], [Host(gpus=70)])
    assert list(side_by_side(layout, layout.roles)) == [["r0", "r1"], ["r2"], ["r3"], ["r4"]]


def test_a_cell_of_the_table():
    parts = {"weights": [2**30, 2 * 2**30], "gradients": [0, 2**30], "optimizer": [0, 0]}
    role = {"ranks": 2, "gpus_per_rank": 8, "zero_stage": None, "tensors": parts}
    assert cell(role) == "2 ranks of 8 GPUs: 3.0"
    one = {**role, "gpus_per_rank": 1, "zero_stage": 3}
    assert cell({**one, "ranks": 1}) == "1 rank, ZeRO 3: 3.0"
    assert cell({**one, "ranks": 8, "shards": 8}) == "8 ranks, ZeRO 3: 3.0"
    assert cell({**one, "ranks": 8, "shards": 4}) == "8 ranks in 2 replicas, ZeRO 3: 3.0"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases_are_what_their_names_say(case):
    """Where it can be laid out, it fits; apart, only frozen models share GPUs, and with each other."""
    if case.gpus == 1 and case.apart:
        assert "there is no GPU 1" in launched(case)["verdict"]
        return
    plan = plan_of(case)
    assert plan.fits, plan.verdict
    layout = plan.placement.layout
    for role in ("policy", "value", "rollout"):
        assert layout.neighbours(role) == (set() if case.apart else {*layout.roles} - {role})


@pytest.mark.slow  # Ray, and a child that imports torch and DeepSpeed for each rank: half a minute
def test_ranks_are_on_their_seats_and_hold_what_is_planned():
    case = NAMED["llama2-7b on 8 x 80, apart"]
    found = launched(case, ["policy"])  # which raises where a rank is not on its seat
    assert found["processes"] == 2
    policy = found["roles"]["policy"]
    assert policy["counted"] == [0, 1] and policy["zero_stage"] == 2
    for part in PARTS:
        assert policy["tensors"][part] == pytest.approx([policy["plan"][part]] * 2, rel=MOST_OFF)
    # 6.74e9 parameters: all of the bf16 weights, half of the fp32 gradients and of the master weights and moments
    assert policy["tensors"]["weights"][0] == pytest.approx(2 * 6.74e9, rel=0.01)
    assert policy["tensors"]["gradients"][0] == pytest.approx(2 * 6.74e9, rel=0.01)
    assert policy["tensors"]["optimizer"][0] == pytest.approx(6 * 6.74e9, rel=0.01)
