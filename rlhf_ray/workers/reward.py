"""A reward model: ranking loss with a margin while it is trained, scores once it is frozen."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from model.heads import last_token_scores
from rlhf_ray.algo.ranking import ranking_loss, safety_loss
from rlhf_ray.data.batching import Plan, epoch_part, plan_micro_batches
from rlhf_ray.data.reward_pairs import Pairs
from rlhf_ray.workers.trainer import TrainerWorker


class RewardWorker(TrainerWorker):
    """One data-parallel rank of the helpfulness or the safety reward model."""

    def train_reward(
        self, step: int, *, batch_size: int, micro_batch_tokens: int, safety_loss_coef: float
    ) -> dict[str, float]:
        """One optimizer step on pairs; chosen and rejected answers go through one forward (§3.2.2)."""
        pairs = self._data.train
        epoch, part = epoch_part(len(self._data.order[0]), batch_size, step)
        rows = self._data.order[epoch][part]
        plan = self._plan(pairs, rows, micro_batch_tokens)
        denominator = len(rows) / self.num_ranks
        labelled = sum(pairs.is_labelled(row) for row in rows) / self.num_ranks

        def loss(model: Any, picked: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
            batch = pairs.select([rows[i] for i in picked], self._runtime.device)
            chosen, rejected = self._pair_scores(model, batch)
            value, metrics = ranking_loss(
                chosen[batch.mask], rejected[batch.mask], batch.margin[batch.mask], denominator=denominator
            )
            value = value + 0.0 * chosen.sum()  # keeps an empty micro-batch in the collectives
            if safety_loss_coef > 0 and labelled > 0:
                auxiliary, more = safety_loss(
                    chosen,
                    rejected,
                    batch.chosen_safe,
                    batch.rejected_safe,
                    batch.labelled,
                    denominator=labelled,
                )
                value, metrics = value + safety_loss_coef * auxiliary, {**metrics, **more}
            return value, metrics

        return self.engine.step(plan[self.rank], loss)

    def evaluate_reward(self, *, micro_batch_tokens: int) -> dict[str, float]:
        """Accuracy on held-out comparisons: overall, by guideline, and of each by strength and week; ties count half.

        Each rank goes through its share of them. The model is the one in training, or frozen.
        """
        pairs = self._data.held_out
        groups = sorted({group for row in range(len(pairs)) for group in pairs.groups(row)})
        right, count = torch.zeros(2, len(groups), dtype=torch.float64)
        plan = self._plan(pairs, range(len(pairs)), micro_batch_tokens)
        for rows in plan[self.rank]:  # empty ones too: a sharded model's ranks must stay together
            batch = pairs.select(rows, self._runtime.device)
            chosen, rejected = self._pair_scores(self.engine.forward, batch)
            hits = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
            for row, hit in zip(rows, hits[: len(rows)].tolist(), strict=True):
                own = [groups.index(group) for group in pairs.groups(row)]
                right[own] += hit
                count[own] += 1
        right, count = self._all_sum(torch.stack([right, count]))
        return {
            **{f"accuracy/{group}": share for group, share in zip(groups, (right / count).tolist(), strict=True)},
            **{f"count/{group}": number for group, number in zip(groups, count.tolist(), strict=True)},
        }

    def _plan(self, pairs: Pairs, rows: Sequence[int], token_budget: int) -> Plan:
        padded = self.engine.padded
        # A pair is two rows, padded to the longer one.
        sizes = [2 * max(sides) if padded else sum(sides) for sides in (pairs.lengths(row) for row in rows)]
        return plan_micro_batches(sizes, token_budget=token_budget, num_ranks=self.num_ranks, padded=padded)

    @staticmethod
    def _pair_scores(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        scores = last_token_scores(model(batch.tokens, lengths=batch.lengths), batch.lengths).float()
        chosen, rejected = scores.chunk(2)
        return chosen, rejected
