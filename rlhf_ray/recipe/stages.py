"""The one table of stages, and what a recipe is made of. Imports no torch.

A recipe (`recipe/rounds.py`) is a list of nodes, each a stage with what it works on: what another node makes, or what
the config names. So it can be printed, checked and planned before anything runs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlhf_ray.config import Config, DataSection, InputsSection
from rlhf_ray.config_errors import similar
from rlhf_ray.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of the paper's method."""

    name: str
    does: str
    """What, for `--help`."""
    needs: tuple[str, ...] = ()
    """Outputs that it works on."""
    may_need: tuple[str, ...] = ()
    """Those that it takes in as well where the config names them."""
    makes: Mapping[str, str]
    """Output -> its place in the step's directory."""
    in_part: bool = False
    """Makes only those that are asked for; others make all."""
    roles: tuple[str, ...] = ()
    trains: tuple[str, ...] = ()
    """Roles that learn."""
    settings: tuple[str, ...]
    """Sections and fields of the config that its result depends on, as far as they are no execution settings."""
    version: int = 1
    """Raised when its result for the same inputs changes."""
    runner: str
    """"module:function", called with (context, step, inputs); returns facts for the manifest."""


RUN = ("run.seed", "run.precision")
ENGINES = "roles.rollout"

_TABLE = (
    Stage(
        name="testbed",
        does="Generate the testbed's data.",
        makes={
            name: f"{name}.parquet"
            for name in (
                "corpus",
                "demonstrations",
                "prompts_train",
                "prompts_annotation",
                "prompts_early_stop",
                "prompts_test",
            )
        },
        settings=("testbed",),  # not the run's seed: the seeds of a comparison share the test prompts
        version=2,
        runner="rlhf_ray.recipe.testbed:make_testbed",
    ),
    Stage(
        name="tokenizer",
        does="Train the tokenizer.",
        needs=("corpus",),
        makes={"tokenizer": "tokenizer"},
        settings=("tokenizer",),
        runner="rlhf_ray.recipe.tokenizer:make_tokenizer",
    ),
    Stage(
        name="pretrain",
        does="Pretrain a model.",
        needs=("corpus", "tokenizer"),
        makes={"base": "model"},
        roles=("policy",),
        trains=("policy",),
        settings=("pretrain", "model", *RUN),
        runner="rlhf_ray.recipe.pretraining:pretrain",
    ),
    Stage(
        name="sft",
        does="Supervised fine-tuning.",
        needs=("demonstrations", "tokenizer", "base"),
        may_need=("selections",),
        makes={"chat": "model"},
        roles=("policy",),
        trains=("policy",),
        settings=("sft", *RUN),
        runner="rlhf_ray.recipe.sft:sft",
    ),
    Stage(
        name="pairs",
        does="Sample pairs of answers to be compared.",
        needs=("tokenizer", "prompts_annotation"),  # and models, by `pairs.models`
        makes={"pairs": "pairs.parquet"},
        roles=("rollout",),
        settings=("pairs", ENGINES, *RUN),
        runner="rlhf_ray.recipe.preference_collection:sample_pairs",
    ),
    Stage(
        name="label",
        does="Have pairs compared by the simulated annotator.",
        needs=("pairs", "prompts_annotation"),
        makes={"comparisons": "comparisons.parquet"},
        settings=("label", "run.seed"),
        version=2,
        runner="rlhf_ray.recipe.preference_collection:label_pairs",
    ),
    Stage(
        name="reward",
        does="Train the helpfulness and the safety reward model.",
        needs=("comparisons", "tokenizer", "chat"),  # of comparisons a table of each week
        may_need=("comparisons_held_out",),
        makes={"helpfulness": "helpfulness/model", "safety": "safety/model"},
        in_part=True,
        roles=("helpfulness", "safety"),
        trains=("helpfulness", "safety"),
        settings=("reward", *RUN),
        runner="rlhf_ray.recipe.reward_modeling:train_reward_models",
    ),
    Stage(
        name="rejection-sample",
        does="Sample many answers to each prompt, and score them.",
        needs=("tokenizer", "chat", "helpfulness", "safety", "prompts_train", "prompts_early_stop"),
        makes={"samples": "samples.parquet"},
        roles=("helpfulness", "safety", "rollout"),
        settings=("rejection_sampling", "ppo.safety_threshold", ENGINES, *RUN),
        runner="rlhf_ray.recipe.rejection_sampling:rejection_sample",
    ),
    Stage(
        name="select",
        does="Choose among samples the answers to be learnt.",
        needs=("tokenizer", "samples", "helpfulness", "safety"),  # and samples of earlier rounds
        makes={"selections": "selections.parquet"},
        roles=("helpfulness", "safety"),
        settings=("select", "ppo.safety_threshold", *RUN),
        version=2,
        runner="rlhf_ray.recipe.rejection_sampling:select",
    ),
    Stage(
        name="ppo",
        does="PPO against both reward models.",
        needs=("tokenizer", "chat", "helpfulness", "safety", "prompts_train", "prompts_early_stop"),
        makes={"policy": "model", "last": "last"},
        roles=("policy", "value", "reference", "helpfulness", "safety", "rollout"),
        trains=("policy", "value"),
        settings=("ppo", ENGINES, *RUN),
        runner="rlhf_ray.recipe.ppo:ppo",
    ),
    Stage(
        name="reward-accuracy",
        does="Measure every version of the reward models on the held-out comparisons of every week.",
        needs=("tokenizer",),  # and the comparisons and models of all weeks
        may_need=("comparisons_held_out",),
        makes={"reward_accuracy": "reward_accuracy.json"},
        roles=("helpfulness", "safety"),
        settings=("reward.held_out", "reward.max_length", *RUN),
        runner="rlhf_ray.recipe.reward_modeling:measure_reward_models",
    ),
    Stage(
        name="evaluate",
        does="Compare all versions of the chat model.",
        needs=("tokenizer", "helpfulness", "safety", "prompts_test", "chat"),  # and the models
        may_need=("referee",),
        makes={"evaluation": "evaluation.json"},
        roles=("policy", "reference", "helpfulness", "safety", "rollout"),
        settings=("evaluate", "ppo.safety_threshold", ENGINES, *RUN),
        version=4,
        runner="rlhf_ray.evaluate.policies:evaluate",
    ),
)
STAGES: Mapping[str, Stage] = {stage.name: stage for stage in _TABLE}
"""By name, in the recipe's order."""

REWARDS = ("helpfulness", "safety")
"""Both reward models: roles, and outputs."""
REFEREE = "referee"
"""The one that is trained apart: an input of the evaluation, and the scope of what it is made of."""
ON_DEMAND = ("rejection-sample", "select")
"""Stages that a recipe without rounds goes through only when it is asked to."""
MODELS = ("base", "previous", "chat", "helpfulness", "safety", "policy", "last")
"""Outputs that are checkpoints."""


@dataclass(frozen=True)
class Artefact:
    """Something that a stage has made or the config names."""

    kind: str
    """The output's name: "chat", "comparisons", ..."""
    path: Path
    key: str
    """Hash that stands for its content."""
    maker: str
    """The finished step's directory, or the field of the config."""
    scope: str = ""
    """Of the node that made it."""
    parents: Mapping[str, str] = field(default_factory=dict)
    """Input -> key, of what it was made from."""

    @property
    def label(self) -> str:
        """What tables and messages call it, e.g. sft-1a2b3c/model."""
        return f"{self.path.parent.name}/{self.path.name}"


@dataclass(frozen=True)
class Made:
    """What another node makes."""

    node: str
    output: str


@dataclass(frozen=True)
class Given:
    """What the config names."""

    field: str
    path: str
    answers: Made | None = None
    """What people write it about: until it is there, a recipe waits."""


Source = Given | Made


@dataclass(frozen=True)
class Node:
    """A stage and what it works on."""

    stage: Stage
    inputs: Mapping[str, Source]
    makes: Mapping[str, str]
    """As of the stage, less what the config names in its place."""
    scope: str = ""
    """Tells nodes of one stage apart, e.g. "v2"."""
    changes: Mapping[str, object] = field(default_factory=dict)
    """Dotted config keys that have another value here than in the run's config."""

    @property
    def name(self) -> str:
        """STAGE or STAGE@SCOPE."""
        return f"{self.stage.name}@{self.scope}" if self.scope else self.stage.name

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that it starts: where they learn what it makes, those of what it makes here."""
        return tuple(role for role in self.stage.roles if role in self.makes or role not in self.stage.makes)


def given_outputs(config: Config) -> dict[str, Given]:
    """What the config names, by the output in whose place it stands; a checkpoint's own tokenizer goes with it."""
    found = {
        name: Given(f"{section}.{name}", path)
        for section in ("data", "inputs")
        for name, path in getattr(config, section).model_dump().items()
        if path is not None
    }
    for name in ("chat", "base"):
        if name in found:
            found.setdefault("tokenizer", found[name])
    return found


def wanted_stages(config: Config, stages: Sequence[str] | None = None) -> tuple[str, ...]:
    """The stages that are asked for; by default those that the config lists, or all that its recipe goes through.

    Raises:
        UserError: one is not known.
    """
    every = tuple(name for name in STAGES if config.rounds is not None or name not in ON_DEMAND)
    wanted = tuple(stages or config.run.stages or every)
    for stage in wanted:
        if stage not in STAGES:
            raise UserError(f"run.stages={stage!r} is no stage; {similar(stage, STAGES)}")
    return wanted


def maker_of(output: str) -> str:
    """The stage that makes an output."""
    return next(stage.name for stage in _TABLE if output in stage.makes or (stage.name, output) == ("sft", "previous"))


def field_of(output: str) -> str | None:
    """The field of the config that names such an output from elsewhere."""
    sections = (("data", DataSection), ("inputs", InputsSection))
    return next((f"{name}.{output}" for name, section in sections if output in section.model_fields), None)
