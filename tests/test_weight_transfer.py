"""Weights from GPU to GPU, rehearsed: vLLM's transfer engines between real roles, whose memory is a file for CUDA IPC
and a store's for NCCL. Everything above those two is what runs on GPUs.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from channel_world import World, inputs_of, start
from torch import Tensor
from training_world import OPTIM

from cluster.layout import Host, lay_out
from cluster.worker_group import WorkerError, collect
from model.checkpoint_redundant import LM_HEAD
from model.config import PRESETS
from model.llama import Llama
from rlhf_ray.backends.weights import Channel, EngineClient, WeightSender, WeightStream, for_engine
from rlhf_ray.config import parse_config
from rlhf_ray.machine import demands
from rlhf_ray.recipe.context import Context
from rlhf_ray.recipe.engines import generate, read_prompts, sync_weights, verify_weight_channel
from rlhf_ray.records import WeightVersion
from rlhf_ray.run_state import RunDir
from rlhf_ray.workers.policy import PolicyWorker
from rlhf_ray.workers.roles import WORKER_CLASSES, Roles, worker_environment
from rlhf_ray.workers.rollout import RolloutWorker
from rlhf_ray.workers.trainer import TrainerWorker

VERSION = WeightVersion("ppo", 3)
GPU = "GPU-of-this-test"


class Communicator:
    """NCCL's broadcast through a TCP store: the sender waits for all receivers, and notices no death."""

    def __init__(self, group: Any):
        self._group, self._count = group, 0

    def broadcast(self, tensor: Tensor, src: int, stream: Any = None) -> None:
        group, self._count = self._group, self._count + 1
        if group.rank != src:
            tensor.copy_(group.broadcast(tensor, src))
            group.store.set(f"taken/{self._count}/{group.rank}", b"1")
            return
        group.broadcast(tensor, src)
        for rank in range(1, group.world_size):
            group.store.get(f"taken/{self._count}/{rank}")

    def destroy(self) -> None:
        pass


def communicator(host: str, port: int, rank: int, world_size: int, device: Any) -> Communicator:
    from vllm.distributed.utils import StatelessProcessGroup

    return Communicator(StatelessProcessGroup.create(host=host, port=port, rank=rank, world_size=world_size))


def shared_memory(path: str, size: int) -> Tensor:
    return torch.from_file(path, shared=True, size=size, dtype=torch.uint8)


def packed_ipc_producer(
    iterator: Iterator[tuple[str, Tensor]], gpu_uuid: str, post_iter_func: Any, buffer_size_bytes: int
) -> Iterator[Any]:
    """vLLM's, with a file for the buffer that it shares, and small buckets."""
    from vllm.distributed.weight_transfer.packed_tensor import PackedIpcChunk, pack_tensors

    path = f"/dev/shm/weights-{os.getpid()}"
    buffer = shared_memory(path, 2**20)
    try:
        while (chunk := pack_tensors(iterator, post_iter_func, 2**16)) is not None:
            buffer[: len(chunk.packed_tensor)] = chunk.packed_tensor
            yield PackedIpcChunk(
                names=chunk.names,
                shapes=chunk.shapes,
                dtype_names=[str(dtype).split(".")[-1] for dtype in chunk.dtypes],
                tensor_sizes=chunk.tensor_sizes,
                ipc_handle={gpu_uuid: (path, 2**20)},
            )
    finally:
        Path(path).unlink()


def packed_ipc_consumer(
    ipc_handle: Any, names: Any, shapes: Any, dtype_names: Any, tensor_sizes: Any, **_: Any
) -> list[tuple[str, Tensor]]:
    from vllm.distributed.weight_transfer.packed_tensor import unpack_tensor

    packed = shared_memory(*ipc_handle[GPU])[: sum(tensor_sizes)]
    dtypes = [getattr(torch, name) for name in dtype_names]
    unpacked = unpack_tensor(packed, names, shapes, dtypes, tensor_sizes)
    return [(name, tensor.clone()) for name, tensor in unpacked]


def pretend() -> None:
    """That this process is on a GPU, as far as vLLM's transfer engines ask."""
    from vllm.distributed.weight_transfer import ipc_engine, nccl_common, packed_tensor

    stream = SimpleNamespace(synchronize=lambda: None)
    torch.accelerator.current_device_index = lambda: 0
    torch.accelerator.synchronize = lambda: None
    torch.cuda.get_device_properties = lambda _: SimpleNamespace(uuid=GPU)
    torch.cuda.synchronize = torch.cuda.ipc_collect = lambda: None
    nccl_common.stateless_init_process_group = communicator
    packed_tensor._get_streams = lambda _, count: (stream,) * count
    ipc_engine.packed_ipc_producer, ipc_engine.packed_ipc_consumer = packed_ipc_producer, packed_ipc_consumer


class PretendingPolicy(PolicyWorker):
    """Sends from a GPU that is not there."""

    def send_weights(self, channel: Channel, *, scrambled: bool = False) -> None:
        pretend()
        super().send_weights(channel, scrambled=scrambled)


class PretendingRollout(RolloutWorker):
    """Takes on one; can be made to die on the way."""

    deadly = ""

    def die_in(self, method: str) -> None:
        self.deadly = method

    def transfer(self, method: str, **arguments: Any) -> None:
        pretend()
        if method == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        super().transfer(method, **arguments)


WAYS = {
    # Two ranks under ZeRO 3 gather as they send; two engines take.
    "nccl": ("untied", {"policy": {"num_ranks": 2, "zero_stage": 3}, "rollout": {"num_engines": 2}}),
    "ipc": ("tied", {}),
}


@pytest.fixture(scope="module", params=WAYS)
def run(request: Any, tmp_path_factory: Any) -> Iterator[Context]:
    """Engines on one checkpoint, a policy with other weights, and a way between them."""
    chat, roles = WAYS[request.param]
    for module in (__name__, "channel_world"):
        ray.cloudpickle.register_pickle_by_value(sys.modules[module])
    world = World.make(tmp_path_factory.mktemp("world"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(WORKER_CLASSES, "rollout", PretendingRollout)
        patch.setitem(WORKER_CLASSES, "policy", PretendingPolicy)
        context = Context(world.config(chat, "fp32", **roles), RunDir(world.directory / "run"))
        patch.setattr(context.roles, "weights_way", lambda: request.param)
        context.roles.start("rollout", "policy")
        load_policy(context)
        start(context)
        yield context
        context.close()


def load_policy(context: Context) -> None:
    trained, settings = context.config.inputs.chat + "-trained", context.config.roles.policy
    policy = context.roles["policy"]
    policy.call(TrainerWorker.build, trained, head="lm", seed=0, runtime=context.roles.runtime)
    policy.call(TrainerWorker.begin_training, optim=OPTIM, num_steps=1, zero_stage=settings.zero_stage)
    policy.call(PolicyWorker.set_version, VERSION)


def check(context: Context) -> None:
    """Scrambles, syncs, compares, on every engine; and they know whose weights they have."""
    prompts = read_prompts(inputs_of(context), "prompts_train", max_new_tokens=6, readers=["chat"])
    gaps = verify_weight_channel(context.roles, prompts, precision="fp32")
    assert gaps["synced_gap_max"] < 1e-3 and gaps["scrambled_gap"] > 0.5
    calls = generate(context.roles, prompts, num_chunks=2, seed=(0, 0), temperature=1.0, max_new_tokens=4)
    collect(calls, timeout_s=300)
    assert [ray.get(call.data[0]).policy_version for call in calls] == [VERSION] * 2


@pytest.mark.slow
def test_engines_compute_what_the_trainer_does_before_and_after_one_of_them_died_on_the_way(run: Context) -> None:
    way = run.roles.weights_way()
    channel = run.roles.channel()
    check(run)
    run.roles["rollout"].call_one(run.roles["rollout"].num_ranks - 1, PretendingRollout.die_in, "update_weights")
    begin = time.monotonic()
    with pytest.raises(WorkerError) as caught:
        sync_weights(run.roles)
    # Over NCCL the policy waits for ever for what is gone, and the driver says who it was.
    assert caught.value.died and time.monotonic() - begin < 30
    assert caught.value.role == {"nccl": "rollout", "ipc": "policy"}[way]
    assert run.roles.drop_dead() == {"nccl": ["rollout", "policy"], "ipc": ["rollout"]}[way]
    if way == "nccl":
        load_policy(run)
    start(run)
    assert run.roles.channel() != channel
    check(run)


@pytest.mark.slow
def test_a_policy_that_is_loaded_anew_sends_its_own(run: Context) -> None:
    """Its engines had the connection with the one before."""
    load_policy(run)
    start(run)
    check(run)


def test_the_way_follows_from_who_sits_where(monkeypatch: pytest.MonkeyPatch) -> None:
    def way(gpus: int, **settings: Any) -> str:
        config = parse_config({"run": {"device": "cuda"}, "roles": settings})
        roles = Roles(config, ("policy", "rollout"))
        layout = lay_out(demands(config, ("policy", "rollout")), [Host(gpus=gpus)])
        monkeypatch.setattr(roles, "_take_place", lambda: SimpleNamespace(layout=layout))
        return roles.weights_way()

    two = {"num_ranks": 2}
    assert way(1) == way(2, policy=two, rollout={"num_engines": 2}) == "ipc"
    # One of the policy's GPUs has no engine, whose rank would keep what it offers.
    assert way(2, policy=two) == "store"
    assert way(2) == way(4, policy=two, rollout={"num_engines": 2}) == "nccl"
    # The policy's first rank is on an engine's GPU, another engine's GPU has no rank of it.
    assert way(2, policy={"gpus": [0]}, rollout={"num_engines": 2}) == "store"
    # It is the second that shares.
    assert way(3, policy={**two, "gpus": [0, 1]}, rollout={"num_engines": 2, "gpus": [1, 2]}) == "nccl"
    assert way(1, rollout={"weights": "store"}) == "store"
    config = parse_config({"run": {"device": "cpu"}})
    roles = Roles(config)
    monkeypatch.setattr(roles, "_take_place", lambda: SimpleNamespace(layout=lay_out(demands(config, ()), [Host()])))
    assert roles.weights_way() == "store" and roles.channel() is None


def test_a_trainer_does_not_wait_for_engines_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over NCCL it broadcasts to them in the meantime."""
    engine = SimpleNamespace(transfer=SimpleNamespace(remote=lambda *_, **__: None))
    channel = Channel(way="nccl", engines=(engine,), pids=(1,), ranks_each=1, num_ids=9, timeout_s=1)
    sender, client = WeightSender.__new__(WeightSender), EngineClient(channel)
    aborted = threading.Event()
    client.give_up = aborted.set

    def send_weights() -> None:
        thread = threading.Thread(target=pytest.raises, args=(MemoryError, client.update_weights, {}))
        thread.start()
        assert aborted.wait(20)
        thread.join()
        raise RuntimeError("aborted")  # as the broadcast

    def fail(calls: Any, timeout: float) -> None:
        raise MemoryError("no room for a bucket")

    monkeypatch.setattr(ray, "get", fail)
    sender._client, sender._stream = client, SimpleNamespace()  # type: ignore[assignment]
    sender._engine = SimpleNamespace(send_weights=send_weights)
    with pytest.raises(MemoryError, match="no room"):
        sender.send(VERSION)


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_told_of_the_weights_is_what_comes(tied: bool) -> None:
    model = Llama(PRESETS["tiny"].model_copy(update={"tie_embeddings": tied, "vocab_size": 200}))
    shapes = {name: torch.empty_like(p, device="meta") for name, p in model.named_parameters()}
    stream = WeightStream(model.named_parameters, shapes, num_ids=190, tied=tied)
    pairs = dict(stream)
    told = [(each.name, each.dtype, each.shape) for each in stream.metadata()]
    assert told == [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in pairs.items()]
    assert LM_HEAD in pairs and len(pairs[LM_HEAD]) == 190
    assert stream.largest_bytes() == max(p.numel() for p in model.parameters()) * 4
    true = dict(for_engine(model.named_parameters(), num_ids=190, tied=tied))
    assert all(torch.equal(pairs[name], tensor) and not pairs[name].requires_grad for name, tensor in true.items())
    stream.scrambled = True
    assert not any(torch.equal(tensor, true[name]) for name, tensor in stream)


def test_each_of_several_engines_has_its_own_place_in_the_communicator(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def engine(number: int) -> Any:
        def remote(method: str, **arguments: Any) -> None:
            asked.append((number, method, arguments.get("init_info", {}).get("rank_offset")))

        return SimpleNamespace(transfer=SimpleNamespace(remote=remote))

    monkeypatch.setattr(ray, "get", lambda calls, timeout: asked.append(timeout))
    channel = Channel("nccl", (engine(0), engine(1)), pids=(1, 2), ranks_each=4, num_ids=9, timeout_s=7.0)
    EngineClient(channel).init_weight_transfer_engine({"rank_offset": 1})
    assert asked == [(0, "init_weight_transfer_engine", 1), (1, "init_weight_transfer_engine", 5), 7.0]


def test_segments_that_grow_are_for_gpus_without_an_engine() -> None:
    grows = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert grows.items() <= worker_environment(threads=1, on_gpu=True).items()
    for without in ({"on_gpu": True, "wakes_engines": True}, {"on_gpu": False}):
        assert "PYTORCH_CUDA_ALLOC_CONF" not in worker_environment(threads=1, **without)
