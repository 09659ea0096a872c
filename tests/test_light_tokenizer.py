"""The stand-in for transformers' tokenizers agrees with them, token for token."""

import json
import subprocess
import sys

import pytest
from tiny_inputs import write_tokenizer

from rlhf_ray.data.chat import encode_answer, encode_dialogue, encode_prompt, load_tokenizer
from rlhf_ray.data.light_tokenizer import LightTokenizer
from rlhf_ray.data.template import control_tokens
from rlhf_ray.errors import UserError

DIALOGUE = [
    {"role": "system", "content": "Be kind <b>."},
    {"role": "user", "content": " which is\n a fish?"},
    {"role": "assistant", "content": "carp, é 12"},
    {"role": "user", "content": "sure?"},
]
CHATML = (
    "{% for message in messages %}\n"
    "    {% if message['role'] == 'assistant' %}\n"
    "{{ '<|im_start|>assistant\n' }}{%- generation -%}{{ message['content'] + '<|im_end|>' }}{%- endgeneration %}\n"
    "    {% else %}\n"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}\n"
    "    {% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def as_chatml(directory):
    """Another template, and special tokens that only tokenizer_config.json tells of."""
    write_tokenizer(directory)
    tokenizer = load_tokenizer(directory)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=[write_tokenizer, as_chatml], ids=["ours", "chatml"])
def directory(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("tokenizer"))


def test_tokens_are_those_of_transformers(directory):
    light, real = LightTokenizer(directory), load_tokenizer(directory)
    answer = {"role": "assistant", "content": "yes. "}
    assert encode_prompt(light, DIALOGUE) == encode_prompt(real, DIALOGUE)
    assert encode_dialogue(light, [*DIALOGUE, answer]) == encode_dialogue(real, [*DIALOGUE, answer])
    for finished in (True, False):
        assert encode_answer(light, "carp", finished=finished) == encode_answer(real, "carp", finished=finished)


def test_facts_are_those_of_transformers(directory):
    light, real = LightTokenizer(directory), load_tokenizer(directory)
    assert light.vocabulary == real.get_vocab()
    assert light.eos_token == real.eos_token
    specials = [{str(t) for t in each.added_tokens_decoder.values() if t.special} for each in (light, real)]
    assert specials[0] == specials[1]


def listed(**flags):
    """The added_tokens_decoder of a tokenizer_config.json."""
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    return {"added_tokens_decoder": {str(n): {"content": t, "special": s, **plain} for n, (t, s) in flags.items()}}


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"tokenizer_config.json": listed(**{"301": ("<|im_end|>", True), "302": ("<tool>", True)})},
        {"tokenizer_config.json": listed(**{"302": ("<tool>", False), "2": ("</s>", False)})},
        {"tokenizer_config.json": listed(**{"303": ("<new>", True), "304": ("<plain>", False)})},
        {"tokenizer_config.json": {"additional_special_tokens": ["<tool>", "<new>"]}},
        {"tokenizer_config.json": {"extra_special_tokens": {"tool_token": "<tool>"}}},
        {"tokenizer_config.json": {"tool_token": "<tool>", "pad_token": "[PAD]"}},
        {"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizerFast", "eos_token": None}},
        {"special_tokens_map.json": {"eos_token": "<|im_end|>", "additional_special_tokens": ["<tool>"]}},
        {
            "tokenizer_config.json": listed(**{"300": ("<|im_start|>", True)}),
            "special_tokens_map.json": {"additional_special_tokens": ["<tool>"]},
        },
        {"added_tokens.json": {"<new>": 303}},
        {"tokenizer_config.json": {"unk_token": ""}},
        {
            "tokenizer.json": {
                "truncation": {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
            }
        },
        {"tokenizer_config.json": {"chat_template": "of no account"}, "additional_chat_templates/tool_use.jinja": "x"},
    ],
    ids=range(14),
)
def test_special_tokens_are_those_of_transformers_wherever_they_are_named(tmp_path, files):
    directory = write_tokenizer(tmp_path / "t")
    content = json.loads((directory / "tokenizer.json").read_text())
    for number, token in enumerate(["<|im_start|>", "<|im_end|>", "<tool>"], start=300):  # none is flagged
        content["model"]["vocab"][token] = number
        content["added_tokens"].append({**content["added_tokens"][0], "id": number, "content": token, "special": False})
    (directory / "tokenizer.json").write_text(json.dumps(content))
    (directory / "chat_template.jinja").write_text(CHATML)
    for name, changes in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        old = json.loads((directory / name).read_text()) if (directory / name).exists() else {}
        (directory / name).write_text(changes if isinstance(changes, str) else json.dumps(old | changes))
    light, real = LightTokenizer(directory), load_tokenizer(directory)
    assert set(control_tokens(light)) == set(control_tokens(real)) >= {"<|im_start|>", "<|im_end|>", "<s>"}
    assert (light.eos_token, light.vocabulary) == (real.eos_token, real.get_vocab())
    assert light.eos_token == "<|im_end|>"
    for text in ("is <tool> a fish?", "a  <new> <plain> [PAD]"):
        told = []
        for tokenizer in (light, real):
            try:
                told.append(encode_prompt(tokenizer, [{"role": "user", "content": text}]))
            except UserError as error:
                told.append(str(error).split(",")[0])
        assert told[0] == told[1]


def test_added_tokens_that_transformers_cannot_read_are_told(tmp_path):
    directory = write_tokenizer(tmp_path / "t")
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(
        json.dumps(settings | {"additional_special_tokens": [{"content": "<tool>"}]})
    )
    with pytest.raises(UserError, match="additional_special_tokens must be a list of texts"):
        LightTokenizer(directory)
    with pytest.raises(UserError, match="no tokenizer can be read there"):
        load_tokenizer(directory)


def test_of_several_templates_the_default_is_taken(tmp_path):
    directory = write_tokenizer(tmp_path / "t")
    (template := directory / "chat_template.jinja").rename(tmp_path / "default")
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    default = {"name": "default", "template": (tmp_path / "default").read_text()}
    settings["chat_template"] = [{"name": "tool_use", "template": "{{ 'tools' }}"}, default]
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    assert not template.exists()
    assert encode_prompt(LightTokenizer(directory), DIALOGUE) == encode_prompt(load_tokenizer(directory), DIALOGUE)


def test_it_loads_neither_torch_nor_transformers(directory):
    program = (
        "import sys\nfrom rlhf_ray.data.chat import encode_prompt\n"
        "from rlhf_ray.data.light_tokenizer import LightTokenizer\n"
        f"encode_prompt(LightTokenizer({str(directory)!r}), [{{'role': 'user', 'content': 'a'}}])\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[]\n"


def test_templates_that_fail_and_files_that_are_broken(tmp_path):
    light = LightTokenizer(write_tokenizer(tmp_path / "t"))
    with pytest.raises(UserError, match=r"cannot be rendered \(role tool is out of place\)"):
        encode_prompt(light, [{"role": "tool", "content": "x"}, DIALOGUE[1]])
    (tmp_path / "t" / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json is not valid JSON"):
        LightTokenizer(tmp_path / "t")


def test_llamas_own_class_has_its_marks_where_the_files_are_silent(tmp_path):
    directory = write_tokenizer(tmp_path / "t")
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    assert LightTokenizer(directory).eos_token == "</s>"
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    assert LightTokenizer(directory).eos_token is None
