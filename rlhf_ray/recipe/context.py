"""What the stages of one run share: its directory, the outputs so far, and the workers."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_ray.config import Config
from rlhf_ray.data.reward_function import function_version, is_function
from rlhf_ray.data.special_ids import write_ids
from rlhf_ray.errors import UserError
from rlhf_ray.machine import machine_facts, ray_address, settled
from rlhf_ray.metrics import console
from rlhf_ray.run_state import RunDir, Step, code_version, copy_file, fingerprint

SHARED_CODE = (
    "model",
    "rlhf_ray.algo",
    "rlhf_ray.backends",
    "rlhf_ray.data",
    "rlhf_ray.workers",
    "rlhf_ray.records",
    "rlhf_ray.recipe.engines",
)

TOKENIZER_FILES = (
    "tokenizer*",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
)

WHO_MAKES = {
    "tokenizer": ("tokenizer", "inputs.tokenizer"),
    "base": ("pretrain", "inputs.base"),
    "chat": ("sft", "inputs.chat"),
    "comparisons": ("collect", "data.comparisons"),
    "helpfulness": ("reward", "inputs.helpfulness"),
    "safety": ("reward", "inputs.safety"),
    "policy": ("ppo", None),
    "corpus": ("testbed", "data.corpus"),
    "demonstrations": ("testbed", "data.demonstrations"),
    "prompts_train": ("testbed", "data.prompts_train"),
    "prompts_early_stop": ("testbed", "data.prompts_early_stop"),
    "prompts_annotation": ("testbed", "data.prompts_annotation"),
    "prompts_test": ("testbed", "data.prompts_test"),
}
"""Output name -> the stage that makes it, and the config key that names one from elsewhere."""


def address_field(address: str | None) -> str:
    """Where a settled config's cluster address is from."""
    return "RAY_ADDRESS" if address == ray_address() else "cluster.address"


def no_cluster(address: str | None, error: Exception) -> UserError:
    """What is wrong where the cluster's address leads nowhere."""
    return UserError(
        f"{address_field(address)}={address!r}: no cluster answers there ({str(error).splitlines()[0]}); "
        "start one with `ray start --head`, or set cluster.address=local for an embedded one"
    )


class MissingOutputError(UserError):
    """A stage needs what neither the run nor the config has."""


class NotDoneError(Exception):
    """A stage that is not to be run has not been done."""


class Outputs:
    """Paths that stages have made or the config names, each with the hash that stands for its content."""

    def __init__(self, config: Config):
        self._paths: dict[str, Path] = {}
        self._keys: dict[str, str] = {}
        given = {**config.data.model_dump(), **config.inputs.model_dump()}
        for checkpoint in (given["chat"], given["base"]):
            if given["tokenizer"] is None and checkpoint and (Path(checkpoint) / "tokenizer.json").exists():
                given["tokenizer"] = checkpoint  # a checkpoint's own tokenizer goes with it
        for name, path in given.items():
            if path is not None:
                is_named = name in ("helpfulness", "safety") and is_function(path)
                key = function_version(path, root=os.getcwd()) if is_named else fingerprint(path)
                self.add(name, Path(path), key=key)

    def add(self, name: str, path: Path, *, key: str) -> None:
        """Registers an output; one that the config names stays."""
        if name not in self._paths:
            self._paths[name], self._keys[name] = path, key

    def __contains__(self, name: str) -> bool:
        return name in self._paths

    def __getitem__(self, name: str) -> Path:
        """The path.

        Raises:
            MissingOutputError: nothing has made it and the config does not name one.
        """
        if name not in self._paths:
            stage, key = WHO_MAKES[name]
            remedy = f"run the {stage} stage first" + (f", or set {key}" if key else "")
            raise MissingOutputError(f"{name}: there is none in this run yet; {remedy}")
        return self._paths[name]

    def key(self, name: str) -> str:
        """The hash of the content."""
        self[name]
        return self._keys[name]


@dataclass
class Context:
    """One run."""

    config: Config
    """Settled (`rlhf_ray.machine`) whatever was given."""
    run: RunDir
    outputs: Outputs = field(init=False)
    may_run: bool = True
    """Whether stages may do work, or only look for what was done before."""
    every_id: bool = False
    """Whether engines may sample ids that the tokenizer does not know, as benchmarks with a stand-in for it do."""
    _roles: Any = None
    _at: str = ""
    _stack: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        self.config = settled(self.config)
        self.run.machine = machine_facts(self.config)
        self.outputs = Outputs(self.config)

    @property
    def roles(self) -> Any:
        """The run's `Roles`; Ray starts at first use, so that a run with nothing to do starts nothing."""
        if self._roles is None:
            from cluster.session import session
            from rlhf_ray.workers.roles import Roles

            cluster = self.config.cluster
            try:
                self._stack.enter_context(session(address=cluster.address, num_cpus=cluster.cores))
            except ConnectionError as error:
                raise no_cluster(cluster.address, error) from error
            self._roles = Roles(self.config)
            self._roles.step = self._at
            self._stack.callback(self._roles.stop)
        return self._roles

    def unload(self) -> None:
        """Frees what roles hold; to be called when a stage has ended."""
        if self._roles is not None:
            self._roles.unload()

    def close(self) -> None:
        """Ends the workers and Ray."""
        self._stack.close()
        self._roles = None

    def step(
        self, name: str, *, sections: Sequence[str], parents: Sequence[str], code: Sequence[str], **more: Any
    ) -> Step:
        """The step `name`, filed under the hash of these config sections, parent outputs and source modules."""
        dumped = self.config.model_dump(mode="json")
        inputs = {
            "config": {section: dumped[section] for section in sections},
            "seed": self.config.run.seed,
            "precision": self.config.run.precision,
            "parents": {parent: self.outputs.key(parent) for parent in parents},
            "code": code_version(*SHARED_CODE, *code),
            **more,
        }
        return self.run.step(name, inputs)

    def sampling_settings(self) -> dict[str, int]:
        """What of the engines decides their samples. Where else roles run is no part of what a step is: ranks, ZeRO
        stage and GPUs change results by rounding alone, and a step goes on on others than it began on.
        """
        rollout = self.config.roles.rollout
        return {"max_num_seqs": rollout.max_num_seqs, "tensor_parallel_size": rollout.tensor_parallel_size}

    def skip(self, step: Step) -> bool:
        """Whether the step's output is there already; says so.

        Raises:
            NotDoneError: it is not, and this run must not make it.
        """
        if not self.may_run:
            if not step.done:
                raise NotDoneError(step.name)
        elif step.done:
            console.print(f"{step.name}: done before with the same inputs ({step.key}), skipped")
        elif step.partial.exists():
            done, _ = step.latest_state()
            console.print(f"{step.name}: going on from step {done} ({step.key})")
        else:
            console.print(f"{step.name}: starting ({step.key})")
        self._at = step.name
        if self._roles is not None:
            self._roles.step = step.name
        return step.done

    def add_tokenizer(self, checkpoint: Path) -> None:
        """Copies the run's tokenizer into a checkpoint; others load it as it is, and end answers as the run does."""
        for pattern in TOKENIZER_FILES:
            for file in self.outputs["tokenizer"].glob(pattern):
                copy_file(file, checkpoint / file.name)
        write_ids(checkpoint)
