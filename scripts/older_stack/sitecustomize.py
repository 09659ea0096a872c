"""Has torch 2.11 and vLLM 0.26 understand the calls that the project makes to torch 2.13 and vLLM 0.32.

For `scripts/gpu_check.py` alone: where libraries are so old it puts this directory on PYTHONPATH, and Python
imports a module of this name in every process that starts. A module of theirs is changed once it is imported.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


def without_enable_gqa(varlen: Any) -> None:
    """Its FlashAttention groups heads without being told."""
    own = varlen.varlen_attn
    varlen.varlen_attn = lambda *args, enable_gqa=False, **options: own(*args, **options)


@dataclass(frozen=True)
class IPCTrainerInitInfo:
    """As vLLM 0.32's."""

    rank: int
    packed: bool
    packed_buffer_size_bytes: int


class IPCTrainer:
    """As vLLM 0.32's trainer by CUDA IPC, on the function that sends weights in 0.26."""

    def __init__(self, info: IPCTrainerInitInfo, *, client: Any, source: Any):
        """Connects, on all ranks; the first speaks with the engines."""
        self._info, self._client, self._source = info, client, source
        if info.rank == 0:
            client.init_weight_transfer_engine({})

    def send_weights(self) -> None:
        """All of them, bucket by bucket."""
        from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine

        first, options = self._info.rank == 0, asdict(self._info)
        options.pop("rank")
        if first:
            self._client.start_weight_update()
        IPCWeightTransferEngine.trainer_send_weights(
            iter(self._source), {"send_mode": lambda info: self._client.update_weights(asdict(info)), **options}
        )
        if first:
            self._client.finish_weight_update()

    def shutdown(self) -> None:
        """Holds nothing."""


def with_ipc_trainer(factory: Any) -> None:
    """The only one that is made."""
    factory.WeightTransferTrainerFactory.trainer_init = IPCTrainer


def with_init_info(ipc_engine: Any) -> None:
    """What the trainer is made of."""
    ipc_engine.IPCTrainerInitInfo = IPCTrainerInitInfo


def with_shutdown(gpu_worker: Any) -> None:
    """Of a connection that, by CUDA IPC, holds nothing."""
    gpu_worker.Worker.shutdown_weight_transfer_engine = lambda worker: None


CHANGES: dict[str, Callable[[Any], None]] = {
    "torch.nn.attention.varlen": without_enable_gqa,
    "vllm.distributed.weight_transfer.factory": with_ipc_trainer,
    "vllm.distributed.weight_transfer.ipc_engine": with_init_info,
    "vllm.v1.worker.gpu_worker": with_shutdown,
}


class Changing(MetaPathFinder):
    """Finds these modules as Python does, and changes them when they have been executed."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        """None for all others."""
        spec = PathFinder.find_spec(name, path) if name in CHANGES else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def changed(module: ModuleType) -> None:
                execute(module)
                CHANGES[name](module)

            spec.loader.exec_module = changed  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Changing())
