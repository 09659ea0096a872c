"""Training by DeepSpeed ZeRO: one optimizer step over micro-batches, export of whole weights, resumable state.

The only file that imports DeepSpeed. Every stage trains through `TrainEngine.step`.
"""

import gc
import inspect
import logging
import math
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.llama import Llama, fill
from rlhf_ray.backends.train_state import PARTS, StateReader, write_state
from rlhf_ray.config import can_sleep

B = TypeVar("B")
LossFn = Callable[[nn.Module, B], tuple[Tensor, dict[str, Tensor]]]

_GATHER_BYTES = 256 * 2**20


class NonFiniteError(RuntimeError):
    """A loss, reward or gradient is NaN or infinite; the optimizer step is not taken."""

    def __init__(self, message: str, details: dict[str, Any] | None = None):
        """`details` are JSON-ready facts about the step, for a dump by whoever knows where files go."""
        super().__init__(message)
        self.details = details or {}


def init_distributed(device: torch.device) -> None:
    """Joins the role's process group, once per process: gloo on CPU, NCCL on CUDA."""
    os.environ["DS_ACCELERATOR"] = "cuda" if device.type == "cuda" else "cpu"
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not dist.is_initialized():
        # An all-reduce for inference, unused here. Building it takes g++ and ten seconds, and a process killed in
        # the middle leaves a lock for which every later one waits for ever.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        backend = "nccl" if device.type == "cuda" else "gloo"
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(backend, store=_store(rank, world_size), rank=rank, world_size=world_size)
        deepspeed.init_distributed(dist_backend=backend, verbose=False)  # takes what is there


def _store(rank: int, world_size: int) -> dist.TCPStore:
    """Where the ranks find each other. torch's own, by the same variables, would listen on every interface."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    listening: dict[str, Any] = {}
    if rank == 0:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening["master_listen_fd"] = socket.create_server((host, port), family=family).detach()
    return dist.TCPStore(host, port, world_size, rank == 0, **listening)


def learning_rate_scale(
    step: int, *, num_steps: int, warmup_steps: int, warmup_ratio: float, schedule: str, min_lr_ratio: float
) -> float:
    """The learning rate of 0-based `step` as a share of the peak: linear warm-up, then cosine or constant (§2.2)."""
    warmup = max(warmup_steps, math.ceil(warmup_ratio * num_steps))
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, num_steps - warmup)
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class TrainEngine:
    """A model under DeepSpeed with AdamW and a learning-rate schedule."""

    group = None
    """Ranks that gather weights from each other, as of a frozen model: all of the role."""

    def __init__(
        self,
        model: Llama,
        *,
        optim: Any,
        num_steps: int,
        zero_stage: int,
        precision: str,
        weights: Iterator[tuple[str, Tensor]] | None = None,
        state: Path | None = None,
        masters: Iterable[tuple[str, Tensor]] = (),
    ):
        """Wraps `model`, on every rank with the weights that rank 0 has.

        Args:
            weights: of a model on the meta device, on rank 0: name and value of each parameter in their order.
            optim: an `OptimSection`.
            num_steps: length of the schedule, optimizer steps.
            precision: "bf16" (fp32 master weights) or "fp32".
            state: a directory of `save_state` to go on from, whatever ranks and stage wrote it.
            masters: names and values of the master weights that hold more than the model's bf16; names that are no
                parameter's are passed over. Not read where there is a state.
        """
        import deepspeed

        if state is not None and dist.get_rank() == 0:  # before DeepSpeed takes copies of the weights
            weights = _weights_of_state(model, state)
        decayed = {name for name, p in model.named_parameters() if p.dim() >= 2}
        config = _deepspeed_config(optim, zero_stage=zero_stage, precision=precision)
        if zero_stage == 3:
            divide(model.to(torch.bfloat16 if precision == "bf16" else torch.float32), weights, config)
        else:
            _take_weights(model, model, weights)
        parameters = list(model.named_parameters())
        groups = [
            {"params": [p for name, p in parameters if name in decayed], "weight_decay": optim.weight_decay},
            {"params": [p for name, p in parameters if name not in decayed], "weight_decay": 0.0},
        ]
        self._adamw = adamw = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
        self._schedule = schedule = torch.optim.lr_scheduler.LambdaLR(
            adamw,
            lambda step: learning_rate_scale(
                step,
                num_steps=num_steps,
                warmup_steps=optim.warmup_steps,
                warmup_ratio=optim.warmup_ratio,
                schedule=optim.schedule,
                min_lr_ratio=optim.min_lr_ratio,
            ),
        )
        self.zero_stage = zero_stage
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=adamw,
            lr_scheduler=schedule,
            dist_init_required=False,
            config=config,
        )
        if zero_stage == 0 and precision == "bf16":
            # To allocate AdamW's state DeepSpeed took a step on zero gradients. It decayed the weights, and counted
            # in the bias correction, which makes all early steps too small.
            adamw.state.clear()
            self._engine.optimizer.refresh_fp32_params()
        self.num_ranks: int = dist.get_world_size()
        if state is not None:
            self._take_state(state)
        else:
            self._take_masters(masters)

    @property
    def module(self) -> nn.Module:
        """The model as it is called."""
        return self._engine

    @property
    def sharded(self) -> bool:
        """Whether ranks gather weights from each other on the way: all must pass as many micro-batches."""
        return self.zero_stage == 3 and self.num_ranks > 1

    @property
    def padded(self) -> bool:
        """Whether rows are padded on their way through the model; else their tokens lie end to end."""
        return not self._engine.module.model.lays_end_to_end(self._engine.device)

    @torch.no_grad()
    def forward(self, tokens: Tensor, **options: Any) -> Any:
        """As `Llama.forward`, without gradients."""
        return self._engine(tokens, **options)

    def sleep(self) -> None:
        """Leaves the device to others, as far as it can: DeepSpeed moves states of ZeRO 2 and 3 to host memory."""
        if can_sleep(self.zero_stage):
            from deepspeed.ops.adam import fused_adam

            # Stage 3 moves states of DeepSpeed's own AdamW alone, by its class; torch's has the same two.
            own, fused_adam.FusedAdam = fused_adam.FusedAdam, type(self._adamw)
            try:
                self._engine.offload_states(pin_memory=self._engine.device.type == "cuda")
            finally:
                fused_adam.FusedAdam = own

    def wake(self) -> None:
        """Comes back to it."""
        if can_sleep(self.zero_stage):
            self._engine.reload_states()

    def step(self, micro_batches: Sequence[B], loss_fn: LossFn[B]) -> dict[str, float]:
        """One optimizer step; gradients are those of the sum of the losses over micro-batches and ranks.

        Every rank passes the same number of micro-batches. A loss divides by (global denominator / ranks), because
        DeepSpeed averages over ranks; metrics are summed over micro-batches and averaged over ranks likewise.

        Returns:
            the metrics with "loss", "grad_norm" (of the whole step, before clipping) and "lr".
        Raises:
            NonFiniteError: a rank's loss or the gradient norm is not finite: on every rank, so that none is
                left waiting for another, and before weights or optimizer change.
        """
        parts: list[dict[str, Tensor]] = []
        for index, batch in enumerate(micro_batches):
            # DeepSpeed knows of one accumulation step and is told the boundary, so it does not divide by their number.
            # Stages 0 and 1 reduce gradients at the boundary alone; 2 and 3, which divide them, at every micro-batch.
            self._engine.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            loss, metrics = loss_fn(self._engine, batch)
            self._engine.backward(loss)
            parts.append({name: value.detach().float() for name, value in {"loss": loss, **metrics}.items()})
        own = {name: torch.stack([part[name] for part in parts]).sum() for name in parts[0]}
        averaged = self._average(own)
        if not math.isfinite(averaged["loss"]):
            losses = self._from_ranks(own["loss"])
            worst = next(rank for rank, loss in enumerate(losses) if not math.isfinite(loss))
            raise NonFiniteError(
                f"loss is {losses[worst]} on rank {worst} of {self.num_ranks}",
                {"loss_of_ranks": losses, **_details(parts)},
            )
        averaged["lr"] = self._engine.get_lr()[0]
        averaged["grad_norm"] = self._take_step()
        if not math.isfinite(averaged["grad_norm"]):
            raise NonFiniteError("gradient norm is not finite", {**averaged, **_details(parts)})
        return averaged

    def _take_step(self) -> float:
        """Clips and updates, unless the gradient norm, which is returned, is not finite."""
        if isinstance(self._engine.optimizer, torch.optim.Optimizer):
            # Stage 0 in fp32 is bare AdamW: DeepSpeed clips, but reports no norm and checks nothing.
            gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients))
            if math.isfinite(norm):
                self._engine.step()
            return norm
        self._engine.step()
        if not self._engine.was_step_applied():
            return float("nan")
        return float(self._engine.get_global_grad_norm())

    def _average(self, values: dict[str, Tensor]) -> dict[str, float]:
        names = sorted(values)
        stacked = torch.stack([values[name] for name in names]).to(self._engine.device)
        dist.all_reduce(stacked)
        return dict(zip(names, (stacked / self.num_ranks).tolist(), strict=True))

    def _from_ranks(self, value: Tensor) -> list[float]:
        table = torch.zeros(self.num_ranks, device=self._engine.device)
        table[dist.get_rank()] = value
        dist.all_reduce(table)
        return [float(x) for x in table.tolist()]

    @torch.no_grad()
    def forward_nothing(self) -> None:
        """Takes part in what other ranks gather."""
        sample_forward(self._engine.module, self._engine, self._engine.device)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Whole parameters in the model's dtype; all ranks must go through it together (ZeRO-3 gathers)."""
        return whole_weights(self._engine.module, sharded=self.zero_stage == 3)

    def shapes(self) -> dict[str, Tensor]:
        """The parameters that `weights` goes through, whole, on the meta device."""
        return {
            name: torch.empty(getattr(p, "ds_shape", p.shape), dtype=p.dtype, device="meta")
            for name, p in self._engine.module.named_parameters()
        }

    def save_state(self, directory: Path) -> None:
        """Writes fp32 weights, AdamW moments and the step; each rank what it holds of them."""
        if not self._adamw.state:  # no step was taken yet, as while the value model warms up
            self._make_moments()
            self._set_steps(0)
        self._link_moments()
        steps = next(iter(self._adamw.state.values()))["step"]
        runs = ((name, start, held) for name, _, start, held in self._held() if held["weight"].numel())
        write_state(directory, runs, steps=int(steps), rank=dist.get_rank())

    def _held(self) -> Iterator[tuple[str, nn.Parameter, int, dict[str, Tensor]]]:
        """What this rank holds of each parameter: (name, parameter, first element, tensors by PARTS), which are where
        DeepSpeed has them. At stage 0, of which every rank holds all, it is rank 0's.
        """
        for name, parameter in self._engine.module.named_parameters():
            if self.zero_stage == 0:
                if dist.get_rank() == 0:
                    master = self._masters()[parameter]
                    moments = self._adamw.state[master]
                    yield name, parameter, 0, {"weight": master, **{part: moments[part] for part in PARTS[1:]}}
            elif self.zero_stage == 3:
                from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

                size, whole = parameter.ds_tensor.numel(), int(parameter.ds_numel)
                start = min(whole, size * dist.get_rank())
                own = slice(0, min(size, whole - start))  # what is behind pads the last rank's
                moments = {part: safe_get_local_optimizer_state(parameter, part)[own] for part in PARTS[1:]}
                yield name, parameter, start, {"weight": safe_get_local_fp32_param(parameter)[own], **moments}
            elif (mapping := parameter._hp_mapping) is not None:
                moments = {part: mapping.get_optim_state_fragment(part) for part in PARTS[1:]}
                yield name, parameter, mapping.lp_fragment_address.start, {"weight": mapping.hp_fragment, **moments}

    def _take_masters(self, masters: Iterable[tuple[str, Tensor]]) -> None:
        """DeepSpeed made its own from the model's weights."""
        parameters = dict(self._engine.module.named_parameters())
        with torch.no_grad():
            for name, weight in masters:
                if name in parameters:  # else it belongs to a head that this model does without
                    self._set_state(parameters[name], {"weight": weight.float().to(self._engine.device)})

    def _take_state(self, directory: Path) -> None:
        """Takes master weights, moments and step from disk; the model has its weights already."""
        self._make_moments()
        with torch.no_grad(), StateReader(directory) as reader:
            for name, parameter, start, held in self._held():
                for part, tensor in held.items():
                    found = reader.read(name, part, start=start, numel=tensor.numel())
                    self._set_held(parameter, part, tensor, found.to(tensor.device))
            if self.zero_stage == 0:  # every rank holds all
                for name, parameter in self._engine.module.named_parameters():
                    self._set_state(parameter, {part: reader.read(name, part).view_as(parameter) for part in PARTS})
            self._set_steps(reader.steps)

    def _set_held(self, parameter: nn.Parameter, part: str, tensor: Tensor, found: Tensor) -> None:
        """Puts what was read in the place of what this rank holds."""
        if self.zero_stage != 3:
            tensor.copy_(found.view_as(tensor))
            return
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        padded = nn.functional.pad(found, (0, parameter.ds_tensor.numel() - len(found)))  # type: ignore[attr-defined]
        if part == "weight":
            safe_set_local_fp32_param(parameter, padded)
        else:
            safe_set_local_optimizer_state(parameter, padded, part)

    def _set_steps(self, steps: int) -> None:
        """Goes to a place in the schedule and in AdamW's bias correction; the moments are there."""
        for moments in self._adamw.state.values():
            moments["step"] = torch.tensor(float(steps), device=self._engine.device)  # where fused AdamW wants it
        self._schedule.last_epoch = steps
        rates = [
            rate * scale(steps) for rate, scale in zip(self._schedule.base_lrs, self._schedule.lr_lambdas, strict=True)
        ]
        for group, rate in zip(self._adamw.param_groups, rates, strict=True):
            group["lr"] = rate
        self._schedule._last_lr = rates

    def _set_state(self, parameter: nn.Parameter, parts: dict[str, Tensor]) -> None:
        """Sets master weight and, where given, moments."""
        moments = {part: tensor for part, tensor in parts.items() if part != "weight"}
        if self.zero_stage == 0:
            master = self._masters()[parameter]
            master.copy_(parts["weight"])
            for part, tensor in moments.items():
                self._adamw.state[master][part].copy_(tensor)
            return
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        safe_set_full_fp32_param(parameter, parts["weight"])
        for part, tensor in moments.items():
            safe_set_full_optimizer_state(parameter, tensor, part)

    def _masters(self) -> dict[nn.Parameter, Tensor]:
        """Stage 0: each parameter's fp32 weights, which in fp32 are itself."""
        optimizer = self._engine.optimizer
        if optimizer is self._adamw:
            return {p: p for group in self._adamw.param_groups for p in group["params"]}
        pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        return {p: master for own, masters in pairs for p, master in zip(own, masters, strict=True)}

    def _make_moments(self) -> None:
        """Moments of zero. DeepSpeed makes its own at the first step: here on zero gradients, at a rate of zero."""
        if self.zero_stage == 0:
            for master in self._masters().values():
                self._adamw.state[master] = {part: torch.zeros_like(master) for part in PARTS[1:]}
            return
        for group in self._adamw.param_groups:
            group["lr"] = 0.0
        self._engine.set_gradient_accumulation_boundary(True)
        nothing = sample_forward(self._engine.module, self._engine, self._engine.device)
        self._engine.backward(0.0 * nothing)
        self._engine.step()
        self._link_moments()

    def _link_moments(self) -> None:
        """Stages 1 and 2 in fp32 link parameters to moments when the first group has stepped: too soon for others."""
        optimizer = self._engine.optimizer
        if hasattr(optimizer, "_hp_optimizer_states_linked"):
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()

    def close(self) -> None:
        """Frees the optimizer and what DeepSpeed hooked into the model."""
        destroy(self._engine, sharded=self.zero_stage == 3)


def sample_forward(model: Llama, module: nn.Module, device: torch.device) -> Tensor:
    """A scalar made by all parameters from two tokens, which means nothing; `module` is the model as it is called."""
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=device)
    options = {"target_mask": torch.tensor([[False, True]], device=device)} if model.head == "lm" else {}
    result = module(tokens, **options)
    return (result if isinstance(result, Tensor) else result.logprobs).sum()


def _take_weights(model: Llama, part: nn.Module, weights: Iterator[tuple[str, Tensor]] | None) -> None:
    """Gives a part of the model memory, where it has none, and the next of the weights, where there are any."""
    if next(part.parameters()).is_meta:
        part.to_empty(device="cpu")
        model.tie_weights()
    if weights is not None:
        fill(part.parameters(), weights)


def _weights_of_state(model: Llama, state: Path) -> Iterator[tuple[str, Tensor]]:
    """Master weights of a directory of `save_state`, in the order of the model's parameters."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    with StateReader(state) as reader:
        for name, shape in shapes.items():
            yield name, reader.read(name, "weight").view(shape)


def divide(
    model: Llama,
    weights: Iterator[tuple[str, Tensor]] | None,
    config: dict[str, Any],
    *,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Gives each rank of a group, or of the role, its share of the weights that the first one has, by ZeRO 3.

    Part by part: the device never holds more of the model than a part beside the share, and neither does host memory
    where the model is on the meta device and has `weights`, on the first rank, from elsewhere.
    """
    import deepspeed

    for part in model.parts():
        if not all(hasattr(parameter, "ds_id") for parameter in part.parameters()):  # a tied head's are the embedding's
            _take_weights(model, part, weights)
            deepspeed.zero.Init(module=part, config_dict_or_path=config, data_parallel_group=group)


@cache
def replica_group(size: int) -> dist.ProcessGroup | None:
    """This rank's group of so many that follow each other, made by all ranks together; None where it is all of them."""
    return None if size == dist.get_world_size() else dist.new_subgroups(size)[0]


def divide_frozen(
    model: Llama,
    weights: Iterator[tuple[str, Tensor]] | None,
    *,
    group: dist.ProcessGroup | None,
    in_host_memory: bool,
) -> nn.Module:
    """A frozen model, divided over the ranks of a group.

    Args:
        weights: see `divide`.
        in_host_memory: each rank's share stays there, and is copied to the device when it is wanted.
    """
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": next(model.parameters()).dtype == torch.bfloat16},
        "zero_optimization": {
            "stage": 3,
            **({"offload_param": {"device": "cpu", "pin_memory": True}} if in_host_memory else {}),
        },
    }
    divide(model, weights, config, group=group)
    engine, *_ = deepspeed.initialize(model=model, config=config, dist_init_required=False)
    engine.eval()
    return engine


def destroy(engine: Any, *, sharded: bool) -> None:
    """Frees what DeepSpeed holds of a model and has hooked into it."""
    engine.destroy()
    if sharded:
        _forget_sharded_models()
    gc.collect()


def _forget_sharded_models() -> None:
    """Clears where DeepSpeed's ZeRO-3 keeps models of this process for ever, optimizers and all: none is in use."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    FWD_MODULE_STACK.clear()
    method = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
    inspect.getclosurevars(method).nonlocals["func"].cache_clear()  # an lru_cache on a method, keyed by `self`


def _details(parts: list[dict[str, Tensor]]) -> dict[str, Any]:
    """This rank's metrics, one list entry a micro-batch."""
    return {
        "rank": dist.get_rank(),
        "micro_batches": [{name: value.item() for name, value in part.items()} for part in parts],
    }


def whole_weights(module: nn.Module, *, sharded: bool) -> Iterator[tuple[str, Tensor]]:
    """Named parameters of `module`, gathered in buckets where ZeRO-3 has sharded them; tied ones once."""
    if not sharded:
        yield from module.named_parameters()
        return
    import deepspeed

    batch: list[tuple[str, Tensor]] = []
    size = 0
    parameters = list(module.named_parameters())
    for index, (name, parameter) in enumerate(parameters):
        batch.append((name, parameter))
        size += int(parameter.ds_numel) * parameter.element_size()  # type: ignore[attr-defined]
        if size >= _GATHER_BYTES or index == len(parameters) - 1:
            with deepspeed.zero.GatheredParameters([p for _, p in batch]):
                copies = [(n, p.detach().clone()) for n, p in batch]
                if copies[0][1].is_cuda:  # whoever takes them may be on another stream by then
                    torch.cuda.current_stream().synchronize()
                yield from copies
            batch, size = [], 0


def _deepspeed_config(optim: Any, *, zero_stage: int, precision: str) -> dict[str, Any]:
    # In bf16 DeepSpeed accumulates gradients in fp32 at stages 1 to 3; at stage 0 it refuses the mix.
    accumulate = "fp32" if precision == "fp32" or zero_stage > 0 else "bf16"
    return {
        "train_micro_batch_size_per_gpu": 1,  # micro-batches are ours; DeepSpeed only insists on a number
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.grad_clip,
        "bf16": {"enabled": precision == "bf16"},
        "data_types": {"grad_accum_dtype": accumulate},
        "zero_optimization": {"stage": zero_stage, "overlap_comm": _overlaps(zero_stage)},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


def _overlaps(zero_stage: int) -> bool:
    """Whether ranks send each other gradients, and at stage 3 the next weights, while they compute.

    For stages that do so in every micro-batch; stage 2 has a second bucket for it. On CPU both want the cores.
    """
    return zero_stage >= 2 and torch.cuda.is_available() and dist.get_world_size() > 1
