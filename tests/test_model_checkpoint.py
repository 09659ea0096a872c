"""Checkpoints: exchange with transformers, refusals, atomic writing."""

import json
import os
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from model.checkpoint import iterate_tensors, load_checkpoint, load_model, meta_model, save_checkpoint, weights_of
from model.checkpoint_files import (
    CheckpointError,
    check_checkpoint,
    expected_shapes,
    is_reward_model,
    read_config,
    stray_files,
)
from model.config import PRESETS, Llama3RopeScaling, UnsupportedModelError, to_hf_config
from model.heads import last_token_scores, scored_lengths
from model.llama import Llama
from rlhf_ray.backends.train_state import PARTS, write_state

TINY, EMBEDDING = PRESETS["tiny"], "model.embed_tokens.weight"
SCALING = Llama3RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
VARIANTS = {
    "gqa": TINY,
    "mha": TINY.model_copy(update={"num_kv_heads": 4}),
    "tied": TINY.model_copy(update={"tie_embeddings": True}),
    "llama3_rope": TINY.model_copy(update={"rope_scaling": SCALING, "rope_theta": 500000.0}),
}


def random_model(config, head="lm"):
    model = Llama(config, head=head)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def change_config(directory, **changes):
    content = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(content | changes))


def random_tokens(*shape):
    return torch.randint(4, TINY.vocab_size, shape, generator=torch.Generator().manual_seed(3))


def save(directory, model, **options):
    num_labels = 1 if model.head == "scalar" else None
    save_checkpoint(directory, model.config, model.state_dict().items(), num_labels=num_labels, **options)
    return directory


@pytest.fixture
def saved(tmp_path):
    return save(tmp_path / "saved", random_model(TINY))


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_opens_ours(tmp_path, name):
    model = random_model(VARIANTS[name])
    directory = save(tmp_path / "ours", model)
    theirs, report = LlamaForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert theirs.dtype == torch.float32 and theirs.generation_config.eos_token_id == 2
    tokens = random_tokens(2, 100)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_we_open_what_transformers_saved(tmp_path, name):
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig.from_dict(to_hf_config(VARIANTS[name], dtype="float32"))).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs", head="lm", dtype=torch.float32)
    assert model.config == VARIANTS[name]
    tokens = random_tokens(2, 100)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["gqa", "tied"])
def test_reward_model_gives_the_same_scores_in_transformers(tmp_path, name):
    model = random_model(VARIANTS[name], head="scalar")
    directory = save(tmp_path / "reward", model)
    assert is_reward_model(directory)
    theirs, report = AutoModelForSequenceClassification.from_pretrained(directory, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tokens, lengths = random_tokens(3, 9), torch.tensor([9, 4, 6])
    tokens[torch.arange(9) >= lengths[:, None]] = TINY.pad_token_id
    mask = (tokens != TINY.pad_token_id).long()
    with torch.no_grad():
        ours = last_token_scores(model(tokens), lengths)
        expected = theirs(tokens, attention_mask=mask).logits.squeeze(-1)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
    again = load_model(directory, head="scalar", dtype=torch.float32)
    assert torch.equal(again.score.weight, model.score.weight)


def rows_that_end_in_eos(lengths, *, pad):
    tokens = random_tokens(len(lengths), int(lengths.max()))
    tokens[torch.arange(len(lengths)), lengths - 1] = TINY.eos_token_id
    tokens[torch.arange(tokens.shape[1]) >= lengths[:, None]] = pad
    return tokens


@pytest.mark.parametrize("pad", [TINY.eos_token_id, None])
def test_transformers_reads_a_score_at_eos_where_the_chat_model_pads_with_it(tmp_path, pad):
    model = random_model(TINY.model_copy(update={"pad_token_id": pad}), head="scalar")
    theirs = AutoModelForSequenceClassification.from_pretrained(save(tmp_path / "reward", model))
    lengths = torch.tensor([9, 4, 6])
    tokens = rows_that_end_in_eos(lengths, pad=theirs.config.pad_token_id)
    with torch.no_grad():
        ours = last_token_scores(model(tokens), lengths)
        expected = theirs(tokens).logits.squeeze(-1)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def test_without_a_token_that_no_row_ends_in_transformers_refuses_padded_rows(tmp_path):
    config = TINY.model_copy(update={"bos_token_id": 2, "pad_token_id": 2})
    theirs = AutoModelForSequenceClassification.from_pretrained(
        save(tmp_path / "reward", random_model(config, head="scalar"))
    )
    with pytest.raises(ValueError, match="batch sizes > 1"):
        theirs(random_tokens(2, 5))


@pytest.mark.parametrize("pad", [3, TINY.eos_token_id, None])
def test_a_reward_model_of_transformers_is_read_where_transformers_reads_it(tmp_path, pad):
    directory = save(tmp_path / "reward", random_model(TINY, head="scalar"))
    content = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(content | {"pad_token_id": pad}))
    model = load_model(directory, head="scalar", dtype=torch.float32)
    theirs = AutoModelForSequenceClassification.from_pretrained(directory)
    lengths = torch.tensor([9, 4, 6])
    tokens = rows_that_end_in_eos(lengths, pad=0)
    with torch.no_grad():
        ours = last_token_scores(model(tokens), scored_lengths(tokens, lengths, model.config.pad_token_id))
        rows = [row[None, :length] for row, length in zip(tokens, lengths, strict=True)]
        expected = torch.cat([theirs(row).logits.squeeze(-1) for row in rows])
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def test_value_model_from_language_model_gets_a_fresh_head(tmp_path, saved):
    with pytest.raises(CheckpointError, match="is a language model without a score head; ask for a fresh one"):
        load_model(saved, head="scalar")
    model = load_model(saved, head="scalar", dtype=torch.float32, fresh_head=True, seed=5)
    assert torch.equal(model.score.weight, model.fresh_score(seed=5))
    assert torch.equal(model.model.norm.weight, random_model(TINY).model.norm.weight)


def test_heads_that_do_not_fit_are_refused(tmp_path, saved):
    reward = save(tmp_path / "reward", random_model(TINY, head="scalar"))
    with pytest.raises(CheckpointError, match=r"is a reward model .* without a language head"):
        load_model(reward, head="lm")
    with pytest.raises(CheckpointError, match="has a score head of its own"):
        load_model(reward, head="scalar", fresh_head=True)
    with pytest.raises(CheckpointError, match="fresh_head=True needs a model with head='scalar'"):
        load_model(saved, head="lm", fresh_head=True)
    config = json.loads((reward / "config.json").read_text())
    config["id2label"] = {"0": "A", "1": "B"}
    (reward / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="has 2 labels; a reward model has exactly 1"):
        is_reward_model(reward)


@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_headless_model_loads_either(tmp_path, head):
    model = random_model(TINY, head=head)
    body = load_model(save(tmp_path / "saved", model), head="none", dtype=torch.float32)
    tokens = random_tokens(1, 5)
    assert torch.equal(body(tokens), model.hidden(tokens))


def test_tied_model_stays_tied_and_ignores_a_stored_head(tmp_path):
    model = random_model(VARIANTS["tied"])
    directory = save(tmp_path / "tied", model)
    tensors = load_file(directory / "model.safetensors")
    assert "lm_head.weight" not in tensors
    save_file(tensors | {"lm_head.weight": tensors[EMBEDDING].clone()}, directory / "model.safetensors")
    loaded = load_model(directory, head="lm", dtype=torch.float32)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("head", ["another", "another dtype"])
def test_a_stored_head_that_is_not_the_tied_one_is_refused(tmp_path, head):
    directory = save(tmp_path / "tied", random_model(VARIANTS["tied"]))
    tensors = load_file(directory / "model.safetensors")
    other = tensors[EMBEDDING].clone()
    other[-1, -1] += 1
    stored = other if head == "another" else tensors[EMBEDDING].bfloat16()
    save_file(tensors | {"lm_head.weight": stored}, directory / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"lm_head.weight differs from .*tie_word_embeddings=true.*set it to false"
    ):
        check_checkpoint(directory)
    change_config(directory, tie_word_embeddings=False)
    assert torch.equal(load_model(directory, head="lm", dtype=stored.dtype).lm_head.weight, stored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_rotary_frequencies_must_be_those_of_theta(saved, dtype):
    tensors = load_file(saved / "model.safetensors")
    exponents = torch.arange(0, 32, 2) / 32  # a head is 32 wide
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    save_file(tensors | {name: (10000.0**-exponents).to(dtype)}, saved / "model.safetensors")
    check_checkpoint(saved)
    save_file(tensors | {name: (20000.0**-exponents).to(dtype)}, saved / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1.*inv_freq holds other frequencies than .*rope_theta=10000"):
        check_checkpoint(saved)


def test_a_tensor_in_two_shards_must_be_the_same(tmp_path):
    directory = save(tmp_path / "sharded", random_model(TINY), max_shard_bytes=200_000)
    first, *_, last = sorted(directory.glob("*.safetensors"))
    tensor = load_file(first)[EMBEDDING]
    save_file(load_file(last) | {EMBEDDING: tensor}, last)
    assert len([name for name, _ in iterate_tensors(directory) if name == EMBEDDING]) == 1
    save_file(load_file(last) | {EMBEDDING: tensor + 1}, last)
    with pytest.raises(CheckpointError, match=f"{EMBEDDING} differs from the tensor of that name in {first.name}"):
        check_checkpoint(directory)


def test_a_whole_file_beside_an_index_of_others_is_refused(tmp_path):
    directory = save(tmp_path / "sharded", random_model(TINY), max_shard_bytes=200_000)
    shutil.copy(save(tmp_path / "whole", random_model(TINY)) / "model.safetensors", directory)
    with pytest.raises(CheckpointError, match=r"has both model\.safetensors and model\.safetensors\.index\.json"):
        check_checkpoint(directory)


def test_tensors_of_a_dtype_are_left_out(tmp_path):
    model = random_model(TINY).bfloat16()
    model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data.float()
    directory = save(tmp_path / "model", model)
    assert {tensor.dtype for _, tensor in iterate_tensors(directory)} == {torch.bfloat16, torch.float32}
    assert [name for name, _ in iterate_tensors(directory, but="BF16")] == [EMBEDDING]


@pytest.mark.parametrize("shard_bytes", [200_000, 10**9])
def test_files_of_other_weights_are_not_read(tmp_path, shard_bytes):
    directory = save(tmp_path / "model", random_model(TINY), max_shard_bytes=shard_bytes)
    tensors = dict(iterate_tensors(directory))
    strays = {"adapter_model.safetensors", "consolidated.safetensors", "consolidated.safetensors.index.json"}
    for stray in strays:
        (directory / stray).write_bytes(b"x")
    assert {path.name for path in stray_files(directory)} == strays
    assert all(torch.equal(tensor, tensors.pop(name)) for name, tensor in iterate_tensors(directory)) and not tensors


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (2, 4, (2, ())),  # one of each: two statements of what one token is
        ([5, 7], 7, (5, (7,))),
        (2, [5, 7], (5, (7,))),
        ([7, 9], [5, 7], (5, (7, 9))),
    ],
)
def test_lists_of_tokens_that_end_an_answer_are_read_from_either_file(saved, config, generation, expected):
    change_config(saved, eos_token_id=config)
    (saved / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    read = read_config(saved)
    assert (read.eos_token_id, read.other_eos_token_ids) == expected


def test_all_tokens_that_end_an_answer_are_written(tmp_path):
    config = TINY.model_copy(update={"eos_token_id": 5, "other_eos_token_ids": (7, 9)})
    directory = save(tmp_path / "model", random_model(config))
    assert json.loads((directory / "generation_config.json").read_text())["eos_token_id"] == [5, 7, 9]
    assert json.loads((directory / "config.json").read_text())["eos_token_id"] == 5
    assert read_config(directory) == config


def test_other_classes_of_model_are_named(saved):
    change_config(saved, architectures=["LlamaForTokenClassification"])
    with pytest.raises(
        CheckpointError, match="architectures names 'LlamaForTokenClassification'; it must be LlamaForCausal"
    ):
        check_checkpoint(saved)


def test_weights_are_cast_to_the_model(saved):
    assert load_model(saved, head="lm").lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head", ["lm", "scalar", "none"])
def test_weights_come_in_the_order_of_the_models_parameters(tmp_path, head, tied):
    """Whatever the order in the files, and by parts, with a fresh head as well."""
    config = TINY.model_copy(update={"tie_embeddings": tied})
    stored = random_model(config)
    directory = save(tmp_path / "m", stored, max_shard_bytes=150_000)
    model = meta_model(config, head=head, dtype=torch.bfloat16)
    weights = list(weights_of(model, directory, fresh_head=head == "scalar", seed=5))
    assert [name for name, _ in weights] == [name for name, _ in model.named_parameters()]
    expected = dict(stored.named_parameters()) | {"score.weight": stored.fresh_score(seed=5)}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights)
    assert not any(parameter.device.type == "cpu" for parameter in model.parameters())
    of_parts = dict.fromkeys(parameter for part in model.parts() for parameter in part.parameters())
    assert list(map(id, of_parts)) == list(map(id, model.parameters()))


def test_checkpoint_of_another_shape_is_refused(saved):
    config = TINY.model_copy(update={"num_layers": 3, "rope_theta": 5e5, "max_seq_len": 64})
    message = r"does not fit the model: num_layers=2 \(model: 3\), rope_theta=10000.0 \(model: 500000.0\)$"
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(Llama(config), saved)


def test_sharded_round_trip(tmp_path):
    model = random_model(TINY)
    # Embedding and head take 131,072 bytes each, so each gets a shard of its own.
    directory = save(tmp_path / "sharded", model, max_shard_bytes=150_000)
    shards = sorted(path.name for path in directory.glob("*.safetensors"))
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors" and len(shards) > 3
    assert all(path.stat().st_size < 155_000 for path in directory.glob("*.safetensors"))
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(parameter.numel() for parameter in model.parameters())
    loaded = dict(iterate_tensors(directory))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    theirs = LlamaForCausalLM.from_pretrained(directory)
    assert torch.equal(theirs.lm_head.weight, model.lm_head.weight)
    (directory / shards[1]).unlink()
    with pytest.raises(CheckpointError, match=f"{shards[1]}: cannot be read: No such file"):
        check_checkpoint(directory)


def test_check_reports_what_is_there(saved):
    info = check_checkpoint(saved)
    assert info.config == TINY == read_config(saved) and not info.is_reward_model
    assert {path.name: sorted(names) for path, names in info.files.items()} == {
        "model.safetensors": sorted(expected_shapes(TINY, reward_model=False))
    }


def test_expected_shapes_are_the_models():
    for name, head in (("tiny", "lm"), ("testbed", "lm"), ("testbed", "scalar"), ("llama2-70b", "lm")):
        with torch.device("meta"):
            model = Llama(PRESETS[name], head=head)
        shapes = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
        assert expected_shapes(PRESETS[name], reward_model=head == "scalar") == shapes


def test_truncated_files_are_named_with_their_sizes(saved):
    path = saved / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=f"truncated: {len(content) - 1} bytes, should be {len(content)}"):
        check_checkpoint(saved)
    path.write_bytes(content + b"x")
    with pytest.raises(CheckpointError, match="longer than its header says"):
        check_checkpoint(saved)
    for short in (b"", content[:5], content[:100]):
        path.write_bytes(short)
        with pytest.raises(CheckpointError, match=f"truncated in its header .{len(short)} bytes"):
            check_checkpoint(saved)
    path.write_bytes(struct.pack("<Q", 4) + b"{{{{")
    with pytest.raises(CheckpointError, match="its safetensors header is damaged"):
        check_checkpoint(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "missing tensors model.norm.weight"),
        (lambda t: t.update({"model.norm.bias": torch.zeros(64)}), "unknown tensors model.norm.bias"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(32)}),
            r"model.norm.weight has shape \[32\]; config.json implies \[64\]",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)}),
            "model.norm.weight has dtype I8; must be one of F32",
        ),
    ],
)
def test_wrong_tensors_are_named(saved, change, message):
    tensors = load_file(saved / "model.safetensors")
    change(tensors)
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(CheckpointError, match=message) as caught:
        check_checkpoint(saved)
    assert "\n" not in str(caught.value)


def test_missing_files_are_named(tmp_path, saved):
    with pytest.raises(CheckpointError, match="nowhere: no such checkpoint directory"):
        read_config(tmp_path / "nowhere")
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor"):
        check_checkpoint(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON"):
        read_config(saved)
    (saved / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UnsupportedModelError, match=r"saved: config\.json: model_type='gpt2'"):
        read_config(saved)
    (saved / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read: No such file"):
        read_config(saved)


@pytest.mark.parametrize("file_name", ["../model.safetensors", "/etc/passwd", 7])
def test_index_cannot_point_outside_its_directory(saved, file_name):
    (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file_name}}))
    with pytest.raises(CheckpointError, match="must be a plain file name"):
        check_checkpoint(saved)


def test_index_must_agree_with_the_files(saved):
    index = {"weight_map": {"model.norm.weight": "model.safetensors", "absent": "model.safetensors"}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="absent should be here"):
        check_checkpoint(saved)


def test_saving_is_whole_or_not_at_all(tmp_path):
    tensors = list(random_model(TINY).state_dict().items())
    target = tmp_path / "new"

    def interrupted():
        yield from tensors[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(target, TINY, interrupted(), max_shard_bytes=1000)
    with pytest.raises(CheckpointError, match=r"missing tensors: lm_head.weight$"):
        save_checkpoint(target, TINY, tensors[:-1])
    with pytest.raises(CheckpointError, match=r"lm_head\.weight of shape .* is unexpected or comes twice"):
        save_checkpoint(target, TINY, [*tensors, tensors[-1]])
    assert list(tmp_path.iterdir()) == []
    save_checkpoint(target, TINY, tensors)
    with pytest.raises(CheckpointError, match="new: already exists"):
        save_checkpoint(target, TINY, tensors)


def test_files_have_the_modes_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        save(tmp_path / "model", random_model(TINY), max_shard_bytes=2**16)
        write_state(
            tmp_path / "state", [("w", 0, {part: torch.zeros(2) for part in PARTS})], steps=1, max_bytes=1
        )  # a trainer's
    finally:
        os.umask(before)
    files = [*(tmp_path / "model").iterdir(), *(tmp_path / "state").iterdir()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}


def test_saving_copies_tensors_that_the_caller_reuses(tmp_path):
    # ZeRO-3 gathers parameters into buffers that it reuses.
    shapes = expected_shapes(TINY, reward_model=False)
    buffer = torch.empty(512 * 64)

    def reused():
        for number, (name, shape) in enumerate(shapes.items()):
            tensor = buffer[: torch.Size(shape).numel()].view(shape)
            yield name, tensor.fill_(number)

    save_checkpoint(tmp_path / "saved", TINY, reused())
    loaded = dict(iterate_tensors(tmp_path / "saved"))
    assert all((loaded[name] == number).all() for number, name in enumerate(shapes))


def test_extra_files_come_along(tmp_path):
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    directory = save(tmp_path / "saved", random_model(TINY), extra_files=[tokenizer])
    assert (directory / "tokenizer.json").read_text() == "{}"
    shutil.rmtree(directory)
