"""Records: lengths, rows picked across chunks, and buckets of weights there and back."""

import pickle

import pytest
import torch

from rlhf_ray.backends.weights import fill_buckets
from rlhf_ray.records import Experience, PromptBatch, Rollouts, WeightVersion, select_rows

FIELDS = ("logprobs", "values", "advantages", "returns", "weights")


VERSION = WeightVersion("ppo", 3)


def chunk(lengths, *, first):
    """Rows whose token t holds first + 100 * row + t, with prompts of two tokens."""
    longest = max(lengths)
    places = torch.arange(longest)
    sizes = torch.tensor(lengths)
    real = places < sizes[:, None]
    tokens = (first + 100 * torch.arange(len(lengths))[:, None] + places) * real
    return Experience(
        tokens=tokens,
        response_mask=real & (places >= 2),
        **{name: tokens * float(i + 1) for i, name in enumerate(FIELDS)},
        lengths=sizes,
        policy_version=VERSION,
    )


def test_lengths_count_up_to_the_last_response_token():
    mask = torch.tensor([[0, 0, 1, 1, 0], [0, 1, 0, 1, 1], [0, 1, 0, 0, 0]]).bool()
    rollouts = Rollouts(
        tokens=torch.ones(3, 5, dtype=torch.int64),
        response_mask=mask,
        rollout_logprobs=torch.zeros(3, 5),
        finished=torch.ones(3, dtype=torch.bool),
        is_safety=torch.zeros(3, dtype=torch.bool),
        prompt_ids=("a", "b", "c"),
        messages=([], [], []),
        policy_version=VERSION,
    )
    assert rollouts.lengths.tolist() == [4, 5, 2]


def test_rows_are_numbered_through_the_chunks_and_cut_to_the_longest_picked():
    chunks = [chunk([4, 3], first=1000), chunk([3, 6, 5], first=5000)]
    # Rows 0, 1 are the first chunk's; rows 2, 3, 4 the second's. The longest of rows 4 and 1 has 5 tokens.
    picked = select_rows(chunks, [4, 1])
    assert picked.tokens.tolist() == [[5200, 5201, 5202, 5203, 5204], [1100, 1101, 1102, 0, 0]]
    assert picked.response_mask.int().tolist() == [[0, 0, 1, 1, 1], [0, 0, 1, 0, 0]]
    assert picked.lengths.tolist() == [5, 3]
    assert picked.policy_version == VERSION
    for i, name in enumerate(FIELDS):
        assert torch.equal(getattr(picked, name), picked.tokens * float(i + 1))


def test_every_row_of_every_chunk_comes_out_as_it_went_in():
    chunks = [chunk([4, 3], first=1000), chunk([3, 6, 5], first=5000)]
    rows = [row for c in chunks for row in zip(c.tokens, c.lengths.tolist(), strict=True)]
    for number, (tokens, length) in enumerate(rows):
        assert torch.equal(select_rows(chunks, [number]).tokens[0], tokens[:length])


def test_an_empty_pick_is_one_masked_row():
    empty = select_rows([chunk([4], first=1)], [])
    assert empty.tokens.shape == empty.response_mask.shape == empty.advantages.shape == (1, 2)
    assert not empty.response_mask.any()


def test_records_are_frozen():
    with pytest.raises(AttributeError):
        chunk([3], first=1).policy_version = WeightVersion("ppo", 4)  # type: ignore[misc]


def test_prompts_are_picked_in_any_order_and_more_than_once():
    prompts = PromptBatch(
        ids=("a", "b", "c"),
        tokens=([1], [2, 2], [3]),
        messages=([{"role": "user", "content": "a"}], [], []),
        is_safety=(True, False, False),
        ends_at_eos=False,
    )
    picked = prompts.select([2, 0, 2])
    assert (picked.ids, picked.tokens, picked.is_safety) == (("c", "a", "c"), ([3], [1], [3]), (False, True, False))
    assert picked.messages[1] == prompts.messages[0] and not picked.ends_at_eos
    assert (len(picked), len(prompts.select([])), prompts.select(range(3))) == (3, 0, prompts)


def named_weights(dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 8), (3,), (40, 2), (5, 5), (7,)]
    return [(f"p{i}", torch.randn(s, generator=generator).to(dtype)) for i, s in enumerate(shapes)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bucket_bytes", [1, 100, 10_000])
def test_buckets_hold_the_weights_bit_for_bit(dtype, bucket_bytes):
    weights = named_weights(dtype)
    buckets = fill_buckets(weights, version=VERSION, bucket_bytes=bucket_bytes)
    read = dict(pair for bucket in buckets for pair in bucket.tensors())
    assert list(read) == [name for name, _ in weights]
    for name, tensor in weights:
        assert read[name].dtype == dtype and torch.equal(read[name], tensor)


def test_bucket_limits():
    # bf16 bytes: 64, 6, 160, 50, 14. Limit 75: {64 + 6}, {160 alone, larger than the limit}, {50 + 14}.
    buckets = list(fill_buckets(named_weights(), version=VERSION, bucket_bytes=75))
    assert [bucket.names for bucket in buckets] == [("p0", "p1"), ("p2",), ("p3", "p4")]
    assert [bucket.version for bucket in buckets] == [VERSION] * 3
    assert [[array.nbytes for array in bucket.data] for bucket in buckets] == [[64, 6], [160], [50, 14]]
    # A limit smaller than any parameter gives each its own bucket; a large one holds all.
    assert len(list(fill_buckets(named_weights(), version=VERSION, bucket_bytes=1))) == 5
    assert len(list(fill_buckets(named_weights(), version=VERSION, bucket_bytes=294))) == 1
    assert list(fill_buckets([], version=VERSION)) == []


def test_a_bucket_is_the_weights_own_memory_and_its_pickle_a_copy():
    weights = named_weights()
    [bucket] = fill_buckets(weights, version=VERSION)
    stored = pickle.dumps(bucket)
    weights[0][1].zero_()
    assert not dict(bucket.tensors())["p0"].any()
    assert torch.equal(dict(pickle.loads(stored).tensors())["p0"], named_weights()[0][1])
