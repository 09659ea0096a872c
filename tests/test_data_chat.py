"""Chat templates: exact text and tokens, and training tokens that equal those of a rollout."""

import json
import re

import pytest
from tokenizers import AddedToken

from rlhf_ray.data.chat import decode_answer, encode_answer, encode_dialogue, encode_prompt, load_tokenizer
from rlhf_ray.data.template import render, settle_eos, turn_end
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
    tokens, mask = encode_dialogue(ours, DIALOGUE, learnt=[False, True])
    learnt = [token for token, learn in zip(tokens, mask, strict=True) if learn]
    assert text_of(ours, learnt) == "▁▁world\n</s>"
    tokens, mask = encode_dialogue(ours, DIALOGUE, learnt=[True, False], finished=False)
    learnt = [token for token, learn in zip(tokens, mask, strict=True) if learn]
    assert text_of(ours, learnt) == "▁hello▁hello</s>" and text_of(ours, tokens).endswith("world\n")


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


def test_decoding_keeps_spaces_before_punctuation(ours):
    ours.clean_up_tokenization_spaces = True
    assert decode_answer(ours, encode_answer(ours, "a cat , is n't it ?", finished=True)) == "a cat , is n't it ?"


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


@pytest.mark.parametrize(
    ("content", "lost"),
    [
        ("message['content'][:10]", "messages[0].content (role user)"),
        ("message['content'].split('</think>')[-1]", "messages[1].content (role assistant)"),
        ("message['content'] | replace('\n', ' ')", "messages[0].content (role user)"),
        ("message['content'] | upper", "messages[0].content (role user)"),
        ("('' if message['role'] == 'user' else message['content'])", "messages[0].content (role user)"),
    ],
)
def test_a_template_that_leaves_out_a_part_of_a_message_is_refused(content, lost):
    tokenizer = make_chatml()
    tokenizer.chat_template = CHATML.replace("message['content'] ", content + " ", 1)
    dialogue = [
        {"role": "user", "content": "which is\na fish?"},
        {"role": "assistant", "content": "<think>hm</think>carp"},
    ]
    with pytest.raises(
        UserError, match=re.escape(lost) + ".*leaves out a part of it; use one that writes every message"
    ):
        encode_dialogue(tokenizer, dialogue)


def test_a_template_that_drops_the_system_message_or_moves_it_is_refused():
    tokenizer = make_chatml()
    dialogue = [{"role": "system", "content": "Be kind."}, USER, ANSWER]
    for template in (
        "{% for message in messages if message['role'] != 'system' %}" + CHATML.split("{% endif %}", 1)[1],
        "{% for message in messages if message['role'] != 'system' %}{{ message['content'] }}"
        "{% if loop.first and messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% endif %}"
        "{{ '<|im_end|>' }}{% endfor %}",
    ):
        tokenizer.chat_template = template
        encode_dialogue(tokenizer, [USER, ANSWER])
        with pytest.raises(UserError, match=r"messages\[[01]\]\.content .* leaves out a part of it"):
            encode_dialogue(tokenizer, dialogue)


def test_outer_white_space_may_be_lost(tokenizer):
    encode_dialogue(tokenizer, [{"role": "user", "content": " two\nlines\n"}, {"role": "assistant", "content": " a "}])


@pytest.mark.parametrize(
    "date", ["{{ strftime_now('%d %b %Y') }}", "{% if date_string is defined %}{{ date_string }}{% endif %}"]
)
def test_templates_are_told_one_date(date):
    tokenizer = make_chatml()
    tokenizer.chat_template = date + CHATML
    assert render(tokenizer, [USER], add_generation_prompt=True).startswith("26 Jul 2024<|im_start|>")


def test_the_token_that_closes_an_answer_is_the_eos_whatever_the_files_call_so(tmp_path):
    tokenizer = make_chatml()
    tokenizer.eos_token = "</s>"
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.eos_token == "<|im_end|>"
    assert encode_answer(loaded, "The mat.", finished=True)[-1] == loaded.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize(
    ("closing", "end"),
    [
        ("'<|im_end|>' + eos_token", "<|im_end|>"),  # the first of two
        ("' ' + eos_token", "</s>"),
        ("'\n<|im_end|>\n'", "<|im_end|>"),
    ],
)
def test_the_first_token_after_an_answer_closes_it(closing, end):
    tokenizer = make_chatml()
    tokenizer.eos_token = "</s>"
    tokenizer.chat_template = CHATML.replace("'<|im_end|>' + '\n'", closing)
    assert turn_end(tokenizer) == end


def test_a_template_that_closes_answers_with_text_is_refused():
    tokenizer = make_chatml()
    tokenizer.chat_template = "{% for m in messages %}{{ '### ' + m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    with pytest.raises(UserError, match=r"closes an answer with no special token.*write eos_token after the answer"):
        settle_eos(tokenizer)


def test_a_template_that_writes_the_other_eos_elsewhere_is_refused(tmp_path):
    tokenizer = make_chatml()
    tokenizer.eos_token = "</s>"
    tokenizer.chat_template = CHATML + "{% if add_generation_prompt %}{{ eos_token }}{% endif %}"
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"closes answers with '<\|im_end\|>' and writes eos_token, which is '</s>', elsew"
    ):
        load_tokenizer(tmp_path)


def test_tokens_that_mark_turns_may_not_be_spelled_though_nothing_flags_them():
    tokenizer = train_tokenizer(TEXTS, vocab_size=400)
    added = ["<|im_start|>", "<|im_end|>", "covid", "user", "  ", "<tool>"]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in added])
    tokenizer.chat_template = CHATML
    settle_eos(tokenizer)
    for text in ("a <|im_start|> b", "<|im_end|>"):
        with pytest.raises(UserError, match=r"holds the special token '<\|im_"):
            encode_prompt(tokenizer, [{"role": "user", "content": text}])
    encode_prompt(tokenizer, [{"role": "user", "content": "a covid  user <tool>"}])  # words that were added, no marks
    answer = encode_answer(tokenizer, "The mat.", finished=True)
    assert decode_answer(tokenizer, answer) == decode_answer(tokenizer, answer[:-1]) == "The mat."


def test_an_end_that_the_tokenizer_splits_is_refused():
    tokenizer = train_tokenizer(TEXTS, vocab_size=400)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])  # after normalization, where a text begins with a sign
    tokenizer.chat_template = CHATML
    with pytest.raises(UserError, match=r"'<\|im_end\|>', which closes an answer in the chat template, is split"):
        settle_eos(tokenizer)


def test_a_tokenizer_json_is_read_as_it_is_whatever_class_is_named(tmp_path, ours):
    ours.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    silent = {key: value for key, value in settings.items() if key not in ("bos_token", "eos_token")}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(silent | {"tokenizer_class": "LlamaTokenizerFast"}))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.bos_token, loaded.eos_token) == ("<s>", "</s>")
    assert encode_dialogue(loaded, DIALOGUE) == encode_dialogue(ours, DIALOGUE)


def test_a_tokenizer_without_template_is_refused():
    tokenizer = make_chatml()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        encode_prompt(tokenizer, [USER])
