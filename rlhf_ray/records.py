"""What crosses a process: frozen records of tensors.

B rows, T tokens of the longest row; rows are right-padded and start at index 0. Quantities of a token stand at the
token's own index: `logprobs[:, t]` is the log-prob of token t given those before it.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class WeightVersion(NamedTuple):
    """Which weights."""

    artefact: str
    """What is trained, or the checkpoint they are from."""
    step: int
    """Iterations that it has been trained for."""


class StaleRolloutsError(RuntimeError):
    """Rollouts are of other weights than experience may be built from."""


@dataclass(frozen=True, kw_only=True)
class PromptBatch:
    """Prompts to be answered: all that an engine needs to know of them."""

    ids: tuple[str, ...]
    """Of each prompt."""
    tokens: tuple[list[int], ...]
    """Token ids, up to where the answer begins."""
    messages: tuple[list[dict[str, str]], ...]
    """The dialogues, for rewards that are functions; empty lists where there is no text."""
    is_safety: tuple[bool, ...]
    """Tagged in advance as likely to draw unsafe answers."""
    ends_at_eos: bool = True
    """Whether EOS ends an answer; not so in a benchmark, whose answers all have one length."""

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, rows: Sequence[int]) -> "PromptBatch":
        """Some of the prompts, in this order."""
        return replace(
            self,
            ids=tuple(self.ids[row] for row in rows),
            tokens=tuple(self.tokens[row] for row in rows),
            messages=tuple(self.messages[row] for row in rows),
            is_safety=tuple(self.is_safety[row] for row in rows),
        )


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """Answers of one chunk as sampled: what is trained on, never decoded and tokenised again."""

    tokens: Tensor
    """(B, T) int64, prompt then answer, right-padded."""
    response_mask: Tensor
    """(B, T) bool, True where the policy emitted the token (EOS included)."""
    rollout_logprobs: Tensor
    """(B, T) float32, the engine's log-probs at the sampling temperature; zero outside the mask."""
    finished: Tensor
    """(B,) bool, False where the answer was cut off without EOS."""
    is_safety: Tensor
    """(B,) bool, prompts tagged in advance as likely to draw unsafe answers."""
    prompt_ids: tuple[str, ...]
    """Of the prompts."""
    messages: tuple[list[dict[str, str]], ...]
    """The dialogues that were answered."""
    policy_version: WeightVersion
    """Of the weights that sampled."""
    num_ids: int | None = None
    """Rows of the vocabulary, the first, that could be sampled, over which log-probs are taken; None for all."""

    @property
    def lengths(self) -> Tensor:
        """(B,) int64, tokens of each row: up to its last response token."""
        positions = torch.arange(1, self.tokens.shape[1] + 1)
        return (self.response_mask * positions).amax(dim=1)


@dataclass(frozen=True)
class Completion:
    """One sampled answer."""

    tokens: list[int]
    """Sampled token ids, the one that ended the answer included."""
    logprobs: list[float]
    """Log-prob of each token at the sampling temperature."""
    finished: bool
    """False where the length limit cut the answer off."""


@dataclass(frozen=True, kw_only=True)
class Experience:
    """Rollouts with all that the policy and value updates need."""

    tokens: Tensor
    """(B, T) int64."""
    response_mask: Tensor
    """(B, T) bool."""
    logprobs: Tensor
    """(B, T) float32, the trainer's, before this iteration's updates."""
    values: Tensor
    """(B, T) float32, before this iteration's updates."""
    advantages: Tensor
    """(B, T) float32."""
    returns: Tensor
    """(B, T) float32."""
    weights: Tensor
    """(B, T) float32, truncated importance weights; ones when that is off."""
    lengths: Tensor
    """(B,) int64."""
    policy_version: WeightVersion
    """Of the weights that sampled."""
    num_ids: int | None = None
    """As in `Rollouts`."""


@dataclass(frozen=True, kw_only=True)
class WeightBucket:
    """Some parameters of one version of the weights."""

    version: WeightVersion
    """Which weights these are."""
    names: tuple[str, ...]
    """Hugging Face parameter names."""
    shapes: tuple[tuple[int, ...], ...]
    """Their shapes."""
    dtype: torch.dtype
    """Of the parameters."""
    data: tuple[NDArray[np.uint8], ...]
    """(bytes,) uint8 each, in the order of the names. Arrays, since Ray copies those into its store and out of it only
    maps them; numpy knows no bfloat16."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The named parameters, views of `data`: not to be written to where it lies in the object store."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            flat = [torch.from_numpy(array).view(self.dtype) for array in self.data]
        for name, shape, tensor in zip(self.names, self.shapes, flat, strict=True):
            yield name, tensor.view(shape)


def select_rows(experiences: Sequence[Experience], rows: Sequence[int]) -> Experience:
    """The given rows of several chunks, numbered through, right-padded to the longest of them.

    An empty selection gives one row of two tokens whose mask is False: a rank without rows still takes part in
    the collectives of its micro-batch.
    """
    bounds: list[tuple[Experience, int]] = [(e, i) for e in experiences for i in range(e.tokens.shape[0])]
    picked = [bounds[row] for row in rows]
    version, num_ids = experiences[0].policy_version, experiences[0].num_ids
    if not picked:
        zeros = torch.zeros(1, 2)
        return Experience(
            tokens=torch.zeros(1, 2, dtype=torch.int64),
            response_mask=torch.zeros(1, 2, dtype=torch.bool),
            logprobs=zeros,
            values=zeros,
            advantages=zeros,
            returns=zeros,
            weights=zeros,
            lengths=torch.full((1,), 2),
            policy_version=version,
            num_ids=num_ids,
        )
    lengths = torch.stack([e.lengths[i] for e, i in picked])
    longest = int(lengths.max())

    def padded(name: str) -> Tensor:
        sources = [getattr(e, name)[i] for e, i in picked]
        out = torch.zeros(len(sources), longest, dtype=sources[0].dtype)
        for row, source in enumerate(sources):
            kept = min(longest, source.shape[0])
            out[row, :kept] = source[:kept]
        return out

    return Experience(
        tokens=padded("tokens"),
        response_mask=padded("response_mask"),
        logprobs=padded("logprobs"),
        values=padded("values"),
        advantages=padded("advantages"),
        returns=padded("returns"),
        weights=padded("weights"),
        lengths=lengths,
        policy_version=version,
        num_ids=num_ids,
    )


def to_rollouts(
    prompts: PromptBatch,
    completions: Sequence[Completion],
    *,
    policy_version: WeightVersion,
    num_ids: int | None = None,
) -> Rollouts:
    """Token ids that were given, and what followed them, as one right-padded record."""
    rows = [prompt + completion.tokens for prompt, completion in zip(prompts.tokens, completions, strict=True)]
    longest = max(len(row) for row in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    logprobs = torch.zeros(len(rows), longest)
    for i, (prompt, completion) in enumerate(zip(prompts.tokens, completions, strict=True)):
        tokens[i, : len(rows[i])] = torch.tensor(rows[i])
        mask[i, len(prompt) : len(rows[i])] = True
        logprobs[i, len(prompt) : len(rows[i])] = torch.tensor(completion.logprobs)
    return Rollouts(
        tokens=tokens,
        response_mask=mask,
        rollout_logprobs=logprobs,
        finished=torch.tensor([completion.finished for completion in completions]),
        is_safety=torch.tensor(prompts.is_safety),
        prompt_ids=prompts.ids,
        messages=prompts.messages,
        policy_version=policy_version,
        num_ids=num_ids,
    )
