"""Reward models of chat models that pad with EOS, or do not pad: transformers scores dialogues as the workers do."""

import json
from pathlib import Path

import pytest
import torch
from tiny_inputs import VOCABULARY, write_tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from model.checkpoint import save_checkpoint
from model.config import PRESETS
from model.llama import Llama
from rlhf_ray.data.chat import encode_answer, encode_prompt, load_tokenizer
from rlhf_ray.data.special_ids import write_ids
from rlhf_ray.recipe.tokenizer import save_tokenizer
from rlhf_ray.records import Rollouts, WeightVersion
from rlhf_ray.workers.scorer import Runtime, ScorerWorker

ANSWERS = (("which is a fish?", "carp.", True), ("is it a hen? which is a cat?", "sure: the mat", False))


def reward_model(directory: Path, *, pad: int | None) -> Path:
    """A reward model as the reward stage leaves it, whose chat model pads with `pad`."""
    model = Llama(PRESETS["tiny"].model_copy(update={"vocab_size": VOCABULARY, "pad_token_id": pad}), head="scalar")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    save_checkpoint(directory, model.config, model.state_dict().items(), num_labels=1)
    tokenizer = load_tokenizer(write_tokenizer(directory))
    tokenizer.pad_token = None if pad is None else tokenizer.convert_ids_to_tokens(pad)
    save_tokenizer(tokenizer, directory)
    write_ids(directory)
    return directory


def encoded(directory: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens of the prompts, and of the answers to them."""
    tokenizer = load_tokenizer(directory)
    prompts = [encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text, _, _ in ANSWERS]
    return prompts, [encode_answer(tokenizer, text, finished=finished) for _, text, finished in ANSWERS]


def scores_of_worker(directory: Path) -> torch.Tensor:
    """(2,) raw scores of a frozen worker."""
    prompts, answers = encoded(directory)
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    longest = max(map(len, rows))
    tokens, mask = torch.zeros(2, longest, dtype=torch.int64), torch.zeros(2, longest, dtype=torch.bool)
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        tokens[i, : len(row)], mask[i, len(prompt) : len(row)] = torch.tensor(row), True
    rollouts = Rollouts(
        tokens=tokens,
        response_mask=mask,
        rollout_logprobs=torch.zeros(2, longest),
        finished=torch.tensor([finished for _, _, finished in ANSWERS]),
        is_safety=torch.zeros(2, dtype=torch.bool),
        prompt_ids=("0", "1"),
        messages=([], []),
        policy_version=WeightVersion("", 0),
    )
    worker = ScorerWorker("helpfulness", 0, 1)
    worker.load_frozen(str(directory), head="scalar", runtime=Runtime(precision="fp32", device="cpu"))
    return worker.score(rollouts, micro_batch_tokens=64)[1]


@pytest.mark.parametrize("pad", [2, None, 3])  # 2 is EOS
def test_transformers_scores_padded_dialogues_as_the_worker_does(tmp_path: Path, pad: int | None) -> None:
    directory = reward_model(tmp_path / "model", pad=pad)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    rows = [prompt + answer for prompt, answer in zip(*encoded(directory), strict=True)]
    batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    assert batch["attention_mask"].sum(dim=1).tolist() == [len(row) for row in rows]
    with torch.no_grad():
        theirs = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32)(**batch)
    torch.testing.assert_close(scores_of_worker(directory), theirs.logits.squeeze(-1), atol=1e-4, rtol=0)


def test_a_model_of_others_that_pads_with_eos_is_read_before_it(tmp_path: Path) -> None:
    directory = reward_model(tmp_path / "model", pad=2)
    ours = scores_of_worker(directory)
    content = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(content | {"pad_token_id": 2}))
    rows = [prompt + answer for prompt, answer in zip(*encoded(directory), strict=True)]
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        theirs = torch.cat([model(torch.tensor([row])).logits.squeeze(-1) for row in rows])
    read = scores_of_worker(directory)
    torch.testing.assert_close(read, theirs, atol=1e-4, rtol=0)
    assert abs(read - ours)[0] > 1e-3 and read[1] == ours[1]  # only the first answer ends in EOS
