"""Who of a run's roles sits where, who is awake when, and with how many threads."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.hardware import Facts
from cluster.layout import Host, lay_out
from cluster.placement import Place
from cluster.worker_group import Call, Worker
from rlhf_ray.config import parse_config
from rlhf_ray.machine import demands
from rlhf_ray.recipe import engines, ppo
from rlhf_ray.recipe.scoring import SCORING_ROLES, ScoringSettings, score
from rlhf_ray.workers import roles as roles_module
from rlhf_ray.workers.roles import Roles, WorkerGroup
from rlhf_ray.workers.rollout import RolloutWorker

EVERYONE = ("rollout", *SCORING_ROLES)


class Cluster:
    """Roles on GPUs that are not there: notes who is called, in order, and what each was launched with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, gpus: int):
        self.calls: list[tuple[str, str]] = []
        self.threads: dict[str, int] = {}
        self.freed = 0
        self._gpus = gpus
        monkeypatch.setattr(roles_module, "cluster_nodes", lambda cpus_per_rank: [Host(gpus=self._gpus)])
        monkeypatch.setattr(roles_module, "reserve", self._reserve)
        monkeypatch.setattr(WorkerGroup, "launch", self._launch)
        for module in (roles_module, engines, ppo):
            monkeypatch.setattr(module, "collect", lambda calls, **_: [{} for _ in calls])
        monkeypatch.setattr("rlhf_ray.recipe.scoring.collect", lambda calls, **_: [{} for _ in calls])

    def _reserve(self, layout: Any, **_: Any) -> Any:
        def free() -> None:
            self.freed += 1

        facts = dict.fromkeys(range(len(layout.nodes)), Facts(cores=12, memory_bytes=0, cpu="", gpus=()))
        return SimpleNamespace(layout=layout, facts=facts, is_whole=lambda: True, free=free)

    def _launch(self, worker: Any, place: Place, *, role: str, **options: Any) -> Any:
        seats = place.layout.of(role)

        def submit_one(rank: int, method: Any, *args: Any, **more: Any) -> Any:
            if method.__name__ == "set_threads":
                self.threads[role] = args[0]
            elif rank == 0:
                self.calls.append((role, method.__name__))
            return Call(role, rank, method.__name__, object(), (None,) * more.get("num_data", 0))

        def submit(method: Any, *args: Any, **more: Any) -> list[Any]:
            return [submit_one(rank, method) for rank in range(len(seats))]

        def call(method: Any, *args: Any, **more: Any) -> list[Any]:
            return [{} for _ in submit(method)]

        def call_one(rank: int, method: Any, *args: Any, **more: Any) -> Any:
            submit_one(rank, method)
            return {}

        return SimpleNamespace(
            call_one=call_one,
            role=role,
            num_ranks=len(seats),
            actors=[],
            pids=[],
            call=call,
            submit=submit,
            submit_one=submit_one,
            stop=lambda: None,
            wait_until_gone=lambda seconds: None,
        )

    def roles(self, **settings: Any) -> Roles:
        config = parse_config({"run": {"device": "cuda"}, **settings})
        return Roles(config, EVERYONE)

    def slept(self) -> list[str]:
        """What has been said of sleeping and waking since it was last asked for, as "policy sleeps"."""
        words = {Worker.sleep.__name__: "sleeps", Worker.wake.__name__: "wakes"}
        said = [f"{role} {words[method]}" for role, method in self.calls if method in words]
        self.calls.clear()
        return said


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Cluster]:
    return lambda gpus: Cluster(monkeypatch, gpus=gpus)


def test_on_gpus_of_their_own_roles_never_sleep(cluster: Any) -> None:
    made = cluster(6)
    roles = made.roles()
    assert roles.turns(*SCORING_ROLES) == [SCORING_ROLES]
    assert roles.can_overlap("rollout", SCORING_ROLES) and not roles.shares_gpus("policy") and len(roles.gpus()) == 6
    for resident in (EVERYONE, ("rollout",), ("policy", "value"), ("rollout",)):
        roles.make_resident(*resident)
    assert made.slept() == []


def test_roles_on_one_gpu_take_turns(cluster: Any) -> None:
    made = cluster(1)
    roles = made.roles()
    assert roles.turns("reference", "policy", "value") == [("reference",), ("policy",), ("value",)]
    assert not roles.can_overlap("rollout", ["reference"]) and roles.shares_gpus("rollout") and roles.gpus() == [""]
    roles.start(*EVERYONE)
    roles.make_resident("rollout")
    assert made.slept() == [f"{role} sleeps" for role in SCORING_ROLES]
    assert not roles.engines_forgot
    roles.make_resident("policy")
    assert made.slept() == ["rollout sleeps", "policy wakes"] and roles.engines_forgot
    roles.make_resident("policy", "rollout")  # to send weights
    assert made.slept() == ["rollout wakes"]
    roles.make_resident("rollout")
    assert made.slept() == ["policy sleeps"]
    roles.make_resident("rollout")
    assert made.slept() == []


def test_turns_are_noted_for_a_benchmark(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = cluster(1)
    roles = made.roles()
    roles.start(*EVERYONE)
    roles.make_resident("rollout")
    roles.turn_log = []
    taken = iter([9.0, 8.0, 6.0, 5.0])
    monkeypatch.setattr(roles, "gpu_memory_gib", lambda: (next(taken), 80.0))
    roles.make_resident("policy")
    roles.make_resident("policy")  # nobody leaves or wakes
    roles.make_resident("policy", "rollout")
    assert [(turn.leave, turn.wake, turn.used_gib) for turn in roles.turn_log] == [
        (("rollout",), ("policy",), (9.0, 8.0)),
        ((), ("rollout",), (6.0, 5.0)),
    ]
    assert all(turn.seconds > 0 for turn in roles.turn_log)


def test_of_six_roles_on_two_gpus_those_apart_work_at_the_same_time(cluster: Any) -> None:
    made = cluster(2)
    roles = made.roles()
    # rollout, value, helpfulness on one; policy, reference, safety on the other
    assert roles.turns("reference", "helpfulness", "safety", "policy", "value") == [
        ("reference", "helpfulness"),
        ("safety", "value"),
        ("policy",),
    ]
    assert not roles.can_overlap("rollout", SCORING_ROLES)
    assert roles.can_overlap("rollout", ["policy", "reference"])


def test_an_iteration_of_ppo_on_one_gpu(cluster: Any) -> None:
    """Generate, score in turns, update in turns, send the weights: each role wakes as seldom as can be."""
    made = cluster(1)
    roles = made.roles()
    roles.start(*EVERYONE)
    roles.make_resident("policy", "rollout")
    roles.make_resident("rollout")
    made.calls.clear()
    rollouts = engines.generate(roles, prompts(), num_chunks=1, seed=(0, 0), temperature=1.0, max_new_tokens=4)
    scoring = ScoringSettings(temperature=1.0, micro_batch_tokens=64, safety_threshold=0.15)
    score(roles, scoring, rollouts)
    section = parse_config({}).ppo
    built = [Call("policy", 0, "build_experience", object(), (None,))]
    ppo.update(roles, section.model_copy(update={"num_chunks": 1}), 0, built, seed=0)
    engines.sync_weights(roles)
    engines.ready_engines(roles)
    order = [f"{role}.{method}" for role, method in made.calls]
    assert order == [
        "rollout.generate",
        "rollout.sleep",
        "reference.wake",
        "reference.logprobs",
        "reference.sleep",
        "helpfulness.wake",
        "helpfulness.score",
        "helpfulness.sleep",
        "safety.wake",
        "safety.score",
        "safety.sleep",
        "policy.wake",
        "policy.logprobs",
        "policy.sleep",
        "value.wake",
        "value.values",
        "value.train_value",
        "value.sleep",
        "policy.wake",
        "policy.train_policy",
        "rollout.expect_weights",
        "policy.give_back",
        "rollout.wake",
        "policy.send_weights",
        "policy.sleep",
    ]


def test_an_engine_has_all_its_chunks_at_once_unless_others_wait_for_the_first(cluster: Any) -> None:
    made = cluster(8)
    roles = made.roles(roles={"rollout": {"num_engines": 2}})
    batch = prompts().select([0] * 8)
    options: dict[str, Any] = {"num_chunks": 4, "seed": (0, 0), "temperature": 1.0, "max_new_tokens": 4}
    together = engines.generate(roles, batch, **options)
    assert [call.rank for call in together] == [0, 1, 0, 1]
    assert together[0].ref is together[2].ref and together[0].ref is not together[1].ref
    streamed = engines.generate(roles, batch, stream=True, **options)
    assert [call.rank for call in streamed] == [0, 1, 0, 1] and len({id(call.ref) for call in streamed}) == 4


def test_engines_that_slept_get_the_policys_weights_before_they_generate(cluster: Any) -> None:
    made = cluster(1)
    roles = made.roles()
    roles.start(*EVERYONE)
    roles.make_resident("rollout")
    roles.make_resident("reference")
    made.calls.clear()
    engines.ready_engines(roles)
    assert [f"{role}.{method}" for role, method in made.calls][-3:] == [
        "rollout.wake",
        "policy.send_weights",
        "policy.sleep",
    ]
    made.calls.clear()
    engines.ready_engines(roles)
    assert made.calls == []


def test_an_engine_that_is_awake_leaves_its_cache_before_weights_are_sent(cluster: Any) -> None:
    made = cluster(1)
    roles = made.roles()
    roles.start(*EVERYONE)
    roles.make_resident("rollout")
    made.calls.clear()
    engines.sync_weights(roles)
    assert [f"{role}.{method}" for role, method in made.calls] == [
        "rollout.expect_weights",
        "rollout.sleep",
        "policy.wake",
        "policy.give_back",
        "rollout.wake",
        "policy.send_weights",
    ]
    assert not roles.engines_forgot


def test_weights_are_checked_with_the_policy_awake_and_then_asleep(cluster: Any) -> None:
    made = cluster(2)
    roles = made.roles(roles={role: {"num_ranks": 2} for role in ("policy", "value")} | {"rollout": {"num_engines": 2}})
    roles.start(*EVERYONE)
    roles.make_resident("rollout")
    made.calls.clear()
    with pytest.raises(KeyError):  # the stand-ins say nothing of gaps
        engines.verify_weight_channel(roles, prompts(), precision="fp32")
    order = [f"{role}.{method}" for role, method in made.calls]
    sent = ["policy.give_back", "rollout.wake", "policy.send_weights", "policy.sleep", "rollout.probe_gap"]
    assert order == [
        *["rollout.expect_weights", "rollout.sleep", "policy.wake", "rollout.probe", "policy.logprobs"],
        *["rollout.expect_weights", *sent],  # scrambled
        *["rollout.expect_weights", "rollout.sleep", "policy.wake", *sent],
    ]


def test_a_layout_of_other_sizes_ends_all_roles_and_one_of_the_same_none(cluster: Any) -> None:
    made = cluster(8)
    roles = made.roles()
    roles.start("policy")
    same = parse_config({"run": {"device": "cuda"}, "ppo": {"num_steps": 3}})
    roles.lay_out(same, EVERYONE)
    assert list(roles._groups) == ["policy"] and made.freed == 0
    roles.lay_out(parse_config({"run": {"device": "cuda"}, "roles": {"value": {"num_ranks": 2}}}), EVERYONE)
    assert list(roles._groups) == [] and made.freed == 1
    roles.start("value")
    roles.lay_out(same, ("policy",))  # the next stage has all GPUs for its own roles
    assert list(roles._groups) == [] and made.freed == 2


def test_engines_of_several_ranks_close_before_they_end_in_another_layout_too(cluster: Any, monkeypatch: Any) -> None:
    """They are what they were started as, whatever the config that takes their place says."""
    monkeypatch.setattr(roles_module.ray, "wait", lambda refs, **_: (refs, []))
    made = cluster(2)
    two = {"rollout": {"tensor_parallel_size": 2}}
    roles = made.roles(roles=two)
    roles.start("rollout")
    roles.lay_out(parse_config({"run": {"device": "cuda"}}), EVERYONE)
    assert ("rollout", "close") in made.calls
    made.calls.clear()
    roles.start("rollout")
    roles.lay_out(parse_config({"run": {"device": "cuda"}, "roles": two}), EVERYONE)
    assert ("rollout", "close") not in made.calls


def test_a_reward_that_is_a_function_sits_on_no_gpu() -> None:
    given = {"helpfulness": "my_rewards:words", "safety": "models/safety"}
    config = parse_config({"run": {"device": "cuda"}, "inputs": given})
    layout = lay_out(demands(config, EVERYONE), [Host(gpus=8)])
    assert {role: len(layout.of(role)[0].gpus) for role in EVERYONE} == {
        **dict.fromkeys(EVERYONE, 1),
        "helpfulness": 0,
    }


def test_cores_are_divided_between_roles_that_work_at_the_same_time(cluster: Any) -> None:
    made = cluster(0)
    roles = made.roles(run={"device": "cpu"}, roles={"safety": {"num_ranks": 3}})
    assert roles.turns("helpfulness", "safety") == [("helpfulness", "safety")]
    assert not roles.can_overlap("rollout", ["policy"])
    roles.make_resident("helpfulness", "safety")
    assert made.threads == {"helpfulness": 3, "safety": 3}
    roles.make_resident("safety")
    assert made.threads["safety"] == 4  # 12 cores for 3 ranks
    fewer = made.roles(run={"device": "cpu"}, cluster={"cores": 4}, roles={"safety": {"num_ranks": 3}})
    fewer.make_resident("helpfulness")
    assert made.threads["helpfulness"] == 4
    assert made.slept() == []


class Engine:
    """Notes what is asked of it."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def sleep(self, *, keep_weights: bool) -> None:
        self.asked.append("sleep, weights in host memory" if keep_weights else "sleep and forget")

    def wake(self) -> None:
        self.asked.append("wake")

    def load_weights(self, buckets: Any, **_: Any) -> None:
        self.asked.append("load")


def test_an_engine_keeps_the_weights_of_a_checkpoint_when_it_sleeps_and_forgets_those_of_a_trainer() -> None:
    worker = RolloutWorker("rollout", 0, 1)
    worker.sleep()  # before there is an engine
    worker.wake()
    worker._engine = engine = Engine()  # type: ignore[assignment]
    worker.sleep()
    worker.wake()
    worker.load_weights([])
    worker.sleep()
    assert engine.asked == ["sleep, weights in host memory", "wake", "load", "sleep and forget"]


def prompts() -> Any:
    from rlhf_ray.records import PromptBatch

    return PromptBatch(
        tokens=((1, 2),), ids=("a",), messages=(({"role": "user", "content": "hi"},),), is_safety=(False,)
    )
