"""Which tokens end an answer: one decision, and every file, engine and reader that follows it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny_inputs import VOCABULARY, write_checkpoint, write_rows, write_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from model.checkpoint_files import read_config
from rlhf_ray.cli.export import export_model
from rlhf_ray.config import ModelSection
from rlhf_ray.data.chat import load_tokenizer
from rlhf_ray.data.light_tokenizer import LightTokenizer
from rlhf_ray.data.lm_rows import corpus_rows
from rlhf_ray.data.special_ids import SpecialIds, special_ids, write_ids
from rlhf_ray.recipe.pretraining import model_config

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
START, END, SIZE = VOCABULARY, VOCABULARY + 1, VOCABULARY + 2


def write_chatml(directory: Path, **marks: str | None) -> Path:
    """A tokenizer whose template closes answers with <|im_end|>, and whose files call other tokens so."""
    tokenizer = load_tokenizer(write_tokenizer(directory))
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = CHATML
    for name, token in marks.items():
        setattr(tokenizer, name, token)
    tokenizer.save_pretrained(directory)
    return directory


def write_speaker(directory: Path, token: int) -> Path:
    """A checkpoint that always says one token, with a ChatML tokenizer; its files call 2 the end of an answer."""
    write_checkpoint(directory, vocab_size=SIZE)
    weights = load_file(directory / "model.safetensors")
    weights["model.embed_tokens.weight"][:] = 1  # all other blocks add nothing
    weights["model.norm.weight"][:] = 1
    weights["lm_head.weight"][token] = 1
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return write_chatml(directory)


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ({}, SpecialIds(1, END, 3, (), 3)),
        ({"bos_token": None, "pad_token": "<|im_end|>"}, SpecialIds(None, END, END, (), 0)),  # <unk> pads rewards
        ({"bos_token": "<|im_end|>", "pad_token": None, "unk_token": None}, SpecialIds(END, END, None, (), 0)),
    ],
)
def test_tokenizer_and_template_decide(tmp_path: Path, marks: dict[str, str | None], expected: SpecialIds) -> None:
    assert special_ids(LightTokenizer(write_chatml(tmp_path, **marks))) == expected


def test_a_list_of_ends_counts_and_one_alone_does_not(tmp_path: Path) -> None:
    tokenizer, checkpoint = (
        LightTokenizer(write_chatml(tmp_path / "t")),
        write_checkpoint(tmp_path / "m", vocab_size=SIZE),
    )
    assert special_ids(tokenizer, read_config(checkpoint)).ends == [END]
    change(checkpoint / "generation_config.json", eos_token_id=[7, END, 8])
    assert special_ids(tokenizer, read_config(checkpoint)).ends == [END, 7, 8]
    change(checkpoint / "config.json", eos_token_id=[2, 7])
    assert special_ids(tokenizer, read_config(checkpoint)).ends == [END, 7, 8, 2]


def test_where_bos_is_eos_and_no_other_mark_is_named_a_turn_mark_pads_rewards(tmp_path: Path) -> None:
    directory = write_chatml(tmp_path)
    content = json.loads((directory / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] >= VOCABULARY]
    (directory / "tokenizer.json").write_text(json.dumps(content | {"post_processor": None}))
    named = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|im_end|>")
    change(directory / "tokenizer_config.json", unk_token=None, **named)
    ids = special_ids(LightTokenizer(directory))
    assert (ids.bos, ids.eos, ids.pad, ids.score_pad) == (END, END, END, START)


@pytest.mark.parametrize(("said", "ends"), [(END, 2), (7, [END, 7]), (7, 2)])
def test_transformers_stops_where_the_run_does(tmp_path: Path, said: int, ends: Any) -> None:
    directory = write_speaker(tmp_path / "model", said)
    change(directory / "generation_config.json", eos_token_id=ends)
    write_ids(directory)
    write_ids(directory)  # again: the same
    expected = [END, 7] if isinstance(ends, list) else END
    assert json.loads((directory / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": expected,
        "pad_token_id": 3,
    }
    assert (
        read_config(directory).eos_token_id
        == json.loads((directory / "config.json").read_text())["eos_token_id"]
        == END
    )
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (END, 3)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).generate(
        **prompt, max_new_tokens=5, do_sample=False
    )[0, prompt["input_ids"].shape[1] :]
    stops = said == END or isinstance(ends, list)
    assert answer.tolist() == ([said] if stops else [said] * 5)


def test_a_reward_model_pads_with_a_token_that_no_answer_ends_in(tmp_path: Path) -> None:
    directory = write_chatml(
        write_checkpoint(tmp_path / "m", reward_model=True, vocab_size=SIZE), pad_token="<|im_end|>"
    )
    write_ids(directory)
    config = json.loads((directory / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, END, 1)
    assert AutoTokenizer.from_pretrained(directory).pad_token == "<s>"
    assert not (directory / "generation_config.json").exists()


def test_an_export_of_an_older_run_is_put_right(tmp_path: Path) -> None:
    step = tmp_path / "run" / "steps" / "sft-a"
    write_speaker(step / "model", END)
    change(step / "step.json", name="sft-a")
    export_model(tmp_path / "run", tmp_path / "out", what="chat")
    assert read_config(tmp_path / "out").eos_token_id == END
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == END


@pytest.mark.parametrize("bos", ["<s>", "<|im_end|>", None])
def test_a_fresh_model_and_its_documents_have_the_tokenizers_own_tokens(tmp_path: Path, bos: str | None) -> None:
    directory = write_chatml(tmp_path / "t", bos_token=bos)
    ids = load_tokenizer(directory).convert_tokens_to_ids
    config = model_config(ModelSection(preset="tiny"), directory)
    assert (config.vocab_size, config.eos_token_id, config.pad_token_id) == (SIZE, END, 3)
    assert config.bos_token_id == (None if bos is None else ids(bos))
    texts = [f"the cat {number}." for number in range(20)]
    corpus = write_rows(tmp_path / "corpus", "corpus", [{"text": text} for text in texts])
    rows = corpus_rows(corpus, str(directory), 16, 0.3).train.select([0], "cpu")
    first = rows.tokens[0][rows.segment_ids[0] == 1].tolist()
    assert (first[0] == 1) == (bos == "<s>")
    assert first[-1] == END and END not in first[:-1]


ENGINE = """
import sys
from rlhf_ray.workers.rollout import RolloutWorker
worker = RolloutWorker("rollout", 0, 1)
worker.start(sys.argv[1], tokenizer=sys.argv[1], precision="fp32", max_num_seqs=2, kv_cache_gib=0.05)
def say():
    [answer] = worker.engine.generate([[1, 5]], seeds=[0], temperature=0.0, max_new_tokens=4, end_ids=worker._ends)
    print("said", answer.tokens, answer.finished, flush=True)
say()
for checkpoint in sys.argv[2:]:
    worker.load_checkpoint(checkpoint)
    say()
"""


@pytest.mark.slow
def test_the_engine_stops_where_the_run_does_and_reads_the_files_that_the_run_reads(tmp_path: Path) -> None:
    alone, ends, several = (write_speaker(tmp_path / name, 7) for name in ("alone", "ends", "several"))
    for name in ("config.json", "generation_config.json"):
        change(alone / name, eos_token_id=7)  # one id that is not what closes a turn: no end
    change(several / "generation_config.json", eos_token_id=[END, 7])
    weights = load_file(ends / "model.safetensors")
    weights["lm_head.weight"] = np.roll(weights["lm_head.weight"], END - 7, axis=0)
    save_file(weights, ends / "model.safetensors", metadata={"format": "pt"})
    save_file({"lora.weight": np.zeros(3, np.float32)}, alone / "adapter_model.safetensors")
    save_file(weights, alone / "consolidated.safetensors")  # another model
    result = subprocess.run(
        [sys.executable, "-c", ENGINE, str(alone), str(ends), str(several)], capture_output=True, text=True, timeout=300
    )
    said = [line for line in result.stdout.splitlines() if line.startswith("said")]
    assert said == ["said [7, 7, 7, 7] False", f"said [{END}] True", "said [7] True"], result.stderr[-2000:]
