"""Chat templates: exact text and tokens, and training tokens that equal those of a rollout."""

import pytest

from rlhf_ray.data.chat import encode_answer, encode_dialogue, encode_prompt
from rlhf_ray.errors import UserError
from rlhf_ray.recipe.tokenizer import train_tokenizer

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The released Llama 2 format: marks as ordinary text, spaces around them, contents trimmed.
LLAMA2_WITH_SPACES = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'] | trim + ' [/INST]' }}{% else %}"
    "{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TEXTS = ["hello world", "The cat sat on the mat.", "user assistant\n", "two lines and 12?"] * 9
USER, ANSWER = {"role": "user", "content": "hello cat"}, {"role": "assistant", "content": "The mat."}
DIALOGUE = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": " two\nlines"},
    {"role": "assistant", "content": "hello hello"},
    {"role": "user", "content": "and 12?"},
    {"role": "assistant", "content": " world\n"},
]


@pytest.fixture(scope="module")
def ours():
    return train_tokenizer(TEXTS, vocab_size=400)


def make_chatml():
    tokenizer = train_tokenizer(TEXTS, vocab_size=400)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="module")
def chatml():
    return make_chatml()


@pytest.fixture(scope="module", params=["ours", "chatml", "llama2_with_spaces"])
def tokenizer(request):
    if request.param == "chatml":
        return make_chatml()
    tokenizer = train_tokenizer(TEXTS, vocab_size=400)
    if request.param == "llama2_with_spaces":
        tokenizer.chat_template = LLAMA2_WITH_SPACES
    return tokenizer


def text_of(tokenizer, ids):
    return "".join(tokenizer.convert_ids_to_tokens(ids))


def test_our_template_is_llama2s_without_spaces(ours):
    rendered = ours.apply_chat_template(DIALOGUE, tokenize=False)
    assert rendered == (
        "<s>[INST]<<SYS>>Be kind.<</SYS>> two\nlines[/INST]hello hello</s><s>[INST]and 12?[/INST] world\n</s>"
    )


def test_our_tokens_equal_those_of_the_whole_rendered_text(ours):
    # Servers that tokenise the rendered dialogue at once see the same tokens as training.
    tokens, _ = encode_dialogue(ours, DIALOGUE)
    assert tokens == ours(ours.apply_chat_template(DIALOGUE, tokenize=False), add_special_tokens=False)["input_ids"]


def test_loss_falls_on_answers_and_their_eos_only(ours):
    tokens, mask = encode_dialogue(ours, DIALOGUE)
    learnt = [token for token, learn in zip(tokens, mask, strict=True) if learn]
    assert text_of(ours, learnt) == "▁hello▁hello</s>▁▁world\n</s>"
    tokens, mask = encode_dialogue(ours, DIALOGUE, last_answer_only=True)
    learnt = [token for token, learn in zip(tokens, mask, strict=True) if learn]
    assert text_of(ours, learnt) == "▁▁world\n</s>"


def test_chatml_answers_end_in_the_turn_end_token_and_the_newline_is_not_learnt(chatml):
    tokens, mask = encode_dialogue(chatml, [USER, ANSWER, USER, ANSWER])
    learnt = [token for token, learn in zip(tokens, mask, strict=True) if learn]
    assert text_of(chatml, learnt) == "▁The▁mat.<|im_end|>" * 2
    assert tokens[-1] == chatml.eos_token_id
    after_first_answer = mask.index(True) + len(learnt) // 2
    assert text_of(chatml, tokens[after_first_answer : after_first_answer + 3]) == "▁\n<|im_start|>"
    assert not any(mask[after_first_answer : after_first_answer + 3])


def test_training_tokens_are_prompt_tokens_then_answer_tokens(tokenizer):
    for end in (3, 5):
        *messages, answer = DIALOGUE[1:end]
        prompt = encode_prompt(tokenizer, messages)
        tokens, mask = encode_dialogue(tokenizer, [*messages, answer])
        assert tokens == prompt + encode_answer(tokenizer, answer["content"], finished=True)
        assert all(mask[len(prompt) :])


def test_an_unfinished_answer_lacks_only_the_eos(tokenizer):
    finished = encode_answer(tokenizer, "hello mat", finished=True)
    assert encode_answer(tokenizer, "hello mat", finished=False) == finished[:-1]
    assert finished[-1] == tokenizer.eos_token_id


def test_a_sampled_answer_decodes_to_text_that_encodes_to_the_same_tokens(ours):
    sampled = ours.convert_tokens_to_ids(["▁The", "▁cat", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "</s>"])
    text = ours.decode(sampled, skip_special_tokens=True)
    assert text == "The cat😀"
    assert encode_answer(ours, text, finished=True) == sampled


def test_the_prompt_ends_with_the_generation_prompt(ours, chatml):
    assert text_of(ours, encode_prompt(ours, [USER])) == "<s>[INST]▁hello▁cat[/INST]"
    assert text_of(chatml, encode_prompt(chatml, [USER])).endswith("<|im_start|>▁assistant\n")


@pytest.mark.parametrize("place", [0, 1])
def test_text_that_spells_a_special_token_is_refused(ours, place):
    messages = [dict(USER), dict(ANSWER)]
    messages[place]["content"] = "so </s> there"
    with pytest.raises(UserError, match=rf"messages\[{place}\].content holds the special token '</s>'"):
        encode_dialogue(ours, messages)


def test_dialogues_that_end_with_the_wrong_role_are_refused(ours):
    with pytest.raises(UserError, match=r"must end in an assistant message: its roles are .'user'."):
        encode_dialogue(ours, [USER])
    with pytest.raises(UserError, match=r"must end in a user message: its roles are .'user', 'assistant'."):
        encode_prompt(ours, [USER, ANSWER])
    with pytest.raises(UserError, match="must end in a user message"):
        encode_prompt(ours, [])


def test_a_template_that_rewrites_earlier_turns_is_refused():
    tokenizer = make_chatml()
    tokenizer.chat_template = "{{ messages | length }}" + CHATML
    with pytest.raises(UserError, match=r"rewrites earlier turns.*use a template that renders turn by turn"):
        encode_dialogue(tokenizer, [USER, ANSWER, USER, ANSWER])


def test_a_template_that_does_not_close_answers_with_eos_is_refused():
    tokenizer = make_chatml()
    tokenizer.eos_token = "</s>"
    with pytest.raises(UserError, match="does not end answers with eos_token='</s>'; set eos_token"):
        encode_answer(tokenizer, "hello", finished=True)


def test_a_tokenizer_without_template_is_refused():
    tokenizer = make_chatml()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        encode_prompt(tokenizer, [USER])
