"""A Hugging Face tokenizer's files read without transformers, for checks that must answer at once.

Importing transformers takes seconds. This holds as much of its tokenizers as `data/chat.py` uses, and agrees with
them token for token (tests/test_light_tokenizer.py); training and rollouts use the real ones.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rlhf_ray.errors import UserError

# What transformers' class for Llama 2 takes where the files are silent.
_LLAMA_MARKS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

# A block that marks answers and renders what stands in it.
_GENERATION = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")


@dataclass(frozen=True)
class AddedToken:
    """A token that is cut out of the text before it is split."""

    content: str
    special: bool

    def __str__(self) -> str:
        return self.content


class LightTokenizer:
    """The tokenizer of a directory with tokenizer.json.

    Raises:
        UserError: there is none, or its files cannot be read.
    """

    def __init__(self, directory: str | Path):
        from tokenizers import Tokenizer

        directory = Path(directory)
        self.name_or_path = str(directory)
        if not directory.is_dir():
            raise UserError("no such directory; give the directory of a Hugging Face tokenizer")
        file = directory / "tokenizer.json"
        if not file.exists():
            raise UserError("has no tokenizer.json; give the directory of a Hugging Face fast tokenizer")
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"tokenizer.json cannot be read ({str(error).splitlines()[0]}); copy it again") from error
        self._settings = _read_json(directory / "special_tokens_map.json")
        self._settings |= _read_json(directory / "tokenizer_config.json")
        template = directory / "chat_template.jinja"
        self.chat_template: Any = (
            template.read_text(encoding="utf-8") if template.exists() else self._settings.get("chat_template")
        )
        if isinstance(self.chat_template, list):  # several by name: transformers, too, takes this one
            self.chat_template = {each["name"]: each["template"] for each in self.chat_template}.get("default")
        self._compiled: Any = None

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every piece and its id, added tokens included."""
        pieces = self._tokenizer.get_vocab(with_added_tokens=True)
        return pieces | {str(token): number for number, token in self.added_tokens_decoder.items()}

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Added tokens by id."""
        added = self._tokenizer.get_added_tokens_decoder()
        tokens = {number: AddedToken(token.content, token.special) for number, token in added.items()}
        for number, token in (self._settings.get("added_tokens_decoder") or {}).items():
            tokens[int(number)] = AddedToken(token["content"], bool(token.get("special")))
        return tokens

    @property
    def eos_token(self) -> str | None:
        """The token that ends an answer."""
        return self._mark("eos_token")

    def apply_chat_template(
        self, conversation: list[dict[str, Any]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        """The dialogue as text.

        Raises:
            jinja2.TemplateError: the template cannot be rendered.
        """
        assert not tokenize, "text alone"
        if self._compiled is None:
            self._compiled = _compile(str(self.chat_template))
        marks = {name: self._mark(name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
        return str(
            self._compiled.render(
                messages=conversation,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **{name: token for name, token in marks.items() if token is not None},
            )
        )

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids}

    def _mark(self, name: str) -> str | None:
        value = self._settings.get(name)
        if value is None and "Llama" in str(self._settings.get("tokenizer_class")):
            return _LLAMA_MARKS.get(name)
        return value["content"] if isinstance(value, dict) else value


def _compile(template: str) -> Any:
    """The template in the surroundings that transformers gives it; its text is data, hence the sandbox."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    plain = _GENERATION.sub(lambda m: f"{m[1]}{'endif' if m[2] else 'if true'}{m[3]}", template)
    return environment.from_string(plain)


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **options)


def _strftime_now(form: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(form)


def _raise_exception(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path.name} is not valid JSON ({error}); copy it again") from error
    return content
