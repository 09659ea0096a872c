"""A small world for tests of distributed training: models, data, workers, and plain loops to compare with.

The plain loops take one example at a time, unpadded, through torch and AdamW. They share the model with the
workers, and neither batching, losses nor engine.
"""

import gc
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from seats import launch_alone
from torch import Tensor
from torch.nn.functional import softplus
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from cluster.hardware import resident_bytes
from cluster.worker_group import WorkerGroup
from model.config import PRESETS, ModelConfig, Recompute
from model.heads import state_values
from model.llama import Head, Llama
from rlhf_ray.backends import train as train_module
from rlhf_ray.config import OptimSection
from rlhf_ray.data.batching import DrawRows, minibatch_rows, prompt_rows
from rlhf_ray.data.lm_rows import LMBatch, LMData, LMRows
from rlhf_ray.data.packing import Example, pack, unpacked
from rlhf_ray.data.reward_pairs import Pairs, RewardData
from rlhf_ray.records import Experience, WeightVersion
from rlhf_ray.workers.policy import PolicyWorker
from rlhf_ray.workers.ppo_update import UpdateSettings
from rlhf_ray.workers.reward import RewardWorker
from rlhf_ray.workers.roles import worker_environment
from rlhf_ray.workers.scorer import Runtime
from rlhf_ray.workers.trainer import TrainerWorker
from rlhf_ray.workers.value import ValueWorker

UNTIED = PRESETS["tiny"]
TIED = UNTIED.model_copy(update={"tie_embeddings": True})
STEPS = 20
BATCH = 8
RTOL = 1e-5
LONGEST = 40  # tokens of an example

# Adam divides by sqrt(v) + eps. With the usual tiny eps an element whose gradients are near zero moves by
# about lr in a direction that rounding decides, and nothing can be compared to 1e-5; besides, gradients
# that are all wrong by one factor would leave the steps as they are. eps=1e-3 is near these models'
# gradients: rounding stays as small as it is in the gradient, and a wrong factor shows. The clip is such
# that in next-token training some steps are clipped and some are not.
OPTIM = OptimSection(lr=1e-3, warmup_steps=4, eps=1e-3, grad_clip=1.7)


class TrainingWorker(PolicyWorker, ValueWorker, RewardWorker):
    """A rank that can take every trained role, so that one group of processes serves a whole test module."""

    def train_steps(self, num_steps: int, method: Callable[..., dict[str, float]], **options: Any) -> Any:
        """Metrics of each of the first steps."""
        return [method(self, step, **options) for step in range(num_steps)]

    def faulty_step(self, fault: str, faulty_rank: int) -> dict[str, float]:
        """One step; the last micro-batch of one rank has a loss of NaN or inf, or a gradient of NaN."""

        def loss_fn(model: Any, index: int) -> tuple[Tensor, dict[str, Tensor]]:
            mask = torch.tensor([[False, True, True]])
            loss = -model(torch.tensor([[5, 6, 7]]), target_mask=mask).logprobs.sum()
            if index == 1 and self.rank == faulty_rank:
                # The last one is 0 with a gradient of 0 * inf.
                loss = {
                    "nan": loss * torch.nan,
                    "inf": loss * torch.inf,
                    "grad": loss + ((loss * 0) ** 2).sqrt(),
                }[fault]
            return loss, {"index": torch.tensor(float(index))}

        return self.engine.step([0, 1], loss_fn)

    def sent(self, num_micro_batches: int) -> list[dict[str, int]]:
        """What ranks send each other in each micro-batch of a step, and in the last also at the step's end.

        torch's collectives by name -> bytes of the tensors that they reduce, or gather.
        """
        counts: list[dict[str, int]] = []

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                namespace, name = operation.name().split("::")
                if namespace == "c10d":
                    sizes = [tensor.nbytes for tensor in tree_iter(args) if isinstance(tensor, Tensor)]
                    counts[-1][name] = counts[-1].get(name, 0) + max(sizes, default=0)
                return operation(*args, **(kwargs or {}))

        def loss_fn(model: Any, index: int) -> tuple[Tensor, dict[str, Tensor]]:
            counts.append({})
            mask = torch.tensor([[False, True, True]])
            return -model(torch.tensor([[5, 6, 7 + index]]), target_mask=mask).logprobs.sum(), {}

        with Watch():
            self.engine.step(range(num_micro_batches), loss_fn)
        return counts

    def resident_after_unload(
        self, num_builds: int, config: ModelConfig, checkpoint: str, zero_stage: int | None
    ) -> Any:
        """Resident bytes after each of `num_builds` models was in use and unloaded, fp32 and bf16 in turn.

        Args:
            zero_stage: the model's training begins on it; None: `checkpoint` is loaded frozen.
        """
        resident = []
        gc.freeze()  # collections, of which DeepSpeed asks for many, do not go through what was there before
        for number in range(num_builds):
            runtime = Runtime(precision=("fp32", "bf16")[number % 2], device="cpu")
            if zero_stage is None:
                self.load_frozen(checkpoint, head="lm", runtime=runtime)
            else:
                self.build(config, head="lm", seed=1, runtime=runtime)
                self.begin_training(optim=OPTIM, num_steps=STEPS, zero_stage=zero_stage)
            self.open_data(lm_data, BATCH, config.vocab_size, "unpacked")
            if zero_stage is not None:
                self.train_lm(0, batch_size=BATCH, micro_batch_size=2, seed=3)
            self.evaluate_lm(micro_batch_size=BATCH)
            self.unload()
            resident.append(resident_bytes(os.getpid()))
        return resident

    def undivided_while_read(self, source: str | ModelConfig, state: str | None) -> list[int]:
        """Elements of a model that are whole in this process, each time that a tensor is read of it for ZeRO 3."""
        self.build(source, head="lm", seed=1, runtime=Runtime(precision="fp32", device="cpu"))
        model, counts = self._built, []
        assert model is not None
        take = train_module._weights_of_state

        def watched(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                counts.append(sum(p.numel() for p in model.parameters() if not p.is_meta))
                yield name, tensor

        self._weights = watched(self._weights) if self._weights else None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_module, "_weights_of_state", lambda *args: watched(take(*args)))
            self.begin_training(optim=OPTIM, num_steps=STEPS, zero_stage=3, state=state)
        return counts

    def elements_of_share(self) -> int:
        """Of a divided model, those that this rank holds."""
        return sum(parameter.ds_tensor.numel() for parameter in self.engine.module.parameters())

    def copy_weights(self) -> dict[str, Tensor]:
        """Whole weights, from every rank."""
        return {name: tensor.detach().clone() for name, tensor in self.engine.weights()}


def launch(role: str, num_ranks: int, worker: type[TrainerWorker] = TrainingWorker) -> WorkerGroup:
    """A group with one compute thread a rank; its processes can import this module."""
    environment = worker_environment(threads=1, on_gpu=False)
    return launch_alone(
        worker,
        role=role,
        num_ranks=num_ranks,
        env={**environment, "PYTHONPATH": str(Path(__file__).parent)},
        rendezvous=True,
        call_timeout_s=120,
    )


@dataclass(frozen=True)
class Trained:
    """What a training run leaves behind."""

    weights: dict[str, Tensor]
    metrics: list[dict[str, float]]
    """Of each optimizer step."""

    def series(self, name: str) -> list[float]:
        """One metric over the steps."""
        return [row[name] for row in self.metrics]


def begin(
    group: WorkerGroup,
    source: str | ModelConfig,
    head: Head,
    *,
    zero_stage: int = 1,
    precision: str = "fp32",
    optim: OptimSection = OPTIM,
    seed: int = 1,
    state: str | None = None,
    zeroed: bool = False,
    recompute: Recompute = "none",
) -> None:
    """Puts a model under DeepSpeed on every rank, with its scalar head at zero where `zeroed`."""
    runtime = Runtime(precision=precision, device="cpu")
    group.call(TrainerWorker.build, source, head=head, seed=seed, runtime=runtime)
    if zeroed:
        group.call(TrainerWorker.zero_head)
    options: dict[str, Any] = {"optim": optim, "num_steps": STEPS, "state": state}
    group.call(TrainerWorker.begin_training, zero_stage=zero_stage, recompute=recompute, **options)


def train(group: WorkerGroup, method: Callable[..., Any], **options: Any) -> Trained:
    """Steps of a begun training."""
    metrics = group.call(TrainingWorker.train_steps, STEPS, method, **options)[0]
    return Trained(group.call(TrainingWorker.copy_weights)[0], metrics)


def assert_same(run: Trained, expected: Trained) -> None:
    """Every final weight, and loss, gradient norm and learning rate (of each step, or averaged over them)."""
    assert run.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        # An element far smaller than its neighbours carries rounding of their size.
        atol = RTOL * weight.square().mean().sqrt().item()
        torch.testing.assert_close(run.weights[name], weight, rtol=RTOL, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    # Models with a scalar head have gradient norms of 5 to 60, clipped to 1.7, that vary steeply with the
    # weights: where those agree to 1e-6 the norms do to 1e-5.
    for name, rtol in (("loss", RTOL), ("lr", RTOL), ("grad_norm", 5 * RTOL)):
        reference = expected.series(name)
        if len(run.metrics) == 1:
            reference = [np.mean(reference)]
        np.testing.assert_allclose(run.series(name), reference, rtol=rtol, err_msg=name)


# --- next-token training -----------------------------------------------------------------------------------


def lm_examples(count: int, vocab_size: int) -> list[Example]:
    """Random tokens of random lengths; about half are learnt."""
    rng = np.random.default_rng(5)
    lengths = rng.integers(4, LONGEST + 1, count)
    lengths[0] = LONGEST
    return [(rng.integers(4, vocab_size, n).tolist(), (rng.random(n) < 0.5).tolist()) for n in lengths.tolist()]


class WideRows(LMRows):
    """Rows that keep all their padding, where `LMRows` cuts to the longest."""

    def select(self, rows: Sequence[int], device: str) -> LMBatch:
        part = self._packed.take(rows)
        arrays = (part.tokens, part.segment_ids, part.position_ids, part.target_mask)
        return LMBatch(*(torch.from_numpy(array).to(device) for array in arrays))


def lm_data(count: int, vocab_size: int, layout: str) -> LMData:
    """The same examples as plain rows, as rows of twice the width, or packed."""
    examples = lm_examples(count, vocab_size)
    if layout == "packed":
        rows = LMRows(pack(examples, seq_len=2 * LONGEST))
    elif layout == "wide":
        rows = WideRows(unpacked(examples, seq_len=2 * LONGEST))
    else:
        rows = LMRows(unpacked(examples, seq_len=LONGEST))
    return LMData(rows, rows)


def train_lm(
    group: WorkerGroup,
    config: ModelConfig = UNTIED,
    *,
    count: int = 3 * BATCH,
    layout: str = "unpacked",
    batch_size: int = BATCH,
    micro_batch_size: int = 2,
    draw: DrawRows = prompt_rows,
    **options: Any,
) -> Trained:
    """A next-token training run."""
    begin(group, config, "lm", **options)
    group.call(TrainerWorker.open_data, lm_data, count, config.vocab_size, layout)
    method = PolicyWorker.train_lm
    return train(group, method, batch_size=batch_size, micro_batch_size=micro_batch_size, seed=3, draw=draw)


def plain_lm(
    config: ModelConfig = UNTIED,
    *,
    count: int = 3 * BATCH,
    batch_size: int = BATCH,
    draw: DrawRows = prompt_rows,
    scale: float = 1.0,
) -> Trained:
    """The same run, one example at a time; with a `scale` other than 1 the gradients are wrong by it."""
    examples = lm_examples(count, config.vocab_size)

    def losses(model: Llama, step: int) -> list[Tensor]:
        batch = [examples[row] for row in draw(count, batch_size, seed=3, step=step)]
        num_targets = sum(sum(mask[1:]) for _, mask in batch)
        return [-_logprobs(model, t)[torch.tensor(m[1:])].sum() * scale / num_targets for t, m in batch]

    return plain_loop(Llama(config, head="lm"), losses)


def _logprobs(model: Llama, tokens: Sequence[int]) -> Tensor:
    """(T - 1,) log-probs of tokens 1.. of one sequence."""
    row = torch.tensor([tokens])
    log_p = model.logits(row)[0, :-1].log_softmax(dim=-1)
    return log_p.gather(1, row[0, 1:, None]).squeeze(1)


def plain_loop(model: Llama, losses: Callable[[Llama, int], list[Tensor]]) -> Trained:
    """AdamW, clipping and the schedule of OPTIM: four steps of warm-up, then a cosine from lr to lr / 10."""
    model.init_weights(seed=1)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    gains = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}],
        betas=OPTIM.betas,
        eps=OPTIM.eps,
    )
    metrics = []
    for step in range(STEPS):
        shares = [0.25, 0.5, 0.75, 1.0]
        share = shares[step] if step < 4 else 0.1 + 0.45 * (1 + np.cos(np.pi * (step - 4) / (STEPS - 4)))
        for group in optimizer.param_groups:
            group["lr"] = OPTIM.lr * share
        total = 0.0
        for loss in losses(model, step):
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        metrics.append({"loss": total, "grad_norm": norm.item(), "lr": OPTIM.lr * share})
    return Trained({name: p.detach() for name, p in model.named_parameters()}, metrics)


# --- PPO ---------------------------------------------------------------------------------------------------

NUM_ANSWERS = 16
PPO_SETTINGS = UpdateSettings(
    minibatch_size=4,
    inner_epochs=STEPS * 4 // NUM_ANSWERS,
    micro_batch_tokens=100,
    temperature=0.7,
    clip_ratio=0.2,
    clip_value=0.2,
    seed=3,
)


def experiences(vocab_size: int) -> list[Experience]:
    """Two chunks of random answers, whose log-probs and values lie near those of a fresh model.

    Near enough that some tokens clip and some do not.
    """
    generator = torch.Generator().manual_seed(6)
    chunks = []
    for longest in (30, 24):
        rows = NUM_ANSWERS // 2
        lengths = torch.randint(12, longest + 1, (rows,), generator=generator)
        lengths[0] = longest
        places = torch.arange(longest)
        mask = (places >= 8) & (places < lengths[:, None])

        def noise(std: float, shape: Any = mask.shape) -> Tensor:
            return std * torch.randn(shape, generator=generator)

        chunks.append(
            Experience(
                tokens=torch.randint(4, vocab_size, mask.shape, generator=generator) * (places < lengths[:, None]),
                response_mask=mask,
                logprobs=(-torch.tensor(float(vocab_size)).log() + noise(0.15)) * mask,
                values=noise(0.3) * mask,
                advantages=noise(1.0) * mask,
                returns=noise(1.0) * mask,
                weights=1 + noise(0.1).abs(),
                lengths=lengths,
                policy_version=WeightVersion("ppo", 1),
            )
        )
    return chunks


def train_ppo(group: WorkerGroup, head: Head, settings: UpdateSettings = PPO_SETTINGS, **options: Any) -> Trained:
    """One PPO batch in STEPS optimizer steps, on the policy (head "lm") or the value model."""
    begin(group, UNTIED, head, **options)
    method: Any = PolicyWorker.train_policy if head == "lm" else ValueWorker.train_value
    metrics = group.call(method, 0, settings, *experiences(UNTIED.vocab_size))[0]
    return Trained(group.call(TrainingWorker.copy_weights)[0], [metrics])


def plain_ppo(head: Head) -> Trained:
    """The same updates, one answer at a time."""
    chunks = experiences(UNTIED.vocab_size)
    answers = [(chunk, row) for chunk in chunks for row in range(len(chunk.tokens))]
    loss_of = _plain_policy_loss if head == "lm" else _plain_value_loss

    def losses(model: Llama, step: int) -> list[Tensor]:
        epoch, minibatch = divmod(step, NUM_ANSWERS // PPO_SETTINGS.minibatch_size)
        rows = minibatch_rows(NUM_ANSWERS, PPO_SETTINGS.minibatch_size, seed=3, step=epoch)[minibatch]
        num_tokens = sum(int(answers[row][0].response_mask[answers[row][1]].sum()) for row in rows)
        return [loss_of(model, *answers[row]) / num_tokens for row in rows]

    return plain_loop(Llama(UNTIED, head=head), losses)


def _plain_policy_loss(model: Llama, chunk: Experience, row: int) -> Tensor:
    start, end = 8, int(chunk.lengths[row])
    tokens = chunk.tokens[row : row + 1, :end]
    log_p = (model.logits(tokens)[0, start - 1 : -1] / PPO_SETTINGS.temperature).log_softmax(dim=-1)
    logprobs = log_p.gather(1, tokens[0, start:, None]).squeeze(1)
    ratio = (logprobs - chunk.logprobs[row, start:end]).exp()
    advantages = chunk.advantages[row, start:end]
    gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return -(gain * chunk.weights[row, start:end]).sum()


def _plain_value_loss(model: Llama, chunk: Experience, row: int) -> Tensor:
    start, end = 8, int(chunk.lengths[row])
    values = state_values(model(chunk.tokens[row : row + 1, :end]))[0, start:]
    old, returns = chunk.values[row, start:end], chunk.returns[row, start:end]
    clipped = torch.minimum(torch.maximum(values, old - 0.2), old + 0.2)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2).sum()


# --- reward models -----------------------------------------------------------------------------------------

STRENGTHS = ("significantly", "better", "slightly", "negligibly")
BINS = ("chosen_safe", "both_safe", "both_unsafe", None)
SAFETY_LOSS_COEF = 0.7


def comparison_rows(count: int) -> list[dict[str, Any]]:
    """Comparisons of random lower-case answers."""
    rng = np.random.default_rng(7)

    def text() -> str:
        letters = rng.choice(list("abcdefgh  "), int(rng.integers(2, 24)))
        return "x" + "".join(letters).strip()

    return [
        {
            "comparison_id": str(number),
            "guideline": "safety",
            "strength": STRENGTHS[number % 4],
            "safety_bin": BINS[number // 2 % 4],
            "messages": [{"role": "user", "content": text()}],
            "chosen": text(),
            "rejected": text(),
            "chosen_finished": True,
            "rejected_finished": number % 3 > 0,
        }
        for number in range(count)
    ]


def reward_data(num_steps: int) -> RewardData:
    """Fresh pairs for every step, in order."""
    from rlhf_ray.recipe.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["abcdefgh abcdefgh"] * 9, vocab_size=300)
    rows = comparison_rows(3 * BATCH)
    pairs = Pairs(rows, tokenizer, margin="small", max_length=100, path="comparisons")
    return RewardData(pairs, [[i % len(rows) for i in range(num_steps * BATCH)]], pairs)


def train_reward(
    group: WorkerGroup, *, micro_batch_tokens: int = 150, batch_size: int = BATCH, **options: Any
) -> Trained:
    """A reward model's training run, with margin and safety loss."""
    begin(group, UNTIED, "scalar", **options)
    group.call(TrainerWorker.open_data, reward_data, STEPS)
    return train(
        group,
        RewardWorker.train_reward,
        batch_size=batch_size,
        micro_batch_tokens=micro_batch_tokens,
        safety_loss_coef=SAFETY_LOSS_COEF,
    )


def plain_reward() -> Trained:
    """The same run, one answer at a time."""
    data = reward_data(STEPS)
    margins = {"significantly": 1.0, "better": 2 / 3, "slightly": 1 / 3, "negligibly": 0.0}
    safe = {"chosen_safe": (True, False), "both_safe": (True, True), "both_unsafe": (False, False)}
    rows = comparison_rows(3 * BATCH)

    def losses(model: Llama, step: int) -> list[Tensor]:
        numbers = data.order[0][step * BATCH : (step + 1) * BATCH]
        num_labelled = sum(rows[number]["safety_bin"] is not None for number in numbers)
        parts = []
        for number in numbers:
            chosen, rejected = (model(torch.tensor([side]))[0, -1] for side in data.train._sides[number])
            parts.append(softplus(margins[rows[number]["strength"]] - (chosen - rejected)) / BATCH)
            if rows[number]["safety_bin"] is not None:
                signs = [1.0 if is_safe else -1.0 for is_safe in safe[rows[number]["safety_bin"]]]
                wrong = softplus(-signs[0] * chosen) + softplus(-signs[1] * rejected)
                parts[-1] = parts[-1] + SAFETY_LOSS_COEF * 0.5 * wrong / num_labelled
        return parts

    return plain_loop(Llama(UNTIED, head="scalar"), losses)
