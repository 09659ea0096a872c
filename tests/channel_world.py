"""What a policy and engines start from, to send weights between them: models of 0.16M parameters, prompts, a config."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from training_world import TIED, UNTIED

from model.checkpoint import save_checkpoint
from model.config import ModelConfig
from model.llama import Head, Llama
from rlhf_ray.config import Config, parse_config
from rlhf_ray.data.schemas import PROMPTS, write_table
from rlhf_ray.recipe.context import Context
from rlhf_ray.recipe.engines import start_engines
from rlhf_ray.recipe.stages import Artefact, given_outputs
from rlhf_ray.recipe.tokenizer import save_tokenizer, train_tokenizer

NUM_PROMPTS = 12
VOCAB, PADDED = 300, 1500
"""Rows of the embedding: the tokenizer's and a few, or far more, which are as likely to be sampled as the others."""


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
            ("untied", UNTIED.model_copy(update={"vocab_size": PADDED}), "lm"),
            ("untied-trained", UNTIED.model_copy(update={"vocab_size": PADDED}), "lm"),
            ("helpfulness", TIED, "scalar"),
            ("safety", TIED, "scalar"),
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
        config = config.model_copy(update={"vocab_size": VOCAB} if config.vocab_size != PADDED else {})
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

    def config(self, chat: str, precision: str, tensor_parallel_size: int = 1, **roles: Any) -> Config:
        """Of a run whose PPO is ready to begin."""
        inputs = {name: str(self.directory / name) for name in ("helpfulness", "safety")}
        chat_directory, prompts = str(self.directory / chat), str(self.directory / "prompts.parquet")
        return parse_config(
            {
                "run": {"precision": precision, "device": "cpu"},
                "cluster": {"cores": 2, "call_timeout_s": 300.0},
                "roles": {"rollout": {"tensor_parallel_size": tensor_parallel_size}, **roles},
                "inputs": {**inputs, "tokenizer": str(self.directory / "tokenizer"), "chat": chat_directory},
                "data": {"prompts_train": prompts, "prompts_early_stop": prompts},
                "ppo": {"batch_size": 8, "minibatch_size": 4, "max_new_tokens": 6, "num_chunks": 2},
            }
        )


def inputs_of(context: Context) -> dict[str, Artefact]:
    """What the config names."""
    given = given_outputs(context.config)
    return {name: Artefact(name, Path(source.path), "", source.field) for name, source in given.items()}


def start(context: Context) -> None:
    """Engines on the chat model."""
    inputs = inputs_of(context)
    start_engines(context, inputs["chat"].path, inputs["tokenizer"].path)
