"""A model being trained: the machinery that policy, value and reward workers share."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.checkpoint import iterate_tensors, meta_model, read_config, save_checkpoint, weights_of
from model.config import ModelConfig, Recompute
from model.llama import Head, Llama
from rlhf_ray.backends.train import TrainEngine, init_distributed
from rlhf_ray.workers.scorer import Runtime, ScorerWorker


class TrainerWorker(ScorerWorker):
    """One data-parallel rank of a role that DeepSpeed trains."""

    def __init__(self, role: str, rank: int, num_ranks: int):
        super().__init__(role, rank, num_ranks)
        self._built: Llama | None = None
        """On the meta device, until it is put under DeepSpeed."""
        self._weights: Iterator[tuple[str, Tensor]] | None = None
        """That it will have, on rank 0; DeepSpeed sends them to the others."""
        self._data: Any = None
        self._source: str | ModelConfig = ""
        self._fresh: set[str] = set()
        """Parameters whose weights are not the checkpoint's."""

    def unload(self) -> None:
        """Frees model, optimizer and data."""
        self._data = self._built = self._weights = None
        super().unload()

    def build(
        self, source: str | ModelConfig, *, head: Head, seed: int, runtime: Runtime, fresh_head: bool = False
    ) -> None:
        """Names the model to be trained: a checkpoint, or a config whose weights are drawn from `seed`.

        Args:
            fresh_head: put a new scalar head on the checkpoint's body, drawn from `seed`.
        """
        self.unload()
        self._runtime, self._source, self._fresh = runtime, source, set()
        self._config = source if isinstance(source, ModelConfig) else read_config(source)
        self._built = model = meta_model(self._config, head=head, dtype=runtime.dtype)
        if self.rank == 0:
            self._weights = (
                model.fresh_weights(seed=seed)
                if isinstance(source, ModelConfig)
                else weights_of(model, source, fresh_head=fresh_head, seed=seed)
            )

    def zero_head(self) -> None:
        """Sets the scalar head to zero, before training begins."""
        assert self._built is not None, "zero_head comes between build and begin_training"
        self._fresh.add("score.weight")

    def begin_training(
        self,
        *,
        optim: Any,
        num_steps: int,
        zero_stage: int,
        recompute: Recompute = "none",
        state: str | None = None,
    ) -> None:
        """Puts the built model under DeepSpeed; `state` is a directory of `save_state` to go on from."""
        assert self._built is not None, f"{self.role}: build comes before begin_training"
        init_distributed(torch.device(self._runtime.device))
        self._built.model.recompute = recompute
        self._engine = TrainEngine(
            self._built,
            optim=optim,
            num_steps=num_steps,
            zero_stage=zero_stage,
            precision=self._runtime.precision,
            weights=self._weights and self._but_zero(self._weights),
            state=Path(state) if state else None,
            masters=self._exact_weights(),
        )
        self._built = self._weights = None

    def _but_zero(self, weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            yield name, torch.zeros_like(tensor) if name in self._fresh else tensor

    def _exact_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Weights of the checkpoint that the built model has rounded."""
        if isinstance(self._source, str) and self._runtime.precision == "bf16":
            for name, tensor in iterate_tensors(self._source, but="BF16"):
                if name not in self._fresh:
                    yield name, tensor

    def open_data(self, builder: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, int]:
        """Builds this rank's copy of the training data; `builder` returns an object with `sizes()`."""
        self._data = builder(*args, **kwargs)
        sizes: dict[str, int] = self._data.sizes()
        return sizes

    def save_state(self, directory: str) -> None:
        """Writes what `begin_training(state=...)` resumes from."""
        self.engine.save_state(Path(directory))

    def save_model(self, directory: str, *, num_labels: int | None = None) -> None:
        """Writes a Hugging Face checkpoint; rank 0 writes, the others help to gather."""
        assert self._config is not None
        if self.rank == 0:
            save_checkpoint(directory, self._config, self.engine.weights(), num_labels=num_labels)
        else:
            for _ in self.engine.weights():
                pass

    def _all_sum(self, values: Tensor) -> Tensor:
        """Sum over ranks."""
        if self.num_ranks > 1:
            init_distributed(torch.device(self._runtime.device))
            values = values.to(self._runtime.device)
            dist.all_reduce(values)
        return values.cpu()
