"""Dialogues to tokens through a Hugging Face chat template, the same way in training and in rollouts.

A template renders text. Tokenising the rendered text of a whole dialogue would let pieces merge across the
border between prompt and answer, where a rollout cannot: there the prompt is tokenised first and the answer
comes as sampled tokens. So the text is cut at the borders of every answer and each part is tokenised on its
own. The prompt tokens of training are then those of the rollout, and the answer tokens depend on the answer
alone.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_ray.data.light_tokenizer import LLAMA_MARKS, read_settings
from rlhf_ray.data.template import Messages, check_contents, control_tokens, dialogue_of, render, settle_eos
from rlhf_ray.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LLAMA2_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}
        {{- bos_token + '[INST]' -}}
        {%- if loop.index0 == 1 and messages[0]['role'] == 'system' -%}
            {{- '<<SYS>>' + messages[0]['content'] + '<</SYS>>' -}}
        {%- endif -%}
        {{- message['content'] + '[/INST]' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- message['content'] + eos_token -}}
    {%- elif loop.index0 > 0 or message['role'] != 'system' -%}
        {{- raise_exception('role ' + message['role'] + ' is out of place') -}}
    {%- endif -%}
{%- endfor -%}
"""
"""Llama 2's dialogue format: every exchange is BOS [INST] user [/INST] answer EOS, and the system text stands
inside the first user message between <<SYS>> and <</SYS>>.

The released code puts spaces and newlines around the marks, because there they are ordinary text. In our
tokenizers each mark is one special token and every text between marks starts with the word-start sign by
itself (`recipe/tokenizer.py`), so the template adds no space: an answer has the same tokens whether it is
tokenised alone, after its prompt, or sampled, and a decoded answer has no space to strip.
"""

# Stands before an answer when only the answer's own tokens are asked for.
_ANY_PROMPT: Messages = ({"role": "user", "content": "?"},)


def load_tokenizer(directory: str | Path) -> "PreTrainedTokenizerBase":
    """The Hugging Face tokenizer of a directory; its EOS is the token that closes an answer in its chat template.

    Raises:
        UserError: there is none, its files cannot be read, or the template closes an answer with no one token.
    """
    # Here, because importing transformers takes seconds and most of this module does not need it.
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not Path(directory).is_dir():
        raise UserError(f"{directory}: no such directory; give the directory of a Hugging Face tokenizer")
    # AutoTokenizer rebuilds the tokenizer of a class like LlamaTokenizer by that class's rules, which are not those
    # of every tokenizer.json that names it.
    reader = PreTrainedTokenizerFast if (Path(directory) / "tokenizer.json").exists() else AutoTokenizer
    marks = read_settings(Path(directory))
    silent = {name: marks[name] for name in LLAMA_MARKS if isinstance(marks.get(name), str)}
    try:
        tokenizer: PreTrainedTokenizerBase = reader.from_pretrained(str(directory), **silent)
    except (OSError, ValueError, TypeError, LookupError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{directory}: no tokenizer can be read there ({reason}); save one there") from error
    if tokenizer.chat_template is not None:
        settle_eos(tokenizer)
    return tokenizer


def encode_dialogue(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Messages,
    *,
    learnt: Sequence[bool] | None = None,
    finished: bool = True,
) -> tuple[list[int], list[bool]]:
    """Tokens of a dialogue that ends in an assistant message, and which of them are learnt.

    What the template writes after the final EOS is left out: no model is asked to emit it.

    Args:
        tokenizer: any with a chat template that renders turn by turn.
        messages: optional system message, then user and assistant in turn.
        learnt: which of the answers, in order; Ghost Attention learns the last alone. None for all.
        finished: False for a last answer that was cut off, which has no EOS.
    Returns:
        (tokens, answer_mask): the mask is True on the tokens of the answers that are learnt, their EOS included.
    Raises:
        UserError: see `encode_prompt`.
    Source: loss on answer tokens only, Llama 2 section 3.1.
    """
    if not messages or messages[-1]["role"] != "assistant":
        raise UserError(f"a dialogue to learn from must end in an assistant message: {_roles(messages)}")
    parts = _parts(tokenizer, messages)
    if not finished:
        parts[-1] = (parts[-1][0].removesuffix(str(tokenizer.eos_token)), True)
    tokens: list[int] = []
    answer_mask: list[bool] = []
    flags = itertools.repeat(True) if learnt is None else iter(learnt)
    for text, is_answer in parts:
        part = _tokenize(tokenizer, text)
        tokens += part
        answer_mask += [is_answer and next(flags)] * len(part)
    return tokens, answer_mask


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", messages: Messages) -> list[int]:
    """Tokens up to the point where the model answers, the template's generation prompt included.

    `encode_prompt(m) + encode_answer(a, finished=True)` are the tokens of `encode_dialogue(m + [a])`.

    Args:
        messages: ends in a user message.
    Raises:
        UserError: the dialogue does not end so, a message holds the text of a special token, the tokenizer
            has no chat template, or its template refuses the dialogue, leaves out a part of it, does not render turn
            by turn or does not close answers with EOS.
    """
    if not messages or messages[-1]["role"] != "user":
        raise UserError(f"a dialogue to answer must end in a user message: {_roles(messages)}")
    return [token for text, _ in _parts(tokenizer, messages) for token in _tokenize(tokenizer, text)]


def encode_answer(tokenizer: "PreTrainedTokenizerBase", text: str, *, finished: bool) -> list[int]:
    """Tokens of an answer as they follow `encode_prompt`.

    Args:
        finished: True ends in EOS; False is for answers that were cut off, which have none.
    Raises:
        UserError: see `encode_prompt`.
    """
    dialogue = [*_ANY_PROMPT, {"role": "assistant", "content": text}]
    answer, _ = _parts(tokenizer, dialogue)[-1]
    if not finished:
        answer = answer.removesuffix(str(tokenizer.eos_token))
    return _tokenize(tokenizer, answer)


def check_template(tokenizer: "PreTrainedTokenizerBase", roles: Sequence[str]) -> None:
    """The template takes a dialogue of these roles as training and rollouts need it.

    Raises:
        UserError: see `encode_prompt`.
    """
    encode = encode_dialogue if roles[-1] == "assistant" else encode_prompt
    encode(tokenizer, dialogue_of(roles))


def decode_answer(tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[int]) -> str:
    """Text of an answer's tokens, without those that are no text."""
    control = set(tokenizer.convert_tokens_to_ids(list(control_tokens(tokenizer))))
    kept = [token for token in tokens if token not in control]
    # The clean-up that some settings ask for takes spaces before punctuation away.
    return str(tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)).strip()


def _parts(tokenizer: "PreTrainedTokenizerBase", messages: Messages) -> list[tuple[str, bool]]:
    """The rendered dialogue in order, cut into (text, is it an answer); an answer ends in EOS."""
    _refuse_special_tokens(tokenizer, messages)
    eos = str(tokenizer.eos_token)
    parts: list[tuple[str, bool]] = []
    done = ""  # what is rendered and cut so far
    first = 0  # the message after those
    for end, message in enumerate(messages, start=1):
        if message["role"] == "user":
            prompt = render(tokenizer, messages[:end], add_generation_prompt=True)
            parts.append((_after(done, prompt, tokenizer), False))
            done = prompt
        elif message["role"] == "assistant":
            # Some templates write more after EOS, such as a newline: that goes to the next prompt.
            answer, closing, _ = _after(
                done, render(tokenizer, messages[:end], add_generation_prompt=False), tokenizer
            ).partition(eos)
            if not closing:
                raise UserError(
                    f"{tokenizer.name_or_path}: the chat template does not end answers with eos_token={eos!r}"
                    "; set eos_token to the token that closes an assistant turn"
                )
            parts.append((answer + eos, True))
            done += answer + eos
        else:
            continue  # a system message is part of the prompt that follows it
        check_contents(tokenizer, messages[:end], parts[-1][0], first=first)
        first = end
    return parts


def _after(done: str, rendered: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    if not rendered.startswith(done):
        raise UserError(
            f"{tokenizer.name_or_path}: the chat template rewrites earlier turns when one is added, so "
            "prompts of rollouts would differ from those learnt; use a template that renders turn by turn"
        )
    return rendered[len(done) :]


def _refuse_special_tokens(tokenizer: "PreTrainedTokenizerBase", messages: Messages) -> None:
    """Text that spells a special token would be read as one: it could close a turn or fake another."""
    special = control_tokens(tokenizer)
    for place, message in enumerate(messages):
        for token in special:
            if token in message["content"]:
                raise UserError(
                    f"messages[{place}].content holds the special token {token!r}, which would end or fake a "
                    "turn; remove it from the text"
                )


def _tokenize(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _roles(messages: Messages) -> str:
    return f"its roles are {[message['role'] for message in messages]}; add the missing message or cut one"
