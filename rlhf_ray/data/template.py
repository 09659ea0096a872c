"""What a chat template makes of a dialogue, and the tokens that it closes answers and marks turns with.

Tokenizers are transformers' or `LightTokenizer`.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, TypeAlias

from rlhf_ray.errors import UserError

Messages: TypeAlias = Sequence[Mapping[str, str]]
"""Dialogue as mappings with "role" (system, user, assistant) and "content"."""

TODAY = datetime(2024, 7, 26)
"""The date that templates are told, the one that Llama 3.1's takes by itself: prompts must not change overnight."""

# Texts that no template writes by itself, so that what is left out is noticed.
_PROBE = {"system": "Zq system 1x.", "user": "Zq user 2x?", "assistant": "Zq answer 3x."}


def render(tokenizer: Any, messages: Messages, *, add_generation_prompt: bool) -> str:
    """The dialogue as the tokenizer's template writes it.

    Raises:
        UserError: there is no template, or it refuses the dialogue.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template; set chat_template in its "
            "tokenizer_config.json"
        )
    import jinja2

    conversation: list[dict[str, Any]] = [dict(message) for message in messages]
    try:
        text = tokenizer.apply_chat_template(
            conversation,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            date_string=TODAY.strftime("%d %b %Y"),
            strftime_now=TODAY.strftime,
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise UserError(f"the chat template cannot be rendered ({error}); correct it or the dialogue") from error
    return str(text)


def check_contents(tokenizer: Any, messages: Messages, text: str, *, first: int = 0) -> None:
    """Every message from number `first` on stands in the text, whole and in order; outer white space may be lost.

    Raises:
        UserError: one does not.
    """
    place = 0
    for number, message in enumerate(messages[first:], start=first):
        content = message["content"].strip()
        if (place := text.find(content, place)) < 0:
            raise UserError(
                f"messages[{number}].content (role {message['role']}): the chat template of {tokenizer.name_or_path} "
                "leaves out a part of it; use one that writes every message in full, or change the message"
            )
        place += len(content)


def dialogue_of(roles: Sequence[str]) -> list[dict[str, str]]:
    """A dialogue of these roles, whose texts are found again in what a template makes of it."""
    return [{"role": role, "content": f"{_PROBE[role]}{place}"} for place, role in enumerate(roles)]


def turn_end(tokenizer: Any) -> str:
    """The token that closes an answer: the first added or special one that the template writes after its text.

    Raises:
        UserError: as `render`; or the template writes none there.
    """
    question, answer = dialogue_of(("user", "assistant"))
    if tokenizer.eos_token is None and "eos_token" in str(tokenizer.chat_template):
        raise UserError("the tokenizer has no eos_token; set it to the token that closes an answer")
    text = render(tokenizer, [question, answer], add_generation_prompt=False)
    check_contents(tokenizer, [question, answer], text)
    after = text.rpartition(answer["content"])[2]
    if not (tokens := _tokens_in(tokenizer, after)):
        raise UserError(
            f"{tokenizer.name_or_path}: the chat template closes an answer with no special token, and nothing tells "
            "where it ends; write eos_token after the answer in the template"
        )
    return min(tokens, key=lambda token: (after.index(token), -len(token)))


def settle_eos(tokenizer: Any) -> None:
    """Makes the token that closes an answer the tokenizer's EOS, whatever its files call so.

    Raises:
        UserError: as `turn_end`; the template also writes the other one, elsewhere; or after a text the tokenizer does
            not take the end for the one token that it is.
    """
    end, declared = turn_end(tokenizer), tokenizer.eos_token
    alone, word, both = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (end, "a", f"a{end}"))
    if len(alone) != 1 or both != word + alone:
        raise UserError(
            f"{tokenizer.name_or_path}: {end!r}, which closes an answer in the chat template, is split into others; "
            "set special=true and normalized=false for it in tokenizer.json"
        )
    if end == declared:
        return
    prompt = dialogue_of(("user", "assistant", "user"))
    before = render(tokenizer, prompt, add_generation_prompt=True)
    tokenizer.eos_token = end
    if render(tokenizer, prompt, add_generation_prompt=True) != before:
        tokenizer.eos_token = declared
        raise UserError(
            f"{tokenizer.name_or_path}: the chat template closes answers with {end!r} and writes eos_token, which is "
            f"{declared!r}, elsewhere; write that token itself there, and set eos_token to the one that closes answers"
        )


def control_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Tokens that a message must not spell: those flagged special anywhere, and those that the template marks turns
    with, flagged or not.
    """
    return _control_tokens(tokenizer, str(tokenizer.chat_template), tokenizer.eos_token)


@lru_cache(maxsize=8)
def _control_tokens(tokenizer: Any, template: str, eos: str | None) -> tuple[str, ...]:
    frame = ""
    for roles in (("system", "user", "assistant", "user"), ("user", "assistant", "user")):
        try:
            frame += render(tokenizer, dialogue_of(roles), add_generation_prompt=True)
        except UserError:
            continue  # told where such a dialogue is met
    return tuple(dict.fromkeys([*_flagged(tokenizer), *_tokens_in(tokenizer, frame)]))


def _tokens_in(tokenizer: Any, text: str) -> list[str]:
    """Special and added tokens that stand in a text; words and white space that were added are text like other."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    marks = [token for token in added if token.strip() and not token.strip().isalnum()]
    return [token for token in dict.fromkeys([*_flagged(tokenizer), *marks]) if token in text]


def _flagged(tokenizer: Any) -> list[str]:
    flagged = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return [token for token in (*flagged, *tokenizer.all_special_tokens) if token]  # some settings name the empty text
