"""Packing: every example whole and by itself, the same targets as without packing."""

import numpy as np
import pytest

from rlhf_ray.data.packing import pack, pack_stream, unpacked
from rlhf_ray.errors import UserError


def example(start, length, prompt=1):
    return list(range(start, start + length)), [i >= prompt for i in range(length)]


def targets_with_context(packed):
    """What a model with causal attention inside segments sees for each target."""
    seen = []
    for row in range(packed.num_rows):
        for t in np.flatnonzero(packed.target_mask[row]):
            visible = [s for s in range(t) if packed.segment_ids[row, s] == packed.segment_ids[row, t]]
            context = [(int(packed.tokens[row, s]), int(packed.position_ids[row, s])) for s in visible]
            seen.append((int(packed.tokens[row, t]), int(packed.position_ids[row, t]), tuple(context)))
    return sorted(seen)


def test_first_fit_layout_by_hand():
    packed = pack([example(10, 4), example(20, 3), example(30, 2, prompt=0), example(40, 1)], seq_len=6)
    # Row 0 holds 4, has room for 2: example 20 opens row 1; 30 goes back to row 0; 40 fills row 1 further.
    assert packed.tokens.tolist() == [[10, 11, 12, 13, 30, 31], [20, 21, 22, 40, 0, 0]]
    assert packed.segment_ids.tolist() == [[1, 1, 1, 1, 2, 2], [1, 1, 1, 2, 0, 0]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 0, 0]]
    # Example 30 asks for its first token too, but nothing stands before it.
    assert packed.target_mask.astype(int).tolist() == [[0, 1, 1, 1, 0, 1], [0, 1, 1, 0, 0, 0]]
    assert packed.num_targets == 6
    assert packed.padding_share == pytest.approx(2 / 12)


def test_every_target_sees_the_same_context_as_without_packing():
    rng = np.random.default_rng(0)
    examples = [example(100 * i, int(n), prompt=int(n) // 2) for i, n in enumerate(rng.integers(1, 17, 60))]
    packed, plain = pack(examples, seq_len=16), unpacked(examples, seq_len=16)
    assert targets_with_context(packed) == targets_with_context(plain)
    assert plain.num_rows == 60
    assert packed.num_rows < 40
    assert packed.padding_share < 0.1 < plain.padding_share


def test_no_row_is_opened_while_an_earlier_one_has_room():
    rng = np.random.default_rng(1)
    lengths = [int(n) for n in rng.integers(1, 11, 200)]
    packed = pack([example(0, n) for n in lengths], seq_len=10)
    free: list[int] = []  # first-fit, as a plain loop
    for n in lengths:
        place = next((i for i, room in enumerate(free) if room >= n), len(free))
        if place == len(free):
            free.append(10)
        free[place] -= n
    assert (packed.segment_ids == 0).sum(axis=1).tolist() == free


def test_long_examples_are_refused_or_cut():
    examples = [example(0, 3), example(10, 8)]
    with pytest.raises(UserError, match="example 1 has 8 tokens and a row holds seq_len=5"):
        pack(examples, seq_len=5)
    packed = pack(examples, seq_len=5, too_long="cut")
    assert packed.tokens.tolist() == [[0, 1, 2, 0, 0], [10, 11, 12, 13, 14]]
    assert packed.num_cut == 1
    assert unpacked(examples, seq_len=5, too_long="cut").num_targets == packed.num_targets


def test_empty_examples_and_mismatched_masks_are_refused():
    for broken in (([], []), ([1, 2], [True])):
        with pytest.raises(ValueError, match="example 1 has"):
            pack([example(0, 2), broken], seq_len=4)


def test_nothing_to_pack():
    packed = pack([], seq_len=4)
    assert (packed.tokens.shape, packed.num_targets, packed.padding_share) == ((0, 4), 0, 0.0)


def test_documents_stream_through_rows_by_hand():
    packed = pack_stream([[1, 5, 6, 2], [], [1, 7, 8, 9, 10, 11, 2], [1, 2]], seq_len=5)
    # The second document starts in row 0, goes on through row 1 and ends in row 2.
    assert packed.tokens.tolist() == [[1, 5, 6, 2, 1], [7, 8, 9, 10, 11], [2, 1, 2, 0, 0]]
    assert packed.segment_ids.tolist() == [[1, 1, 1, 1, 2], [1, 1, 1, 1, 1], [1, 2, 2, 0, 0]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 3, 4], [0, 0, 1, 0, 0]]
    assert packed.target_mask.astype(int).tolist() == [[0, 1, 1, 1, 0], [0, 1, 1, 1, 1], [0, 0, 1, 0, 0]]


def test_a_stream_keeps_every_token_in_order_and_pads_only_the_last_row():
    rng = np.random.default_rng(2)
    documents = [rng.integers(1, 99, n).tolist() for n in rng.integers(0, 40, 50)]
    packed = pack_stream(iter(documents), seq_len=16)
    flat = packed.tokens.ravel()[: sum(map(len, documents))]
    assert flat.tolist() == [token for document in documents for token in document]
    assert (packed.segment_ids[:-1] > 0).all()


def test_a_stream_of_rows_too_short_to_learn_from_is_refused():
    with pytest.raises(ValueError, match="seq_len=1 must be at least 2"):
        pack_stream([[1, 2]], seq_len=1)


def test_take_picks_rows_in_order():
    packed = unpacked([example(0, 2), example(10, 3), example(20, 4)], seq_len=4)
    taken = packed.take([2, 0])
    assert taken.tokens.tolist() == [[20, 21, 22, 23], [0, 1, 0, 0]]
    assert taken.segment_ids.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert (taken.num_targets, taken.position_ids[1].tolist()) == (4, [0, 1, 0, 0])
