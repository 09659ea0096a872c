"""A model that only computes: whole on its device, or divided over ranks where it is too large for one."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from model.llama import Llama
from rlhf_ray.backends.train import destroy, divide_frozen, replica_group, sample_forward


class FrozenEngine:
    """A frozen model; what the engines of trained models have as well is named alike."""

    def __init__(
        self,
        model: Llama,
        *,
        device: str,
        ranks: int = 1,
        shares_device: bool = False,
        weights: Iterator[tuple[str, Tensor]] | None = None,
    ):
        """Takes a model that is in host memory, or is to be divided.

        Args:
            ranks: of the replica. Of several each holds a share of the weights and they gather layer by layer, so all
                must pass as many micro-batches; torch.distributed is up.
            shares_device: others need the device in turn: a share of a divided model stays in host memory.
            weights: see `backends.train.divide`.
        """
        model = model.eval().requires_grad_(False)
        self.sharded = ranks > 1
        self.group = replica_group(ranks) if self.sharded else None
        """Those that gather from each other; None for all of the role."""
        self._device, self._model = torch.device(device), model
        self.module: nn.Module = (
            divide_frozen(model, weights, group=self.group, in_host_memory=shares_device)
            if self.sharded
            else model.to(self._device)
        )
        if self.group is not None:
            # DeepSpeed compares the order of the modules in the first two passes between all ranks of the role. From
            # then on it knows it, and replicas go their own ways.
            for _ in range(2):
                self.forward_nothing()

    @property
    def padded(self) -> bool:
        """Whether rows are padded on their way through the model; else their tokens lie end to end."""
        return not self._model.model.lays_end_to_end(self._device)

    @torch.no_grad()
    def forward(self, tokens: Tensor, **options: Any) -> Any:
        """As `Llama.forward`."""
        return self.module(tokens, **options)

    @torch.no_grad()
    def forward_nothing(self) -> None:
        """Takes part in what other ranks gather."""
        sample_forward(self._model, self.module, self._device)

    def sleep(self) -> None:
        """Leaves the device to others."""
        if not self.sharded:
            self._model.to("cpu")

    def wake(self) -> None:
        """Comes back to it."""
        if not self.sharded:
            self._model.to(self._device)

    def close(self) -> None:
        """Frees the model."""
        if self.sharded:
            destroy(self.module, sharded=True)
        del self.module, self._model
