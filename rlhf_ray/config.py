"""The run's configuration: TOML holds what differs from the defaults, `--set section.key=value` overrides.

Defaults are the paper's hyperparameters (Llama 2, arXiv 2307.09288) where it gives them; where it is silent
the field says so and docs/decisions.md says why. Imports no torch: `--help` and bad input answer at once.
"""

import json
import os.path
import sys
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError

from model.config import Recompute
from rlhf_ray.config_errors import explain, key_path
from rlhf_ray.errors import UserError


def sampling_temperature(value: float) -> float:
    """The temperature, where vLLM samples at it: at 0.01 where less is asked for, and it refuses more than 2."""
    if value != 0 and not 0.01 <= value <= 2:
        raise PydanticCustomError("temperature", "must be 0 (greedy) or from 0.01 to 2: vLLM samples at no other")
    return value


T = TypeVar("T")
EXECUTION, LENGTH, CONTENT = "execution", "length", "content"
Execution = Annotated[T, EXECUTION]
"""A field that says how a result is computed, not which: it stands in no key."""
Length = Annotated[T, LENGTH]
"""A field that says how far training goes: a run goes on from where a shorter one ended."""
ByContent = Annotated[T, CONTENT]
"""A field that names files, which stand in keys by what they hold."""
VERSION_SECTIONS = ("pairs", "label", "reward", "rejection_sampling", "select", "sft", "ppo")
"""Sections of which a version may have settings of its own."""
OF_ALL = "rounds.settings"
SAME_IN_ALL = ("reward.held_out", "reward.max_length")
"""Settings of those that only all versions together may have: every reward model is measured on all weeks."""
PositiveInt = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0.0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
NotNegative = Annotated[float, Field(ge=0.0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
HeldOut = Annotated[float, Field(gt=0.0, lt=1.0)]  # both parts must get some rows
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Betas = Annotated[tuple[Beta, Beta], Strict(False)]
FilePath = Annotated[str, AfterValidator(os.path.expanduser)]
Names = Annotated[tuple[str, ...], Strict(False), Field(min_length=1)]
NamesOrPaths = Annotated[tuple[FilePath, ...], Strict(False), Field(min_length=1)]
Method = Literal["rejection-sampling", "ppo"]
Methods = Annotated[
    tuple[Method, ...], Strict(False), Field(min_length=1), AfterValidator(lambda methods: in_order(methods))
]
DottedSettings = Annotated[dict[str, Any], BeforeValidator(lambda settings: dotted(settings))]
Keepable = Literal["base", "previous", "chat", "helpfulness", "safety", "last", "states"]
Kept = Annotated[tuple[Keepable, ...], Strict(False)]
Temperature = Annotated[float, AfterValidator(sampling_temperature)]
SamplingTemperatures = Annotated[
    tuple[Annotated[float, Field(ge=0.01, le=2.0)], ...],
    Strict(False),
    Field(min_length=1),
    AfterValidator(lambda values: all_different(values)),
]
Temperatures = Annotated[tuple[Temperature, ...], Strict(False), Field(min_length=1)]
Gpus = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Strict(False), Field(min_length=1)]
RanksPerReplica = Annotated[PositiveInt | None, AfterValidator(lambda size, role: of_equal_size(size, role))]


def all_different(values: tuple[T, ...]) -> tuple[T, ...]:
    """The values, where none stands twice."""
    if len(set(values)) < len(values):
        raise PydanticCustomError("different", "must be different values")
    return values


def in_order(methods: tuple[T, ...]) -> tuple[T, ...]:
    """The methods of a version, where PPO comes last and none stands twice."""
    if methods not in (("rejection-sampling",), ("ppo",), ("rejection-sampling", "ppo")):
        raise PydanticCustomError("order", "must be rejection-sampling, ppo, or both in this order")
    return methods


def of_equal_size(size: int | None, role: ValidationInfo) -> int | None:
    """The ranks of a replica, where the role's ranks make whole replicas, and those are divided."""
    if size is None:
        return None
    stage, ranks = role.data.get("zero_stage", 3), role.data.get("num_ranks", size)
    if stage != 3:
        raise PydanticCustomError("whole", f"needs zero_stage=3 in place of {stage}, at which each rank has all of it")
    if ranks % size:
        raise PydanticCustomError("uneven", f"must divide num_ranks={ranks}")
    return size


def dotted(settings: Any) -> Any:
    """The leaves of nested tables by their dotted keys; of `{ sft.epochs = 3 }` TOML makes tables."""
    if not isinstance(settings, Mapping):
        return settings
    found: dict[Any, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{below}": leaf for below, leaf in dotted(value).items()}
        else:
            found[key] = value
    return found


class Section(BaseModel):
    """A frozen table of the config in which an unknown key or a wrong type is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _none_is_a_word(cls, raw: Any) -> Any:
        """TOML has no null: "none" stands for it where a value may be missing."""
        if not isinstance(raw, Mapping):
            return raw
        optional = {name for name, field in cls.model_fields.items() if NoneType in get_args(field.annotation)}
        return {name: None if value == "none" and name in optional else value for name, value in raw.items()}

    @model_validator(mode="before")
    @classmethod
    def _over_own_defaults(cls, raw: Any) -> Any:
        """A table given in part keeps the rest of this section's default, not of its class's."""
        if not isinstance(raw, Mapping):
            return raw
        defaults = {name: field.default for name, field in cls.model_fields.items() if name in raw}
        return {
            name: {**defaults[name].model_dump(), **value}
            if isinstance(value, Mapping) and isinstance(defaults.get(name), Section)
            else value
            for name, value in raw.items()
        }


class RunSection(Section):
    """The run as a whole."""

    stages: Names | None = None
    """Stages that `rlhf-ray run` goes through, in the recipe's order; none for all."""
    seed: Seed = 0
    """Seed of every draw: data, initial weights, prompt order, sampling."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of models; with bf16 the optimizer keeps fp32 master weights. "auto" takes bf16 on CUDA and on CPUs
    with units for it (AMX, AVX512-BF16), else fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where models live; "auto" takes CUDA where the driver's machine has it."""
    save_every_s: Execution[Positive | None] = 600.0
    """Seconds after which a checkpoint is written, whatever a section's `save_every`; none goes by steps alone."""
    keep: Kept = get_args(Keepable)
    """What stays on disk once no later stage needs it: models by name, and "states", from which finished training goes
    on. What a recipe ends in, and all tables, stay in any case."""


class ClusterSection(Section):
    """The Ray cluster."""

    address: str | None = None
    """A running cluster ("auto" or "host:port"), or "local" for an embedded Ray on this machine; none takes
    RAY_ADDRESS, and where that is not set an embedded one."""
    cores: PositiveInt | None = None
    """CPU cores that compute threads may fill on one machine; none for all that the process may use."""
    cpus_per_rank: Annotated[float, Field(ge=0.001)] = 0.1
    """Ray's CPU share of a rank. Small, because roles take turns; threads are set per phase instead."""
    start_timeout_s: Positive = 300.0
    """Deadline for placement and for start-up of a role, seconds."""
    call_timeout_s: Positive = 3600.0
    """Deadline of every call to a worker, seconds."""
    max_repairs: Annotated[int, Field(ge=0)] = 3
    """Times that a stage may lose workers, have their groups rebuilt and go on from its last checkpoint."""


class TrainRole(Section):
    """A role that DeepSpeed trains."""

    num_ranks: Execution[PositiveInt] = 1
    """Data-parallel ranks."""
    zero_stage: Execution[Literal[0, 1, 2, 3]] = 1
    """DeepSpeed ZeRO stage. In bf16, stage 1 alone accumulates gradients in fp32 by DeepSpeed's own rule."""
    gpus: Execution[Gpus | None] = None
    """Its ranks' GPUs, numbered through all nodes, where the device is CUDA; none for those with the fewest other
    roles on them."""
    recompute: Execution[Recompute] = "none"
    """What the backward pass computes again rather than have it kept: "none"; "selective", norms, rotary positions and
    SwiGLU, which take little time; "full", each block, for a third more computation."""


class RewardRole(TrainRole):
    """A role that is trained in one stage and scores in others."""

    ranks_per_replica: Execution[RanksPerReplica] = None
    """As of the reference, while the model is frozen."""


class FrozenRole(Section):
    """A role that only scores."""

    num_ranks: Execution[PositiveInt] = 1
    """Chunks of a batch go to them in turn."""
    zero_stage: Execution[Literal[0, 3]] = 0
    """0 has a replica of the model on each rank; 3 divides replicas over several, as ZeRO 3 does: for models too large
    for a GPU."""
    ranks_per_replica: Execution[RanksPerReplica] = None
    """Ranks that a divided replica is spread over; none for one replica over all of them. The fewer, the faster they
    gather and the more each of them holds."""
    gpus: Execution[Gpus | None] = None
    """Its ranks' GPUs, numbered through all nodes, where the device is CUDA; none for those with the fewest other
    roles on them."""


class RolloutRole(Section):
    """vLLM engines."""

    num_engines: Execution[PositiveInt] = 1
    """Engines; chunks of a batch go to them in turn."""
    tensor_parallel_size: PositiveInt = 1
    """GPUs that one engine spreads over."""
    gpus: Execution[Gpus | None] = None
    """As of the other roles; of an engine that spreads, as many as it spreads over."""
    gpu_memory_utilization: Execution[Annotated[float, Field(gt=0.0, le=1.0)]] = 0.5
    """Share of the GPU's memory vLLM may take (weights and KV cache)."""
    weights: Execution[Literal["auto", "store"]] = "auto"
    """How the policy's weights come: "auto" takes CUDA IPC or NCCL where the layout has a way for them; "store" goes
    through host memory and Ray's object store in any case."""
    max_num_seqs: PositiveInt = 256
    """Sequences decoded together. Samples depend on it: a run with another value draws others."""
    kv_cache_gib: Execution[Positive | None] = None
    """KV cache of an engine on CPU, GiB; none for as much as its longest batch can fill: `max_num_seqs` whole contexts,
    at most 1 GiB, though never less than one context."""

    @property
    def num_ranks(self) -> int:
        """Ray actors of the role, as of the others: one an engine."""
        return self.num_engines


class RolesSection(Section):
    """Who runs on how many ranks. Every role is its own Ray actors."""

    policy: TrainRole = TrainRole()
    value: TrainRole = TrainRole()
    helpfulness: RewardRole = RewardRole()
    safety: RewardRole = RewardRole()
    reference: FrozenRole = FrozenRole()
    rollout: RolloutRole = RolloutRole()


class DataSection(Section):
    """Parquet files for a run that does not generate the testbed; see `rlhf-ray data check`."""

    corpus: FilePath | None = None
    """Pretraining texts (column text)."""
    public_demonstrations: FilePath | None = None
    """Dialogues from elsewhere to fine-tune on first, before `demonstrations` (§3.1)."""
    demonstrations: FilePath | None = None
    """Dialogues for SFT (column messages)."""
    pairs: FilePath | None = None
    """Pairs of answers to be labelled, in place of what `pairs` would make."""
    comparisons: FilePath | None = None
    """Human comparisons for the reward models, in place of what `label` would make."""
    selections: FilePath | None = None
    """Chosen answers with their token ids that `sft` learns beside the demonstrations, in place of what `select` would
    make."""
    comparisons_held_out: FilePath | None = None
    """Comparisons to measure accuracy on; none keeps a share of `comparisons` (`reward.held_out`)."""
    prompts_train: FilePath | None = None
    """Prompts PPO samples from."""
    prompts_early_stop: FilePath | None = None
    """Held-out prompts on which PPO's early stopping looks at the reward models."""
    prompts_annotation: FilePath | None = None
    """Prompts for pairs of answers."""
    prompts_test: FilePath | None = None
    """Prompts of the final evaluation, seen by nothing else."""


class InputsSection(Section):
    """Directories that replace what an earlier stage would have made."""

    tokenizer: FilePath | None = None
    """A Hugging Face tokenizer."""
    base: FilePath | None = None
    """A pretrained Llama checkpoint."""
    chat: FilePath | None = None
    """A fine-tuned Llama checkpoint, in place of the SFT stage's."""
    helpfulness: FilePath | None = None
    """A reward model (LlamaForSequenceClassification, one label), or a Python function as module:function."""
    safety: FilePath | None = None
    """A reward model (LlamaForSequenceClassification, one label), or a Python function as module:function."""
    referee: FilePath | None = None
    """A reward model or function that only the evaluation asks, so that nothing has been chosen or trained by it."""


class TestbedSection(Section):
    """The generated language world (docs/testbed.md)."""

    __test__ = False  # not a test class, whatever its name

    seed: Seed = 0
    """Seed of the generated data; `run.seed` does not change it."""
    num_corpus: PositiveInt = 40_000
    """Pretraining documents."""
    num_demonstrations: PositiveInt = 8_000
    """Demonstrations for SFT."""
    num_prompts_train: PositiveInt = 4_000
    """Prompts for PPO."""
    num_prompts_early_stop: PositiveInt = 200
    """Held-out prompts for PPO's early stopping."""
    num_prompts_annotation: PositiveInt = 4_000
    """Prompts for pairs of answers."""
    num_prompts_test: PositiveInt = 600
    """Prompts for evaluation against the judge: half ordinary, a quarter unsafe, a quarter borderline."""
    evaluate_on: Literal["test", "development"] = "test"
    """Split that these are drawn from; who tunes looks at development alone."""


class TokenizerSection(Section):
    """BPE tokenizer (Llama 2 §2.2.1: digits split, byte fallback, 32k pieces)."""

    vocab_size: PositiveInt = 32_000
    """Pieces in all: special tokens, 256 bytes and learnt ones."""


class ModelSection(Section):
    """The transformer that pretraining starts."""

    preset: str = "llama2-7b"
    """A name in model.config.PRESETS; the vocabulary size follows the tokenizer's."""
    max_seq_len: PositiveInt | None = None
    """Context length, where it differs from the preset's."""


class OptimSection(Section):
    """AdamW and its schedule (§2.2)."""

    lr: Positive = 3e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Shape after warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 2000
    """Steps of linear warm-up."""
    warmup_ratio: Fraction = 0.0
    """Warm-up as a share of all steps; the larger of the two holds."""
    min_lr_ratio: Fraction = 0.1
    """Where the cosine ends, as a share of the peak."""
    betas: Betas = (0.9, 0.95)
    """AdamW betas."""
    eps: Positive = 1e-5
    """AdamW epsilon."""
    weight_decay: NotNegative = 0.1
    """Decoupled weight decay, on matrices only (on what, the paper does not say)."""
    grad_clip: Positive = 1.0
    """Limit of the global gradient norm."""


class PretrainSection(Section):
    """Pretraining (§2.2): packed rows, next-token loss."""

    optim: OptimSection = OptimSection()
    seq_len: PositiveInt = 4096
    """Tokens of a packed row."""
    batch_size: PositiveInt = 1024
    """Rows of an optimizer step (4M tokens at the default row)."""
    micro_batch_size: Execution[PositiveInt] = 1
    """Rows a rank passes through the model at once."""
    num_steps: Length[PositiveInt] = 500_000
    """Optimizer steps; the corpus is repeated as needed."""
    held_out: HeldOut = 0.01
    """Share of documents kept for the held-out loss."""
    save_every: Execution[PositiveInt] = 1000
    """Steps between resumable checkpoints."""


class SFTSection(Section):
    """Supervised fine-tuning (§3.1): packed dialogues, loss on answer tokens only."""

    optim: OptimSection = OptimSection(lr=2e-5, warmup_steps=0)
    seq_len: PositiveInt = 4096
    """Tokens of a packed row."""
    batch_size: PositiveInt = 64
    """Rows of an optimizer step; the last of each pass takes what is left."""
    micro_batch_size: Execution[PositiveInt] = 1
    """Rows a rank passes through the model at once."""
    epochs: PositiveInt = 2
    """Passes over the demonstrations; the model after each is kept as a version."""
    held_out: HeldOut = 0.02
    """Share of demonstrations kept for the held-out loss."""
    demonstration_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    """Share of demonstrations among the dialogues where answers chosen by rejection sampling are learnt beside them; 0
    learns those alone. The paper does not say whether there were any."""
    save_every: Execution[PositiveInt] = 500
    """Steps between resumable checkpoints."""


class PairsSection(Section):
    """Pairs of answers to be compared (§3.2.1): two models, at varied temperatures.

    Which models and which temperatures, the paper does not say.
    """

    models: ByContent[NamesOrPaths] = ("previous", "newest")
    """Who answers: "newest" (the chat model), "previous" (an SFT epoch earlier) or directories."""
    temperatures: Temperatures = (0.7, 1.0, 1.2)
    """Sampling temperatures, drawn per answer."""
    num_prompts: PositiveInt | None = None
    """Annotation prompts of a week, each week the next ones of the table in a drawn order; none for all, every week."""
    pairs_per_prompt: PositiveInt = 1
    """Pairs per annotation prompt."""
    max_new_tokens: PositiveInt = 512
    """Length limit of an answer, tokens."""


class LabelSection(Section):
    """Who compares (§3.2.1); helpfulness and safety have guidelines of their own."""

    noise: NotNegative = 0.1
    """Bradley-Terry temperature of the simulated annotator; 0 never errs."""


class RewardSection(Section):
    """Reward models (§3.2): ranking loss with a margin, two models on two mixes."""

    optim: OptimSection = OptimSection(lr=1e-5, warmup_steps=5, warmup_ratio=0.03)
    batch_size: PositiveInt = 512
    """Pairs of an optimizer step; the last of each pass takes what is left."""
    micro_batch_tokens: Execution[PositiveInt] = 16_384
    """Tokens a rank passes through the model at once, padding included where there is any."""
    score_micro_batch_tokens: Execution[PositiveInt | None] = None
    """The same where held-out comparisons are only scored, which keeps no activations; none for as many."""
    epochs: PositiveInt = 1
    """Passes over the mix; the paper found that more than one overfits."""
    margin: Literal["none", "small", "large"] = "small"
    """Margin by strength (Table 27). Which one the final models use, the paper does not say."""
    safety_loss_coef: NotNegative = 1.0
    """Weight of the auxiliary safety loss in the safety model; its form is ours, the paper prints none."""
    helpfulness_share: Fraction = 0.5
    """Share of helpfulness comparisons in the helpfulness model's mix, the rest from safety (§3.2.2)."""
    safety_share: Fraction = 0.9
    """Share of safety comparisons in the safety model's mix, the rest from helpfulness (§3.2.2)."""
    held_out: HeldOut = 0.15
    """Share of prompts whose comparisons are kept to measure accuracy."""
    max_length: PositiveInt = 4096
    """Tokens of dialogue and answer; longer pairs are an error, never cut in silence."""
    save_every: Execution[PositiveInt] = 500
    """Steps between resumable checkpoints."""

    @property
    def tokens_to_score(self) -> int:
        """Tokens a rank passes through a model at once where it only scores."""
        return self.score_micro_batch_tokens or self.micro_batch_tokens


class RejectionSamplingSection(Section):
    """Rejection sampling (§3.2.3): the best of K answers, by the reward models, is what the next version learns.

    K, the number of prompts and how many answers of a prompt are learnt, the paper does not say.
    """

    teacher: ByContent[FilePath | None] = None
    """A checkpoint that samples in place of the newest model: the paper fine-tunes smaller models on the answers of
    the largest."""
    samples_per_prompt: Annotated[int, Field(ge=1, le=100)] = 20
    """K."""
    num_prompts: PositiveInt | None = None
    """Prompts of a round, each round the next ones of `prompts_train` in a drawn order; none for all."""
    temperatures: SamplingTemperatures = (0.6, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5)
    """Tried on held-out prompts in each round, for the best shifts (Figure 8); a single one is taken as it is."""
    sweep_prompts: PositiveInt = 100
    """Held-out prompts for that."""
    sweep_samples: Annotated[int, Field(ge=1, le=100)] = 10
    """Answers to each of them at each temperature."""
    max_new_tokens: PositiveInt = 512
    """Length limit of an answer, tokens."""
    group_size: Execution[PositiveInt] = 256
    """Prompts that are sampled, scored and written together; a run that is stopped goes on behind the last group."""
    micro_batch_tokens: Execution[PositiveInt] = 16_384
    """Tokens a rank passes through a reward model at once, padding included where there is any."""


class SelectSection(Section):
    """Which samples are learnt."""

    per_prompt: PositiveInt = 1
    """The best so many answers of a prompt."""
    choice: Literal["best", "random"] = "best"
    """"random" is the control: as many, whatever their scores."""


class PPOSection(Section):
    """PPO (§3.2.3). On critic, GAE, KL estimator, whitening scope and temperature the paper is silent."""

    optim: OptimSection = OptimSection(lr=1e-6, schedule="constant", warmup_steps=0)
    value_optim: OptimSection = OptimSection(lr=9e-6, schedule="constant", warmup_steps=0)
    num_steps: Length[PositiveInt] = 400
    """Iterations (200 to 400 in the paper, ended by early stopping)."""
    batch_size: PositiveInt = 512
    """Prompts, hence answers, of an iteration."""
    minibatch_size: PositiveInt = 64
    """Answers of an optimizer step."""
    inner_epochs: PositiveInt = 1
    """Passes over an iteration's answers."""
    num_chunks: Execution[PositiveInt] = 1
    """Parts a batch is generated and scored in; on GPUs scoring of one overlaps generation of the next."""
    micro_batch_tokens: Execution[PositiveInt] = 16_384
    """Tokens a rank passes through the model at once, padding included where there is any."""
    score_micro_batch_tokens: Execution[PositiveInt | None] = None
    """The same where answers are only scored, which keeps no activations; none for as many."""
    max_new_tokens: PositiveInt = 512
    """Length limit of an answer, tokens."""
    temperature: Annotated[float, Field(ge=0.01, le=2.0)] = 1.0
    """Sampling temperature; applied to the trainer's and the reference's log-probs as well."""
    kl_coef: NotNegative = 0.01
    """Beta of Eq. 4 (0.01 for 7B and 13B, 0.005 for 34B and 70B)."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Per-token KL estimate that the reward pays for."""
    safety_threshold: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15
    """Below this sigmoid score the safety model rules (§3.2.3); the gate works on raw scores."""
    clip_ratio: Positive = 0.2
    """PPO's clip threshold."""
    clip_value: Positive | None = 0.2
    """Clip range of the value loss; none to leave it off."""
    gamma: Fraction = 1.0
    """Discount."""
    gae_lambda: Fraction = 0.95
    """Lambda of GAE."""
    whiten_advantages: bool = True
    """Whiten advantages over the batch as well (rewards always are, Eq. 4)."""
    importance_cap: Positive | None = None
    """Truncated importance sampling between engine and trainer: the weight's cap; none leaves it off."""
    truncated: Literal["score", "bootstrap", "penalty"] = "score"
    """Answers cut off without EOS: scored as they are, value bootstrapped, or penalised."""
    truncation_penalty: NotNegative = 1.0
    """Taken off the whitened reward of a cut-off answer under the "penalty" rule."""
    value_init: Literal["helpfulness", "policy"] = "helpfulness"
    """Body of the value model."""
    value_head: Literal["zero", "keep"] = "zero"
    """Its head: started at zero, on the scale of whitened rewards, or the reward model's."""
    value_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """First iterations in which only the value model learns."""
    max_logprob_gap: Execution[Positive] = 0.2
    """Mean |engine - trainer| log-prob above which the run fails, nats."""
    eval_every: PositiveInt = 10
    """Iterations between evaluations on the held-out prompts."""
    patience: Length[PositiveInt] = 5
    """Evaluations without a better held-out reward before PPO stops; the best policy is the result."""
    save_every: Execution[PositiveInt] = 10
    """Iterations between resumable checkpoints."""

    @property
    def tokens_to_score(self) -> int:
        """Tokens a rank passes through a model at once where it only scores."""
        return self.score_micro_batch_tokens or self.micro_batch_tokens


class EvaluateSection(Section):
    """Final evaluation on prompts nothing else has seen."""

    temperatures: Annotated[Temperatures, AfterValidator(all_different)] = (1.0, 0.0)
    """Sampling temperatures, each with its rows of the table; 0 is greedy. PPO sharpens a policy, and a lower
    temperature alone does so too: the SFT model at 0 is the comparator that tells the two apart."""
    own_temperatures: SamplingTemperatures | None = None
    """Each model is sampled at the best of these for itself as well, chosen on `prompts_early_stop` by its reward."""
    diversity_prompts: Annotated[int, Field(ge=0)] = 20
    """Test prompts, drawn, whose sampled answers are held against each other (self-BLEU); 0: none."""
    diversity_samples: Annotated[int, Field(ge=2, le=100)] = 10
    """Answers to each of them at each sampled temperature."""
    controls: ByContent[dict[str, FilePath]] = {}
    """More checkpoints for the table, label -> directory: an SFT model trained as long as all of PPO, for example."""
    micro_batch_tokens: Execution[PositiveInt] = 16_384
    """Tokens a rank passes through a model at once, padding included where there is any."""
    max_new_tokens: PositiveInt = 512
    """Length limit of an answer, tokens."""


class VersionSection(Section):
    """One version of the chat model (§3.2.3)."""

    methods: Methods = ("rejection-sampling",)
    """How it is made, in this order."""
    start: Literal["base", "chat", "newest"] = "base"
    """What is fine-tuned on the selections: the base model, as the paper does, the SFT model or the version before."""
    pool: Literal["last", "all"] = "last"
    """Samples that are chosen from: this round's, or those of all rounds so far, scored anew."""
    comparisons: FilePath | None = None
    """A table of people's comparisons of this week's pairs; the version waits until it is there. None has the simulated
    annotator compare them."""
    settings: DottedSettings = {}
    """As those of all versions, for this one."""


class RoundsSection(Section):
    """Versions of the chat model, each after a week of comparisons that renews both reward models (§3.2)."""

    versions: Annotated[tuple[VersionSection, ...], Strict(False), Field(min_length=1)] = (
        VersionSection(),
        VersionSection(),
        VersionSection(),
        VersionSection(pool="all"),
        VersionSection(methods=("rejection-sampling", "ppo"), pool="all"),
    )
    """V1, V2, ...; by default the paper's: answers of the last round alone made it forget skills, so from V4 on it
    chooses among those of all rounds, and PPO follows on the last."""
    settings: DottedSettings = {}
    """Dotted settings that have another value in all versions than before them, such as "sft.optim.lr"."""
    referee: bool = True
    """Whether one more reward model is trained apart, on comparisons that no other sees, and judges all versions at the
    end. Where people compare, or `inputs.referee` names one, it is not."""


class Config(Section):
    """Everything about a run."""

    run: RunSection = RunSection()
    cluster: ClusterSection = ClusterSection()
    roles: RolesSection = RolesSection()
    data: DataSection = DataSection()
    inputs: InputsSection = InputsSection()
    testbed: TestbedSection = TestbedSection()
    tokenizer: TokenizerSection = TokenizerSection()
    model: ModelSection = ModelSection()
    pretrain: PretrainSection = PretrainSection()
    sft: SFTSection = SFTSection()
    pairs: PairsSection = PairsSection()
    label: LabelSection = LabelSection()
    reward: RewardSection = RewardSection()
    rejection_sampling: RejectionSamplingSection = RejectionSamplingSection()
    select: SelectSection = SelectSection()
    ppo: PPOSection = PPOSection()
    evaluate: EvaluateSection = EvaluateSection()
    stage_roles: dict[str, dict[str, dict[str, Any]]] = {}
    """Stage -> role -> settings of `[roles.ROLE]` that have another value in that stage: more ranks to train a reward
    model than to score with it, for example."""
    rounds: RoundsSection | None = None
    """None makes one version, by PPO on the SFT model."""


def load_config(path: str | Path, overrides: Sequence[str] | None = None) -> Config:
    """The config in a TOML file with `section.key=value` overrides laid over it.

    Raises:
        UserError: one line naming the field, its value, the rule and the remedy.
    """
    raw = read_toml(path)
    set_here = apply_overrides(raw, overrides or [])
    config = parse_config(raw, source=str(path), set_here=set_here)
    for field, settings in own_settings(config).items():
        for key in sorted({*set_here} & {*settings}):
            print(f"--set {key}: {field} has a value of its own, and keeps it", file=sys.stderr)
    return config


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        UserError: it cannot be read or is not TOML.
    """
    try:
        content = Path(path).read_bytes()
        return tomllib.loads(content.decode(json.detect_encoding(content[:4])))  # UTF-8, or UTF-16 as Windows writes it
    except OSError as error:
        raise UserError(f"config {path}: cannot be read ({error.strerror}); give the path of a TOML file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"config {path}: not valid TOML, which is UTF-8 ({error}); save it as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"config {path}: not valid TOML ({error}); correct the line it names") from error


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Lays `section.key=value` overrides over tables, in place; returns their keys.

    Raises:
        UserError: one does not read so.
    """
    return [_apply_override(raw, override) for override in overrides]


def parse_config(raw: Mapping[str, Any], *, source: str = "config", set_here: Sequence[str] = ()) -> Config:
    """A validated Config from nested tables.

    Args:
        source: where the values are from, named in messages.
        set_here: dotted keys that `--set` gave; messages about these name `--set` instead.
    Raises:
        UserError: as `load_config`.
    """
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(key_path(first))
        from_set = any(f"{field}.".startswith(f"{key}.") or key.startswith(f"{field}.") for key in set_here)
        more = f" (and {error.error_count() - 1} more problems)" if error.error_count() > 1 else ""
        raise UserError(f"{'--set' if from_set else source}: {explain(first, Config())}{more}") from error
    check_stage_roles(config, source=source)
    check_rounds(config, source=source)
    return config


def check_stage_roles(config: Config, *, source: str) -> None:
    """Raises UserError where a role has settings for a stage that are none of a role's. The stages' names are checked
    where they are known (`recipe/rounds.py`).
    """
    for stage in config.stage_roles:
        check_settings(config, stage_settings(config, stage), field=f"{source}: stage_roles.{stage}")


def check_settings(config: Config, settings: Mapping[str, object], *, field: str) -> None:
    """Raises UserError where the config is none with these settings."""
    try:
        config_with(config, settings)
    except ValidationError as error:
        raise UserError(f"{field}: {explain(error.errors()[0], Config())}") from error
    except UserError as error:
        raise UserError(f"{field}: {error}") from error


def stage_settings(config: Config, stage: str) -> dict[str, Any]:
    """Dotted settings that have another value in a stage."""
    roles = config.stage_roles.get(stage, {})
    return {f"roles.{role}.{key}": value for role, settings in roles.items() for key, value in settings.items()}


def check_rounds(config: Config, *, source: str) -> None:
    """What versions have of their own are settings of stages, and nothing given stands for what each of them makes.

    Raises:
        UserError: not so.
    """
    if config.rounds is None:
        return
    own = own_settings(config)
    for name, settings in own.items():
        field = f"{source}: {name}"
        for key in settings:
            if key.partition(".")[0] not in VERSION_SECTIONS:
                known = ", ".join(VERSION_SECTIONS)
                raise UserError(f"{field} has {key}, which is the same in all versions; it may have {known}")
            if key in SAME_IN_ALL and name != OF_ALL:
                raise UserError(f"{field} has {key}, by which all versions are measured; set {OF_ALL}")
        check_settings(config, {**own[OF_ALL], **settings}, field=field)
    for place, version in enumerate(config.rounds.versions):
        if version.comparisons is not None and config.inputs.helpfulness and config.inputs.safety:
            raise UserError(
                f"{source}: rounds.versions[{place}].comparisons={version.comparisons!r}: nothing learns from them, "
                "since inputs.helpfulness and inputs.safety give both reward models; leave it out"
            )
    for name in ("pairs", "selections"):
        if getattr(config.data, name) is not None:
            raise UserError(
                f"{source}: data.{name} is for a single stage, and every version of [rounds] makes its own; leave one "
                "of the two out"
            )


def version_configs(config: Config) -> dict[str, Config]:
    """The config as it is for what all versions have in common and for each of them, by the field that says so."""
    own = own_settings(config)
    return {name: config_with(config, {**own[OF_ALL], **settings}) for name, settings in own.items()}


def own_settings(config: Config) -> dict[str, dict[str, Any]]:
    """What all versions have in common, and what each has of its own, by the field that says so."""
    if config.rounds is None:
        return {}
    own = {f"rounds.versions[{place}].settings": v.settings for place, v in enumerate(config.rounds.versions)}
    return {OF_ALL: config.rounds.settings, **own}


def teachers(config: Config) -> dict[str, str]:
    """Models that sample in place of the newest, by field."""
    found = {"rejection_sampling.teacher": config.rejection_sampling.teacher}
    for field, changed in version_configs(config).items():
        if changed.rejection_sampling.teacher not in found.values():
            found[f"{field}: rejection_sampling.teacher"] = changed.rejection_sampling.teacher
    return {field: path for field, path in found.items() if path is not None}


def settings_of(config: Config, fields: Sequence[str], *, marks: Collection[str]) -> dict[str, Any]:
    """Values of sections and single fields, as JSON, by dotted name.

    Args:
        fields: dotted names.
        marks: of the fields that are taken (EXECUTION, LENGTH, CONTENT, or "" for those without one).
    """
    found: dict[str, Any] = {}

    def take(name: str, section: Section, key: str) -> None:
        value, field = getattr(section, key), type(section).model_fields[key]
        if isinstance(value, Section):
            for below in type(value).model_fields:
                take(f"{name}.{below}", value, below)
        elif next((mark for mark in field.metadata if isinstance(mark, str)), "") in marks:
            found[name] = value

    for name in fields:
        *above, key = name.split(".")
        section: Any = config
        for part in above:
            section = getattr(section, part)
        take(name, section, key)
    return found


def config_with(config: Config, settings: Mapping[str, object]) -> Config:
    """The config with dotted keys replaced.

    Raises:
        UserError, ValidationError: there is no such key, or it has another kind of value.
    """
    if not settings:
        return config
    raw = config.model_dump()
    for key, value in settings.items():
        *tables, name = key.split(".")
        table = raw
        for part in tables:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise UserError(f"{key}: {part} is a value, not a section; drop what follows it")
        table[name] = value
    return Config.model_validate(raw)


def _apply_override(raw: dict[str, Any], override: str) -> str:
    """Lays one `section.key=value` over the tables; returns its key."""
    key, separator, text = override.partition("=")
    path = [part.strip() for part in key.split(".")]
    if not separator or not all(path):
        raise UserError(f"--set {override}: must read section.key=value, for example --set ppo.num_steps=30")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string, so that shells need no quotes within quotes
    *tables, name = path
    for table in tables:
        raw = raw.setdefault(table, {})
        if not isinstance(raw, dict):
            raise UserError(f"--set {override}: {table} is a value, not a section; drop what follows it")
    raw[name] = value
    return ".".join(path)


def can_sleep(zero_stage: int) -> bool:
    """Whether a role that is trained can leave its GPUs to others: DeepSpeed moves the states of ZeRO 2 and 3 alone."""
    return zero_stage >= 2


def replicas(role: TrainRole | FrozenRole) -> list[range]:
    """Ranks of each replica of a role's model: one that has it whole, or those that gather weights from each other."""
    size = (getattr(role, "ranks_per_replica", None) or role.num_ranks) if role.zero_stage == 3 else 1
    return [range(first, first + size) for first in range(0, role.num_ranks, size)]
