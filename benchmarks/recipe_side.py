"""This project's PPO on the work of `ppo_work`: real Ray, vLLM and DeepSpeed, set up as the PPO stage does."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from ppo_work import Work

import rlhf_ray.workers.roles as roles_module
from rlhf_ray.config import Config, parse_config
from rlhf_ray.recipe import ppo
from rlhf_ray.recipe.context import Context
from rlhf_ray.recipe.engines import start_engines, sync_weights
from rlhf_ray.recipe.scoring import SCORING_ROLES
from rlhf_ray.recipe.stages import Artefact
from rlhf_ray.records import PromptBatch, WeightBucket, WeightVersion
from rlhf_ray.run_state import RunDir
from rlhf_ray.workers.policy import PolicyWorker
from rlhf_ray.workers.rollout import RolloutWorker

# Workers import the classes below from this directory, which a session does not tell them of.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))


class MeasuredRollout(RolloutWorker):
    """The parts of a sync are timed."""

    def load_weights(self, buckets: list[Any]) -> WeightVersion:
        self._fetch_s = 0.0
        start = time.perf_counter()
        version = super().load_weights(buckets)
        self._load_s = time.perf_counter() - start - self._fetch_s
        return version

    def _fetch(self, buckets: list[Any]) -> Iterator[WeightBucket]:
        fetched = super()._fetch(buckets)
        while True:
            start = time.perf_counter()
            bucket = next(fetched, None)
            self._fetch_s += time.perf_counter() - start
            if bucket is None:
                return
            yield bucket

    def sync_seconds(self) -> dict[str, float]:
        """Of the latest sync: out of the object store, and into the engine."""
        return {"transfer": self._fetch_s, "load": self._load_s}


class MeasuredPolicy(PolicyWorker):
    """The export of weights is timed."""

    def export_weights(self) -> list[Any]:
        start = time.perf_counter()
        buckets = super().export_weights()
        self._export_s = time.perf_counter() - start
        return buckets

    def sync_seconds(self) -> dict[str, float]:
        """Of the latest sync: out of the trainer, into the object store."""
        return {"export": self._export_s}


class RecipeSide:
    """The roles of a run whose PPO is ready for its first iteration."""

    def __init__(self, work: Work, context: Context):
        self.work, self.context, self.roles = work, context, context.roles
        self._index = 0
        self._prompts = PromptBatch(  # as token ids; answers go on to the length limit
            ids=tuple(f"p{number}" for number in range(len(work.prompts))),
            tokens=tuple(work.prompts),
            messages=([],) * len(work.prompts),
            is_safety=tuple(work.is_safety),
            ends_at_eos=False,
        )

    def iteration(self) -> dict[str, float]:
        """One PPO iteration; returns seconds per phase, and of the whole call."""
        start = time.perf_counter()
        row = ppo.iteration(self.roles, self.work.section, self._index, self._prompts, seed=0)
        call = time.perf_counter() - start
        answers = row["response/tokens"]
        assert answers == self.work.response_tokens, f"answers have {answers} tokens, not {self.work.response_tokens}"
        self._index += 1
        phases = {name: row[f"time/{name}_s"] for name in ("rollout", "score", "update", "sync", "step")}
        return {**phases, "call": call}

    def sync(self) -> dict[str, float]:
        """One weight sync; returns its seconds and those of its parts."""
        start = time.perf_counter()
        sync_weights(self.roles)
        seconds = time.perf_counter() - start
        parts: dict[str, float] = self.roles["policy"].call(MeasuredPolicy.sync_seconds)[0]
        parts |= self.roles["rollout"].call(MeasuredRollout.sync_seconds)[0]
        return {"sync": seconds, **parts}


@contextmanager
def recipe_side(work: Work, directory: Path, *, only_sync: bool = False) -> Iterator[RecipeSide]:
    """Starts Ray, roles, models and engine; ends them with the block.

    Args:
        only_sync: start the policy and the engine alone.
    """
    classes = dict(roles_module.WORKER_CLASSES)
    roles_module.WORKER_CLASSES.update(rollout=MeasuredRollout, policy=MeasuredPolicy)
    context = Context(_config(work), RunDir(directory / "run"), every_id=True)
    try:
        roles, roles_used = context.roles, ("policy",) if only_sync else SCORING_ROLES
        roles.start("rollout", *roles_used)
        inputs = {name: Artefact(name, path, "", "") for name, path in _models(work).items()}
        ppo.load_models(context, inputs, None, version=WeightVersion("benchmark", 0), roles_used=roles_used)
        start_engines(context, work.chat, work.chat)
        sync_weights(roles)
        yield RecipeSide(work, context)
    finally:
        context.close()
        roles_module.WORKER_CLASSES.update(classes)


def _models(work: Work) -> dict[str, Path]:
    return {"tokenizer": work.chat, "chat": work.chat, "helpfulness": work.helpfulness, "safety": work.safety}


def _config(work: Work) -> Config:
    return parse_config(
        {
            "run": {"precision": work.precision, "device": "cuda" if torch.cuda.is_available() else "cpu"},
            "inputs": {name: str(path) for name, path in _models(work).items()},
            "ppo": work.section.model_dump(),
        }
    )
