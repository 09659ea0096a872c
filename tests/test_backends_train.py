"""The training engine: NaN and inf stop a step on every rank, and a state on disk goes on bit for bit."""

import time

import pytest
import ray
import torch
from training_world import BATCH, OPTIM, RTOL, STEPS, TIED, UNTIED, TrainingWorker, begin, launch, lm_data

from cluster.session import session
from cluster.worker_group import WorkerError, collect
from model.checkpoint import save_checkpoint
from model.flops import num_parameters
from model.llama import Llama
from rlhf_ray.backends import train
from rlhf_ray.backends.train import NonFiniteError
from rlhf_ray.backends.train_state import StateReader
from rlhf_ray.records import Rollouts, WeightVersion
from rlhf_ray.workers.policy import PolicyWorker
from rlhf_ray.workers.scorer import Runtime, ScorerWorker
from rlhf_ray.workers.trainer import TrainerWorker

LM_STEP = {"batch_size": BATCH, "micro_batch_size": 2, "seed": 3}
FP32 = Runtime(precision="fp32", device="cpu")


@pytest.fixture(scope="module")
def group():
    with session(num_cpus=2):
        yield launch("trainer", 2)


def weights_of(group, rank=0):
    return group.call(TrainingWorker.copy_weights)[rank]


@pytest.mark.parametrize(("on_gpu", "ranks", "stages"), [(True, 2, [2, 3]), (True, 1, []), (False, 2, [])])
def test_what_is_sent_in_every_micro_batch_is_sent_while_gpus_compute(monkeypatch, on_gpu, ranks, stages):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setattr(train.dist, "get_world_size", lambda: ranks)
    configs = [train._deepspeed_config(OPTIM, zero_stage=stage, precision="bf16") for stage in range(4)]
    assert [n for n, config in enumerate(configs) if config["zero_optimization"]["overlap_comm"]] == stages


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_what_is_not_finite_on_one_rank_stops_the_step_on_all(group, zero_stage, precision):
    begin(group, TIED, "lm", zero_stage=zero_stage, precision=precision)
    healthy = group.call(TrainingWorker.faulty_step, "none", -1)
    assert healthy[0] == healthy[1]
    before = weights_of(group)
    for fault, message in (("grad", "gradient norm"), ("nan", "loss is nan on rank 1 of 2")):
        start = time.monotonic()
        calls = group.submit(TrainingWorker.faulty_step, fault, 1)
        for call in calls:  # every rank says so, none waits for the other
            with pytest.raises(WorkerError, match=message) as error:
                collect([call], timeout_s=60)
            assert isinstance(error.value.cause, NonFiniteError)
            details = error.value.cause.details
            assert details["rank"] == call.rank and len(details["micro_batches"]) == 2
        assert time.monotonic() - start < 30
        after = weights_of(group)
        for name, weight in before.items():
            assert torch.equal(weight, after[name]), f"{name} changed by a step with fault {fault}"


@pytest.mark.slow
def test_an_infinite_loss_names_its_rank(group):
    begin(group, UNTIED, "lm", zero_stage=1)
    with pytest.raises(WorkerError, match="loss is inf on rank 0 of 2") as error:
        group.call(TrainingWorker.faulty_step, "inf", 0)
    losses = error.value.cause.details["loss_of_ranks"]
    assert losses[0] == float("inf") and 0 < losses[1] < 100


@pytest.mark.slow
@pytest.mark.parametrize(("zero_stage", "precision"), [(0, "bf16"), (1, "bf16"), (2, "fp32"), (3, "bf16")])
def test_a_saved_state_goes_on_bit_for_bit(group, tmp_path, zero_stage, precision):
    def build(state=None):
        begin(group, TIED, "lm", zero_stage=zero_stage, precision=precision, state=state)
        group.call(TrainerWorker.open_data, lm_data, 3 * BATCH, TIED.vocab_size, "unpacked")

    def steps(first, last):
        return [group.call(PolicyWorker.train_lm, step, **LM_STEP)[0] for step in range(first, last)]

    half = STEPS // 2
    build()
    steps(0, half)
    group.call(TrainerWorker.save_state, str(tmp_path / "state"))
    metrics, weights = steps(half, STEPS), weights_of(group)
    build(state=str(tmp_path / "state"))
    assert steps(half, STEPS) == metrics
    resumed = weights_of(group)
    assert all(torch.equal(resumed[name], weight) for name, weight in weights.items())


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_state_saved_before_the_first_step_goes_on(group, tmp_path, zero_stage, precision):
    """As PPO saves a policy that waits for its value model to warm up."""

    def trained(state=None, *, save=False):
        begin(group, TIED, "lm", zero_stage=zero_stage, precision=precision, state=state)
        group.call(TrainerWorker.open_data, lm_data, 3 * BATCH, TIED.vocab_size, "unpacked")
        if save:
            group.call(TrainerWorker.save_state, str(tmp_path / "state"))
        return [group.call(PolicyWorker.train_lm, step, **LM_STEP)[0] for step in range(3)], weights_of(group)

    metrics, weights = trained()
    for run in (trained(save=True), trained(str(tmp_path / "state"))):
        assert run[0] == metrics
        assert all(torch.equal(run[1][name], weight) for name, weight in weights.items())


@pytest.mark.slow
def test_a_state_goes_on_on_other_ranks_and_stages(group, tmp_path):
    def some_steps(ranks, zero_stage, first, last, state):
        begin(ranks, TIED, "lm", zero_stage=zero_stage, state=state)
        ranks.call(TrainerWorker.open_data, lm_data, 3 * BATCH, TIED.vocab_size, "unpacked")
        metrics = [ranks.call(PolicyWorker.train_lm, step, **LM_STEP)[0] for step in range(first, last)]
        ranks.call(TrainerWorker.save_state, str(tmp_path / f"{ranks.num_ranks}-{last}"))
        return metrics, weights_of(ranks)

    one, four = launch("one", 1), launch("four", 4)
    whole_metrics, whole = some_steps(one, 0, 0, 12, None)
    metrics, _ = some_steps(group, 2, 0, 4, None)
    more, _ = some_steps(one, 0, 4, 8, str(tmp_path / "2-4"))
    last, weights = some_steps(four, 3, 8, 12, str(tmp_path / "1-8"))
    one.stop()
    four.stop()
    for own, other in zip([*metrics, *more, *last], whole_metrics, strict=True):
        assert own == pytest.approx(other, rel=RTOL)
    for name, weight in whole.items():
        torch.testing.assert_close(weights[name], weight, rtol=RTOL, atol=RTOL * float(weight.square().mean().sqrt()))


@pytest.mark.slow
@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_a_sharded_model_exports_what_a_whole_one_does(group, config):
    exports = []
    for zero_stage in (0, 3):
        begin(group, config, "lm", zero_stage=zero_stage, precision="bf16")
        exports += group.call(TrainingWorker.copy_weights)  # of both ranks
    assert ("lm_head.weight" in exports[0]) == (not config.tie_embeddings)
    for other in exports[1:]:
        assert list(other) == list(exports[0])
        assert all(torch.equal(other[name], weight) for name, weight in exports[0].items())
    assert exports[0]["model.norm.weight"].dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_masters_are_the_checkpoints_weights_bit_for_bit(group, tmp_path, zero_stage):
    """In bf16 too, where the model rounds them; of all ranks only the first loads any."""
    model = Llama(TIED, head="scalar")
    model.init_weights(seed=2)
    for dtype, zeroed in ((torch.float32, False), (torch.float16, True)):
        stored = {name: weight.to(dtype) for name, weight in model.state_dict().items()}
        checkpoint, state = tmp_path / f"{dtype}", tmp_path / f"{dtype}-state"
        save_checkpoint(checkpoint, TIED, stored.items(), num_labels=1)
        begin(group, str(checkpoint), "scalar", zero_stage=zero_stage, precision="bf16", zeroed=zeroed)
        group.call(TrainerWorker.save_state, str(state))
        with StateReader(state) as reader:
            masters = {name: reader.read(name, "weight") for name in reader.names}
        if zeroed:  # a value model's head starts at zero, whatever the checkpoint's is
            stored["score.weight"] = torch.zeros_like(stored["score.weight"])
        assert masters.keys() == stored.keys()
        own = group.call(TrainingWorker.copy_weights)
        for name, weight in stored.items():
            assert torch.equal(masters[name], weight.float().flatten()), name
            assert all(torch.equal(weights[name], weight.float().bfloat16()) for weights in own), name


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 3])
def test_fresh_weights_are_those_of_the_seed_on_every_rank(group, zero_stage):
    start = Llama(UNTIED)
    start.init_weights(seed=1)
    begin(group, UNTIED, "lm", zero_stage=zero_stage, precision="bf16")
    for weights in group.call(TrainingWorker.copy_weights):
        assert all(torch.equal(weights[name], weight.bfloat16()) for name, weight in start.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("source", ["drawn", "checkpoint", "state"])
@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_a_divided_model_is_never_whole_in_host_memory(group, tmp_path, config, source):
    """Its parts are read and divided one after the other, whatever they come from."""
    model = Llama(config, head="lm")
    parts = [sum(p.numel() for p in part.parameters()) for part in model.parts()]
    given, state = config, None
    if source == "checkpoint":
        given = str(tmp_path / "m")
        save_checkpoint(tmp_path / "m", config, model.state_dict().items())
    elif source == "state":
        begin(group, config, "lm", zero_stage=1)
        state = str(tmp_path / "state")
        group.call(TrainerWorker.save_state, state)
    counts, of_others = group.call(TrainingWorker.undivided_while_read, given, state)
    assert len(counts) == len(list(model.parameters())) and of_others == []
    assert 0 < max(counts) <= max(parts) < num_parameters(config) / 2
    whole = Llama(config, head="lm")
    whole.init_weights(seed=0 if source == "checkpoint" else 1)
    for weights in group.call(TrainingWorker.copy_weights):
        assert all(torch.equal(weights[name], weight) for name, weight in whole.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3, None], ids=["0", "1", "2", "3", "frozen"])
def test_a_model_that_was_unloaded_leaves_no_memory_behind(group, tmp_path, zero_stage):
    # Nearly 4 million parameters: of a whole model that stayed, weights alone would be 2 % of the process each time.
    config = UNTIED.model_copy(update={"hidden_size": 256, "ffn_size": 768, "num_layers": 4, "vocab_size": 2048})
    assert num_parameters(config) > 3.5e6
    checkpoint = tmp_path / "model"
    save_checkpoint(checkpoint, config, Llama(config, head="lm").state_dict().items())
    options = (config, str(checkpoint), zero_stage)
    for resident in group.call(TrainingWorker.resident_after_unload, 10, *options):
        # The third build is in fp32 and the fourth in bf16, as are the ninth and the tenth.
        assert max(resident[8:]) < 1.02 * max(resident[2:4]), [f"{number / 2**20:.0f} MiB" for number in resident]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_training_that_sleeps_between_steps_is_the_same_training(group, tmp_path, zero_stage, precision):
    """The states of ZeRO 2 and 3 leave the device and come back; a sleeper is woken before it is asked for anything."""

    def trained(*, sleeps):
        begin(group, TIED, "lm", zero_stage=zero_stage, precision=precision)
        group.call(TrainerWorker.open_data, lm_data, 3 * BATCH, TIED.vocab_size, "unpacked")
        metrics = []
        for step in range(4):
            if sleeps:
                group.call(TrainerWorker.sleep)
                group.call(TrainerWorker.wake)
            metrics.append(group.call(PolicyWorker.train_lm, step, **LM_STEP)[0])
            metrics.append({"held out": group.call(PolicyWorker.evaluate_lm, micro_batch_size=4)[0]})
        state = tmp_path / str(sleeps)
        group.call(TrainerWorker.save_state, str(state))
        with StateReader(state) as reader:
            kept = {name: reader.read(name, "exp_avg") for name in reader.names}
        return metrics, weights_of(group) | kept

    (metrics, weights), (own_metrics, own) = trained(sleeps=False), trained(sleeps=True)
    assert own_metrics == metrics
    assert all(torch.equal(own[name], weight) for name, weight in weights.items())


def rollouts(rows):
    """Dialogues of several lengths, of which the second half is the answer."""
    generator = torch.Generator().manual_seed(rows)
    lengths = torch.randint(4, 16, (rows,), generator=generator)
    tokens = torch.randint(4, TIED.vocab_size, (rows, 16), generator=generator)
    columns = torch.arange(16)
    answers = (columns >= lengths[:, None] // 2) & (columns < lengths[:, None])
    return Rollouts(
        tokens=tokens * (columns < lengths[:, None]),
        response_mask=answers,
        rollout_logprobs=torch.zeros(rows, 16),
        finished=torch.ones(rows, dtype=torch.bool),
        is_safety=torch.zeros(rows, dtype=torch.bool),
        prompt_ids=tuple(map(str, range(rows))),
        messages=tuple([] for _ in range(rows)),
        policy_version=WeightVersion("", 0),
    )


@pytest.mark.slow
@pytest.mark.parametrize("shares_device", [False, True])
@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_a_divided_frozen_model_scores_what_a_whole_one_does(group, tmp_path, head, shares_device):
    """Its ranks have different numbers of micro-batches of their own, and in the end one of them none at all."""
    model = Llama(TIED, head=head)
    model.init_weights(seed=2)
    save_checkpoint(tmp_path / "m", TIED, model.state_dict().items(), num_labels=1 if head == "scalar" else None)
    method, options = (ScorerWorker.logprobs, {"temperature": 0.7}) if head == "lm" else (ScorerWorker.score, {})
    parts, found = [rollouts(7), rollouts(2)], []
    for ranks in (1, 2):
        held = {"runtime": FP32, "ranks_per_replica": ranks, "shares_device": shares_device}
        group.call(ScorerWorker.load_frozen, str(tmp_path / "m"), head=head, **held)
        group.call(ScorerWorker.sleep)
        group.call(ScorerWorker.wake)
        calls = [
            group.submit_one(rank, method, part, micro_batch_tokens=32, num_data=1, **options)
            for rank, part in enumerate(parts)
        ]
        collect(calls, timeout_s=60)
        alone = group.submit_one(1, method, parts[0], micro_batch_tokens=32, num_data=1, **options)
        collect([alone, *([group.submit_one(0, ScorerWorker.join_in)] if ranks > 1 else [])], timeout_s=60)
        found.append([ray.get(call.data[0], timeout=60) for call in (*calls, alone)])
        group.call(ScorerWorker.unload)
    for whole, divided in zip(*found, strict=True):
        assert whole.abs().sum() > 0
        torch.testing.assert_close(divided, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_each_of_two_replicas_scores_for_itself_what_a_whole_model_does(group, tmp_path):
    """Of two ranks each; the second works while the first is not asked, and trained models have all ranks again."""
    model = Llama(TIED, head="lm")
    model.init_weights(seed=2)
    save_checkpoint(tmp_path / "m", TIED, model.state_dict().items())
    method, options = ScorerWorker.logprobs, {"temperature": 1.0, "micro_batch_tokens": 32, "num_data": 1}
    parts = {3: rollouts(7), 0: rollouts(3), 1: rollouts(2)}
    group.call(ScorerWorker.load_frozen, str(tmp_path / "m"), head="lm", runtime=FP32)
    whole = {rank: group.submit_one(0, method, part, **options) for rank, part in parts.items()}
    four = launch("scorer", 4)
    try:
        for _ in range(2):  # another model takes the first one's place
            held = {"runtime": FP32, "ranks_per_replica": 2}
            four.call(ScorerWorker.load_frozen, str(tmp_path / "m"), head="lm", **held)
            shares = four.call(TrainingWorker.elements_of_share)
            assert all(num_parameters(TIED) / 2 <= share < 0.51 * num_parameters(TIED) for share in shares)
            for ranks in ([3], [0, 1]):
                calls = {rank: four.submit_one(rank, method, parts[rank], **options) for rank in ranks}
                joins = [four.submit_one(2, ScorerWorker.join_in)] if ranks == [3] else []
                collect([*calls.values(), *joins], timeout_s=60)
                for rank, call in calls.items():
                    scored, expected = ray.get([call.data[0], whole[rank].data[0]], timeout=60)
                    torch.testing.assert_close(scored, expected, rtol=1e-5, atol=1e-6)
        begin(four, TIED, "lm", zero_stage=3)
        losses = {metrics["loss"] for metrics in four.call(TrainingWorker.faulty_step, "none", -1)}
        assert len(losses) == 1
    finally:
        four.stop()
