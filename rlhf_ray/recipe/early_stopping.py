"""PPO's early stopping: the best held-out reward so far, and the policy that earned it."""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from rlhf_ray.config import PPOSection
from rlhf_ray.run_state import copy_files
from rlhf_ray.workers.roles import Roles
from rlhf_ray.workers.trainer import TrainerWorker


@dataclass
class EarlyStopping:
    """The best held-out reward so far."""

    best: float = -math.inf
    best_step: int = -1
    evaluations_since_best: int = 0

    def update(self, step: int, reward: float) -> bool:
        """Takes in one evaluation; True where it is the best so far."""
        if reward > self.best:
            self.best, self.best_step, self.evaluations_since_best = reward, step, 0
            return True
        self.evaluations_since_best += 1
        return False

    @classmethod
    def load(cls, state: Path | None) -> "EarlyStopping":
        """From a checkpoint of the stage, or afresh."""
        return cls(**json.loads((state / "early_stopping.json").read_text(encoding="utf-8"))) if state else cls()


def evaluation_is_due(section: PPOSection, index: int) -> bool:
    """Whether the policy is evaluated after iteration `index`; never while it waits for the value model."""
    return index >= section.value_warmup_steps and (index + 1) % section.eval_every == 0


def best_directory(work: Path, index: int) -> Path:
    """Where the policy after iteration `index` is kept while it is the best; -1 is the policy PPO starts from."""
    return work / "best" / f"after-{index + 1:06d}"


def keep_best(roles: Roles, work: Path, index: int) -> None:
    """Saves the policy as the best so far; one from before an interruption is the same and stays.

    The policy that PPO starts from lies on disk as the chat model.
    """
    if index >= 0 and not best_directory(work, index).exists():
        roles.make_resident("policy")
        roles["policy"].call(TrainerWorker.save_model, str(best_directory(work, index)), step=f"ppo step {index}")


def take_best(finished: Path, work: Path, index: int) -> None:
    """Has the best policy of a finished step in that which goes on with it."""
    target = best_directory(work, index)
    if index >= 0 and not target.exists():
        own = best_directory(finished, index)
        link_whole(own if own.exists() else finished / "model", target)


def link_whole(source: Path, target: Path) -> None:
    """Second names for a checkpoint's files, in a directory that appears by rename."""
    half = target.with_name(f".{target.name}.partial-")
    copy_files(source, half, link=True)
    half.rename(target)


def drop_others(directory: Path, kept: Path) -> None:
    """Removes all of a directory's entries but one. Only once a checkpoint no longer points at them."""
    for other in directory.glob("*"):
        if other != kept:
            shutil.rmtree(other)
