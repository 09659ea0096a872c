"""What fails while results are written costs no training: every stage goes on from its end. The workers are fakes."""

import errno
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny_inputs import ANSWER, TEXTS, USER, comparison, prompt, write_checkpoint, write_rows, write_tokenizer

from rlhf_ray.config import parse_config
from rlhf_ray.evaluate import policies
from rlhf_ray.recipe import ppo as ppo_stage
from rlhf_ray.recipe import preference_collection, reward_modeling
from rlhf_ray.recipe.context import Context
from rlhf_ray.recipe.pretraining import pretrain
from rlhf_ray.recipe.sft import sft
from rlhf_ray.run_state import RunDir

STEPS = 4
HELD_OUT_LOSS = 2.5


class Group:
    """Ranks that write what they are told to and count their training steps."""

    num_ranks = 1

    def __init__(self, checkpoint: Path):
        self.trained: list[int] = []
        self._checkpoint = checkpoint

    def call(self, method: Callable[..., Any], *args: Any, step: str = "", **options: Any) -> list[Any]:
        return [getattr(self, f"_{method.__name__}", lambda *_: {})(*args)]

    submit = call

    def _train_lm(self, index: int) -> dict[str, float]:
        self.trained.append(index)
        return {"loss": 1.0, "tokens": 8.0, "accuracy": 0.5}

    _train_reward = _train_lm

    def _open_data(self, *args: Any) -> dict[str, int]:
        return {"train": STEPS, "held_out": 1}

    def _evaluate_lm(self) -> float:
        return HELD_OUT_LOSS

    def _evaluate_reward(self) -> dict[str, float]:
        return {"accuracy/helpfulness": 0.5, "count/helpfulness": 4.0}

    def _save_model(self, directory: str) -> None:
        assert not Path(directory).exists()
        shutil.copytree(self._checkpoint, directory)

    def _save_state(self, directory: str) -> None:
        Path(directory, "weights").parent.mkdir(exist_ok=True)
        Path(directory, "weights").touch()


class Roles(dict[str, Group]):
    """All roles, each a fake group."""

    runtime = SimpleNamespace(device="cpu")
    timeout_s = 1.0
    step = ""

    def __init__(self, checkpoint: Path):
        super().__init__({name: Group(checkpoint) for name in ("policy", "value", "helpfulness", "safety", "rollout")})

    def work_together(self, *roles: str, **options: Any) -> None: ...

    start = work_together

    def begin_training(self, role: str, **options: Any) -> list[None]:
        return []

    def steps_trained(self) -> int:
        return sum(len(group.trained) for group in self.values())


@pytest.fixture
def attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Context]:
    """Makes a run's context, each time as a new process would."""
    checkpoint = write_checkpoint(tmp_path / "chat")
    write_tokenizer(checkpoint)
    rows = {
        "corpus": [{"text": text} for text in TEXTS],
        "demonstrations": [{"messages": [USER, ANSWER], "kind": "k"}],
        "comparisons": [comparison(0)],
        "prompts_annotation": [prompt(0)],
        "prompts_early_stop": [prompt(0)],
        "prompts_train": [prompt(0)],
        "prompts_test": [prompt(0)],
    }
    kinds = {name: "prompts" if name.startswith("prompts") else name for name in rows}
    data = {name: write_rows(tmp_path / name, kinds[name], table) for name, table in rows.items()}
    config = {
        "data": data,
        "inputs": {"chat": str(checkpoint), "base": str(checkpoint), "tokenizer": str(checkpoint)},
        "pretrain": {"num_steps": STEPS},
        "sft": {"epochs": 2, "batch_size": 2},
        "reward": {"batch_size": 1},
        "ppo": {"num_steps": STEPS, "eval_every": 1, "patience": 2},
    }
    monkeypatch.setattr(reward_modeling, "collect", lambda calls, **_: calls)

    def make() -> Context:
        context = Context(parse_config(config), RunDir(tmp_path / "run"))
        context._roles = Roles(checkpoint)
        return context

    return make


def with_models(context: Context) -> Context:
    """The context of a run that has all its models."""
    for name in ("policy", "helpfulness", "safety"):
        context.outputs.add(name, context.outputs["chat"], key=name)
    return context


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("stage", "name", "steps"),
    [(pretrain, "pretrain", STEPS), (sft, "sft", STEPS), (reward_modeling.train_reward_models, "reward-*", 2 * STEPS)],
)
def test_a_trained_model_is_not_trained_again(attempt, monkeypatch, stage, name, steps) -> None:
    first = attempt()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(Context, "add_tokenizer", full)
        stage(first)
    assert first.roles.steps_trained() == (steps // 2 if name == "sft" else steps)  # there the first epoch is kept
    second = attempt()
    stage(second)
    assert first.roles.steps_trained() + second.roles.steps_trained() == steps
    for done in second.run.path.glob(f"steps/{name}-*"):
        facts = json.loads((done / "step.json").read_text())
        assert (done / "model" / "tokenizer.json").exists() and not (done / "state").exists()
        assert facts.get("held_out_loss", HELD_OUT_LOSS) == HELD_OUT_LOSS
    assert (name != "sft") or (done / "epoch-1" / "tokenizer.json").exists()


@pytest.mark.parametrize(("rewards", "steps", "best"), [((0, 1, 2, 3, 4), STEPS, STEPS - 1), ((0, -1, -2), 2, -1)])
def test_a_policy_is_not_trained_again_and_written_once(attempt, monkeypatch, rewards, steps, best) -> None:
    looks, indices = iter(rewards), []

    def iteration(roles: Any, section: Any, index: int, **_: Any) -> dict[str, float]:
        indices.append(index)
        return {"reward/combined": 0.0, "kl/per_sequence": 0.0, "time/step_s": 0.0}

    for function in ("load_models", "start_engines", "sync_weights", "verify_weight_channel"):
        monkeypatch.setattr(ppo_stage, function, lambda *_, **__: {})
    monkeypatch.setattr(ppo_stage, "open_prompts", lambda *_, **__: 1)
    monkeypatch.setattr(ppo_stage, "iteration", iteration)
    monkeypatch.setattr(ppo_stage, "evaluate_held_out", lambda *_: {"held_out/reward_combined": next(looks)})
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(Context, "add_tokenizer", full)
        ppo_stage.ppo(with_models(attempt()))
    done = ppo_stage.ppo(with_models(attempt()))
    assert indices == list(range(steps))
    facts = json.loads((done / "step.json").read_text())
    assert (facts["steps"], facts["best_step"]) == (steps, best)
    weights = {name: done / name / "model.safetensors" for name in ("model", "last")}
    assert weights["model"].samefile(weights["last"]) == (best == STEPS - 1)
    chat = load_file(done.parents[2] / "chat" / "model.safetensors")
    assert all(tensor.equal(chat[name]) for name, tensor in load_file(weights["model"]).items())
    assert sorted(path.name for path in done.iterdir() if path.is_dir()) == ["last", "model", "tensorboard"]


def test_answers_are_sampled_once(attempt, monkeypatch) -> None:
    sampled = []
    answers = itertools.count()

    def evaluate_model(context: Any, checkpoint: Path, prompts: Any, temperature: float) -> Any:
        sampled.append((checkpoint, temperature))
        answer = policies.Answer(f"answer {next(answers)}", True, 0.1, 0.2, 0.3)
        return {"reward_combined": 1 / 3}, [answer]

    def sample(context: Any, jobs: list[Any], version: int, temperature: float) -> Any:
        sampled.append((version, temperature))
        return [
            (index, side, f"answer {next(answers)}", True)
            for index, job in enumerate(jobs)
            for side in (0, 1)
            if (job.versions[side], job.temperatures[side]) == (version, temperature)
        ]

    for module in (policies, preference_collection):
        for function in ("load_scorers", "start_engines", "open_prompts", "check_labels_possible", "check_swappable"):
            monkeypatch.setattr(module, function, lambda *_, **__: None, raising=False)
    monkeypatch.setattr(policies, "evaluate_model", evaluate_model)
    monkeypatch.setattr(preference_collection, "sample", sample)
    monkeypatch.setattr(
        preference_collection, "label", lambda index, job, made, *_: {**comparison(index), **text(made)}
    )

    def text(made: dict[Any, Any]) -> dict[str, str]:
        return {"chosen": made[0, 0][0], "rejected": made[0, 1][0]}

    for module, stage, table in (
        (policies, policies.evaluate, "answers.parquet"),
        (preference_collection, preference_collection.collect, "comparisons.parquet"),
    ):
        sampled.clear()
        contexts = [with_models(attempt()), with_models(attempt())]
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr(module, "write_table", full)
            stage(contexts[0])
        once = list(sampled)
        assert once
        done = stage(contexts[1])
        assert sampled == once
        assert (done / table).exists() and not (done / "parts").exists()
