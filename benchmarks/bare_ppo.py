"""The PPO iteration of this project in one process: no Ray, no DeepSpeed, no workers. The yardstick of its speed.

    python benchmarks/bare_ppo.py 3.8m [--iterations 10] [--smollm2 DIR] [--precision bf16] [--work DIR]

Policy, value model, reference and two reward models as plain torch modules, AdamW with fp32 master weights, vLLM in the
same process with the weights synced every iteration. The maths is written out here once more, on (answers, response
tokens) without masks, because every answer has the same number of tokens; tests/test_bare_ppo.py holds it against
`rlhf_ray/algo/`. Each phase runs on one thread or two, whichever took less time in a few iterations before.

What it leaves out that the project does: sampling seeds of each request and the engine's log-probs, metrics but the
losses, entropy. Prints seconds per phase and writes benchmarks/results/bare_ppo_SHAPE.json. Run it on an idle machine.
"""

import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from measuring import RESULTS, per_phase, work_directory, write_result
from ppo_work import Work, make_work, work_parser
from torch import Tensor, nn

from model.checkpoint import load_model
from model.heads import last_token_scores, state_values
from rlhf_ray.config import OptimSection
from rlhf_ray.recipe.ppo import scoring_settings

set_threads = torch.set_num_threads  # vLLM puts one in its place that does nothing
PHASES = ("rollout", "score", "update", "sync")
EPSILON = 1e-8
WARMUP, TUNING = 2, 3


@dataclass(frozen=True)
class Batch:
    """Right-padded rows, each a prompt and R response tokens."""

    tokens: Tensor  # (B, T) int64
    lengths: Tensor  # (B,) int64, prompt and answer
    places: Tensor  # (B, R) int64, where the response tokens stand
    mask: Tensor  # (B, T) bool, the same places

    @classmethod
    def of(cls, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> "Batch":
        rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        lengths = torch.tensor([len(row) for row in rows])
        tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor(row)
        places = (lengths[:, None] - len(answers[0])) + torch.arange(len(answers[0]))
        mask = torch.zeros_like(tokens, dtype=torch.bool).scatter(1, places, True)
        return cls(tokens, lengths, places, mask)

    def micro_batches(self, rows: Sequence[int], token_budget: int) -> Iterator[tuple[Tensor, "Batch"]]:
        """(row numbers, their batch cut to its longest), rows of like length together."""
        start = 0
        ordered = sorted(rows, key=lambda row: -int(self.lengths[row]))
        while start < len(ordered):
            longest = int(self.lengths[ordered[start]])
            picked = torch.tensor(ordered[start : start + max(1, token_budget // longest)])
            start += len(picked)
            yield (
                picked,
                Batch(
                    self.tokens[picked, :longest],
                    self.lengths[picked],
                    self.places[picked],
                    self.mask[picked, :longest],
                ),
            )


def logprobs_of(policy: nn.Module, batch: Batch, temperature: float) -> Tensor:
    """(B, R) float32."""
    result = policy(batch.tokens, target_mask=batch.mask, temperature=temperature)
    return result.logprobs.gather(1, batch.places)


def values_of(value_model: nn.Module, batch: Batch) -> Tensor:
    """(B, R) float32, of the states before each response token."""
    return state_values(value_model(batch.tokens)).float().gather(1, batch.places)


def whiten(values: Tensor) -> Tensor:
    """Mean 0 and unbiased variance 1 over all entries."""
    wide = values.double()
    return ((wide - wide.mean()) * torch.rsqrt(wide.var() + EPSILON)).to(values.dtype)


def advantages_and_returns(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    helpfulness: Tensor,
    safety: Tensor,
    is_safety: Tensor,
    *,
    safety_threshold_raw: float,
    kl_coef: float,
    gamma: float,
    gae_lambda: float,
    whiten_advantages: bool = True,
) -> tuple[Tensor, Tensor]:
    """Gate, joint whitening, KL per token, GAE, whitened advantages; (B, R) in and out, scores and tags (B,)."""
    scores = whiten(torch.where(is_safety | (safety < safety_threshold_raw), safety, helpfulness))
    rewards = -kl_coef * (logprobs - ref_logprobs)
    rewards[:, -1] += scores
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(scores)
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = delta + gamma * gae_lambda * next_advantage
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    returns = advantages + values
    return (whiten(advantages) if whiten_advantages else advantages), returns


def clipped_policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_ratio: float) -> Tensor:
    """Summed over tokens."""
    ratio = (logprobs - old_logprobs).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_ratio, 1 + clip_ratio)).sum()


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_value: float | None) -> Tensor:
    """Summed over tokens."""
    error = (values - returns).square()
    if clip_value is not None:
        clipped = old_values + (values - old_values).clamp(-clip_value, clip_value)
        error = torch.maximum(error, (clipped - returns).square())
    return 0.5 * error.sum()


class Trained:
    """A model with AdamW on fp32 master weights; in fp32 the model's own parameters are the masters."""

    def __init__(self, model: nn.Module, optim: OptimSection, dtype: torch.dtype):
        """`model` in fp32; it is cast to `dtype`."""
        self.model = model
        self._limit = optim.grad_clip
        self._masters = [p.detach().clone() if dtype != torch.float32 else p for p in model.parameters()]
        model.to(dtype)
        self._parameters = list(model.parameters())
        self._is_mixed = dtype != torch.float32
        groups = [
            {"params": [p for p in self._masters if p.dim() >= 2], "weight_decay": optim.weight_decay},
            {"params": [p for p in self._masters if p.dim() < 2], "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)

    def backward(self, loss: Tensor) -> None:
        """Adds the loss's gradients to the masters', in fp32."""
        loss.backward()
        if not self._is_mixed:
            return
        for master, parameter in zip(self._masters, self._parameters, strict=True):
            assert parameter.grad is not None
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad += parameter.grad
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Clips, updates, rounds into the model."""
        torch.nn.utils.clip_grad_norm_(self._masters, self._limit)
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        if self._is_mixed:
            torch._foreach_copy_(self._parameters, self._masters)


class BareLoop:
    """Five models and an engine in this process."""

    def __init__(self, work: Work, *, engine: bool = True, threads: int | None = None):
        """`engine` False leaves vLLM out, for whoever brings answers of his own; `threads` of all phases."""
        self.work, self.section = work, work.section
        dtype = torch.bfloat16 if work.precision == "bf16" else torch.float32
        cores = len(os.sched_getaffinity(0))
        self.threads = dict.fromkeys(PHASES, threads or cores)
        self.seconds: dict[str, float] = {}
        set_threads(threads or cores)
        value = load_model(work.helpfulness, head="scalar", dtype=torch.float32)
        if self.section.value_head == "zero":
            nn.init.zeros_(value.score.weight)
        self.policy = Trained(load_model(work.chat, head="lm", dtype=torch.float32), self.section.optim, dtype)
        self.value = Trained(value, self.section.value_optim, dtype)
        self.reference = load_model(work.chat, head="lm", dtype=dtype).eval().requires_grad_(False)
        self.rewards = {
            name: load_model(path, head="scalar", dtype=dtype).eval().requires_grad_(False)
            for name, path in (("helpfulness", work.helpfulness), ("safety", work.safety))
        }
        self._llm = self._start_engine(dtype) if engine else None
        self._index = 0

    def _start_engine(self, dtype: torch.dtype) -> Any:
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        from vllm import LLM

        llm = LLM(
            model=str(self.work.chat),
            skip_tokenizer_init=True,
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=max(map(len, self.work.prompts)) + self.work.response_tokens,
            max_num_seqs=min(256, self.section.batch_size),
            distributed_executor_backend="uni",
            gpu_memory_utilization=0.5,
            enforce_eager=True,
            disable_log_stats=True,
        )
        torch.set_num_threads = set_threads
        return llm

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        set_threads(self.threads[name])
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def iteration(self) -> dict[str, float]:
        """One PPO iteration; returns seconds per phase and their sum."""
        self.seconds = {}
        rows = self.work.rows(self._index)
        prompts = [self.work.prompts[row] for row in rows]
        is_safety = torch.tensor([self.work.is_safety[row] for row in rows])
        with self._phase("rollout"):
            answers = self.generate(prompts)
        with self._phase("score"):
            batch = Batch.of(prompts, answers)
            scored = self.experience(batch, is_safety)
        with self._phase("update"):
            self.update(batch, *scored)
        with self._phase("sync"):
            self.sync()
        self._index += 1
        return {**self.seconds, "step": sum(self.seconds.values())}

    def generate(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """One answer to each prompt, of exactly the work's length."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=self.section.temperature,
            max_tokens=self.work.response_tokens,
            ignore_eos=True,
            detokenize=False,
        )
        assert self._llm is not None
        outputs = self._llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    @torch.no_grad()
    def experience(self, batch: Batch, is_safety: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, R) log-probs, values, advantages and returns, before any update."""
        num_rows, num_tokens = batch.places.shape
        logprobs, ref_logprobs, values = (torch.zeros(num_rows, num_tokens) for _ in range(3))
        scores = {name: torch.zeros(num_rows) for name in self.rewards}
        temperature = self.section.temperature
        for rows, part in batch.micro_batches(range(num_rows), self.section.tokens_to_score):
            logprobs[rows] = logprobs_of(self.policy.model, part, temperature)
            ref_logprobs[rows] = logprobs_of(self.reference, part, temperature)
            values[rows] = values_of(self.value.model, part)
            for name, model in self.rewards.items():
                scores[name][rows] = last_token_scores(model(part.tokens), part.lengths).float()
        names = ("kl_coef", "gamma", "gae_lambda", "whiten_advantages")
        advantages, returns = advantages_and_returns(
            logprobs,
            ref_logprobs,
            values,
            scores["helpfulness"],
            scores["safety"],
            is_safety,
            safety_threshold_raw=scoring_settings(self.section).gate,
            **{name: getattr(self.section, name) for name in names},
        )
        return logprobs, values, advantages, returns

    def update(self, batch: Batch, logprobs: Tensor, values: Tensor, advantages: Tensor, returns: Tensor) -> None:
        """The optimizer steps of policy and value model over one batch."""
        section, num_rows = self.section, len(batch.lengths)
        for _ in range(section.inner_epochs):
            order = torch.randperm(num_rows).tolist()
            for start in range(0, num_rows, section.minibatch_size):
                chosen = order[start : start + section.minibatch_size]
                tokens = len(chosen) * batch.places.shape[1]
                for rows, part in batch.micro_batches(chosen, section.micro_batch_tokens):
                    new = logprobs_of(self.policy.model, part, section.temperature)
                    loss = clipped_policy_loss(new, logprobs[rows], advantages[rows], section.clip_ratio)
                    self.policy.backward(loss / tokens)
                self.policy.step()
                for rows, part in batch.micro_batches(chosen, section.micro_batch_tokens):
                    new = values_of(self.value.model, part)
                    loss = clipped_value_loss(new, values[rows], returns[rows], section.clip_value)
                    self.value.backward(loss / tokens)
                self.value.step()

    def sync(self) -> None:
        """The policy's weights into the engine."""
        assert self._llm is not None
        weights = [(name, p.detach()) for name, p in self.policy.model.named_parameters()]
        if not any(name == "lm_head.weight" for name, _ in weights):  # tied: else the packed output head stays old
            weights.append(("lm_head.weight", dict(weights)["model.embed_tokens.weight"]))
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        self._llm.reset_prefix_cache()

    def engine_gap(self) -> float:
        """Mean |engine - policy| log-prob of freshly sampled tokens, nats: what the sync is checked by."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=1.0, max_tokens=self.work.response_tokens, ignore_eos=True, logprobs=0, detokenize=False
        )
        prompts = self.work.prompts[:4]
        assert self._llm is not None
        outputs = self._llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        sampled = [output.outputs[0] for output in outputs]
        batch = Batch.of(prompts, [list(answer.token_ids) for answer in sampled])
        engine = [[step[token].logprob for step, token in zip(a.logprobs, a.token_ids, strict=True)] for a in sampled]
        with torch.no_grad():
            return (logprobs_of(self.policy.model, batch, 1.0) - torch.tensor(engine)).abs().mean().item()

    def tune(self, *, iterations: int = TUNING) -> dict[int, list[dict[str, float]]]:
        """Gives each phase the thread count under which it was fastest; returns what was measured."""
        found: dict[int, list[dict[str, float]]] = {}
        for count in range(1, min(2, len(os.sched_getaffinity(0))) + 1):
            self.threads = dict.fromkeys(PHASES, count)
            found[count] = [self.iteration() for _ in range(iterations)]
        for name in PHASES:
            self.threads[name] = min(found, key=lambda count: statistics.median(r[name] for r in found[count]))
        return found


def serve(connection: Connection, work: Work, iterations: int) -> None:
    """Runs a loop in a process of its own, which sleeps between iterations: one for each message, until None.

    Answers first with the thread counts, then with the seconds of each iteration.
    """
    loop = BareLoop(work)
    connection.send("started")
    connection.recv()
    for _ in range(WARMUP):
        loop.iteration()
    loop.tune(iterations=iterations)
    connection.send(loop.threads)
    while connection.recv() is not None:
        connection.send(loop.iteration())


def main() -> None:
    """Measures one shape and writes the result."""
    parser = work_parser(__doc__)
    parser.add_argument("--iterations", type=int, default=10)
    options = parser.parse_args()
    load = os.getloadavg()
    with work_directory(options.work, prefix="bare-ppo-") as directory:
        work = make_work(options.shape, directory, smollm2=options.smollm2, precision=options.precision)
        loop = BareLoop(work)
        config = work.described()
    for _ in range(WARMUP):
        loop.iteration()
    tuning = loop.tune()
    rows = [loop.iteration() for _ in range(options.iterations)]
    batch = work.section.batch_size
    measured = {
        "seconds": per_phase(rows),
        "samples_per_s": round(batch / statistics.median(row["step"] for row in rows), 3),
        "rollout_tokens_per_s": round(
            batch * work.response_tokens / statistics.median(row["rollout"] for row in rows), 1
        ),
        "threads": loop.threads,
        "tuning_s": {count: per_phase(found) for count, found in tuning.items()},
        "warmup": WARMUP,
        "engine_gap_nats": loop.engine_gap(),
    }
    print({name: measured["seconds"][name]["median"] for name in (*PHASES, "step")}, loop.threads, flush=True)
    write_result(options.result or RESULTS / f"bare_ppo_{options.shape}.json", measured, config=config, load=load)


if __name__ == "__main__":
    main()
