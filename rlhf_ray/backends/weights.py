"""The weight channel: a trainer's weights into engines' memory, by the way that the layout gives.

store: buckets through host memory and Ray's object store, on CPU and wherever nothing else goes.
ipc: CUDA IPC, where engines and the trainer's ranks have the same GPUs.
nccl: a broadcast from the trainer's first rank, whose GPU is no engine's.

The last two are vLLM's own transfer engines; here are what they ask of a trainer (`WeightStream`), of a connection to
the engines (`EngineClient`), and who holds both (`WeightSender`).
"""

import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
import torch
from ray.exceptions import RayActorError
from torch import Tensor

from model.checkpoint_redundant import EMBEDDING, LM_HEAD
from rlhf_ray.backends.engine_limits import GPU_BUCKET_BYTES
from rlhf_ray.records import WeightBucket, WeightVersion

Way = Literal["store", "ipc", "nccl"]

BUCKET_BYTES = 256 * 2**20
"""Of a bucket in the object store: each is one object, so that a sync is a handful of transfers."""


def fill_buckets(
    weights: Iterable[tuple[str, Tensor]], *, version: WeightVersion, bucket_bytes: int = BUCKET_BYTES
) -> Iterator[WeightBucket]:
    """Groups named parameters of one dtype into buckets of about `bucket_bytes`, in order; a larger one has its own.

    On CPU a bucket's arrays are the parameters' own memory: it is to be put into the store before they change.
    """
    batch: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in weights:
        num_bytes = tensor.numel() * tensor.element_size()
        if batch and (size + num_bytes > bucket_bytes or tensor.dtype != batch[0][1].dtype):
            yield _bucket(batch, version)
            batch, size = [], 0
        batch.append((name, tensor))
        size += num_bytes
    if batch:
        yield _bucket(batch, version)


def _bucket(batch: list[tuple[str, Tensor]], version: WeightVersion) -> WeightBucket:
    return WeightBucket(
        version=version,
        names=tuple(name for name, _ in batch),
        shapes=tuple(tuple(tensor.shape) for _, tensor in batch),
        dtype=batch[0][1].dtype,
        data=tuple(tensor.detach().reshape(-1).cpu().view(torch.uint8).numpy() for _, tensor in batch),
    )


def for_engine(weights: Iterable[tuple[str, Tensor]], *, num_ids: int, tied: bool) -> Iterator[tuple[str, Tensor]]:
    """Parameters as an engine takes them: the rows of the vocabulary that it has, and a tied head by its own name.

    Without the name the packed output projection would silently keep the old weights.
    """
    for name, tensor in weights:
        if name == LM_HEAD and tied:
            continue
        kept = tensor[:num_ids] if name in (EMBEDDING, LM_HEAD) else tensor
        yield name, kept
        if name == EMBEDDING and tied:
            yield LM_HEAD, kept


def scramble(tensor: Tensor) -> Tensor:
    """The tensor in a form in which no model computes what it did, at the price of one pass over memory.

    Scaled by -16, so that what is lost shows in every kind of tensor, alone or with others: gains and projections may
    change sign in pairs, or be near zero. What is zero moves, and not by the same amount in every row.
    """
    rows = torch.arange(tensor.shape[0], device=tensor.device) % 5 - 2
    return (tensor * -16).add_((rows / 8).to(tensor.dtype).view(-1, *[1] * (tensor.dim() - 1)))


@dataclass(frozen=True)
class Channel:
    """A connection from a trainer's ranks to engines, from GPU to GPU; equal while no engine was started anew."""

    way: Way
    engines: tuple[Any, ...] = field(compare=False)
    """Their Ray actors, `RolloutWorker`."""
    pids: tuple[int, ...]
    """Their processes."""
    ranks_each: int
    """Tensor-parallel ranks of an engine."""
    num_ids: int
    """Rows of the vocabulary that they have."""
    timeout_s: float
    """Deadline of each of their calls, seconds."""


class WeightStream:
    """A trained model's parameters for engines, as vLLM's `WeightSource`; all ranks go through it in step.

    Every pass gathers them anew, in buckets where ZeRO 3 has divided them.
    """

    def __init__(self, weights: Callable[[], Iterable[tuple[str, Tensor]]], shapes: Mapping[str, Tensor], **rows: Any):
        """From what `TrainEngine.weights` and `TrainEngine.shapes` return; `rows` as `for_engine` takes them."""
        self._weights, self._shapes, self._rows = weights, shapes, rows
        self.scrambled = False
        """Send every tensor in a form that computes something else."""

    def metadata(self) -> list[Any]:
        """Name, dtype and shape of what a pass will yield; gathers nothing."""
        from vllm.distributed.weight_transfer import ParamMeta

        told = for_engine(self._shapes.items(), **self._rows)
        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in told]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in for_engine(self._weights(), **self._rows):
            yield name, scramble(tensor) if self.scrambled else tensor.detach()

    def largest_bytes(self) -> int:
        """Of a tensor."""
        return max(tensor.numel() * tensor.element_size() for tensor in self._shapes.values())


class EngineClient:
    """The engines as vLLM's `VLLMWeightSyncClient`: each call goes to all at once and waits, with a deadline.

    vLLM's own for Ray waits for ever, and gives several engines the same ranks.
    """

    def __init__(self, channel: Channel):
        self._channel = channel
        self.version = WeightVersion("", 0)
        """Of what is being sent."""
        self.give_up: Callable[[], object] = bool
        """Called where engines fail to take weights: the trainer may wait for them in a broadcast."""
        self.failure: Exception | None = None
        """Why they did."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connects them; each has its own place in the communicator, where there is one."""
        own = [dict(init_info) for _ in self._channel.engines]
        for index, info in enumerate(own):
            if "rank_offset" in info:
                info["rank_offset"] += index * self._channel.ranks_each
        self._all("init_weight_transfer_engine", [{"init_info": info} for info in own])

    def shutdown_weight_transfer_engine(self) -> None:
        """Takes the connection away."""
        self._all("shutdown_weight_transfer_engine")

    def start_weight_update(self) -> None:
        """Has them ready to take weights."""
        self._all("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        """Has them take what the info tells of; over NCCL in a thread, while the trainer broadcasts."""
        try:
            self._all("update_weights", [{"update_info": update_info}] * len(self._channel.engines))
        except RayActorError:
            raise  # of a death the driver knows, which ends the trainer's ranks too
        except Exception as error:
            self.failure = error
            self.give_up()
            raise

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Puts what they took in place, under `version`."""
        self._all("finish_weight_update")
        engines = self._channel.engines
        ray.get([engine.took_weights.remote(self.version) for engine in engines], timeout=self._channel.timeout_s)

    def _all(self, method: str, arguments: Sequence[Mapping[str, Any]] = ()) -> None:
        engines = self._channel.engines
        calls = [
            engine.transfer.remote(method, **own)
            for engine, own in zip(engines, arguments or [{}] * len(engines), strict=True)
        ]
        ray.get(calls, timeout=self._channel.timeout_s)


class WeightSender:
    """The trainer's end of a channel, on each of its ranks; the first speaks with the engines."""

    def __init__(self, channel: Channel, stream: WeightStream, *, rank: int):
        """Connects, all ranks and the engines together."""
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

        self.channel, self._stream, self._client = channel, stream, EngineClient(channel)
        if rank == 0:
            self._client.shutdown_weight_transfer_engine()  # of a trainer that is no more
        if torch.cuda.is_available():
            # NCCL's start asks vLLM for the current stream, which makes one of its own unless it has been told of one.
            torch.cuda.set_stream(torch.cuda.current_stream())
        size = max(GPU_BUCKET_BYTES, stream.largest_bytes())
        self._engine: Any = WeightTransferTrainerFactory.trainer_init(
            _init_info(channel, rank, bucket_bytes=size), client=self._client, source=stream
        )
        if channel.way == "nccl" and rank == 0:
            self._client.give_up = self._engine.model_update_group.destroy  # aborts what is under way

    def send(self, version: WeightVersion, *, scrambled: bool = False) -> None:
        """Sends all weights, bucket by bucket, and says which they are."""
        self._client.version, self._stream.scrambled = version, scrambled
        self._client.failure = None
        try:
            self._engine.send_weights()
        except Exception as error:
            raise self._client.failure or error from error

    def close(self) -> None:
        """Gives up the trainer's end."""
        self._engine.shutdown()


def _init_info(channel: Channel, rank: int, *, bucket_bytes: int) -> Any:
    """vLLM's, of one of its transfer engines."""
    buckets = {"packed": True, "packed_buffer_size_bytes": bucket_bytes}
    if channel.way == "ipc":
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        return IPCTrainerInitInfo(rank=rank, **buckets)
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    address = ray.util.get_node_ip_address()
    with socket.create_server((address, 0)) as free:
        port = free.getsockname()[1]
    size = 1 + len(channel.engines) * channel.ranks_each
    return NCCLTrainerInitInfo(rank=rank, master_address=address, master_port=port, world_size=size, **buckets)
