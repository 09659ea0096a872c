"""The work on which PPO loops are compared: models, prompts and settings of three shapes, made on disk.

    testbed   the model, batch and lengths of configs/demo.toml: 0.8M parameters, 256 prompts of the testbed, four
              optimizer steps on 64 answers each, 24 new tokens
    3.8m      3.8M parameters, 32 prompts of 32 tokens, 64 new tokens, one epoch, one optimizer step
    smollm2   the same work on SmolLM2-135M, whose checkpoint scripts/fetch_smollm2.py makes
    tiny      for trying the scripts out: 8 prompts of 8 tokens, 8 new tokens

Weights are random but for SmolLM2's; every answer has exactly the given number of tokens, so that the work does not
depend on what is sampled.
"""

import argparse
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import ROOT, parser_of

from model.checkpoint import iterate_tensors, load_model, read_config, save_checkpoint
from model.config import PRESETS, ModelConfig
from model.llama import Llama
from rlhf_ray.config import OptimSection, PPOSection, load_config
from rlhf_ray.data.batching import prompt_rows
from rlhf_ray.data.chat import load_tokenizer
from rlhf_ray.data.prompts import load_prompts
from rlhf_ray.recipe.context import TOKENIZER_FILES
from rlhf_ray.recipe.run import run_recipe
from rlhf_ray.recipe.tokenizer import save_tokenizer, train_tokenizer

SHAPES = ("testbed", "3.8m", "smollm2", "tiny")
FIRST_WORD = 16  # random prompts are drawn from the ids above this: below are special tokens
TESTBED = {"testbed.num_corpus": 8000, "testbed.num_demonstrations": 100, "testbed.num_prompts_annotation": 100}
"""Tables that a comparison of speed has no use for are kept short; the tokenizer still learns the testbed's words."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one PPO iteration works on."""

    name: str
    chat: Path
    """Policy and reference; holds a tokenizer as well."""
    helpfulness: Path
    """Reward model, and the value model's body."""
    safety: Path
    prompts: list[list[int]]
    is_safety: list[bool]
    section: PPOSection
    precision: str = "bf16"

    @property
    def response_tokens(self) -> int:
        """Tokens of every answer."""
        return self.section.max_new_tokens

    def rows(self, index: int, *, seed: int = 0) -> list[int]:
        """The prompts of an iteration."""
        return prompt_rows(len(self.prompts), self.section.batch_size, seed=seed, step=index)

    def described(self) -> dict[str, Any]:
        """For a file of results."""
        config = read_config(self.chat)
        lengths = [len(prompt) for prompt in self.prompts]
        return {
            "model": config.model_dump(exclude={"rope_scaling"}),
            "parameters": sum(p.numel() for p in _on_meta(config).parameters()),
            "precision": self.precision,
            "prompt_tokens": {"mean": round(sum(lengths) / len(lengths), 1), "max": max(lengths)},
            "response_tokens": self.response_tokens,
            "ppo": self.section.model_dump(mode="json"),
        }


def work_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every script on this work has."""
    parser = parser_of(doc)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--smollm2", type=Path, help="SmolLM2's checkpoint, for the shape smollm2")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    return parser


def make_work(shape: str, directory: Path, *, smollm2: Path | None = None, precision: str = "bf16") -> Work:
    """The work of a shape, its files below `directory`; files that are there already are used again."""
    if shape == "testbed":
        return _testbed(directory / shape, precision)
    section = PPOSection(
        batch_size=32,
        minibatch_size=32,
        micro_batch_tokens=4096,
        max_new_tokens=64,
        optim=OptimSection(lr=1e-5, schedule="constant", warmup_steps=0),
        value_optim=OptimSection(lr=1e-5, schedule="constant", warmup_steps=0),
    )
    if shape == "smollm2":
        if smollm2 is None:
            raise SystemExit("error: smollm2 needs --smollm2 DIR; python scripts/fetch_smollm2.py DIR makes it")
        chat, prompt_tokens, num_prompts = smollm2.resolve(), 32, 32
        section = section.model_copy(update={"micro_batch_tokens": 2048})  # as configs/smollm2.toml
    elif shape == "3.8m":
        chat, prompt_tokens, num_prompts = _random_chat(PRESETS[shape], directory / shape / "chat"), 32, 32
    elif shape == "tiny":
        chat, prompt_tokens, num_prompts = _random_chat(PRESETS[shape], directory / shape / "chat"), 8, 8
        small = {"batch_size": 8, "minibatch_size": 8, "max_new_tokens": 8, "micro_batch_tokens": 64}
        section = section.model_copy(update=small)
    else:
        raise SystemExit(f"error: shape {shape!r} must be one of {', '.join(SHAPES)}")
    rng = random.Random(0)
    vocabulary = read_config(chat).vocab_size
    prompts = [[rng.randrange(FIRST_WORD, vocabulary) for _ in range(prompt_tokens)] for _ in range(num_prompts)]
    return _with_rewards(shape, directory / shape, chat, prompts, [i % 4 == 0 for i in range(num_prompts)], section,
                         precision)  # fmt: skip


def _testbed(directory: Path, precision: str) -> Work:
    config = load_config(ROOT / "configs" / "demo.toml", [f"{key}={value}" for key, value in TESTBED.items()])
    made = run_recipe(config, directory / "run", stages=("testbed", "tokenizer"))
    shape = PRESETS[config.model.preset].model_copy(update={"vocab_size": config.tokenizer.vocab_size})
    chat = _random_chat(shape, directory / "chat", tokenizer=made["tokenizer"].path)
    prompts = load_prompts(str(made["prompts_train"].path), load_tokenizer(chat), max_prompt_tokens=shape.max_seq_len)
    tokens, is_safety = list(prompts.tokens), list(prompts.is_safety)
    return _with_rewards("testbed", directory, chat, tokens, is_safety, config.ppo, precision)


def _with_rewards(
    name: str,
    directory: Path,
    chat: Path,
    prompts: list[list[int]],
    is_safety: list[bool],
    section: PPOSection,
    precision: str,
) -> Work:
    rewards = {}
    for seed, role in enumerate(("helpfulness", "safety"), start=1):
        rewards[role] = directory / role
        if not rewards[role].exists():
            model = load_model(chat, head="scalar", fresh_head=True, seed=seed)
            save_checkpoint(rewards[role], model.config, model.named_parameters(), num_labels=1)
    return Work(
        name=name, chat=chat, prompts=prompts, is_safety=is_safety, section=section, precision=precision, **rewards
    )


def _random_chat(config: ModelConfig, directory: Path, *, tokenizer: Path | None = None) -> Path:
    """A language model with random weights, and a tokenizer; without one given, one of a few words that knows EOS."""
    if not directory.exists():
        model = Llama(config)
        model.init_weights(seed=0)
        save_checkpoint(directory, config, model.to(torch.bfloat16).named_parameters())
        if tokenizer is None:
            save_tokenizer(train_tokenizer(["which is a fish: carp or hen?"] * 9, vocab_size=300), directory)
        else:
            for pattern in TOKENIZER_FILES:
                for file in tokenizer.glob(pattern):
                    (directory / file.name).write_bytes(file.read_bytes())
    return directory


def _on_meta(config: ModelConfig) -> Llama:
    with torch.device("meta"):
        return Llama(config)


def num_bytes(checkpoint: Path) -> int:
    """Bytes of a checkpoint's tensors."""
    return sum(tensor.nbytes for _, tensor in iterate_tensors(checkpoint))
