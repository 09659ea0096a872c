"""The tokenizer: its vocabulary, exact round trips, and its files as transformers reads them."""

import json

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf_ray.errors import UserError
from rlhf_ray.recipe.tokenizer import BYTE_PIECES, SPECIAL_TOKENS, save_tokenizer, train_tokenizer

TEXTS = ["The cat sat on the mat 12345 times.\nIt was, in 1999, a café."] * 5 + ["hello world 77 77"] * 20
VOCAB_SIZE = 320


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(iter(TEXTS), vocab_size=VOCAB_SIZE)


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_special_tokens_then_bytes_then_learnt_pieces(tokenizer):
    assert len(tokenizer) == VOCAB_SIZE
    first = tokenizer.convert_ids_to_tokens(list(range(len(SPECIAL_TOKENS) + 256)))
    assert first == [*SPECIAL_TOKENS, *BYTE_PIECES]
    assert SPECIAL_TOKENS[:4] == ("<unk>", "<s>", "</s>", "<pad>")
    ids = (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert ids == (0, 1, 2, 3)


def test_bytes_are_ordinary_pieces(tokenizer):
    # An emoji is 4 bytes after the word-start sign; decoding without special tokens must keep them.
    ids = encode(tokenizer, "😀")
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "😀"


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "hello",
        " hello",
        "  hello  world ",
        "a\n b\n",
        "\r\n\t x",
        "x=12 34.5",
        "日本語 ½ ẞ é",
        "👩‍🚀 \u200b\x00 \U0010ffff",
    ],
)
def test_round_trip_is_exact(tokenizer, text):
    ids = encode(tokenizer, text)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text


def test_no_piece_holds_two_digits_or_a_digit_and_more(tokenizer):
    learnt = tokenizer.convert_ids_to_tokens(list(range(len(SPECIAL_TOKENS) + 256, VOCAB_SIZE)))
    assert [piece for piece in learnt if len(piece) > 1 and any(c.isnumeric() for c in piece)] == []
    assert tokenizer.convert_ids_to_tokens(encode(tokenizer, "77 1999")) == list("▁77▁1999")


def test_pieces_stay_within_words(tokenizer):
    learnt = tokenizer.convert_ids_to_tokens(list(range(len(SPECIAL_TOKENS) + 256, VOCAB_SIZE)))
    assert "▁hello" in learnt
    assert [piece for piece in learnt if "▁" in piece[1:] or ("\n" in piece and piece != "\n")] == []


def test_a_word_has_the_same_pieces_wherever_it_stands(tokenizer):
    hello = encode(tokenizer, "hello")
    assert len(hello) == 1
    assert encode(tokenizer, "hello hello") == hello * 2
    assert encode(tokenizer, "[INST]hello[/INST]hello")[1::2] == hello * 2


def test_training_is_deterministic(tokenizer):
    again = train_tokenizer(TEXTS, vocab_size=VOCAB_SIZE)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_rare_characters_leave_room_for_words():
    texts = ["".join(chr(0x4E00 + 40 * i + j) for j in range(40)) for i in range(20)] * 2 + ["hello world"] * 50
    tokenizer = train_tokenizer(texts, vocab_size=VOCAB_SIZE)
    assert "▁hello" in tokenizer.get_vocab()
    assert tokenizer.decode(encode(tokenizer, texts[7])) == texts[7]


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size=280 must be at least 286"):
        train_tokenizer(TEXTS, vocab_size=280)


@pytest.mark.parametrize("beside_a_llama_model", [False, True])
def test_auto_tokenizer_reads_the_same_tokenizer(tokenizer, tmp_path, beside_a_llama_model):
    save_tokenizer(tokenizer, tmp_path)
    if beside_a_llama_model:
        # Beside a model, transformers may choose the tokenizer class by the model's type.
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": VOCAB_SIZE}))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    assert loaded.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert loaded.chat_template == tokenizer.chat_template
    names = ("unk_token", "bos_token", "eos_token", "pad_token")
    assert [getattr(loaded, name) for name in names] == list(SPECIAL_TOKENS[:4])
    text = "  hello 12\n😀 it's (fine)"
    assert encode(loaded, text) == encode(tokenizer, text)
    assert loaded.decode(encode(loaded, text)) == text
    assert loaded("hello")["input_ids"] == [1, *encode(tokenizer, "hello")]
