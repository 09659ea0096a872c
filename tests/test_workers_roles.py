"""Who of a run's roles gets which resources, and how many threads."""

from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_ray.config import parse_config
from rlhf_ray.workers.roles import Roles, WorkerGroup


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """{role: what it was launched with, and the threads it was told}"""
    seen: dict[str, Any] = {}

    def launch(worker: Any, *, role: str, num_ranks: int, resources: Any, **options: Any) -> Any:
        seen[role] = {**resources, "ranks": num_ranks}

        def call(method: Any, threads: int, **more: Any) -> None:
            seen[role]["threads"] = threads

        return SimpleNamespace(role=role, num_ranks=num_ranks, call=call)

    monkeypatch.setattr(WorkerGroup, "launch", launch)
    return seen


def test_a_reward_that_is_a_function_takes_no_gpu(launched: dict[str, Any]) -> None:
    given = {"helpfulness": "my_rewards:words", "safety": "models/safety"}
    roles = Roles(parse_config({"run": {"device": "cuda"}, "inputs": given}))
    roles.start("helpfulness", "safety", "policy", "rollout")
    assert {role: with_.get("GPU") for role, with_ in launched.items()} == {
        "helpfulness": None,
        "safety": 1.0,
        "policy": 1.0,
        "rollout": 1.0,
    }


def test_threads_are_divided_as_if_those_that_are_done_worked_along(launched: dict[str, Any]) -> None:
    settings = {"run": {"device": "cpu"}, "cluster": {"cores": 12}, "roles": {"safety": {"num_ranks": 3}}}
    roles = Roles(parse_config(settings))
    roles.work_together("helpfulness", "safety")
    assert {role: with_["threads"] for role, with_ in launched.items()} == {"helpfulness": 3, "safety": 3}
    launched.clear()
    roles = Roles(parse_config(settings))
    roles.work_together("safety", among=("helpfulness", "safety"))
    assert set(launched) == {"safety"} and launched["safety"]["threads"] == 3
    roles.work_together("safety")
    assert launched["safety"]["threads"] == 4  # 12 cores for 3 ranks
