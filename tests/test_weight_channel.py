"""The weight channel: after a sync the engine computes what the trainer does; and the driver sees no tensor.

Real roles, as a run has them, on a model of 0.16M parameters.
"""

import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from channel_world import PADDED, VOCAB, World, inputs_of, start
from torch import Tensor
from training_world import OPTIM, TIED

from cluster.hardware import resident_bytes
from cluster.worker_group import WorkerError, collect
from model.checkpoint import iterate_tensors
from model.checkpoint_files import read_config
from rlhf_ray.backends import rollout as vllm_engine
from rlhf_ray.backends.engine_limits import CPU_BLOCK, kv_cache_bytes
from rlhf_ray.backends.weights import fill_buckets
from rlhf_ray.recipe import ppo
from rlhf_ray.recipe.context import Context
from rlhf_ray.recipe.engines import (
    MAX_SYNCED_GAP,
    WeightChannelError,
    generate,
    read_prompts,
    sync_weights,
    verify_weight_channel,
)
from rlhf_ray.records import PromptBatch, Rollouts, WeightVersion
from rlhf_ray.run_state import RunDir
from rlhf_ray.workers.policy import PolicyWorker
from rlhf_ray.workers.roles import WORKER_CLASSES
from rlhf_ray.workers.rollout import RolloutWorker
from rlhf_ray.workers.scorer import ScorerWorker
from rlhf_ray.workers.trainer import TrainerWorker

VERSION = WeightVersion("ppo", 3)
KINDS = (
    "model.embed_tokens.weight",
    *(f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    *(f"model.layers.1.{name}_layernorm.weight" for name in ("input", "post_attention")),
    "model.norm.weight",
    "lm_head.weight",
)
"""A tensor of each kind."""


class UnpluggableRollout(RolloutWorker):
    """An engine whose weight channel can be made to do nothing, or to lose a tensor."""

    def unplug(self) -> None:
        self.engine.load_weights = lambda buckets, **options: [None for _ in buckets]

    def take_others(self, checkpoint: str, dtype: torch.dtype) -> None:
        """From now on what arrives unscrambled are these weights."""
        own = self.engine.load_weights

        def load(buckets: Any, *, scrambled: bool) -> None:
            for _ in buckets:
                pass
            other = ((name, tensor.to(dtype)) for name, tensor in iterate_tensors(checkpoint))
            own(fill_buckets(other, version=VERSION), scrambled=scrambled)

        self._whole_load, self.engine.load_weights = own, load

    def take_own(self) -> None:
        self.engine.load_weights = self._whole_load

    def lose(self, lost: str, how: str) -> None:
        """From now on `lost` does not arrive, or is taken and the engine computes with what it had before."""
        whole = self._whole = getattr(self, "_whole", vllm_engine._take_weights)

        def take(worker: Any, bucket: Any, *, scrambled: bool, **options: Any) -> None:
            one = vllm_engine.for_engine

            def losing(weights: Any, **settings: Any) -> Iterator[tuple[str, Tensor]]:
                for name, tensor in one(weights, **settings):
                    if name != lost or scrambled:
                        yield name, tensor
                    elif how == "stays scrambled":
                        yield name, vllm_engine.scramble(tensor)

            vllm_engine.for_engine = losing
            try:
                whole(worker, bucket, scrambled=scrambled, **options)
            finally:
                vllm_engine.for_engine = one

        vllm_engine._take_weights = take if lost else whole

    def facts(self) -> dict[str, Any]:
        """What the engine is and where it runs."""
        llm = self.engine._llm
        pids = llm.collective_rpc(lambda worker: os.getpid())
        variables = llm.collective_rpc(lambda worker: sorted(os.environ))
        return {
            "pids": pids,
            "resident": [resident_bytes(pid) for pid in pids],
            "variables": set().union(os.environ, *variables),
            "blocks": llm.llm_engine.vllm_config.cache_config.num_gpu_blocks,
            "ids": self._num_ids,
        }


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World.make(tmp_path_factory.mktemp("world"))


ENGINES = [("tied", "fp32", 1), ("untied", "fp32", 1), ("tied", "bf16", 1), ("tied", "bf16", 2)]


def engine_name(settings) -> str:
    return "-".join(map(str, settings))


@pytest.fixture(scope="module", params=ENGINES, ids=engine_name)
def run(request, world):
    """A run's context: an engine on one checkpoint, of one rank or of two, a policy with other weights."""
    chat, precision, size = request.param
    before = beside_processes()
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(WORKER_CLASSES, "rollout", UnpluggableRollout)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):  # as under torchrun
            patch.setenv(name, "7")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        config = world.config(chat, precision, size)
        context = Context(config, RunDir(world.directory / f"run-{engine_name(request.param)}"))
        roles = context.roles
        roles.start("rollout", "policy")
        start(context)
        trained = str(world.directory / f"{chat}-trained")
        roles["policy"].call(TrainerWorker.build, trained, head="lm", seed=0, runtime=roles.runtime)
        zero_stage = 3 if chat == "untied" else 1
        roles["policy"].call(TrainerWorker.begin_training, optim=OPTIM, num_steps=1, zero_stage=zero_stage)
        yield context
        pids = roles["rollout"].call_one(0, UnpluggableRollout.facts)["pids"]
        context.close()
        deadline = time.monotonic() + 30
        while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
        assert beside_processes() <= before


def beside_processes() -> set[Path]:
    """Files by which ranks of an engine speak with each other: vLLM's shared memory and sockets."""
    shared, sockets = Path("/dev/shm"), Path(tempfile.gettempdir())
    found = {*shared.glob("psm_*"), *shared.glob("vllm_*"), *sockets.glob("vllm-*")}
    return found | {path for path in sockets.iterdir() if path.is_socket()}


@pytest.fixture
def prompts(run) -> PromptBatch:
    return read_prompts(inputs_of(run), "prompts_train", max_new_tokens=6, readers=["chat"])


def gap(roles, prompts: PromptBatch) -> float:
    """Mean |engine - trainer| log-prob over some prompts as they stand, nats."""
    probe = roles["rollout"].submit_one(0, RolloutWorker.probe, prompts, num_data=1)
    trainer = roles["policy"].submit_one(
        0, ScorerWorker.logprobs, probe.data[0], temperature=1.0, micro_batch_tokens=4096, num_data=1
    )
    collect([probe, trainer], timeout_s=300)
    return float(roles["rollout"].call_one(0, RolloutWorker.probe_gap, probe.data[0], trainer.data[0])["mean"])


@pytest.mark.slow
def test_nothing_of_an_embedded_ray_its_trainers_and_engines_listens_beyond_this_machine(run):
    me = psutil.Process()
    open_to_others = {
        (process.name(), connection.laddr)
        for process in [me, *me.children(recursive=True)]
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
        and connection.laddr.ip not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")
    }
    assert open_to_others == set()


@pytest.mark.slow
def test_after_a_sync_the_engine_computes_what_the_trainer_does(run, prompts):
    precision = run.config.run.precision
    assert gap(run.roles, prompts) > 0.5  # two different models
    run.roles["policy"].call(PolicyWorker.set_version, VERSION)
    sync_weights(run.roles)
    assert gap(run.roles, prompts) <= MAX_SYNCED_GAP[precision]
    gaps = verify_weight_channel(run.roles, prompts, precision=precision)
    assert gaps["synced_gap"] <= gaps["synced_gap_max"] < {"fp32": 1e-3, "bf16": 0.5}[precision]
    assert gaps["scrambled_gap"] > 0.5
    buckets = run.roles["policy"].call(PolicyWorker.export_weights)[0]
    assert run.roles["rollout"].call(RolloutWorker.load_weights, buckets) == [VERSION]  # the bucket's


@pytest.mark.slow
def test_the_engine_has_what_it_needs_and_sees_no_ranks_of_others(run):
    facts = run.roles["rollout"].call_one(0, UnpluggableRollout.facts)
    assert not facts["variables"] & {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    assert not facts["variables"] & {"TORCHELASTIC_RUN_ID", "VLLM_CPU_KVCACHE_SPACE"}
    settings, precision = run.config.roles.rollout, run.config.run.precision
    assert len(set(facts["pids"])) == settings.tensor_parallel_size
    # 256 sequences of 256 tokens, 128 to a block, and a block that vLLM keeps: not the 8,192 blocks of 1 GiB.
    assert facts["blocks"] == 256 * 2 + 1
    model = TIED.model_copy(update={"vocab_size": VOCAB})
    cache = kv_cache_bytes(model, sequences=256, precision=precision)
    # 2 layers of 2 heads of 32, keys and values.
    assert cache == facts["blocks"] * CPU_BLOCK * 2 * 2 * 32 * 2 * {"bf16": 2, "fp32": 4}[precision]
    assert 0.2 < run.roles.memory()["memory/rollout_peak_gib"] < 1.6


@pytest.mark.slow
def test_ids_that_the_tokenizer_does_not_know_are_never_sampled(run, prompts):
    ids = run.roles["rollout"].call_one(0, UnpluggableRollout.facts)["ids"]
    rows = read_config(run.config.inputs.chat).vocab_size
    assert ids < rows
    sync_weights(run.roles)
    options = {"num_chunks": 1, "temperature": 2.0, "max_new_tokens": 6}
    [call] = generate(run.roles, prompts, seed=(0, 0), **options)
    rollouts = ray.get(call.data[0])
    assert int(rollouts.tokens.max()) < ids and rollouts.num_ids == ids

    def gap_of(sampled: Rollouts) -> float:
        """Mean |engine - trainer| log-prob of the answers, nats."""
        of_trainer = run.roles["policy"].submit_one(
            0, ScorerWorker.logprobs, sampled, temperature=2.0, micro_batch_tokens=4096, num_data=1
        )
        collect([of_trainer], timeout_s=300)
        difference = ray.get(of_trainer.data[0]) - sampled.rollout_logprobs
        return float(difference[sampled.response_mask].abs().mean())

    assert gap_of(rollouts) <= MAX_SYNCED_GAP[run.config.run.precision]
    if rows == PADDED:  # four of five rows are padding
        assert gap_of(dataclasses.replace(rollouts, num_ids=None)) > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("how", ["does not arrive", "stays scrambled"])
def test_a_tensor_that_is_lost_on_the_way_is_found_out(run, prompts, how):
    if run.config.roles.rollout.tensor_parallel_size > 1:
        pytest.skip("the other processes cannot be made to lose one")
    precision = run.config.run.precision
    tied = read_config(run.config.inputs.chat).tie_embeddings
    # A tied matrix arrives under both names, and the engine keeps the later one for both.
    for kind in KINDS[1:] if tied and how == "stays scrambled" else KINDS:
        run.roles["rollout"].call(UnpluggableRollout.lose, kind, how)
        with pytest.raises((WeightChannelError, WorkerError)) as caught:
            verify_weight_channel(run.roles, prompts, precision=precision)
        assert "after a weight sync its log-probs differ" in str(caught.value) or "the engine got no" in str(
            caught.value
        ), kind
    run.roles["rollout"].call(UnpluggableRollout.lose, "", "")
    verify_weight_channel(run.roles, prompts, precision=precision)


@pytest.mark.slow
def test_syncs_leave_nothing_in_memory(run):
    residents = []
    for _ in range(10):
        sync_weights(run.roles)
        residents.append(sum(run.roles["rollout"].call_one(0, UnpluggableRollout.facts)["resident"]))
    assert residents[9] < 1.02 * residents[2]


@pytest.mark.slow
def test_other_weights_are_found_out(run, prompts):
    precision, chat = run.config.run.precision, run.config.inputs.chat
    run.roles["rollout"].call(UnpluggableRollout.take_others, chat, run.roles.runtime.dtype)
    with pytest.raises(WeightChannelError, match="after a weight sync its log-probs differ"):
        verify_weight_channel(run.roles, prompts, precision=precision)
    run.roles["rollout"].call(UnpluggableRollout.take_own)


@pytest.mark.slow
@pytest.mark.parametrize("run", [("tied", "fp32", 1)], indirect=True, ids=engine_name)
def test_a_prompt_that_stands_several_times_in_a_batch_gets_as_many_answers(run, prompts):
    sampled = []
    for num_chunks in (1, 4):
        options = {"num_chunks": num_chunks, "seed": (0, 0), "temperature": 1.0, "max_new_tokens": 6}
        calls = generate(run.roles, prompts.select([3, 1, 3, 3]), **options)
        collect(calls, timeout_s=300)
        chunks = [ray.get(call.data[0]) for call in calls]
        sampled.append([r.tokens[i][r.response_mask[i]].tolist() for r in chunks for i in range(len(r.tokens))])
    assert sampled[0] == sampled[1]
    assert len({tuple(sampled[0][place]) for place in (0, 2, 3)}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("run", [("tied", "bf16", 1)], indirect=True, ids=engine_name)
def test_the_driver_receives_numbers_and_references_only(run, prompts, monkeypatch):
    ppo.load_models(run, inputs_of(run), None, version=VERSION)
    start(run)
    sync_weights(run.roles)
    received: list[Any] = []
    get = ray.get

    def recording(*args: Any, **kwargs: Any) -> Any:
        received.append(get(*args, **kwargs))
        return received[-1]

    monkeypatch.setattr(ray, "get", recording)
    row = ppo.iteration(run.roles, run.config.ppo, 0, prompts, seed=0)
    assert len(received) > 20
    for value in received:
        found = list(leaves(value))
        assert all(isinstance(leaf, (int, float, str, type(None), ray.ObjectRef)) for leaf in found), found
        assert len(found) < 100
    # The policy is still the reference, and both computed the same chunks.
    assert row["kl/per_sequence"] == 0.0
    assert row["logprob/gap_per_token"] < 0.1
    assert row["policy/approx_kl"] >= 0 and np.isfinite(row["value/loss"])


def leaves(value: Any) -> Iterator[Any]:
    """What a value is made of, down to what is no container."""
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple, set)):
        for item in value:
            yield from leaves(item)
    else:
        yield value


@pytest.mark.slow
def test_a_channel_that_does_nothing_is_found_out(run, prompts):
    """Last of this engine: it stays unplugged."""
    sync_weights(run.roles)
    run.roles["rollout"].call(UnpluggableRollout.unplug)
    with pytest.raises(WeightChannelError, match="the weight channel does not reach the engine"):
        verify_weight_channel(run.roles, prompts, precision=run.config.run.precision)
