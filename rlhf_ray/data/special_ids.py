"""Ids of the special tokens of a run, and the files of its checkpoints that name them.

A tokenizer's files, config.json and generation_config.json all say which token ends an answer, and public checkpoints
disagree. Here the tokenizer and its chat template decide (`template.turn_end`); a checkpoint adds the further ids that
it lists as ends, as Llama 3's does; and every file that a run writes says the same.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from model.checkpoint_files import CONFIG_FILE, GENERATION_FILE, is_reward_model, read_config
from model.config import ModelConfig
from rlhf_ray.data.light_tokenizer import LightTokenizer
from rlhf_ray.data.template import control_tokens
from rlhf_ray.errors import UserError


class SpecialIds(NamedTuple):
    """Token ids with a meaning; None for a token that the tokenizer has not."""

    bos: int | None
    eos: int
    """Closes an answer in the chat template; ends a document in pretraining."""
    pad: int | None
    other_eos: tuple[int, ...]
    """Further tokens that end an answer where a model emits them."""
    score_pad: int | None
    """Padding of reward models, a token that no answer ends in: transformers reads a score at the last token that is
    not padding, and many chat models pad with EOS.
    """

    @property
    def ends(self) -> list[int]:
        """All that end an answer, EOS first."""
        return [self.eos, *self.other_eos]


def special_ids(tokenizer: LightTokenizer, model: ModelConfig | None = None) -> SpecialIds:
    """The ids that a tokenizer gives the models of a run.

    Args:
        model: of the checkpoint that is started from; where it lists several tokens that end an answer, all count.
            One alone does not: base models name the token that ends a document there.
    Raises:
        UserError: the tokenizer has no EOS.
    """
    ids, marks = tokenizer.vocabulary, tokenizer.marks
    if tokenizer.eos_token is None:
        raise UserError(
            f"{tokenizer.name_or_path}: the tokenizer has no eos_token; set it to the token that closes an answer"
        )
    bos, eos, pad = (ids.get(marks.get(name, "")) for name in ("bos_token", "eos_token", "pad_token"))
    assert eos is not None, "settings name tokens of the vocabulary: others are added"
    listed = (model.eos_token_id, *model.other_eos_token_ids) if model is not None and model.other_eos_token_ids else ()
    others = tuple(token_id for token_id in listed if token_id not in (eos, None))
    stand_ins = [pad, bos, ids.get(marks.get("unk_token", "")), *(ids[token] for token in control_tokens(tokenizer))]
    score_pad = next((token_id for token_id in stand_ins if token_id not in (None, eos, *others)), None)
    return SpecialIds(bos, eos, pad, others, score_pad)


def write_ids(checkpoint: Path) -> None:
    """Has all files of a checkpoint, which holds its tokenizer, name the special tokens that `special_ids` gives."""
    tokenizer = LightTokenizer(checkpoint)
    ids, is_reward = special_ids(tokenizer, read_config(checkpoint)), is_reward_model(checkpoint)
    pad = ids.score_pad if is_reward else ids.pad
    named = {"bos_token_id": ids.bos, "eos_token_id": ids.eos, "pad_token_id": pad}
    _update(checkpoint / CONFIG_FILE, named)
    if not is_reward:
        _update(checkpoint / GENERATION_FILE, named | {"eos_token_id": ids.ends if ids.other_eos else ids.eos})
    written = ("bos_token", "eos_token", "pad_token", "unk_token")
    marks = {name: token for name, token in tokenizer.marks.items() if name in written}
    if pad is not None:
        marks["pad_token"] = {number: piece for piece, number in tokenizer.vocabulary.items()}[pad]
    # Readers take tokenizer.json as it is under this class alone; others rebuild it by rules of their own.
    _update(checkpoint / "tokenizer_config.json", marks | {"tokenizer_class": "PreTrainedTokenizerFast"})
    if (legacy := checkpoint / "special_tokens_map.json").exists():
        _update(legacy, marks)


def _update(path: Path, values: dict[str, Any]) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    text = json.dumps(content | values, indent=2, ensure_ascii=False) + "\n"
    path.unlink(missing_ok=True)  # a copy of a file that nobody may write to
    path.write_text(text, encoding="utf-8")
