"""A frozen model: the reference policy's log-probs, or a reward model's score of each answer."""

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.hardware import give_back_memory
from cluster.worker_group import Worker
from model.checkpoint import load_model, meta_model, weights_of
from model.checkpoint_files import read_config
from model.config import ModelConfig
from model.heads import last_token_scores, scored_lengths
from model.llama import Head
from rlhf_ray.backends.frozen import FrozenEngine
from rlhf_ray.backends.train import NonFiniteError, TrainEngine, init_distributed
from rlhf_ray.data.batching import plan_micro_batches
from rlhf_ray.data.chat import load_tokenizer
from rlhf_ray.data.reward_function import find_function, score_with
from rlhf_ray.errors import located
from rlhf_ray.records import Completion, PromptBatch, Rollouts, WeightVersion, to_rollouts

logging.getLogger("ray").setLevel(logging.ERROR)


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """How a worker computes."""

    precision: str
    """"bf16" or "fp32"."""
    device: str
    """"cpu" or "cuda"."""

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters and activations."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


class ScorerWorker(Worker):
    """One rank of a frozen model; also the base of the trained roles, which score in the same way."""

    def __init__(self, role: str, rank: int, num_ranks: int):
        super().__init__(role, rank, num_ranks)
        self._engine: FrozenEngine | TrainEngine | None = None
        self._function: Callable[[Rollouts], Tensor] | None = None
        self._config: ModelConfig | None = None
        self._runtime = Runtime(precision="fp32", device="cpu")

    def set_threads(self, threads: int) -> None:
        """Compute threads of this rank from now on; more runnable ones than cores spin against each other."""
        torch.set_num_threads(threads)

    def load_frozen(
        self, checkpoint: str, *, head: Head, runtime: Runtime, ranks_per_replica: int = 1, shares_device: bool = False
    ) -> None:
        """Takes a checkpoint for scoring, in place of whatever the rank held; see `FrozenEngine`."""
        self.unload()
        self._runtime = runtime
        weights = None
        if ranks_per_replica > 1:
            init_distributed(torch.device(runtime.device))
            model = meta_model(read_config(checkpoint), head=head, dtype=runtime.dtype)
            if self.rank % ranks_per_replica == 0:  # whose weights are sent
                weights = weights_of(model, checkpoint)
        else:
            model = load_model(checkpoint, head=head, dtype=runtime.dtype)
        self._config = model.config
        self._engine = FrozenEngine(
            model, device=runtime.device, ranks=ranks_per_replica, shares_device=shares_device, weights=weights
        )

    def load_function(self, spec: str, *, field: str, root: str, tokenizer: str) -> None:
        """Takes a Python function for scoring (`data/reward_function.py`), in place of whatever the rank held.

        Args:
            field: of the config, that names it.
        Raises:
            UserError: there is no such function.
        """
        self.unload()
        with located(field):
            function, loaded = find_function(spec, root=root), load_tokenizer(tokenizer)

        def score(rollouts: Rollouts) -> Tensor:
            with located(field):
                return score_with(function, rollouts, loaded, name=spec)

        self._function = score

    def sleep(self) -> None:
        """Leaves the device to other roles, until `wake`."""
        if self._engine is not None:
            self._engine.sleep()
            self.give_back()

    def give_back(self) -> None:
        """What torch's allocator has kept for later."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """Has the device again."""
        if self._engine is not None:
            self._engine.wake()

    def unload(self) -> None:
        """Frees the model."""
        if self._engine is not None:
            self._engine.close()
        self._engine = self._function = None
        gc.collect()
        give_back_memory()
        self.give_back()

    def gpu_memory_gib(self) -> tuple[float, float]:
        """(taken, by whatever process, there is) on the rank's GPU, GiB; zeros on CPU."""
        if self._runtime.device != "cuda":
            return 0.0, 0.0
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**30, total / 2**30

    def peak_memory_gib(self) -> float:
        """Highest memory so far, GiB: allocated on the GPU, or resident in this process."""
        if self._runtime.device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return super().peak_memory_gib()

    def logprobs(self, rollouts: Rollouts, *, temperature: float, micro_batch_tokens: int) -> tuple[None, Tensor]:
        """(B, T) float32 log-probs of the response tokens at `temperature`, zero elsewhere."""
        out = torch.zeros(rollouts.tokens.shape, dtype=torch.float32)
        for rows, tokens in self._batches(rollouts, micro_batch_tokens):
            mask = rollouts.response_mask[rows][:, : tokens.shape[1]].to(tokens.device)
            options = {"temperature": temperature, "num_ids": rollouts.num_ids}
            result = self.engine.forward(tokens, target_mask=mask, lengths=rollouts.lengths[rows], **options)
            out[rows, : tokens.shape[1]] = result.logprobs.cpu()
        return None, out

    def score(self, rollouts: Rollouts, *, micro_batch_tokens: int) -> tuple[dict[str, float], Tensor]:
        """(B,) float32 raw scores, read at the last token of each answer (`scored_lengths`), cut-off answers included.

        Raises:
            NonFiniteError: a model's score is NaN or infinite.
            UserError: as `score_with`.
        """
        if self._function is not None:
            scores = self._function(rollouts)
        else:
            assert self._config is not None
            scores = torch.zeros(rollouts.tokens.shape[0])
            for rows, tokens in self._batches(rollouts, micro_batch_tokens):
                lengths = rollouts.lengths[rows].to(tokens.device)
                read_at = scored_lengths(tokens, lengths, self._config.pad_token_id)
                scores[rows] = last_token_scores(self.engine.forward(tokens, lengths=lengths), read_at).float().cpu()
        if not torch.isfinite(scores).all():
            raise NonFiniteError(f"{self.role} scored an answer {scores[~torch.isfinite(scores)][0].item()}")
        return {"mean": scores.mean().item()}, scores

    def score_answers(
        self, prompts: PromptBatch, answers: Sequence[Completion], *, micro_batch_tokens: int
    ) -> list[float]:
        """Raw scores of answers that are no rollouts of this run's engines, one to each prompt."""
        version = WeightVersion("", 0)
        rollouts = to_rollouts(prompts, answers, policy_version=version)
        scores: list[float] = self.score(rollouts, micro_batch_tokens=micro_batch_tokens)[1].tolist()
        return scores

    def join_in(self) -> list[float]:
        """Takes part in what other ranks of its replica score, with nothing of its own; no scores."""
        if self._function is None:  # which gathers nothing
            for _ in self._equal_numbers([]):
                self.engine.forward_nothing()
        return []

    def _batches(self, rollouts: Rollouts, micro_batch_tokens: int) -> Iterator[tuple[list[int], Tensor]]:
        """Micro-batches of rows of like length, cut to the longest: (row numbers, tokens on the device)."""
        lengths, padded = rollouts.lengths.tolist(), self.engine.padded
        [plan] = plan_micro_batches(lengths, token_budget=micro_batch_tokens, num_ranks=1, padded=padded)
        for rows in self._equal_numbers(plan):
            if rows:
                longest = int(rollouts.lengths[rows].max())
                yield rows, rollouts.tokens[rows][:, :longest].to(self._runtime.device)
            else:
                self.engine.forward_nothing()

    def _equal_numbers(self, plan: list[list[int]]) -> Sequence[list[int]]:
        """The plan this rank must go through; a sharded replica's ranks all pass as many micro-batches."""
        if not self.engine.sharded:
            return plan
        longest = torch.tensor(len(plan), device=self._runtime.device)
        dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=self.engine.group)
        return plan + [[]] * (int(longest) - len(plan))

    @property
    def engine(self) -> Any:
        """What computes: frozen, or in training."""
        assert self._engine is not None, f"{self.role}: no model is loaded"
        return self._engine
