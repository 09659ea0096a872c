"""The value model: V(state before each response token), and its update in PPO."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from model.heads import state_values
from rlhf_ray.algo.losses import value_loss
from rlhf_ray.records import Experience, Rollouts
from rlhf_ray.workers.ppo_update import UpdateSettings, ppo_update
from rlhf_ray.workers.trainer import TrainerWorker


class ValueWorker(TrainerWorker):
    """One data-parallel rank of the value model."""

    def values(self, rollouts: Rollouts, *, micro_batch_tokens: int) -> tuple[None, Tensor]:
        """(B, T + 1) float32 values of the states before each response token, and at `lengths` after the last.

        Zero elsewhere.
        """
        num_rows, num_tokens = rollouts.tokens.shape
        out = torch.zeros(num_rows, num_tokens + 1)
        for rows, tokens in self._batches(rollouts, micro_batch_tokens):
            # What is read at a token is the value of the state after it.
            read = self.engine.forward(tokens, lengths=rollouts.lengths[rows])
            out[rows, 1 : tokens.shape[1] + 1] = read.float().cpu()
        wanted = pad(rollouts.response_mask, (0, 1))
        wanted[torch.arange(num_rows), rollouts.lengths] = True
        return None, out * wanted

    def train_value(self, step: int, settings: UpdateSettings, *experiences: Experience) -> dict[str, float]:
        """The value model's optimizer steps over one batch, on the minibatches the policy has."""

        def loss(model: Any, batch: Experience, *, denominator: float) -> tuple[Tensor, dict[str, Tensor]]:
            device = self._runtime.device
            return value_loss(
                state_values(model(batch.tokens.to(device), lengths=batch.lengths)).float(),
                batch.values.to(device),
                batch.returns.to(device),
                batch.response_mask.to(device),
                clip_value=settings.clip_value,
                denominator=denominator,
            )

        return ppo_update(self.engine, step, settings, experiences, loss, rank=self.rank)
