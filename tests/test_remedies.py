"""What is advised after a failure, and the end of repairs that repair nothing."""

import errno
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError

from cluster import session
from cluster.worker_group import START_UP, WorkerError
from rlhf_ray.config import parse_config
from rlhf_ray.errors import RunFailure
from rlhf_ray.recipe import run as recipe
from rlhf_ray.recipe.ledger import Entry
from rlhf_ray.recipe.remedies import what_helps
from rlhf_ray.recipe.stages import STAGES, Node
from rlhf_ray.run_state import RunDir
from rlhf_ray.workers.roles import Roles

GOES_ON = "the same command goes on from the last checkpoint"


@pytest.fixture(autouse=True)
def session_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A session's logs, whatever sessions this process has had."""
    monkeypatch.setattr(session, "_logs", "/logs")


def failure(
    cause: BaseException | None, *, said: str = "boom", step: str = "ppo step 3", role: str = "policy"
) -> WorkerError:
    return WorkerError(f"{role} rank 0 failed: {said}", role=role, rank=0, step=step, cause=cause)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (failure(ValueError("bad")), ""),
        (failure(None, said="its process ended while it started"), ""),
        (failure(ActorDiedError()), f", and {GOES_ON}"),
        (
            failure(ActorDiedError(), said="killed by SIGKILL, because the memory limit of 6.0 GiB was full"),
            f"; with more memory, or smaller micro-batches and models, {GOES_ON}",
        ),
        (
            failure(GetTimeoutError()),
            f"; if it only needs longer, raise cluster.call_timeout_s, and {GOES_ON}",
        ),
        (
            failure(GetTimeoutError(), step=START_UP),
            f"; if it only needs longer, raise cluster.start_timeout_s, and {GOES_ON}",
        ),
        (failure(OSError(errno.ENOSPC, "full")), f"; make room, and {GOES_ON}"),
        (failure(RuntimeError("I/O error: No space left on device (os error 28)")), f"; make room, and {GOES_ON}"),
        (failure(OSError(errno.EIO, "broken")), f"; once the disk is in order, {GOES_ON}"),
        (failure(PermissionError(errno.EACCES, "no")), f"; let this user write there, and {GOES_ON}"),
        (failure(FileNotFoundError(errno.ENOENT, "gone")), ""),
    ],
)
def test_a_remedy_is_named_where_it_helps(error: WorkerError, remedy: str) -> None:
    assert what_helps(error) == f"the workers' logs are in /logs{remedy}"


def test_a_second_death_at_the_same_place_ends_the_repairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(
        run=RunDir(tmp_path),
        roles=SimpleNamespace(drop_dead=lambda: ["policy"]),
        work_at=lambda name, config, roles: None,
    )
    step = context.run.step("ppo", {})
    step.begin()
    config = parse_config({"cluster": {"max_repairs": 9}})
    entry = Entry(Node(STAGES["ppo"], {}, STAGES["ppo"].makes), config, {}, (), step, {})
    attempts = []

    def die(where: list[str], saves: list[int]) -> None:
        """Dies at the places one after another; a checkpoint is there before the attempts of `saves`."""
        attempts.clear()

        def attempt(*_: object) -> None:
            attempts.append(where[len(attempts)])
            if len(attempts) in saves:
                with step.new_state(len(attempts)):
                    pass
            raise failure(ActorDiedError(), step=attempts[-1])

        monkeypatch.setattr(recipe, "runner", lambda stage: attempt)
        with pytest.raises(
            RunFailure, match=r"second time at the same place with no checkpoint between.*logs are in /logs$"
        ):
            recipe.run_node(context, entry)

    die(["ppo step 3"] * 9, [])
    assert len(attempts) == 2
    die([START_UP] * 9, [])
    assert len(attempts) == 2
    die(["ppo step 3"] * 9, [2])  # one between the first two deaths
    assert len(attempts) == 3
    die(["ppo step 3", "ppo step 2", "ppo step 3", "x"], [])
    assert len(attempts) == 3


def test_a_worker_that_dies_while_it_starts_is_started_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launched: list[str] = []
    roles = Roles(parse_config({"run": {"device": "cpu"}}))

    def launch(role: str, place: None) -> SimpleNamespace:
        launched.append(role)
        if role == "value" and launched.count(role) == 1:
            raise failure(ActorDiedError(), step=START_UP, role=role)
        return SimpleNamespace(role=role, condition=lambda: "idle")

    monkeypatch.setattr(roles, "_launch", launch)
    monkeypatch.setattr(roles, "_take_place", lambda: None)
    context = SimpleNamespace(run=RunDir(tmp_path), roles=roles, work_at=lambda name, config, roles: None)
    step = context.run.step("ppo", {})
    step.begin()
    monkeypatch.setattr(recipe, "runner", lambda stage: lambda *_: {"up": len(roles.start("policy", "value"))})
    recipe.run_node(context, Entry(Node(STAGES["ppo"], {}, {}), parse_config({}), {}, (), step, {}))
    assert sorted(launched) == ["policy", "value", "value"]  # the one that came up was kept
    assert "rebuilding value, repair 1 of 3" in capsys.readouterr().err
