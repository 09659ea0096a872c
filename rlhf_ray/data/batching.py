"""Which rows make up a step, a micro-batch, a data mix.

Pure functions of sizes, seed and step: nothing has to be saved for a resumed run to draw the same rows, and
the draws do not depend on how many workers there are.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Plan: TypeAlias = list[list[list[int]]]
"""plan[rank][micro_batch] holds row numbers."""
DrawRows: TypeAlias = Callable[..., list[int]]
"""`prompt_rows` or `epoch_rows`."""
MAX_PADDING = 0.1
"""Share of padding above which micro-batches of padded rows are split."""

# One stream of random numbers per purpose, so that equal seeds do not tie unrelated draws together.
_MINIBATCHES, _PROMPTS, _MIXTURE = 1, 2, 3


def plan_micro_batches(lengths: Sequence[int], *, token_budget: int, num_ranks: int, padded: bool = True) -> Plan:
    """Deal rows of many lengths out to ranks, in micro-batches that fit in memory and waste little.

    Rows of similar length go together. Micro-batches are cut where the token budget is full; where rows are padded,
    split where that saves most padding until at most a tenth of all positions is padding; then split until every rank
    has equally many. Neighbours in size go to different ranks at the same time, the largest first, so that ranks wait
    little for each other and a plan that does not fit in memory fails at once.

    Args:
        lengths: tokens of each row, >= 1.
        token_budget: most positions of a micro-batch. A single longer row exceeds it alone.
        num_ranks: data-parallel ranks.
        padded: a micro-batch has rows times longest positions; else rows lie end to end in it, and it has as many as
            they have tokens.
    Returns:
        plan[rank][micro_batch] -> rows. Every row stands in it once and every rank has the same number of
        micro-batches. Some are empty only where single rows cannot be dealt out evenly. Without rows there is
        no micro-batch.
    Raises:
        ValueError: a length, the budget or the number of ranks is below 1.
    """
    smallest = min(lengths, default=1)
    for name, value in (("token_budget", token_budget), ("num_ranks", num_ranks), ("length", smallest)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    longest_first = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    batches = _fill(longest_first, lengths, token_budget, padded)
    num_tokens = sum(lengths)
    while padded and sum(_positions(batch, lengths) for batch in batches) * (1 - MAX_PADDING) > num_tokens:
        # There is padding, so some batch holds rows of two lengths, and its best split saves some.
        splits = [_best_split(batch, lengths) for batch in batches]
        place = max(range(len(batches)), key=lambda i: splits[i][0])
        _split(batches, place, splits[place][1])
    while len(batches) % num_ranks and any(len(batch) > 1 for batch in batches):
        place = max(range(len(batches)), key=lambda i: (len(batches[i]) > 1, _positions(batches[i], lengths, padded)))
        _split(batches, place, len(batches[place]) // 2)
    batches.sort(key=lambda batch: -_positions(batch, lengths, padded))
    batches += [[] for _ in range(-len(batches) % num_ranks)]
    return [batches[rank::num_ranks] for rank in range(num_ranks)]


def padding_share(plan: Plan, lengths: Sequence[int]) -> float:
    """Share of the positions of a plan of padded rows that are padding; 0 without rows."""
    positions = sum(_positions(batch, lengths) for rank in plan for batch in rank)
    num_tokens = sum(lengths[row] for rank in plan for batch in rank for row in batch)
    return 1 - num_tokens / positions if positions else 0.0


def minibatch_rows(num_rows: int, minibatch_size: int, *, seed: int, step: int) -> list[list[int]]:
    """The rows of a step's batch in random order, cut into minibatches; the last one may be smaller."""
    order = np.random.default_rng([_MINIBATCHES, seed, step]).permutation(num_rows).tolist()
    return [order[start : start + minibatch_size] for start in range(0, num_rows, minibatch_size)]


def prompt_rows(num_prompts: int, batch_size: int, *, seed: int, step: int) -> list[int]:
    """The prompts of a step: epochs of all prompts, each in its own random order, without replacement.

    A batch that spans the end of an epoch goes on with the next one, so it may hold a prompt twice.

    Args:
        step: counts from 0; the draw depends on nothing that happened before it.
    """
    if num_prompts < 1:
        raise ValueError(f"num_prompts={num_prompts} must be at least 1")
    rows: list[int] = []
    start = step * batch_size
    while len(rows) < batch_size:
        epoch, offset = divmod(start + len(rows), num_prompts)
        rows += _epoch_order(num_prompts, seed, epoch)[offset : offset + batch_size - len(rows)].tolist()
    return rows


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
    """Steps of a pass over all rows; the last one takes what the others leave."""
    return -(-num_rows // batch_size)


def epoch_part(num_rows: int, batch_size: int, step: int) -> tuple[int, slice]:
    """The pass that a step belongs to, counted from 0, and its part of that pass: no step spans two passes."""
    epoch, place = divmod(step, steps_per_epoch(num_rows, batch_size))
    return epoch, slice(place * batch_size, (place + 1) * batch_size)


def epoch_rows(num_rows: int, batch_size: int, *, seed: int, step: int) -> list[int]:
    """The rows of a step of training in passes: each pass in its own random order, every row once.

    Where `batch_size` divides the rows, the draw is that of `prompt_rows`.
    """
    epoch, part = epoch_part(num_rows, batch_size, step)
    rows: list[int] = _epoch_order(num_rows, seed, epoch)[part].tolist()
    return rows


def _epoch_order(num_rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([_PROMPTS, seed, epoch]).permutation(num_rows)


def mixture_rows(sizes: Sequence[int], shares: Sequence[float], num: int, seed: int) -> list[tuple[int, int]]:
    """A data mix: each source gives a fixed share of the rows.

    A source is drawn from without replacement; one that is too small for its share is repeated, in a new
    order each time. The mix is shuffled.

    Args:
        sizes: rows that each source has.
        shares: of each source, not negative; they are taken relative to their sum.
        num: rows of the mix. Shares that do not divide it are rounded by largest remainder.
    Returns:
        (source, row) for each row of the mix.
    Raises:
        ValueError: sizes and shares differ in number, a share is negative, all are 0, or a source
            without rows has a share.
    """
    if len(sizes) != len(shares) or min(shares, default=0) < 0 or sum(shares) <= 0:
        raise ValueError(
            f"shares={list(shares)} must be one per source, none negative, not all 0: {len(sizes)} sources"
        )
    mix: list[tuple[int, int]] = []
    for source, (size, wanted) in enumerate(zip(sizes, _apportion(shares, num), strict=True)):
        if wanted and size < 1:
            raise ValueError(f"source {source} has share {shares[source]} but no rows; set its share to 0")
        for epoch in range(-(-wanted // size) if wanted else 0):
            order = np.random.default_rng([_MIXTURE, seed, source, epoch]).permutation(size)
            mix += [(source, row) for row in order[: wanted - epoch * size].tolist()]
    order = np.random.default_rng([_MIXTURE, seed]).permutation(len(mix))
    return [mix[place] for place in order.tolist()]


def _apportion(shares: Sequence[float], num: int) -> list[int]:
    """Whole numbers proportional to the shares that add up to num; ties go to the earlier source."""
    exact = [share / sum(shares) * num for share in shares]
    counts = [int(x) for x in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: num - sum(counts)]:
        counts[i] += 1
    return counts


def _fill(rows: Sequence[int], lengths: Sequence[int], token_budget: int, padded: bool) -> list[list[int]]:
    """Cut rows, longest first, into as few micro-batches as the budget allows."""
    batches: list[list[int]] = []
    for row in rows:
        if batches and _positions([*batches[-1], row], lengths, padded) <= token_budget:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def _split(batches: list[list[int]], place: int, cut: int) -> None:
    """Replace the batch at a place by its rows before the cut and those after it."""
    batches[place : place + 1] = [batches[place][:cut], batches[place][cut:]]


def _positions(batch: Sequence[int], lengths: Sequence[int], padded: bool = True) -> int:
    """That pass through the model."""
    own = [lengths[row] for row in batch]
    return len(own) * max(own, default=0) if padded else sum(own)


def _best_split(batch: Sequence[int], lengths: Sequence[int]) -> tuple[int, int]:
    """Of all cuts of a batch sorted by falling length: (padding saved, rows before the cut)."""
    savings = ((len(batch) - cut) * (lengths[batch[0]] - lengths[batch[cut]]) for cut in range(1, len(batch)))
    return max(((saved, cut) for cut, saved in enumerate(savings, start=1)), default=(0, 0))
