"""The policy: next-token training in pretraining and SFT, then experience and updates in PPO."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch
from torch import Tensor

from rlhf_ray.algo.gae import gae
from rlhf_ray.algo.kl import KLEstimator, kl_estimate
from rlhf_ray.algo.losses import explained_variance, importance_weights, lm_loss, policy_loss
from rlhf_ray.algo.reward import combine_rewards, token_rewards
from rlhf_ray.algo.whiten import Moments, masked_moments, masked_whiten, merge_moments
from rlhf_ray.backends.train import NonFiniteError
from rlhf_ray.backends.weights import Channel, WeightSender, WeightStream, fill_buckets
from rlhf_ray.data.batching import DrawRows, prompt_rows
from rlhf_ray.records import Experience, Rollouts, StaleRolloutsError, WeightVersion
from rlhf_ray.workers.ppo_update import UpdateSettings, ppo_update
from rlhf_ray.workers.trainer import TrainerWorker


@dataclass(frozen=True, kw_only=True)
class ExperienceSettings:
    """How scores become advantages; the fields of `PPOSection` of the same names."""

    kl_coef: float
    kl_estimator: KLEstimator
    gamma: float
    gae_lambda: float
    whiten_advantages: bool
    importance_cap: float | None
    truncated: str
    truncation_penalty: float


class PolicyWorker(TrainerWorker):
    """One data-parallel rank of the policy."""

    def __init__(self, role: str, rank: int, num_ranks: int):
        super().__init__(role, rank, num_ranks)
        self._version = WeightVersion("", 0)
        self._sender: WeightSender | None = None

    # --- pretraining and supervised fine-tuning -------------------------------------------------------------

    def train_lm(
        self, step: int, *, batch_size: int, micro_batch_size: int, seed: int, draw: DrawRows = prompt_rows
    ) -> dict[str, float]:
        """One optimizer step on packed rows; which rows depends on (seed, step) alone."""
        rows = draw(len(self._data.train), batch_size, seed=seed, step=step)
        targets = max(1, self._data.train.num_targets(rows))  # a row may hold the first token of a document and no more
        own = rows[self.rank :: self.num_ranks]
        # As many on every rank, by the first one's rows: where rows do not deal out evenly, some are empty.
        starts = range(0, -(-len(rows) // self.num_ranks), micro_batch_size)
        micro_batches = [own[start : start + micro_batch_size] for start in starts]

        def loss(model: Any, batch: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
            packed = self._data.train.select(batch, self._runtime.device)
            result = model(
                packed.tokens,
                position_ids=packed.position_ids,
                segment_ids=packed.segment_ids,
                target_mask=packed.target_mask,
            )
            return lm_loss(result.logprobs, packed.target_mask, denominator=targets / self.num_ranks)

        return {**self.engine.step(micro_batches, loss), "tokens": float(self._data.train.num_tokens(rows))}

    def evaluate_lm(self, *, micro_batch_size: int) -> float:
        """Mean next-token loss over the held-out rows, nats; each rank goes through its share of them."""
        held_out = self._data.held_out
        own = list(range(len(held_out)))[self.rank :: self.num_ranks]
        sums = torch.zeros(2, dtype=torch.float64)  # of losses, of targets
        for rows in self._equal_numbers([own[i : i + micro_batch_size] for i in range(0, len(own), micro_batch_size)]):
            if not rows:
                self.engine.forward_nothing()
                continue
            packed = held_out.select(rows, self._runtime.device)
            result = self.engine.forward(
                packed.tokens,
                position_ids=packed.position_ids,
                segment_ids=packed.segment_ids,
                target_mask=packed.target_mask,
            )
            sums += torch.stack([-result.logprobs.double().sum(), packed.target_mask.sum()]).cpu()
        total, count = self._all_sum(sums).tolist()
        return float(total / max(1.0, count))

    # --- PPO ------------------------------------------------------------------------------------------------

    def set_version(self, version: WeightVersion) -> None:
        """Says which weights this policy has; each of its updates is a step further."""
        self._version = version

    def export_weights(self) -> list[Any]:
        """Object references of the current weights' buckets, from rank 0; empty from the others."""
        weights = self.engine.weights()
        if self.rank > 0:
            for _ in weights:
                pass
            return []
        return [ray.put(bucket) for bucket in fill_buckets(weights, version=self._version)]

    def send_weights(self, channel: Channel, *, scrambled: bool = False) -> None:
        """Sends the current weights to the engines, from GPU to GPU; a call on all ranks.

        Args:
            scrambled: in a form in which they compute something else, to prove the channel by.
        """
        if self._sender is None or self._sender.channel != channel:
            self._sender = WeightSender(channel, self._stream(channel.num_ids), rank=self.rank)
        try:
            self._sender.send(self._version, scrambled=scrambled)
        except Exception:
            self._sender = None  # the next starts with a connection of its own
            raise

    def unload(self) -> None:
        """Frees model, optimizer and data, and the trainer's end of a channel."""
        if self._sender is not None:
            self._sender.close()
            self._sender = None
        super().unload()

    def _stream(self, num_ids: int) -> WeightStream:
        assert self._config is not None
        tied = self._config.tie_embeddings
        return WeightStream(self.engine.weights, self.engine.shapes(), num_ids=num_ids, tied=tied)

    def build_experience(
        self, num_chunks: int, settings: ExperienceSettings, gate: float, *inputs: Any
    ) -> tuple[Any, ...]:
        """Rewards, KL, advantages and returns of this rank's chunks, with moments over all ranks.

        Args:
            gate: raw score below which the safety model rules.
            inputs: rollouts of each chunk, then this policy's log-probs (B, T), values (B, T + 1), reference log-probs
                (B, T), helpfulness scores (B,) and safety scores (B,) of each: 6 x num_chunks.
        Returns:
            (metrics, experience_1, ..., experience_num_chunks); metrics are over the whole batch.
        Raises:
            NonFiniteError: a reward or advantage is NaN or infinite.
            StaleRolloutsError: other weights than this policy's have sampled.
        """
        rollouts, logprobs, values, *scores = _by_kind(inputs, num_chunks)
        for chunk in rollouts:
            if chunk.policy_version != self._version:
                raise StaleRolloutsError(
                    f"rollouts are of {chunk.policy_version}, and experience for {self._version} is to be built"
                )
        scored = _scored_chunks(gate, rollouts, logprobs, *scores)
        moments = self._global_moments([(s.combined, torch.ones_like(s.combined, dtype=torch.bool)) for s in scored])
        experiences, sums = [], []
        for chunk, answers, value in zip(rollouts, scored, values, strict=True):
            experience, chunk_sums = _advantages(chunk, answers, value, moments, settings)
            experiences.append(experience)
            sums.append(chunk_sums)
        if settings.whiten_advantages:
            moments = self._global_moments([(e.advantages, e.response_mask) for e in experiences])
            experiences = [
                replace(e, advantages=masked_whiten(e.advantages, e.response_mask, moments=moments))
                for e in experiences
            ]
        metrics = self._batch_metrics(sums)  # before any rank may raise: the others would wait for it in here
        for experience in experiences:
            if not torch.isfinite(experience.advantages).all():
                raise NonFiniteError("an advantage is not finite", metrics)
        return metrics, *experiences

    def summarize(self, num_chunks: int, gate: float, *inputs: Any) -> dict[str, float]:
        """Mean rewards, KL and lengths over the batch of all ranks; `inputs` as for experience, without the values."""
        rollouts, *scores = _by_kind(inputs, num_chunks)
        scored = _scored_chunks(gate, rollouts, *scores)
        return self._batch_metrics([_sums(chunk, answers) for chunk, answers in zip(rollouts, scored, strict=True)])

    def train_policy(self, step: int, settings: UpdateSettings, *experiences: Experience) -> dict[str, float]:
        """PPO's optimizer steps over one batch: every rank sees all chunks and takes its rows of each minibatch."""

        def loss(model: Any, batch: Experience, *, denominator: float) -> tuple[Tensor, dict[str, Tensor]]:
            tokens = batch.tokens.to(self._runtime.device)
            mask = batch.response_mask.to(self._runtime.device)
            options = {"temperature": settings.temperature, "with_entropy": True, "num_ids": batch.num_ids}
            result = model(tokens, target_mask=mask, lengths=batch.lengths, **options)
            value, metrics = policy_loss(
                result.logprobs,
                batch.logprobs.to(tokens.device),
                batch.advantages.to(tokens.device),
                mask,
                clip_ratio=settings.clip_ratio,
                denominator=denominator,
                weights=batch.weights.to(tokens.device),
            )
            return value, {**metrics, "entropy": (result.entropy.detach() * mask).sum() / denominator}

        metrics = ppo_update(self.engine, step, settings, experiences, loss, rank=self.rank)
        self._version = self._version._replace(step=step + 1)
        return metrics

    def _global_moments(self, parts: list[tuple[Tensor, Tensor]]) -> Moments:
        own = merge_moments([masked_moments(values, mask) for values, mask in parts])
        table = torch.zeros(self.num_ranks, 3, dtype=torch.float64)
        table[self.rank] = torch.tensor([float(x) for x in own], dtype=torch.float64)
        return merge_moments([Moments(*row) for row in self._all_sum(table)])

    def _batch_metrics(self, sums: list[dict[str, Tensor]]) -> dict[str, float]:
        """Means over the batch of all ranks: sums over a named count ("answers" or "tokens")."""
        names = sorted(sums[0])
        total = self._all_sum(torch.stack([sum((s[n] for s in sums), torch.zeros(())) for n in names]).double())
        by_name = dict(zip(names, total.tolist(), strict=True))
        answers, tokens = by_name.pop("answers"), by_name.pop("tokens")
        metrics = {
            name: value / max(1.0, tokens if name.endswith("_per_token") else answers)
            for name, value in by_name.items()
        }
        return {
            **_with_explained_variance(metrics),
            "response_tokens": tokens / max(1.0, answers),
            "response_tokens_total": tokens,
        }


def _with_explained_variance(metrics: dict[str, float]) -> dict[str, float]:
    """Replaces the moments of returns and value errors by 1 - var(return - value) / var(return)."""
    if "return_square_per_token" not in metrics:
        return metrics
    kept = {n: v for n, v in metrics.items() if not n.startswith(("return_square", "value_error"))}
    explained = explained_variance(
        return_mean=metrics["return_per_token"],
        return_sq_mean=metrics["return_square_per_token"],
        error_mean=metrics["value_error_per_token"],
        error_sq_mean=metrics["value_error_square_per_token"],
    )
    return {**kept, "value_explained_variance": explained}


@dataclass(frozen=True)
class _Scored:
    logprobs: Tensor  # (B, T)
    ref_logprobs: Tensor  # (B, T)
    log_ratio: Tensor  # (B, T) policy - reference
    helpfulness: Tensor  # (B,)
    safety: Tensor  # (B,)
    gated: Tensor  # (B,) bool, the safety model rules
    combined: Tensor  # (B,) the gate's choice, raw


def _by_kind(inputs: Sequence[Any], num_chunks: int) -> list[Sequence[Any]]:
    """Rollouts, log-probs and so on of all chunks, each kind by itself."""
    return [inputs[start : start + num_chunks] for start in range(0, len(inputs), num_chunks)]


def _scored_chunks(gate: float, *kinds: Sequence[Any]) -> list[_Scored]:
    """Of each chunk; `kinds` are rollouts, log-probs of policy and reference, helpfulness and safety scores."""
    return [_scored(gate, *chunk) for chunk in zip(*kinds, strict=True)]


def _scored(
    gate: float,
    rollouts: Rollouts,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    helpfulness: Tensor,
    safety: Tensor,
) -> _Scored:
    return _Scored(
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        log_ratio=(logprobs - ref_logprobs) * rollouts.response_mask,
        helpfulness=helpfulness,
        safety=safety,
        gated=rollouts.is_safety | (safety < gate),
        combined=combine_rewards(helpfulness, safety, rollouts.is_safety, threshold=gate),
    )


def _advantages(
    rollouts: Rollouts, scored: _Scored, values: Tensor, moments: Moments, settings: ExperienceSettings
) -> tuple[Experience, dict[str, Tensor]]:
    """One chunk's experience and the sums its metrics are made of; `values` as `ValueWorker.values` gives them."""
    mask = rollouts.response_mask
    after_last = values.gather(1, rollouts.lengths[:, None]).squeeze(1)
    values = torch.where(mask, values[:, :-1], 0.0)
    whitened = masked_whiten(scored.combined, torch.ones_like(scored.combined, dtype=torch.bool), moments=moments)
    if settings.truncated == "penalty":
        whitened = torch.where(rollouts.finished, whitened, whitened - settings.truncation_penalty)
    kl = kl_estimate(scored.logprobs, scored.ref_logprobs, estimator=settings.kl_estimator) * mask
    rewards = token_rewards(whitened, kl, mask, kl_coef=settings.kl_coef)
    bootstrap = None
    if settings.truncated == "bootstrap":
        bootstrap = torch.where(rollouts.finished, 0.0, after_last)
    advantages, returns = gae(rewards, values, mask, gamma=settings.gamma, lam=settings.gae_lambda, bootstrap=bootstrap)
    weights = torch.ones_like(values)
    if settings.importance_cap is not None:
        weights = importance_weights(scored.logprobs, rollouts.rollout_logprobs, cap=settings.importance_cap)
    experience = Experience(
        tokens=rollouts.tokens,
        response_mask=mask,
        logprobs=scored.logprobs,
        values=values,
        advantages=advantages,
        returns=returns,
        weights=weights,
        lengths=rollouts.lengths,
        policy_version=rollouts.policy_version,
        num_ids=rollouts.num_ids,
    )
    error = (returns - values) * mask
    return experience, {
        **_sums(rollouts, scored),
        "reward_whitened": whitened.sum(),
        "advantage_abs_per_token": advantages.abs().sum(),
        "return_per_token": returns.sum(),
        "return_square_per_token": returns.square().sum(),
        "value_error_per_token": error.sum(),
        "value_error_square_per_token": error.square().sum(),
    }


def _sums(rollouts: Rollouts, scored: _Scored) -> dict[str, Tensor]:
    """Sums over one chunk; those named _per_token are to be divided by its tokens, the others by its answers."""
    mask = rollouts.response_mask
    nothing = torch.zeros_like(scored.log_ratio)
    k3 = kl_estimate(scored.log_ratio, nothing, estimator="k3") * mask
    return {
        "answers": torch.tensor(float(len(mask))),
        "tokens": mask.sum().float(),
        "reward_helpfulness": scored.helpfulness.sum(),
        "reward_safety": scored.safety.sum(),
        "reward_combined": scored.combined.sum(),
        "reward_gated": scored.gated.sum().float(),
        "kl_per_sequence": scored.log_ratio.sum(),
        "kl_k1_per_token": scored.log_ratio.sum(),
        "kl_k3_per_token": k3.sum(),
        "truncated": (~rollouts.finished).sum().float(),
        "logprob_gap_per_token": ((scored.logprobs - rollouts.rollout_logprobs).abs() * mask).sum(),
    }
