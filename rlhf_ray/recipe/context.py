"""What the stages of one run share: its config, its directory and the workers."""

from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_ray.config import Config
from rlhf_ray.data.special_ids import write_ids
from rlhf_ray.errors import UserError
from rlhf_ray.machine import machine_facts, ray_address, settled
from rlhf_ray.run_state import RunDir, copy_file

TOKENIZER_FILES = (
    "tokenizer*",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
)


def address_field(address: str | None) -> str:
    """Where a settled config's cluster address is from."""
    return "RAY_ADDRESS" if address == ray_address() else "cluster.address"


def no_cluster(address: str | None, error: Exception) -> UserError:
    """What is wrong where the cluster's address leads nowhere."""
    return UserError(
        f"{address_field(address)}={address!r}: no cluster answers there ({str(error).splitlines()[0]}); "
        "start one with `ray start --head`, or set cluster.address=local for an embedded one"
    )


@dataclass
class Context:
    """One run."""

    config: Config
    """Settled (`rlhf_ray.machine`) whatever was given; that of the node at work."""
    run: RunDir
    every_id: bool = False
    """Whether engines may sample ids that the tokenizer does not know, as benchmarks with a stand-in for it do."""
    _roles: Any = None
    _at: str = ""
    _seated: tuple[str, ...] = ()
    _stack: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        self.config = settled(self.config)
        self.run.machine = machine_facts(self.config)

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
            self._roles = Roles(self.config, self._seated)
            self._roles.step = self._at
            self._stack.callback(self._roles.stop)
        return self._roles

    def work_at(self, name: str, config: Config, roles: Collection[str]) -> None:
        """Turns to a node: messages are about it, and roles are of its config's size from now on.

        Each stage has all GPUs for its own roles: those that it does not use are ended.
        """
        self.config, self._at = config, name
        self._seated = tuple(roles)
        if self._roles is not None:
            self._roles.step = name
            self._roles.lay_out(config, self._seated)

    def release(self, needed: set[str]) -> None:
        """Frees what roles hold, and ends those that no later node needs; to be called when a node is done."""
        from cluster.worker_group import WorkerError

        if self._roles is None:
            return
        self._roles.release(needed)
        try:
            self._roles.unload()
        except WorkerError:
            if not self._roles.drop_dead():  # one that died idle is started anew where it is needed
                raise

    def close(self) -> None:
        """Ends the workers and Ray."""
        self._stack.close()
        self._roles = None


def add_tokenizer(tokenizer: Path, checkpoint: Path) -> None:
    """Copies the run's tokenizer into a checkpoint; others load it as it is, and end answers as the run does."""
    for pattern in TOKENIZER_FILES:
        for file in tokenizer.glob(pattern):
            copy_file(file, checkpoint / file.name)
    write_ids(checkpoint)
