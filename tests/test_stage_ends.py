"""What fails while results are written costs no training: every stage goes on from its end. The workers are fakes."""

import errno
import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny_inputs import ANSWER, TEXTS, USER, comparison, prompt, write_checkpoint, write_rows, write_tokenizer

from rlhf_ray.config import config_with, parse_config
from rlhf_ray.evaluate import policies
from rlhf_ray.recipe import language_modeling, preference_collection, reward_modeling, scoring
from rlhf_ray.recipe import ppo as ppo_stage
from rlhf_ray.recipe.context import Context
from rlhf_ray.recipe.ledger import Entry, Ledger
from rlhf_ray.recipe.run import run_node
from rlhf_ray.recipe.stages import STAGES, Artefact, Given, Node
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
        roles = ("policy", "value", "reference", "helpfulness", "safety", "rollout")
        super().__init__({name: Group(checkpoint) for name in roles})

    engines_forgot = False

    def make_resident(self, *roles: Any, **options: Any) -> None: ...

    start = lay_out = make_resident

    def turns(self, *roles: str) -> list[tuple[str, ...]]:
        return [roles]

    def can_overlap(self, role: str, others: Any) -> bool:
        return False

    def shares_gpus(self, role: str) -> bool:
        return False

    def replicas(self, role: str) -> list[range]:
        return [range(1)]

    def frozen(self, role: str) -> dict[str, Any]:
        return {}

    def begin_training(self, role: str, **options: Any) -> list[None]:
        return []

    def steps_trained(self) -> int:
        return sum(len(group.trained) for group in self.values())


class Inputs(dict[str, Artefact]):
    """A node's inputs, which note those that its stage has asked for."""

    def __init__(self, inputs: Any):
        super().__init__(inputs)
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> Artefact:
        self.asked.add(name)
        return super().__getitem__(name)


class Attempt:
    """A node and its run's context, as a new process makes them."""

    def __init__(self, context: Context, entry: Entry):
        self.context, self.roles = context, context.roles
        self.inputs = Inputs(entry.inputs)
        self.entry = replace(entry, inputs=self.inputs)

    def run(self) -> Path:
        """Runs the node to its end; returns the finished step's directory."""
        run_node(self.context, self.entry)
        assert self.inputs.asked == set(self.inputs), "a stage names what it works on, and works on no more"
        assert self.entry.step is not None
        return self.entry.step.path


@pytest.fixture
def attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Attempt]:
    """Makes a stage's node, all its inputs given, each time as a new process would."""
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
        "run": {"device": "cpu", "precision": "fp32"},
        "pretrain": {"num_steps": STEPS},
        "sft": {"epochs": 2, "batch_size": 2},
        "reward": {"batch_size": 1},
        "ppo": {"num_steps": STEPS, "eval_every": 1, "patience": 2, "max_new_tokens": 9},
        "pairs": {"max_new_tokens": 9},
        "evaluate": {"max_new_tokens": 9},
    }
    for module in (language_modeling, reward_modeling, ppo_stage, policies, scoring):
        monkeypatch.setattr(module, "collect", lambda calls, **_: calls)

    def make(name: str, settings: dict[str, object] | None = None, *, makes: Any = None) -> Attempt:
        context = Context(config_with(parse_config(config), settings or {}), RunDir(tmp_path / "run"))
        context._roles = Roles(checkpoint)
        models = {"pairs": ["model.0", "model.1"], "evaluate": ["model.SFT", "model.PPO", "referee"]}
        needs = [*STAGES[name].needs, *models.get(name, [])]
        inputs = {need: Given(f"data.{need}", data.get(need, str(checkpoint))) for need in needs}
        node = Node(STAGES[name], inputs, makes or STAGES[name].makes)
        return Attempt(context, Ledger(context.config, [node], context.run).entry(node))

    return make


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


EPOCHS = {"chat": "model", "previous": "epoch-1"}
CONSTANT = {"pretrain.optim": {"schedule": "constant"}}
"""With which pretraining can be made longer."""


@pytest.mark.parametrize(
    ("name", "settings", "makes", "steps"),
    [
        ("pretrain", {}, None, STEPS),
        ("pretrain", CONSTANT, None, STEPS),
        ("sft", {}, EPOCHS, STEPS),
        ("reward", {}, None, 2 * STEPS),
        ("reward", {}, {"safety": "safety/model"}, STEPS),
    ],
)
def test_a_trained_model_is_not_trained_again(attempt, monkeypatch, name, settings, makes, steps) -> None:
    first = attempt(name, settings, makes=makes)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        for module in (language_modeling, reward_modeling):
            patch.setattr(module, "add_tokenizer", full)
        first.run()
    assert first.roles.steps_trained() == (steps // 2 if name == "sft" else steps)  # there the first epoch is kept
    second = attempt(name, settings, makes=makes)
    done = second.run()
    assert first.roles.steps_trained() + second.roles.steps_trained() == steps
    facts = json.loads((done / "step.json").read_text())
    assert facts.get("held_out_loss", HELD_OUT_LOSS) == HELD_OUT_LOSS
    outputs = makes or STAGES[name].makes
    assert all((done / place / "tokenizer.json").exists() for place in outputs.values())
    assert set(facts.get("accuracy", outputs)) == set(outputs) and len(list(done.glob("*/model"))) in (0, len(outputs))
    # Only what a longer run would go on from stays.
    assert [path.parent.parent for path in done.glob("**/state/step-*")] == ([done] if settings else [])


def test_training_that_is_made_longer_before_it_was_filed_has_the_model_of_its_last_step(attempt, monkeypatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(language_modeling, "add_tokenizer", full)
        attempt("pretrain", CONSTANT).run()
    longer = attempt("pretrain", {**CONSTANT, "pretrain.num_steps": STEPS + 2})
    saved = []
    save = longer.roles["policy"]._save_model
    longer.roles["policy"]._save_model = lambda directory: saved.append(save(directory))
    longer.run()
    assert longer.roles["policy"].trained == [STEPS, STEPS + 1] and len(saved) == 1


@pytest.fixture
def ppo(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """PPO whose iterations only count; its evaluations return `rewards` one after another."""
    found = SimpleNamespace(indices=[], rewards=iter(()))

    def iteration(roles: Any, section: Any, index: int, *_: Any, **__: Any) -> dict[str, float]:
        found.indices.append(index)
        return {"reward/combined": 0.0, "kl/per_sequence": 0.0, "time/step_s": 0.0}

    for function in ("start_engines", "sync_weights", "verify_weight_channel"):
        monkeypatch.setattr(ppo_stage, function, lambda *_, **__: {})
    monkeypatch.setattr(ppo_stage, "iteration", iteration)
    monkeypatch.setattr(ppo_stage, "evaluate_held_out", lambda *_: {"held_out/reward_combined": next(found.rewards)})
    return found


@pytest.mark.parametrize(
    ("rewards", "every", "steps", "best", "regular"),
    [
        ((0, 1, 2, 3, 4), 1, STEPS, STEPS - 1, STEPS - 1),
        ((0, -1, -2), 1, 2, -1, -1),
        ((0, 1, 5), 3, STEPS, STEPS - 1, 2),  # the policy at the end is evaluated too, and counts in no checkpoint
        ((0, 1, 0), 3, STEPS, 2, 2),
        ((0, 1), 9, STEPS, STEPS - 1, -1),
    ],
)
@pytest.mark.parametrize("keep", [("states",), ()])
def test_a_policy_is_not_trained_again_and_written_once(
    attempt, monkeypatch, ppo, keep, rewards, every, steps, best, regular
) -> None:
    settings = {"ppo.eval_every": every, "run.keep": keep}
    ppo.rewards = iter(rewards)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(ppo_stage, "add_tokenizer", full)
        attempt("ppo", settings).run()
    done = attempt("ppo", settings).run()
    assert ppo.indices == list(range(steps)) and list(ppo.rewards) == []
    facts = json.loads((done / "step.json").read_text())
    assert (facts["steps"], facts["best_step"]) == (steps, best)
    weights = {name: done / name / "model.safetensors" for name in ("model", "last")}
    assert weights["model"].samefile(weights["last"]) == (best == STEPS - 1)
    chat = load_file(done.parents[2] / "chat" / "model.safetensors")
    assert all(tensor.equal(chat[name]) for name, tensor in load_file(weights["model"]).items())
    directories = {path.name for path in done.iterdir() if path.is_dir()}
    assert directories - {"best"} == {"last", "model", "tensorboard", *(["state"] if keep else [])}
    if keep:
        [state] = (done / "state").iterdir()
        assert json.loads((state / "early_stopping.json").read_text())["best_step"] == regular


def test_ppo_that_is_made_longer_chooses_as_if_it_had_been_that_long_from_the_start(attempt, ppo) -> None:
    def run(rewards: tuple[int, ...], num_steps: int) -> dict[str, Any]:
        ppo.rewards = iter(rewards)
        done = attempt("ppo", {"ppo.eval_every": 3, "ppo.num_steps": num_steps}).run()
        assert list(ppo.rewards) == [] and (done / "model" / "model.safetensors").exists()
        return json.loads((done / "step.json").read_text())

    # Evaluated before PPO, after iterations 2 and 5, and where training ends: 3 of the short one, 6 of the long one.
    assert run((0, 1, 9), 4)["best_step"] == 3
    facts = run((5, 2), 7)
    assert ppo.indices == list(range(7))
    assert (facts["steps"], facts["best_step"], facts["best_reward"]) == (7, 5, 5)
    facts = run((4,), 8)  # only where it ends: the last regular one was after iteration 5
    assert ppo.indices == list(range(8)) and (facts["best_step"], facts["best_reward"]) == (5, 5)


def test_ppo_that_is_made_longer_before_it_was_filed_is_evaluated_where_it_ends(attempt, monkeypatch, ppo) -> None:
    ppo.rewards = iter((0, 1, 7, 8))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(ppo_stage, "add_tokenizer", full)
        attempt("ppo", {"ppo.eval_every": 3, "ppo.num_steps": 4}).run()
    longer = attempt("ppo", {"ppo.eval_every": 3, "ppo.num_steps": 5})
    saved = []
    save = longer.roles["policy"]._save_model
    longer.roles["policy"]._save_model = lambda directory: saved.append(save(directory))
    facts = json.loads((longer.run() / "step.json").read_text())
    assert list(ppo.rewards) == [] and (facts["best_step"], facts["best_reward"]) == (4, 8)
    assert len(saved) == 1  # the policy of iteration 4, not that of iteration 3


@pytest.mark.parametrize(
    ("name", "module", "table"),
    [("evaluate", policies, "answers.parquet"), ("pairs", preference_collection, "pairs.parquet")],
)
def test_answers_are_sampled_once(attempt, monkeypatch, name, module, table) -> None:
    sampled = []
    answers = itertools.count()

    def evaluate_model(context: Any, checkpoint: Path, prompts: Any, early_stop: Any) -> Any:
        sampled.append(checkpoint)
        rewards = {"helpfulness": 0.1, "safety": 0.2, "combined": 0.3}
        made = [
            {
                "metrics": {"reward_combined": 1 / 3},
                "answers": [{"text": f"answer {next(answers)}", "finished": True, **rewards}],
            }
            for _ in range(2)
        ]
        return {"tried": {}, "decodings": dict(zip(("", " greedy"), made, strict=True))}

    def referee_scores(context: Any, prompts: Any, decodings: Any) -> Any:
        sampled.append(list(decodings))
        return {suffix: [0.5] for suffix in decodings}

    def sample(context: Any, prompts: Any, draws: list[Any], model: int, temperature: float, number: int) -> Any:
        sampled.append((model, temperature))
        return [
            (index, side, f"answer {next(answers)}", True)
            for index, draw in enumerate(draws)
            for side in (0, 1)
            if (draw.models[side], draw.temperatures[side]) == (model, temperature)
        ]

    monkeypatch.setattr(module, "start_engines", lambda *_, **__: None)
    monkeypatch.setattr(policies, "evaluate_model", evaluate_model)
    monkeypatch.setattr(policies, "referee_scores", referee_scores)
    monkeypatch.setattr(preference_collection, "sample", sample)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(module, "write_table", full)
        attempt(name).run()
    once = list(sampled)
    assert len(once) == {"evaluate": 2 * 2, "pairs": 2 * 3}[name]  # models, and their referee; models, temperatures
    done = attempt(name).run()
    assert sampled == once
    assert (done / table).exists() and not (done / "parts").exists()
