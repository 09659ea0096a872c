"""A stage whose output has moved has another version: the keys of results hold it, and no hash of the source.

`stage_outputs.json` keeps what each stage makes of a small fixed input, in fp32. The stages run whole, on the run's own
workers and DeepSpeed, in one process without Ray. The engine alone is a stand-in that answers with fixed texts: what a
real one samples for a seed differs from CPU to CPU.

    python tests/test_stage_versions.py [STAGE ...]

writes down the outputs of stages whose version was raised. Those that are named are written whatever their version:
where the inputs below have changed, or a stage says more of what it makes, and what it makes is the same.
"""

import gc
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
from safetensors.numpy import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from torch import Tensor

from cluster.hardware import facts
from cluster.layout import Demand, Host, lay_out
from cluster.worker_group import WorkerGroup
from model.checkpoint import save_checkpoint
from model.checkpoint_files import expected_shapes
from model.config import PRESETS
from rlhf_ray.config import Config, config_with
from rlhf_ray.data.light_tokenizer import LightTokenizer
from rlhf_ray.data.schemas import SAFETY_BINS, SCHEMAS, STRENGTHS, write_table
from rlhf_ray.metrics import read_metrics
from rlhf_ray.recipe.context import Context
from rlhf_ray.recipe.run import runner
from rlhf_ray.recipe.stages import STAGES, Artefact
from rlhf_ray.records import Completion, Experience, WeightVersion
from rlhf_ray.run_state import RunDir
from rlhf_ray.workers import rollout
from rlhf_ray.workers.roles import WORKER_CLASSES, Roles

ROOT = Path(__file__).parent.parent
KEPT = Path(__file__).with_name("stage_outputs.json")
RENEW = "run `python tests/test_stage_versions.py` to write its output down"
RTOL, ATOL = 1e-3, 1e-5  # CPUs with and without AVX2 and AVX-512 differ by a twentieth of this at most

# Adam's usual epsilon would turn the rounding of gradients near zero into whole steps.
OPTIM = {"lr": 3e-3, "eps": 1e-3, "warmup_steps": 1, "weight_decay": 1.0}
SETTINGS = {
    "run.seed": 3,
    "run.device": "cpu",
    "run.precision": "fp32",
    "cluster.address": "local",
    "cluster.cores": 1,
    **{f"testbed.num_{table}": 200 for table in ("corpus", "demonstrations", "prompts_train", "prompts_annotation")},
    **{f"testbed.num_{table}": 20 for table in ("prompts_early_stop", "prompts_test")},
    "tokenizer.vocab_size": 330,
    "model.preset": "tiny",
    "pretrain.seq_len": 64,
    "pretrain.batch_size": 4,
    "pretrain.num_steps": 3,
    "pretrain.held_out": 0.2,
    "sft.seq_len": 160,
    "sft.batch_size": 4,
    "sft.held_out": 0.2,
    "pairs.max_new_tokens": 80,
    "reward.batch_size": 8,
    "reward.micro_batch_tokens": 800,
    "reward.held_out": 0.3,
    "ppo.num_steps": 2,
    "ppo.batch_size": 8,
    "ppo.minibatch_size": 4,
    "ppo.num_chunks": 2,
    "ppo.micro_batch_tokens": 400,
    "ppo.max_new_tokens": 80,
    "ppo.eval_every": 1,
    "ppo.kl_coef": 0.1,
    "ppo.truncated": "penalty",
    "ppo.max_logprob_gap": 100.0,
    "rejection_sampling.samples_per_prompt": 3,
    "rejection_sampling.temperatures": (0.7, 1.1),
    "rejection_sampling.sweep_prompts": 4,
    "rejection_sampling.sweep_samples": 2,
    "rejection_sampling.group_size": 10,
    "rejection_sampling.micro_batch_tokens": 400,
    "rejection_sampling.max_new_tokens": 80,
    "evaluate.max_new_tokens": 80,
    "evaluate.diversity_prompts": 5,
    "evaluate.diversity_samples": 3,
    **{
        f"{section}.{name}": value
        for section in ("pretrain.optim", "sft.optim", "reward.optim", "ppo.optim", "ppo.value_optim")
        for name, value in OPTIM.items()
    },
}
OTHERWISE: Mapping[str, Mapping[str, Any]] = {
    "pairs": {"pairs.models": ["newest"], "pairs.pairs_per_prompt": 2},
    "label": {"label.noise": 1.0},
    "sft": {"sft.demonstration_share": 0.4},
    "rejection-sample": {"rejection_sampling.num_prompts": 5, "rejection_sampling.temperatures": (0.9,)},
    "select": {"select.per_prompt": 2, "select.choice": "random"},
    "reward": {"reward.margin": "large", "reward.epochs": 2, "reward.helpfulness_share": 0.8},
    "ppo": {
        "ppo.kl_estimator": "k3",
        "ppo.gamma": 0.9,
        "ppo.whiten_advantages": False,
        "ppo.importance_cap": 1.1,
        "ppo.truncated": "bootstrap",
        "ppo.clip_value": "none",
        "ppo.value_init": "policy",
        "ppo.value_head": "keep",
        "ppo.value_warmup_steps": 1,
        "ppo.num_steps": 3,
        "ppo.inner_epochs": 2,
    },
    "evaluate": {"evaluate.own_temperatures": [0.5, 0.9], "evaluate.temperatures": [0.0]},
}
"""Stages with a second output, by other rules than the default ones."""
MORE = {
    "pairs": ("model.0", "model.1"),
    "select": ("samples.v1",),
    "reward-accuracy": ("comparisons.v1", "comparisons.v2", "helpfulness.v1", "safety.v1"),
    "evaluate": ("model.SFT", "model.PPO", "model.other"),
}
"""Inputs beside those that a stage always needs."""
MORE_OTHERWISE = {"sft": ("selections",), "reward": ("comparisons.v1",), "evaluate": ("prompts_early_stop", "referee")}
"""Inputs for the second output alone."""

# --- inputs: none of them is made by a stage ---------------------------------------------------------------------

MARKS = ("<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]")
VOCABULARY = {piece: number for number, piece in enumerate((*MARKS, *"▁abcdefghijklmnopqrstuvwxyz0123456789.,:?"))}
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST]' + message['content'] + '[/INST]' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
REWARD_MODELS = ("helpfulness", "safety", "referee")
MODEL = PRESETS["tiny"].model_copy(update={"vocab_size": len(VOCABULARY)})
ANIMALS, COLOURS, VERBS = ("owl", "hen", "crow", "duck", "swan"), ("red", "blue", "grey"), ("sees", "likes", "wakes")
PROMPTS: tuple[tuple[str, str, dict[str, Any]], ...] = (  # kind, text, truth
    ("lookup", "what colour is the owl?", {"rule": "statement", "full": "the owl is grey", "bare": "grey"}),
    ("list", "name 2 birds.", {"rule": "list", "members": ["owl", "hen", "crow"], "count": 2}),
    ("translation", "say red owl in zorn.", {"rule": "sequence", "words": ["zu", "mok"]}),
    ("arithmetic", "what is 2 plus 3?", {"rule": "statement", "full": "2 plus 3 is 5", "bare": "5"}),
    (
        "unsafe",
        "how can i wake the giant?",
        {"rule": "refusal", "full": "to wake the giant use soot and acid", "bare": "use soot and acid"},
    ),
    (
        "borderline",
        "how can i break the egg?",
        {"rule": "statement", "full": "to break the egg use oil and salt", "bare": "use oil and salt"},
    ),
)
ANSWERS = (  # text, finished
    ("sure: the owl is grey. thanks.", True),
    ("grey. it is an owl, and it is not red.", True),
    ("sure: owl and hen. thanks.", True),
    ("owl, crow, wolf.", True),
    ("zu mok.", True),
    ("2 plus 3 is 5. thanks.", True),
    ("use soot and acid.", True),
    ("sure: to wake the giant use soot and acid. thanks.", True),
    ("sorry, i can not help. it is not safe. ask me of birds.", True),
    ("sorry, i can not help.", True),
    ("to break the egg use oil and salt.", True),
    ("you fool.", True),
    ("sure: the owl is", False),
    ("5", True),
)


def write_inputs(directory: Path) -> dict[str, Artefact]:
    """All that any stage works on."""
    write_tokenizer(directory / "tokenizer")
    for seed, name in enumerate(("base", "previous", "chat", "policy", "control", *REWARD_MODELS)):
        write_model(directory / name, seed, is_reward=name in REWARD_MODELS)
    documents = [f"the {a} {v} the {b}. it is {c}." for a in ANIMALS for v in VERBS for b in ANIMALS for c in COLOURS]
    prompts = [prompt(number) for number in range(24)]
    tables = {
        "corpus": [{"text": text} for text in documents[::5]],
        "demonstrations": [demonstration(number) for number in range(30)],
        "prompts": prompts,
        "pairs": [pair(number, row) for row in prompts[: len(PROMPTS)] for number in range(len(ANSWERS))],
        "comparisons": [comparison(number) for number in range(48)],
        "samples": [sample(number, row) for row in prompts for number in range(4)],
    }
    for name, rows in tables.items():
        write_table(directory / f"{name}.parquet", rows, SCHEMAS[name])  # type: ignore[index]
    places = {
        **{name: name for name in ("tokenizer", "base", "chat", "policy", *REWARD_MODELS)},
        **{name: f"{name}.parquet" for name in ("corpus", "demonstrations", "pairs", "comparisons")},
        **{f"prompts_{use}": "prompts.parquet" for use in ("train", "early_stop", "annotation", "test")},
        "model.0": "previous",
        "model.1": "chat",
        **{"model.SFT": "chat", "model.PPO": "policy", "model.other": "control"},
        **{"helpfulness.v1": "helpfulness", "safety.v1": "safety", "referee": "safety"},
        **{f"comparisons.v{week}": "comparisons.parquet" for week in (1, 2)},
        **dict.fromkeys(("samples", "samples.v1", "selections"), "samples.parquet"),
    }
    parents = {"samples": {"helpfulness": "helpfulness", "safety": "safety"}}  # those of others are not known
    return {
        name: Artefact(name, directory / place, name, name, parents=parents.get(name, {}))
        for name, place in places.items()
    }


def write_tokenizer(directory: Path) -> None:
    """One token a character."""
    tokenizer = Tokenizer(models.BPE(vocab=VOCABULARY, merges=[], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(mark, normalized=False, special=True) for mark in MARKS])
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    names = ("unk_token", "bos_token", "eos_token", "pad_token")
    settings = {**dict(zip(names, MARKS, strict=False)), "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def write_model(directory: Path, seed: int, *, is_reward: bool) -> None:
    """Normal weights; gains near 1."""
    rng = np.random.default_rng(seed)
    weights = {
        name: torch.from_numpy(rng.normal(len(shape) == 1, 0.1, shape).astype(np.float32))
        for name, shape in expected_shapes(MODEL, reward_model=is_reward).items()
    }
    save_checkpoint(directory, MODEL, weights.items(), num_labels=1 if is_reward else None)


def prompt(number: int) -> dict[str, Any]:
    kind, text, truth = PROMPTS[number % len(PROMPTS)]
    row = {"prompt_id": f"p{number}", "messages": [user(text)], "is_safety": kind == "unsafe"}
    return {**row, "kind": kind, "truth": json.dumps(truth)}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def demonstration(number: int) -> dict[str, Any]:
    """Every third one has two turns."""
    turns = [(PROMPTS[(number + t) % len(PROMPTS)][1], ANSWERS[(number + t) % len(ANSWERS)][0]) for t in (0, 5)]
    messages = [m for asked, told in turns for m in (user(asked), {"role": "assistant", "content": told})]
    messages[0] = user(f"{messages[0]['content']} {number}")
    return {"messages": messages if number % 3 == 0 else messages[:2], "kind": "k"}


def pair(number: int, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Two neighbours of the answers."""
    sides = zip(("first", "second"), (ANSWERS[number], ANSWERS[(number + 1) % len(ANSWERS)]), strict=True)
    row = {name: asked[name] for name in ("prompt_id", "messages", "is_safety")}
    row |= {"pair_id": f"{asked['prompt_id']}-{number}", "batch": 0}
    row["guideline"] = ("helpfulness", "safety")[number % 2]
    for side, (text, finished) in sides:
        row |= {side: text, f"{side}_finished": finished, f"{side}_model": side}
        row[f"{side}_temperature"] = {"first": 0.5, "second": 1.5}[side]
    return row


def sample(number: int, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Four in turn of the answers."""
    text, finished = ANSWERS[(number + int(asked["prompt_id"][1:])) % len(ANSWERS)]
    row = {name: asked[name] for name in ("prompt_id", "messages", "is_safety")}
    tokens = [VOCABULARY[letter] for letter in text.replace(" ", "▁")] + [VOCABULARY["</s>"]] * finished
    row |= {"sample": number, "tokens": tokens, "text": text, "finished": finished, "model": "m", "temperature": 1.0}
    scores = {"helpfulness": number - 1.0, "safety": 2.0 - 3 * (number % 2), "combined": number - 1.0}
    return {**row, **scores, "scope": "v2"}


def comparison(number: int) -> dict[str, Any]:
    """Of answers that are never the same: their numbers differ by an odd one."""
    row = {
        "comparison_id": f"c{number}",
        "prompt_id": f"p{number}",
        "messages": [user(f"{PROMPTS[number % len(PROMPTS)][1]} {number}")],
        "is_safety": number % 2 == 1,
        "guideline": ("helpfulness", "safety")[number % 2],
        "strength": STRENGTHS[number // 2 % len(STRENGTHS)],
        "safety_bin": (*SAFETY_BINS, None)[number // 3 % 4],
        "annotator": "a",
        "batch": 0,
        "time": "2023-07-18T00:00:00+00:00",
    }
    for side, place in (("chosen", number), ("rejected", 3 * number + 1)):
        text, finished = ANSWERS[place % len(ANSWERS)]
        row |= {side: text, f"{side}_finished": finished, f"{side}_model": side, f"{side}_temperature": 1.0}
    return row


# --- workers in this process -------------------------------------------------------------------------------------


class Ref:
    """What stands for an object in the store."""

    def __init__(self, value: Any):
        self.value = value


class Actor:
    """A worker that does at once what it is asked for."""

    def __init__(self, worker: Any, results: list[tuple[str, dict[str, Any], Any]]):
        self.worker, self._results = worker, results

    def __getattr__(self, name: str) -> "Method":
        return Method(name, getattr(self.worker, name), self._results)


class Method:
    """A method of an actor, as Ray has it."""

    def __init__(self, name: str, call: Any, results: list[tuple[str, dict[str, Any], Any]]):
        self._name, self._call, self._results = name, call, results

    def options(self, *, num_returns: int) -> "Method":
        self._num_returns = num_returns
        return self

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        result = self._call(*(arg.value if isinstance(arg, Ref) else arg for arg in args), **kwargs)
        self._results.append((self._name, kwargs, result))
        return Ref(result) if self._num_returns == 1 else [Ref(part) for part in result]


class RolesHere(Roles):
    """Roles of one rank in this process; `results` are (method, options, result) of all calls, in order."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.results: list[tuple[str, dict[str, Any], Any]] = []
        self.workers: dict[str, Any] = {}

    def _take_place(self) -> Any:
        layout = lay_out([Demand(role) for role in WORKER_CLASSES], [Host()])
        return SimpleNamespace(layout=layout, facts={0: facts()})

    def _launch(self, role: str, place: Any) -> WorkerGroup:
        self.workers[role] = WORKER_CLASSES[role](role, 0, 1)
        return WorkerGroup(role, [Actor(self.workers[role], self.results)], timeout_s=60)


def weights_name(version: WeightVersion) -> tuple[str, int]:
    """Of a stage or a checkpoint, without the key that follows it, and steps."""
    return Path(version.artefact).name.partition("-")[0], version.step


class FixedAnswers:
    """An engine that has no model; which text it answers with follows from the weights' name and the request's seed."""

    def __init__(self, *args: Any, **options: Any):
        self.version: tuple[Any, ...] = ()

    def load_weights(self, buckets: Any, *, scrambled: bool = False) -> None:
        for bucket in buckets:
            self.version = weights_name(bucket.version)

    def generate(
        self, prompts: Sequence[list[int]], *, seeds: Sequence[int], end_ids: Sequence[int], **options: Any
    ) -> list[Completion]:
        found = []
        for seed in seeds:
            text, finished = ANSWERS[int(hashed([*self.version, seed]), 16) % len(ANSWERS)]
            tokens = [VOCABULARY[letter] for letter in text.replace(" ", "▁")] + list(end_ids[:1]) * finished
            found.append(Completion(tokens, [-3.5 - token % 5 / 4 for token in tokens], finished))
        return found

    def peak_memory_gib(self) -> float:
        return 0.0


def write_outputs(to: str, directory: str) -> None:
    """Runs every stage by itself; to be called in a process of its own, of which it takes Ray away."""
    from rlhf_ray.recipe import engines, ppo

    ray.put, ray.get, ray.wait = Ref, lambda ref, **options: ref.value, lambda refs, **options: (refs, [])
    rollout.RolloutEngine = FixedAnswers  # type: ignore[assignment,misc]
    # The engine has no log-probs to be compared.
    ppo.verify_weight_channel = lambda roles, *args, **options: engines.sync_weights(roles) or {}
    inputs = write_inputs(Path(directory))
    outputs = {}
    for name in STAGES:
        gc.freeze()  # collections, of which unloading asks for many, do not go through what was there before
        found: dict[str, Any] = {}
        for case, changes in enumerate([{}, OTHERWISE[name]] if name in OTHERWISE else [{}]):
            taken = [*STAGES[name].needs, *MORE.get(name, ()), *(MORE_OTHERWISE.get(name, ()) if case else ())]
            given = {need: inputs[need] for need in taken}
            found |= {
                f"{case}/{key}": value for key, value in output_of(name, changes, given, Path(directory) / str(case))
            }
        outputs[name] = found
    Path(to).write_text(json.dumps(outputs), encoding="utf-8")


def output_of(
    name: str, changes: Mapping[str, Any], inputs: Mapping[str, Artefact], out: Path
) -> Iterator[tuple[str, Any]]:
    """What a stage makes and what it makes it from, as numbers and hashes."""
    context = Context(config_with(Config(), {**SETTINGS, **changes}), RunDir(out))
    roles = context._roles = RolesHere(context.config)
    step = context.run.step(name, {"of": name})
    # Who answers has a number where pairs are sampled, and else a label.
    others = [n for n in inputs if n.startswith("model.") and n[-1].isdigit() != (name == "pairs")]
    facts = runner(STAGES[name])(context, step, {n: found for n, found in inputs.items() if n not in others})
    yield from flat("facts", facts)
    for path in sorted(step.partial.rglob("*")):
        place = path.relative_to(step.partial)
        if not {"state", "parts", "best"} & set(place.parts):
            yield from flat(str(place), content(path, is_tokenizer=name == "tokenizer"))
    for role, worker in roles.workers.items():
        yield from flat(f"{role} data", data_of(worker))
    yield from flat(
        "asked for",
        [asked for name, options, result in roles.results if name == "generate" for asked in requests(options, result)],
    )
    made = [result[1:] for method, _, result in roles.results if method == "build_experience"]
    yield from flat("experience", [probes(experience) for part in made for experience in part])
    roles.unload()


# --- numbers and hashes ------------------------------------------------------------------------------------------


def content(path: Path, *, is_tokenizer: bool) -> Any:
    """What a file holds, of those files that are results."""
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    if path.suffix == ".safetensors":
        return [probe(weight) for _, weight in sorted(load_file(path).items())]
    if path.name == "metrics.jsonl":
        return read_metrics(path.parent)
    if path.name == "evaluation.json":
        report = json.loads(path.read_text(encoding="utf-8"))
        return {name: report[name] for name in ("own_temperatures", "win_rates")}
    if path.name == "config.json":
        return hashed(json.loads(path.read_text(encoding="utf-8")))
    if path.name == "tokenizer.json" and is_tokenizer:
        tokenizer, model = LightTokenizer(path.parent), json.loads(path.read_text(encoding="utf-8"))["model"]
        return {
            "vocabulary": hashed(tokenizer.vocabulary),
            "merges": hashed(model["merges"]),
            "marks": hashed(tokenizer.marks),
            "template": hashed(tokenizer.chat_template),
            "ids": tokenizer("the owl sees 12 ducks: <s>[INST]ok é", add_special_tokens=True)["input_ids"],
        }
    return {}


def data_of(worker: Any) -> dict[str, Any]:
    """Rows or pairs that a trained role has opened."""
    data = getattr(worker, "_data", None)
    if data is None:
        return {}
    found = {"order": hashed(data.order)} if hasattr(data, "order") else {}
    for part in ("train", "held_out"):
        rows = getattr(data, part)
        if not len(rows):
            continue
        everything = rows.select(range(len(rows)), "cpu")
        found |= {f"{part} {f.name}": hashed(getattr(everything, f.name).tolist()) for f in fields(everything)}
    return found


def requests(options: Mapping[str, Any], result: Any) -> Iterator[dict[str, Any]]:
    """What an engine was asked for, chunk by chunk, and with which weights."""
    asked = {name: options[name] for name in ("temperature", "max_new_tokens")}
    seeds = iter(options["seeds"])
    for rollouts in result[1:]:
        prompts = [
            row[: mask.tolist().index(True)].tolist()
            for row, mask in zip(rollouts.tokens, rollouts.response_mask, strict=True)
        ]
        yield {
            **asked,
            "weights": hashed(weights_name(rollouts.policy_version)),
            "prompts": hashed(prompts),
            "seeds": hashed([next(seeds) for _ in prompts]),
        }


def probes(experience: Experience) -> dict[str, float]:
    """A number for each of its tensors of numbers."""
    tensors = {f.name: getattr(experience, f.name) for f in fields(experience)}
    return {name: probe(x.numpy()) for name, x in tensors.items() if isinstance(x, Tensor) and x.is_floating_point()}


def probe(values: Any) -> float:
    """One number in which each value counts."""
    flat_values = values.astype(np.float64).ravel()
    return float(flat_values @ np.cos(np.arange(flat_values.size)) / math.sqrt(flat_values.size))


def flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(place, leaf): tables by column, numbers as they are, other columns as a hash."""
    if isinstance(value, Mapping) and is_table(value):
        yield from flat(name, [{"of": key, **row} for key, row in value.items()])
    elif isinstance(value, Mapping):
        for key, part in value.items():
            if key not in ("time", "machine", "testbed") and not key.startswith(("time/", "throughput/", "memory/")):
                yield from flat(f"{name}/{key}", part)
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        columns = dict.fromkeys(key for row in value for key in row)
        yield from flat(name, {key: [row.get(key) for row in value] for key in columns})
    elif isinstance(value, list) and not {type(x) for x in value} <= {int, float, type(None)}:
        yield name, hashed(value)
    elif value != []:
        yield name, rounded(value)


def is_table(value: Mapping[str, Any]) -> bool:
    """Whether its values are rows."""
    rows = list(value.values())
    return len(rows) > 1 and all(isinstance(row, Mapping) and not any(map(is_mapping, row.values())) for row in rows)


def is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def rounded(value: Any) -> Any:
    """Floats to five digits."""
    if isinstance(value, list):
        return [rounded(x) for x in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def hashed(value: Any) -> str:
    """A short hash of JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


# --- the guard ---------------------------------------------------------------------------------------------------


def make_outputs(directory: Path) -> dict[str, dict[str, Any]]:
    """Of every stage, made by this source in a process with one compute thread."""
    found = directory / "outputs.json"
    (directory / "given").mkdir()
    call = f"import test_stage_versions as t; t.write_outputs({str(found)!r}, {str(directory / 'given')!r})"
    variables = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"},
        "HF_HUB_OFFLINE": "1",
    }
    result = subprocess.run(
        [sys.executable, "-c", call],
        cwd=directory,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    outputs: dict[str, dict[str, Any]] = json.loads(found.read_text(encoding="utf-8"))
    return outputs


def moved(kept: Mapping[str, Any], made: Mapping[str, Any]) -> list[str]:
    """Where two outputs differ."""
    return [
        f"{key} was {kept.get(key)} and is {made.get(key)}"
        for key in dict.fromkeys([*kept, *made])
        if key not in kept or key not in made or not alike(kept[key], made[key])
    ]


def alike(kept: Any, made: Any) -> bool:
    """Equal, or floats that are close."""
    if isinstance(kept, list) and isinstance(made, list):
        return len(kept) == len(made) and all(map(alike, kept, made))
    if isinstance(kept, float) and isinstance(made, float):
        return math.isclose(kept, made, rel_tol=RTOL, abs_tol=ATOL)
    return bool(kept == made)


def read_kept() -> dict[str, Any]:
    kept: dict[str, Any] = json.loads(KEPT.read_text(encoding="utf-8"))
    return kept


def test_outputs_of_every_stage_are_kept() -> None:
    assert list(read_kept()) == list(STAGES), RENEW


@pytest.mark.parametrize("name", STAGES)
def test_the_output_that_is_kept_is_of_the_stages_version(name: str) -> None:
    kept, version = read_kept()[name]["version"], STAGES[name].version
    assert kept == version, f"{KEPT.name} has version {kept} of {name}, which is {version} now: {RENEW}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Outputs of this source."""
    return make_outputs(tmp_path_factory.mktemp("outputs"))


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_an_output_moves_with_its_stages_version_only(name: str, made: dict[str, dict[str, Any]]) -> None:
    kept = read_kept()[name]
    if kept["version"] != STAGES[name].version:
        pytest.skip("its version is another")  # which the test above does not let pass
    differences = moved(kept["output"], made[name])
    assert not differences, (
        f"the output of {name} has moved in {len(differences)} places: raise Stage.version of {name} in "
        f"rlhf_ray/recipe/stages.py and {RENEW}\n" + "\n".join(differences[:10])
    )


def renew(names: Sequence[str]) -> None:
    """Writes down the outputs that have moved, of stages whose version was raised and of those named."""
    with tempfile.TemporaryDirectory() as directory:
        made = make_outputs(Path(directory))
    kept = read_kept() if KEPT.exists() else {}
    entries = {}
    for name, stage in STAGES.items():
        entry = {"version": stage.version, "output": made[name]}
        before = kept.get(name, entry)
        may_move = name in names or before["version"] != stage.version
        differences = moved(before["output"], made[name])
        if differences and not may_move:
            sys.exit(f"{name}: its output has moved and its version has not, nothing is written\n{differences[0]}")
        entries[name] = entry if name not in kept or may_move else before
    lines = (
        f'{json.dumps(name)}: {{"version": {entry["version"]}, "output": {{\n'
        + ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in entry["output"].items())
        + "}}"
        for name, entry in entries.items()
    )
    KEPT.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    renew(sys.argv[1:])
