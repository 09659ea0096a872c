"""The stand-in for transformers' tokenizers agrees with them, token for token."""

import json
import subprocess
import sys

import pytest
from tiny_inputs import write_tokenizer

from rlhf_ray.data.chat import encode_answer, encode_dialogue, encode_prompt, load_tokenizer
from rlhf_ray.errors import UserError
from rlhf_ray.light_tokenizer import LightTokenizer

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
        "from rlhf_ray.light_tokenizer import LightTokenizer\n"
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
