"""The weight channel: after a sync the engine computes what the trainer does; and the driver sees no tensor.

Real roles, as a run has them, on a model of 0.16M parameters.
"""

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from torch import Tensor
from training_world import OPTIM, TIED, UNTIED

from cluster.worker_group import WorkerError, collect
from model.checkpoint import iterate_tensors, save_checkpoint
from model.config import ModelConfig
from model.llama import Head, Llama
from rlhf_ray.backends.weights import fill_buckets
from rlhf_ray.config import Config, parse_config
from rlhf_ray.data.schemas import PROMPTS, write_table
from rlhf_ray.recipe import ppo
from rlhf_ray.recipe.context import Context
from rlhf_ray.recipe.engines import (
    MAX_SYNCED_GAP,
    WeightChannelError,
    generate,
    open_prompts,
    start_engines,
    sync_weights,
    verify_weight_channel,
)
from rlhf_ray.recipe.tokenizer import save_tokenizer, train_tokenizer
from rlhf_ray.records import Rollouts
from rlhf_ray.run_state import RunDir
from rlhf_ray.workers.roles import WORKER_CLASSES
from rlhf_ray.workers.rollout import RolloutWorker
from rlhf_ray.workers.scorer import ScorerWorker
from rlhf_ray.workers.trainer import TrainerWorker

NUM_PROMPTS = 12
VOCAB = 300


@dataclasses.dataclass(frozen=True)
class World:
    """Checkpoints, one tokenizer beside them, and a prompts table."""

    directory: Path

    @classmethod
    def make(cls, directory: Path) -> "World":
        tokenizer = train_tokenizer(["hello there", "what is a cat", "abcdefgh"] * 9, vocab_size=VOCAB)
        world = cls(directory)
        for name, config, head in (
            ("tied", TIED, "lm"),
            ("tied-trained", TIED, "lm"),
            ("untied", UNTIED, "lm"),
            ("untied-trained", UNTIED, "lm"),
            ("helpfulness", TIED, "scalar"),
            ("safety", TIED, "scalar"),
            ("short", TIED.model_copy(update={"max_seq_len": 20}), "scalar"),
        ):
            world._save(name, config, head)
        save_tokenizer(tokenizer, directory / "tokenizer")
        rows = [
            {
                "prompt_id": str(i),
                "messages": [{"role": "user", "content": "hello cat " + "ab" * i}],
                "is_safety": i % 3 == 0,
                "kind": "test",
                "truth": "",
            }
            for i in range(NUM_PROMPTS)
        ]
        write_table(directory / "prompts.parquet", rows, PROMPTS)
        return world

    def _save(self, name: str, config: ModelConfig, head: Head) -> None:
        config = config.model_copy(update={"vocab_size": VOCAB})
        model = Llama(config, head=head)
        model.init_weights(seed=len(name))
        with torch.no_grad():  # as large as trained weights: log-probs that differ between tokens
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(4)
        save_checkpoint(
            self.directory / name,
            config,
            model.named_parameters(),
            num_labels=1 if head == "scalar" else None,
        )

    def config(self, chat: str, precision: str) -> Config:
        """Of a run whose PPO is ready to begin."""
        inputs = {name: str(self.directory / name) for name in ("helpfulness", "safety")}
        chat_directory, prompts = str(self.directory / chat), str(self.directory / "prompts.parquet")
        return parse_config(
            {
                "run": {"precision": precision, "device": "cpu"},
                "cluster": {"cores": 2, "call_timeout_s": 300.0},
                "inputs": {**inputs, "tokenizer": str(self.directory / "tokenizer"), "chat": chat_directory},
                "data": {"prompts_train": prompts, "prompts_early_stop": prompts},
                "ppo": {"batch_size": 8, "minibatch_size": 4, "max_new_tokens": 6, "num_chunks": 2},
            }
        )


class UnpluggableRollout(RolloutWorker):
    """An engine whose weight channel can be made to do nothing."""

    def own_gap(self, probe: Rollouts, logprobs: Tensor) -> float:
        return self._probe_gap(probe, logprobs).mean().item()

    def unplug(self) -> None:
        self.engine.load_weights = lambda weights: [None for _ in weights]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World.make(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module", params=[("tied", "fp32"), ("untied", "fp32"), ("tied", "bf16")], ids="-".join)
def run(request, world):
    """A run's context: an engine on one checkpoint, a policy with other weights."""
    chat, precision = request.param
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(WORKER_CLASSES, "rollout", UnpluggableRollout)
        context = Context(world.config(chat, precision), RunDir(world.directory / f"run-{chat}-{precision}"))
        roles = context.roles
        roles.start("rollout", "policy")
        start_engines(context, context.outputs["chat"])
        open_prompts(context, "prompts_train", max_new_tokens=6)
        trained = str(world.directory / f"{chat}-trained")
        roles["policy"].call(TrainerWorker.build, trained, head="lm", seed=0, runtime=roles.runtime)
        zero_stage = 3 if chat == "untied" else 1
        roles["policy"].call(TrainerWorker.begin_training, optim=OPTIM, num_steps=1, zero_stage=zero_stage)
        yield context
        context.close()


def gap(roles) -> float:
    """Mean |engine - trainer| log-prob over some prompts as they stand, nats."""
    probe = roles["rollout"].submit_one(0, RolloutWorker.probe, "prompts_train", num_data=1)
    trainer = roles["policy"].submit_one(
        0, ScorerWorker.logprobs, probe.data[0], temperature=1.0, micro_batch_tokens=4096, num_data=1
    )
    collect([probe, trainer], timeout_s=300)
    gaps = roles["rollout"].call_one(0, UnpluggableRollout.own_gap, probe.data[0], trainer.data[0])
    return float(gaps)


@pytest.mark.slow
def test_after_a_sync_the_engine_computes_what_the_trainer_does(run):
    precision = run.config.run.precision
    assert gap(run.roles) > 0.5  # two different models
    buckets = sync_weights(run.roles)
    assert gap(run.roles) <= MAX_SYNCED_GAP[precision]
    gaps = verify_weight_channel(run.roles, buckets, prompts="prompts_train", precision=precision)
    assert gaps["synced_gap"] <= gaps["synced_gap_max"] < {"fp32": 1e-3, "bf16": 0.5}[precision]
    assert gaps["scrambled_gap"] > 0.5
    assert run.roles["rollout"].call(RolloutWorker.load_weights, buckets) == [1]  # the version is the bucket's


@pytest.mark.slow
def test_other_weights_are_found_out(run, world):
    precision, chat = run.config.run.precision, run.config.inputs.chat
    dtype = run.roles.runtime.dtype
    other = ((name, tensor.to(dtype)) for name, tensor in iterate_tensors(chat))
    buckets = [ray.put(bucket) for bucket in fill_buckets(other, version=1)]
    with pytest.raises(WeightChannelError, match="after a weight sync its log-probs differ"):
        verify_weight_channel(run.roles, buckets, prompts="prompts_train", precision=precision)


@pytest.mark.slow
@pytest.mark.parametrize("run", [("tied", "fp32")], indirect=True, ids="-".join)
def test_a_prompt_that_stands_several_times_in_a_batch_gets_as_many_answers(run):
    sampled = []
    for num_chunks in (1, 4):
        options = {"num_chunks": num_chunks, "seed": (0, 0), "temperature": 1.0, "max_new_tokens": 6}
        calls = generate(run.roles, "prompts_train", [3, 1, 3, 3], **options)
        collect(calls, timeout_s=300)
        chunks = [ray.get(call.data[0]) for call in calls]
        sampled.append([r.tokens[i][r.response_mask[i]].tolist() for r in chunks for i in range(len(r.tokens))])
    assert sampled[0] == sampled[1]
    assert len({tuple(sampled[0][place]) for place in (0, 2, 3)}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("run", [("tied", "bf16")], indirect=True, ids="-".join)
def test_prompts_fit_every_model_that_reads_them(run, world):
    run.outputs.add("short", world.directory / "short", key="short")
    with pytest.raises(WorkerError, match=r"prompts.parquet row \d+: the prompt has \d+ tokens, at most 14 fit"):
        open_prompts(run, "prompts_train", max_new_tokens=6, readers=("chat", "short"))


@pytest.mark.slow
@pytest.mark.parametrize("run", [("tied", "bf16")], indirect=True, ids="-".join)
def test_the_driver_receives_numbers_and_references_only(run, monkeypatch):
    ppo.load_models(run, None)
    start_engines(run, run.outputs["chat"])
    num_prompts = open_prompts(run, "prompts_train", max_new_tokens=6)
    received: list[Any] = []
    get = ray.get

    def recording(*args: Any, **kwargs: Any) -> Any:
        received.append(get(*args, **kwargs))
        return received[-1]

    monkeypatch.setattr(ray, "get", recording)
    row = ppo.iteration(run.roles, run.config.ppo, 0, num_prompts=num_prompts, seed=0)
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
def test_a_channel_that_does_nothing_is_found_out(run):
    """Last of this engine: it stays unplugged."""
    buckets = sync_weights(run.roles)
    run.roles["rollout"].call(UnpluggableRollout.unplug)
    with pytest.raises(WeightChannelError, match="the weight channel does not reach the engine"):
        verify_weight_channel(run.roles, buckets, prompts="prompts_train", precision=run.config.run.precision)
