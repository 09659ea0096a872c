"""Rollouts by vLLM: prompts in, answers out as records, weights in through the channel."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import ray
import torch
from torch import Tensor

from cluster.worker_group import Worker
from model.checkpoint import iterate_tensors
from model.checkpoint_files import read_config
from rlhf_ray.algo.reward import combine_rewards
from rlhf_ray.backends.rollout import RolloutEngine
from rlhf_ray.backends.weights import fill_buckets
from rlhf_ray.data.chat import decode_answer, encode_prompt, load_tokenizer
from rlhf_ray.data.light_tokenizer import LightTokenizer
from rlhf_ray.data.special_ids import special_ids
from rlhf_ray.records import Completion, PromptBatch, Rollouts, WeightBucket, WeightVersion, to_rollouts

_PROBED_PROMPTS = 8


class RolloutWorker(Worker):
    """One vLLM engine with its tokenizer."""

    def __init__(self, role: str, rank: int, num_ranks: int):
        super().__init__(role, rank, num_ranks)
        self._engine: RolloutEngine | None = None
        self._num_ids = 0
        self._ends: list[int] = []
        self._version = WeightVersion("", 0)
        self._of_checkpoint = True
        """Whether the weights are a checkpoint's, not a trainer's."""

    def set_threads(self, threads: int) -> None:
        """Compute threads of the engine from now on."""
        torch.set_num_threads(threads)

    def sleep(self) -> None:
        """Leaves the GPU to other roles, until `wake`; keeps a checkpoint's weights, and forgets a trainer's."""
        if self._engine is not None:
            self._engine.sleep(keep_weights=self._of_checkpoint)

    def expect_weights(self) -> None:
        """A trainer is about to send its own: those it has need not be kept."""
        self._of_checkpoint = False

    def wake(self) -> None:
        """Has the GPU again; a trainer must send its weights anew."""
        if self._engine is not None:
            self._engine.wake()

    def close(self) -> None:
        """Frees the engine."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def peak_memory_gib(self) -> float:
        """Highest memory so far, GiB: of this process, or of the largest that the engine has beside it."""
        beside = 0.0 if self._engine is None else self._engine.peak_memory_gib()
        return beside if torch.cuda.is_available() else max(super().peak_memory_gib(), beside)

    def start(self, checkpoint: str, *, tokenizer: str, every_id: bool = False, **engine_options: Any) -> int:
        """Starts the engine on a checkpoint and takes it through a first generation, which compiles.

        Args:
            tokenizer: directory of the run's tokenizer, which the checkpoint's need not be.
            every_id: ids that the tokenizer does not know may be sampled too, where the vocabulary is padded.
        Returns:
            rows of the vocabulary that the engine has.
        """
        if self._engine is not None:
            self.load_checkpoint(checkpoint)  # an earlier stage of the run started it
            return self._num_ids
        self._tokenizer, self._light = load_tokenizer(tokenizer), LightTokenizer(tokenizer)
        config = read_config(checkpoint)
        known = max(self._light.vocabulary.values()) + 1
        self._num_ids = config.vocab_size if every_id else min(known, config.vocab_size)
        self._engine = RolloutEngine(checkpoint, config, num_ids=self._num_ids, **engine_options)
        self.load_checkpoint(checkpoint)
        self._engine.generate([self._ends[:1]], seeds=[0], temperature=1.0, max_new_tokens=2, end_ids=self._ends)
        return self._num_ids

    def generate(
        self,
        prompts: PromptBatch,
        *,
        seeds: Sequence[int],
        temperature: float,
        max_new_tokens: int,
        sizes: Sequence[int] = (),
    ) -> tuple[Any, ...]:
        """Samples one answer to each prompt; returns (tokens of each answer, rollouts of each chunk).

        Args:
            sizes: prompts of each chunk; by default they are one.
        """
        completions = self.engine.generate(
            list(prompts.tokens),
            seeds=seeds,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            end_ids=self._ends if prompts.ends_at_eos else (),
        )
        bounds = [0, *itertools.accumulate(sizes or [len(prompts)])]
        chunks = [
            to_rollouts(
                prompts.select(range(start, end)),
                completions[start:end],
                policy_version=self._version,
                num_ids=self._num_ids,
            )
            for start, end in itertools.pairwise(bounds)
        ]
        return [len(completion.tokens) for completion in completions], *chunks

    def decode(self, rollouts: Rollouts) -> list[tuple[str, bool]]:
        """(answer text, finished) of each row."""
        answers = []
        for tokens, mask, finished in zip(
            rollouts.tokens, rollouts.response_mask, rollouts.finished.tolist(), strict=True
        ):
            answers.append((decode_answer(self._tokenizer, tokens[mask].tolist()), finished))
        return answers

    def samples(self, rollouts: Rollouts, helpfulness: Tensor, safety: Tensor, *, gate: float) -> list[dict[str, Any]]:
        """Each answer as the columns of `SAMPLES` that are about it.

        Args:
            helpfulness, safety: (B,) float32 raw scores.
            gate: raw safety score below which the safety score rules.
        """
        combined = combine_rewards(helpfulness, safety, rollouts.is_safety, threshold=gate)
        scores = zip(helpfulness.tolist(), safety.tolist(), combined.tolist(), strict=True)
        answers = zip(rollouts.tokens, rollouts.response_mask, self.decode(rollouts), scores, strict=True)
        names = ("helpfulness", "safety", "combined")
        return [
            {"tokens": tokens[mask].tolist(), "text": text, "finished": finished, **dict(zip(names, raw, strict=True))}
            for tokens, mask, (text, finished), raw in answers
        ]

    def chat(self, messages: list[dict[str, str]], *, seed: int, temperature: float, max_new_tokens: int) -> str:
        """One answer to a dialogue."""
        [completion] = self.engine.generate(
            [encode_prompt(self._tokenizer, messages)],
            seeds=[seed],
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            end_ids=self._ends,
        )
        return decode_answer(self._tokenizer, completion.tokens)

    def load_weights(self, buckets: list[Any], *, scrambled: bool = False) -> WeightVersion:
        """Takes weights from the object store; returns which."""
        self.engine.load_weights(self._fetch(buckets), scrambled=scrambled)
        self._of_checkpoint = False
        return self._version

    def transfer(self, method: str, **arguments: Any) -> None:
        """A step of taking weights from GPU to GPU, for the trainer's end of the channel (`backends/weights.py`)."""
        self.engine.transfer(method, **arguments)

    def took_weights(self, version: WeightVersion) -> None:
        """What has come that way are these."""
        self._version, self._of_checkpoint = version, False

    def load_checkpoint(self, checkpoint: str) -> None:
        """Takes the weights of a checkpoint on disk, of the model the engine was started on."""
        self._ends = special_ids(self._light, read_config(checkpoint)).ends
        self._version, self._of_checkpoint = WeightVersion(checkpoint, 0), True
        self.engine.load_weights(fill_buckets(iterate_tensors(checkpoint), version=self._version))

    def probe(self, prompts: PromptBatch) -> tuple[None, Rollouts]:
        """The first prompts as rollouts whose every token counts, to hold log-probs against the trainer's."""
        probed = prompts.select(range(min(_PROBED_PROMPTS, len(prompts))))
        completions = [Completion(tokens[1:], [0.0] * (len(tokens) - 1), True) for tokens in probed.tokens]
        firsts = replace(probed, tokens=tuple(tokens[:1] for tokens in probed.tokens))
        return None, to_rollouts(firsts, completions, policy_version=self._version, num_ids=self._num_ids)

    def probe_gap(self, probe: Rollouts, logprobs: Tensor) -> dict[str, float]:
        """|Difference| in nats of the engine's log-probs on a probe to the trainer's: "mean" and "max"."""
        sequences = [row[:length].tolist() for row, length in zip(probe.tokens, probe.lengths.tolist(), strict=True)]
        own = torch.tensor([value for row in self.engine.prompt_logprobs(sequences) for value in row])
        gap = (own - logprobs[probe.response_mask]).abs()
        return {"mean": gap.mean().item(), "max": gap.max().item()}

    def _fetch(self, buckets: list[Any]) -> Iterator[WeightBucket]:
        for ref in buckets:
            bucket: WeightBucket = ray.get(ref, timeout=600)
            yield bucket
        self._version = bucket.version

    @property
    def engine(self) -> RolloutEngine:
        """The vLLM engine."""
        assert self._engine is not None, f"{self.role}: start comes first"
        return self._engine
