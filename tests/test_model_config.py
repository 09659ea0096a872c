"""Model shapes: presets, validation, conversion to and from config.json."""

import subprocess
import sys

import pytest
from pydantic import ValidationError
from transformers import LlamaConfig

from model.config import (
    PRESETS,
    Llama3RopeScaling,
    ModelConfig,
    UnsupportedModelError,
    from_hf_config,
    llama_ffn_size,
    to_hf_config,
)

SCALING = Llama3RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)


def test_importing_shapes_and_costs_does_not_import_torch():
    code = "import sys, model.config, model.flops, model.checkpoint_files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_ffn_size_follows_the_released_rule():
    # 4096: 4 * 4096 * 2 / 3 = 10922.67 -> 10922 -> next multiple of 256 is 43 * 256 = 11008
    assert llama_ffn_size(4096, multiple_of=256) == 11008
    assert llama_ffn_size(5120, multiple_of=256) == 13824
    assert llama_ffn_size(8192, multiple_of=256, multiplier=1.0) == 22016
    # 70B: 21845 * 1.3 = 28398.5 -> 28398 -> 7 * 4096 = 28672
    assert llama_ffn_size(8192, multiple_of=4096, multiplier=1.3) == 28672


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "hidden_size=64 must be divisible by num_heads=3"),
        ({"num_kv_heads": 3}, "num_heads=4 must be divisible by num_kv_heads=3"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"eos_token_id": 512}, r"eos_token_id=512 must lie in 0..511"),
        ({"pad_token_id": -1}, r"pad_token_id=-1 must lie in 0..511"),
        ({"num_layers": 0}, "num_layers"),
        ({"rope_theta": float("inf")}, "must be finite"),
        ({"heads": 4}, "Extra inputs are not permitted"),
    ],
)
def test_impossible_shapes_are_refused(changes, message):
    fields = PRESETS["tiny"].model_dump(exclude={"head_dim"}) | changes
    with pytest.raises(ValidationError, match=message):
        ModelConfig(**fields)


def test_rope_scaling_factors_must_be_in_order():
    with pytest.raises(ValidationError, match="must be greater than"):
        Llama3RopeScaling(factor=8.0, low_freq_factor=4.0, high_freq_factor=4.0, original_max_position_embeddings=64)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("scaling", [None, SCALING])
def test_config_survives_the_round_trip(name, scaling):
    config = PRESETS[name].model_copy(update={"rope_scaling": scaling, "rope_theta": 500000.0})
    assert from_hf_config(to_hf_config(config)) == config


def test_transformers_reads_every_field():
    config = PRESETS["tiny"].model_copy(update={"rope_scaling": SCALING, "rope_theta": 500000.0})
    hf = LlamaConfig.from_dict(to_hf_config(config, num_labels=1))
    assert hf.rope_parameters == {"rope_type": "llama3", "rope_theta": 500000.0, **SCALING.model_dump()}
    assert hf.num_labels == 1
    assert (hf.bos_token_id, hf.eos_token_id, hf.pad_token_id) == (1, 2, 3)
    assert str(hf.dtype) == "torch.bfloat16"
    assert from_hf_config(hf.to_dict()) == config


def test_the_spelling_before_transformers_5_is_read():
    hf = to_hf_config(PRESETS["tiny"])
    del hf["rope_parameters"]
    scaling = SCALING.model_dump()
    hf |= {"rope_theta": 500000.0, "rope_scaling": {"type": "llama3", **scaling}, "torch_dtype": "float16"}
    config = from_hf_config(hf)
    assert (config.rope_theta, config.rope_scaling) == (500000.0, SCALING)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type='mistral' is not supported: only the Llama"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.*export the model in bfloat16"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_parameters.rope_type='yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rope_scaling.rope_type='linear'"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
            "rope_scaling.low_freq_factor Field required",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"eos_token_id": "</s>"}, "eos_token_id='</s>' is not supported: it must be a token id"),
        ({"eos_token_id": [2, 512]}, r"other_eos_token_ids=512 must lie in 0\.\.511"),
        ({"sliding_window": 4096}, "sliding_window=4096 is not supported: Llama's attention sees the whole context"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types=.*is not supported"),
        ({"auto_map": {"AutoModelForCausalLM": "a.B"}}, "auto_map=.*may compute another model"),
        ({"rope_scaling": {"rope_type": "llama3", **SCALING.model_dump()}}, "rope_scaling=.*says otherwise"),
        ({"rope_theta": 500000.0}, r"rope_theta=500000\.0 is not supported: rope_parameters says 10000\.0"),
        ({"hidden_size": None}, "hidden_size=None is not supported"),
        ({"num_attention_heads": 5}, "hidden_size=64 must be divisible by num_heads=5"),
    ],
)
def test_other_models_are_refused_in_one_line(changes, message):
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        from_hf_config(to_hf_config(PRESETS["tiny"]) | changes)
    assert "\n" not in str(caught.value)


def test_several_tokens_may_end_an_answer_and_none_is_minus_one():
    hf = to_hf_config(PRESETS["tiny"]) | {"eos_token_id": [5, 7, 9, 7], "pad_token_id": -1, "bos_token_id": None}
    config = from_hf_config(hf)
    assert (config.eos_token_id, config.other_eos_token_ids) == (5, (7, 9))
    assert (config.pad_token_id, config.bos_token_id) == (None, None)
    assert from_hf_config(hf | {"eos_token_id": None}).eos_token_id is None
    assert config.shape() == PRESETS["tiny"].shape()


def test_missing_model_type_is_refused():
    with pytest.raises(UnsupportedModelError, match="model_type=None"):
        from_hf_config({"vocab_size": 512})


def test_only_one_label_can_be_written():
    with pytest.raises(ValueError, match="num_labels=2 must be None"):
        to_hf_config(PRESETS["tiny"], num_labels=2)
