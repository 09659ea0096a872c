"""Experience into optimizer steps: the minibatch schedule that policy and value models share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from rlhf_ray.backends.train import TrainEngine
from rlhf_ray.data.batching import minibatch_rows, padding_share, plan_micro_batches
from rlhf_ray.records import Experience, select_rows

Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]
"""(model, experience, *, denominator) -> (loss, metrics)."""


@dataclass(frozen=True, kw_only=True)
class UpdateSettings:
    """The fields of `PPOSection` of the same names."""

    minibatch_size: int
    inner_epochs: int
    micro_batch_tokens: int
    temperature: float
    clip_ratio: float
    clip_value: float | None
    seed: int


def ppo_update(
    engine: TrainEngine,
    step: int,
    settings: UpdateSettings,
    experiences: Sequence[Experience],
    loss: Loss,
    *,
    rank: int,
) -> dict[str, float]:
    """Passes one batch through the model, one optimizer step a minibatch; returns metrics averaged over them.

    Which rows make a minibatch depends on (seed, step, epoch) alone; each rank takes its share of every minibatch, and
    the loss's denominator is the minibatch's response tokens over all ranks divided by the ranks.
    """
    lengths = [int(length) for experience in experiences for length in experience.lengths]
    targets = [int(count) for experience in experiences for count in experience.response_mask.sum(dim=1)]
    totals: dict[str, float] = {}
    padding, num_updates = 0.0, 0
    for epoch in range(settings.inner_epochs):
        schedule = minibatch_rows(
            len(lengths), settings.minibatch_size, seed=settings.seed, step=step * settings.inner_epochs + epoch
        )
        for rows in schedule:
            own_lengths = [lengths[row] for row in rows]
            plan = plan_micro_batches(
                own_lengths,
                token_budget=settings.micro_batch_tokens,
                num_ranks=engine.num_ranks,
                padded=engine.padded,
            )
            denominator = sum(targets[row] for row in rows) / engine.num_ranks
            batches = [select_rows(experiences, [rows[i] for i in picked]) for picked in plan[rank]]
            metrics = engine.step(batches, partial(loss, denominator=denominator))
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + value
            padding += padding_share(plan, own_lengths) if engine.padded else 0.0
            num_updates += 1
    return {**{name: value / num_updates for name, value in totals.items()}, "padding": padding / num_updates}
