"""Byte-pair tokenizer in Llama 2's manner (section 2.2.1): single digits, unknown characters as bytes.

A text is cut into words, each with the sign "▁" for the space before it; digits, line breaks and runs of
punctuation stand alone, and no piece crosses such a cut. The text itself gets a "▁" in front and decoding
removes one: a word has the same pieces at the start of an answer as inside one, and every text comes back
exactly, leading spaces included. The one exception is the character "▁" itself, which comes back as a space.

Special tokens come first, then the 256 bytes as ordinary pieces, then what was learnt.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from rlhf_ray.data.chat import LLAMA2_TEMPLATE
from rlhf_ray.data.schemas import CORPUS, read_table
from rlhf_ray.errors import UserError

if TYPE_CHECKING:
    from rlhf_ray.recipe.context import Context
    from rlhf_ray.recipe.stages import Artefact
    from rlhf_ray.run_state import Step

UNK, BOS, EOS, PAD = "<unk>", "<s>", "</s>", "<pad>"
SPECIAL_TOKENS = (UNK, BOS, EOS, PAD, "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))
DIGITS = "0123456789"

# A word with the space before it, one digit, one line break, a run of anything else, a lone space.
WORDS = r"▁?[\p{L}\p{M}]+|\p{N}|\n|▁?[^▁\p{L}\p{M}\p{N}\n]+|▁"

# Learnt pieces that single characters may take up; rarer characters are spelled in bytes. Without a limit a
# corpus with a long tail of characters would leave a small vocabulary no room for words.
ALPHABET_SHARE = 0.5


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Learn a tokenizer.

    Args:
        texts: the corpus; kept in memory while it is learnt from.
        vocab_size: pieces in all, special tokens and bytes included. A small corpus may give fewer: pieces
            that occur once are not learnt.
    Returns:
        A Hugging Face tokenizer with BOS, EOS, PAD and UNK set and Llama 2's chat template.
    Raises:
        UserError: vocab_size leaves no room for learnt pieces.
    Source: Llama 2 section 2.2.1 (byte-pair encoding, digits split, unknown characters as bytes).
    """
    num_learnt = vocab_size - len(SPECIAL_TOKENS) - len(BYTE_PIECES)
    smallest = len(SPECIAL_TOKENS) + len(BYTE_PIECES) + 2 * (len(DIGITS) + 1)
    if vocab_size < smallest:
        raise UserError(
            f"tokenizer.vocab_size={vocab_size} must be at least {smallest}: {len(SPECIAL_TOKENS)} special "
            f"tokens, {len(BYTE_PIECES)} bytes and some room to learn; raise it"
        )
    texts = list(texts)
    alphabet = _alphabet(texts, int(num_learnt * ALPHABET_SHARE))
    learner = Tokenizer(models.BPE())
    _set_text_steps(learner)
    trainer = BpeTrainer(
        vocab_size=num_learnt,
        min_frequency=2,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    learnt = json.loads(learner.to_str())["model"]
    learnt_pieces = sorted(learnt["vocab"], key=learnt["vocab"].__getitem__)
    pieces = [*SPECIAL_TOKENS, *BYTE_PIECES, *learnt_pieces]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: number for number, piece in enumerate(pieces)},
            merges=[tuple(merge) for merge in learnt["merges"]],
            unk_token=UNK,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    _set_text_steps(tokenizer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=LLAMA2_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def _alphabet(texts: Iterable[str], size: int) -> list[str]:
    """The word-start sign, the digits and the most frequent characters, ties by code point.

    The trainer's own choice among equally frequent characters differs from run to run.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    always = ["▁", *DIGITS]
    others = sorted(set(counts) - {" ", *always}, key=lambda character: (-counts[character], character))
    return always + others[: max(0, size - len(always))]


def _set_text_steps(tokenizer: Tokenizer) -> None:
    """What happens to text before and after the byte-pair model."""
    # Prepending belongs to the normalizer, which works on each text between special tokens: a pre-tokenizer
    # would add no sign to a text that already starts with a space, and that space would be lost in decoding.
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))]
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: str | Path) -> None:
    """Write the tokenizer's files in Hugging Face form; `AutoTokenizer.from_pretrained` reads them."""
    tokenizer.save_pretrained(str(directory))
    # transformers 5 writes the name of its own base class, which earlier versions do not know.
    config = Path(directory) / "tokenizer_config.json"
    content = json.loads(config.read_text(encoding="utf-8"))
    content["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def make_tokenizer(context: "Context", step: "Step", inputs: "Mapping[str, Artefact]") -> dict[str, Any]:
    """Learns from the run's corpus."""
    texts = read_table(inputs["corpus"].path, CORPUS)["text"].to_pylist()
    tokenizer = train_tokenizer(texts, vocab_size=context.config.tokenizer.vocab_size)
    save_tokenizer(tokenizer, step.begin() / "tokenizer")
    return {"pieces": len(tokenizer)}
