"""Shape of a Llama model, its presets, and conversion to and from Hugging Face's config.json.

Imports no torch: the planner and the command line read shapes without paying for it.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

TOKEN_ID_FIELDS = ("bos_token_id", "eos_token_id", "other_eos_token_ids", "pad_token_id")
"""Fields of a config that change no computation."""

Recompute = Literal["none", "selective", "full"]
"""What of a block the backward pass computes again: nothing, what is cheap to compute, or all (`model.recompute`)."""


class UnsupportedModelError(ValueError):
    """A checkpoint's config.json describes something other than a plain Llama model."""


class Llama3RopeScaling(BaseModel):
    """Llama 3.1's stretching of the rotary wavelengths to a longer context."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    factor: float = Field(gt=0)
    """Long wavelengths are multiplied by this."""
    low_freq_factor: float = Field(gt=0)
    """Wavelengths above original context / low_freq_factor are stretched in full."""
    high_freq_factor: float = Field(gt=0)
    """Wavelengths below original context / high_freq_factor are left alone."""
    original_max_position_embeddings: int = Field(gt=0)
    """Context length before stretching, in tokens."""

    @model_validator(mode="after")
    def _check_order(self) -> "Llama3RopeScaling":
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope_scaling.high_freq_factor={self.high_freq_factor} must be greater than "
                f"rope_scaling.low_freq_factor={self.low_freq_factor}"
            )
        return self


class ModelConfig(BaseModel):
    """Everything that fixes the shape and the arithmetic of a Llama model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    """Query heads."""
    num_kv_heads: int = Field(gt=0)
    """Key and value heads; each serves num_heads / num_kv_heads query heads."""
    ffn_size: int = Field(gt=0)
    """Width between the two halves of the SwiGLU feed-forward layer."""
    max_seq_len: int = Field(gt=0)
    """Longest sequence, in tokens, that positions are defined for."""
    head_dim: int = Field(default_factory=lambda fields: fields["hidden_size"] // fields["num_heads"])
    """Width of one head; hidden_size / num_heads unless a checkpoint says otherwise."""
    norm_eps: float = Field(default=1e-5, gt=0)
    rope_theta: float = Field(default=10000.0, gt=0)
    rope_scaling: Llama3RopeScaling | None = None
    tie_embeddings: bool = False
    """One matrix serves as input embedding and output projection."""
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    """Ends an answer. Which token that is the run's tokenizer and chat template decide."""
    other_eos_token_ids: tuple[int, ...] = ()
    """Further tokens that end an answer, of checkpoints that name several."""
    pad_token_id: int | None = 3

    @field_validator("norm_eps", "rope_theta")
    @classmethod
    def _finite(cls, value: float) -> float:
        if value == float("inf"):
            raise ValueError("must be finite")
        return value

    @model_validator(mode="after")
    def _check_shape(self) -> "ModelConfig":
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size={self.hidden_size} must be divisible by num_heads={self.num_heads}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be divisible by num_kv_heads={self.num_kv_heads}")
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even and at least 2: RoPE rotates pairs")
        for field in TOKEN_ID_FIELDS:
            value = getattr(self, field)
            for token_id in value if isinstance(value, tuple) else (value,):
                if token_id is not None and not 0 <= token_id < self.vocab_size:
                    raise ValueError(f"{field}={token_id} must lie in 0..{self.vocab_size - 1} (vocab_size - 1)")
        return self

    def shape(self) -> dict[str, Any]:
        """All but the token ids, which change no computation."""
        return self.model_dump(exclude=set(TOKEN_ID_FIELDS))


def llama_ffn_size(hidden_size: int, *, multiple_of: int, multiplier: float | None = None) -> int:
    """Feed-forward width by the rule of the released Llama 2 files.

    Two thirds of 4 * hidden_size, times the multiplier when there is one, rounded up to a multiple.
    Source: params.json of the released models; the paper does not state it.
    """
    size = int(2 * (4 * hidden_size) / 3)
    if multiplier is not None:
        size = int(multiplier * size)
    return -(-size // multiple_of) * multiple_of


def _llama2(
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    *,
    multiple_of: int = 256,
    multiplier: float | None = None,
) -> ModelConfig:
    return ModelConfig(
        vocab_size=32000,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        ffn_size=llama_ffn_size(hidden, multiple_of=multiple_of, multiplier=multiplier),
        max_seq_len=4096,
        pad_token_id=None,  # Llama 2's tokenizer has none
    )


PRESETS: dict[str, ModelConfig] = {
    # Shapes of the released files; 34B was described by the paper but never released.
    "llama2-7b": _llama2(4096, 32, 32, 32),
    "llama2-13b": _llama2(5120, 40, 40, 40),
    "llama2-34b": _llama2(8192, 48, 64, 8, multiplier=1.0),
    "llama2-70b": _llama2(8192, 80, 64, 8, multiple_of=4096, multiplier=1.3),
    # Benchmarks on one GPU: 1.1 and 3.0 billion parameters, with heads as FlashAttention likes them.
    "1b": _llama2(2048, 22, 32, 4),
    "3b": _llama2(3072, 28, 24, 8),
    # Unit tests. vLLM's CPU attention takes no heads narrower than 32.
    "tiny": ModelConfig(
        vocab_size=512,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        ffn_size=176,
        max_seq_len=256,
    ),
    # The testbed's model: 803,968 parameters. A width that 32 divides multiplies faster on CPU than 344 does.
    "testbed": ModelConfig(
        vocab_size=512,
        hidden_size=128,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        ffn_size=llama_ffn_size(128, multiple_of=32),
        max_seq_len=256,
        tie_embeddings=True,
    ),
    # Benchmarks: 3,819,776 parameters.
    "3.8m": ModelConfig(
        vocab_size=2048,
        hidden_size=256,
        num_layers=4,
        num_heads=8,
        num_kv_heads=2,
        ffn_size=llama_ffn_size(256, multiple_of=16),
        max_seq_len=512,
    ),
}

# config.json keys that may only hold these values: key -> (allowed values, rule).
_FIXED_KEYS: dict[str, tuple[tuple[Any, ...], str]] = {
    "model_type": (("llama",), "only the Llama architecture is supported"),
    "hidden_act": (("silu", "swish"), "Llama's feed-forward layer uses silu"),
    "attention_bias": ((False, None), "Llama's attention has no biases"),
    "mlp_bias": ((False, None), "Llama's feed-forward layer has no biases"),
    "attention_dropout": ((0, None), "Llama is trained without dropout"),
    "quantization_config": (
        (None,),
        "quantized weights cannot be trained; export the model in bfloat16 first",
    ),
    "is_encoder_decoder": ((False, None), "Llama has a decoder only"),
    "sliding_window": ((None,), "Llama's attention sees the whole context"),
    "auto_map": ((None, {}), "code that comes with a checkpoint is not run, and may compute another model"),
}


def from_hf_config(hf: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a Hugging Face Llama config.json, in its old or its new spelling.

    Raises:
        UnsupportedModelError: The file describes another architecture or a Llama variant that this
            package does not compute; the message names field, value and rule.
    """
    for key, (allowed, rule) in _FIXED_KEYS.items():
        value = hf.get(key, None if key == "model_type" else allowed[0])
        if value not in allowed:
            raise _unsupported(key, value, rule)
    if set(hf.get("layer_types") or ()) - {"full_attention"}:
        raise _unsupported("layer_types", hf["layer_types"], "Llama's attention sees the whole context in every layer")
    theta, scaling = _rope_from_hf(hf)
    eos = eos_token_ids(hf.get("eos_token_id", 2))
    num_heads = _required(hf, "num_attention_heads")
    fields: dict[str, Any] = {
        "vocab_size": _required(hf, "vocab_size"),
        "hidden_size": _required(hf, "hidden_size"),
        "num_layers": _required(hf, "num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": hf.get("num_key_value_heads") or num_heads,
        "ffn_size": _required(hf, "intermediate_size"),
        "max_seq_len": hf.get("max_position_embeddings", 2048),
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_embeddings": hf.get("tie_word_embeddings", False),
        "bos_token_id": _token_id(hf.get("bos_token_id", 1)),
        "eos_token_id": eos[0] if eos else None,
        "other_eos_token_ids": eos[1:],
        "pad_token_id": _token_id(hf.get("pad_token_id")),
    }
    if hf.get("head_dim") is not None:
        fields["head_dim"] = hf["head_dim"]
    try:
        return ModelConfig(**fields)
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, fault['loc']))} {fault['msg']}".strip() for fault in error.errors())
        raise UnsupportedModelError(f"config.json is not a valid Llama shape: {'; '.join(faults)}") from error


def to_hf_config(config: ModelConfig, *, num_labels: int | None = None, dtype: str = "bfloat16") -> dict[str, Any]:
    """Contents of a config.json that transformers and vLLM read as they are.

    Args:
        num_labels: 1 describes a reward model (LlamaForSequenceClassification), None a language model.
        dtype: torch name of the dtype in which the weights are stored.
    Raises:
        ValueError: num_labels is neither None nor 1.
    """
    if num_labels not in (None, 1):
        raise ValueError(f"num_labels={num_labels} must be None (language model) or 1 (scalar score)")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope = {"rope_type": "llama3", "rope_theta": config.rope_theta, **config.rope_scaling.model_dump()}
    hf: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM" if num_labels is None else "LlamaForSequenceClassification"],
        "model_type": "llama",
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        # The spelling before transformers 5, so that older readers do not fall back to theta 10,000.
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id if num_labels is None else score_pad_token_id(config),
    }
    if config.rope_scaling is not None:
        hf["rope_scaling"] = rope
    if num_labels == 1:
        hf |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return hf


def score_pad_token_id(config: ModelConfig) -> int | None:
    """The padding token of a reward model: one that no answer ends in; None where there is no such token.

    transformers reads a score at the last token that is not this one. Many chat models pad with EOS, at which a reward
    model has learned to score: transformers would read the token before it. BOS can stand in, for no row ends in it.
    """
    ends = {config.eos_token_id, *config.other_eos_token_ids, None}
    return next((token_id for token_id in (config.pad_token_id, config.bos_token_id) if token_id not in ends), None)


def _rope_from_hf(hf: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Rotary base and Llama 3 scaling fields, from `rope_parameters` or the older `rope_scaling`.

    Readers differ in which of two statements they take, so two that differ are refused.
    """
    keys = [key for key in ("rope_parameters", "rope_scaling") if hf.get(key)] or ["rope_parameters"]
    found = [_rope_of(hf, key) for key in keys]
    if found[0] != found[-1]:
        raise _unsupported(
            "rope_scaling", hf["rope_scaling"], f"rope_parameters={hf['rope_parameters']} says otherwise"
        )
    return found[0]


def _rope_of(hf: Mapping[str, Any], key: str) -> tuple[float, dict[str, Any] | None]:
    rope = dict(hf.get(key) or {})
    theta = float(rope.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0)
    if hf.get("rope_theta") and float(hf["rope_theta"]) != theta:
        raise _unsupported("rope_theta", hf["rope_theta"], f"{key} says {theta}; keep the one it was trained with")
    legacy_type = rope.pop("type", None)
    rope_type = rope.pop("rope_type", legacy_type) or "default"
    partial = rope.pop("partial_rotary_factor", None) or hf.get("partial_rotary_factor")
    if partial not in (None, 1.0):
        raise _unsupported("partial_rotary_factor", partial, "Llama rotates the whole head")
    if rope_type == "default":
        return theta, None
    if rope_type != "llama3":
        raise _unsupported(f"{key}.rope_type", rope_type, "only 'default' and 'llama3' are supported")
    return theta, rope


def eos_token_ids(value: Any) -> tuple[int, ...]:
    """The ids of an `eos_token_id`, one or a list, of config.json or generation_config.json; none for null or -1.

    Raises:
        UnsupportedModelError: it is something else.
    """
    ids = value if isinstance(value, list) else [value]
    if not all(token_id is None or isinstance(token_id, int) for token_id in ids):
        raise _unsupported("eos_token_id", value, "it must be a token id or a list of them")
    return tuple(dict.fromkeys(token_id for token_id in map(_token_id, ids) if token_id is not None))


def _token_id(value: Any) -> Any:
    """A token id; old Llama files write -1 for none."""
    return None if isinstance(value, int) and value < 0 else value


def _required(hf: Mapping[str, Any], key: str) -> int:
    if not isinstance(hf.get(key), int):
        raise _unsupported(key, hf.get(key), "a Llama config.json must give it as an integer")
    return int(hf[key])


def _unsupported(key: str, value: Any, rule: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"config.json: {key}={value!r} is not supported: {rule}")
