"""A model being trained: the machinery that policy, value and reward workers share."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.checkpoint import empty_model, iterate_tensors, load_model, read_config, save_checkpoint
from model.config import ModelConfig, Recompute
from model.llama import Head, Llama
from rlhf_ray.backends.train import TrainEngine, init_distributed
from rlhf_ray.workers.scorer import Runtime, ScorerWorker


class TrainerWorker(ScorerWorker):
    """One data-parallel rank of a role that DeepSpeed trains."""

    def __init__(self, role: str, rank: int, num_ranks: int):
        super().__init__(role, rank, num_ranks)
        self._built: Llama | None = None
        """In host memory, until it is put under DeepSpeed."""
        self._data: Any = None
        self._source: str | ModelConfig = ""
        self._fresh: set[str] = set()
        """Parameters whose weights are not the checkpoint's."""

    def unload(self) -> None:
        """Frees model, optimizer and data."""
        self._data = self._built = None
        super().unload()

    def build(
        self, source: str | ModelConfig, *, head: Head, seed: int, runtime: Runtime, fresh_head: bool = False
    ) -> None:
        """Takes a model to be trained: a checkpoint, or a config whose weights are drawn from `seed`.

        Args:
            fresh_head: put a new scalar head on the checkpoint's body, drawn from `seed`.
        """
        self.unload()
        self._runtime, self._source, self._fresh = runtime, source, set()
        if self.rank > 0:  # DeepSpeed sends rank 0's weights
            config = source if isinstance(source, ModelConfig) else read_config(source)
            model = empty_model(config, head=head, dtype=runtime.dtype)
        elif isinstance(source, ModelConfig):
            model = empty_model(source, head=head, dtype=runtime.dtype)
            model.init_weights(seed=seed)
        else:
            model = load_model(source, head=head, dtype=runtime.dtype, fresh_head=fresh_head, seed=seed)
        self._config, self._built = model.config, model

    def zero_head(self) -> None:
        """Sets the scalar head to zero, before training begins."""
        assert self._built is not None, "zero_head comes between build and begin_training"
        torch.nn.init.zeros_(self._built.score.weight)
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
            state=Path(state) if state else None,
            masters=self._exact_weights(),
        )
        self._built = None

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
