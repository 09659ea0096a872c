"""A Hugging Face tokenizer's files read without transformers, for checks that must answer at once.

Importing transformers takes seconds. This holds as much of its tokenizers as `data/chat.py` uses, and agrees with
them token for token (tests/test_light_tokenizer.py); training and rollouts use the real ones.
"""

import contextlib
import json
import re
from pathlib import Path
from typing import Any, NoReturn

from rlhf_ray.data.template import settle_eos
from rlhf_ray.errors import UserError

# What transformers' class for Llama 2 takes where the files are silent.
LLAMA_MARKS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

# A block that marks answers and renders what stands in it.
_GENERATION = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")


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
        self._tokenizer.no_truncation()  # as transformers, where a caller asks for none, whatever the file says
        self._tokenizer.no_padding()
        self._settings = read_settings(directory)
        self.eos_token = _content(self._settings.get("eos_token"))
        """The token that ends an answer."""
        try:
            self._add_tokens(self._settings.get("added_tokens_decoder") or {})
        except (TypeError, ValueError, LookupError) as error:
            raise UserError(
                f"the added tokens of tokenizer_config.json cannot be read ({error}); correct it"
            ) from error
        self.chat_template = _chat_template(directory, self._settings)
        self._compiled: Any = None
        if self.chat_template is not None:
            with contextlib.suppress(UserError):  # told by whoever uses the template
                settle_eos(self)

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every piece and its id, added tokens included."""
        return dict(self._tokenizer.get_vocab(with_added_tokens=True))

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """Added tokens by id, each with its text (`str`) and whether it is flagged `special`."""
        return dict(self._tokenizer.get_added_tokens_decoder())

    @property
    def all_special_tokens(self) -> list[str]:
        """Tokens that the files name as special, whatever their flags in tokenizer.json."""
        extra = self._extra_tokens
        return list(dict.fromkeys([*self.marks.values(), *(map(str, extra) if isinstance(extra, list) else ())]))

    def apply_chat_template(
        self, conversation: list[dict[str, Any]], *, tokenize: bool, add_generation_prompt: bool, **more: Any
    ) -> str:
        """The dialogue as text; the template sees `more` under these names.

        Raises:
            jinja2.TemplateError: the template cannot be rendered.
        """
        assert not tokenize, "text alone"
        if self._compiled is None:
            self._compiled = _compile(str(self.chat_template))
        return str(
            self._compiled.render(
                messages=conversation,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self.marks | more,
            )
        )

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids}

    @property
    def marks(self) -> dict[str, str]:
        """Tokens by what the settings call them; templates know them by these names."""
        extra = self._extra_tokens
        named = {name: token for name, token in self._settings.items() if name.endswith("_token")}
        named |= {**(extra if isinstance(extra, dict) else {}), "eos_token": self.eos_token}
        found = {name: _content(token) for name, token in named.items()}
        return {name: token for name, token in found.items() if token is not None}

    @property
    def _extra_tokens(self) -> Any:
        """A list, or tokens by name."""
        return self._settings.get("extra_special_tokens") or self._settings.get("additional_special_tokens") or []

    def _add_tokens(self, listed: dict[str, dict[str, Any]]) -> None:
        """Tokens that only the settings know, in transformers' order: those listed with an id, then the named ones."""
        from tokenizers import AddedToken

        if not all(isinstance(token, str) for token in self._extra_tokens):
            raise TypeError("additional_special_tokens must be a list of texts")
        own, named = {repr(token) for token in self.added_tokens_decoder.values()}, set(self.marks.values())
        for _, fields in sorted(listed.items(), key=lambda item: int(item[0])):
            token = AddedToken(**{"special": False} | fields)
            if repr(token) not in own:
                token.special = token.special or str(token) in named
                self._tokenizer.add_tokens([token])
        known = {str(token) for token in self.added_tokens_decoder.values()}
        self._tokenizer.add_special_tokens([token for token in self.all_special_tokens if token not in known])


def read_settings(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json, and the files before it that transformers still reads where it lists no added tokens."""
    settings = _read_json(directory / "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:
        settings |= _read_json(directory / "special_tokens_map.json")
        listed = _read_json(directory / "added_tokens.json").items()
        settings["added_tokens_decoder"] = {str(number): {"content": text} for text, number in listed}
    if "Llama" in str(settings.get("tokenizer_class")):
        settings |= {name: token for name, token in LLAMA_MARKS.items() if settings.get(name) is None}
    return settings


def _content(token: Any) -> str | None:
    """A token's text, which some files give as a string and some with its flags."""
    return token.get("content") if isinstance(token, dict) else token if isinstance(token, str) else None


def _chat_template(directory: Path, settings: dict[str, Any]) -> str | None:
    """The template that transformers takes without tools: files go before settings, and of several the default."""
    files = {path.stem: path for path in (directory / "additional_chat_templates").glob("*.jinja")}
    if (file := directory / "chat_template.jinja").exists():
        files["default"] = file
    if files:
        return files["default"].read_text(encoding="utf-8") if "default" in files else None
    found = settings.get("chat_template")
    if isinstance(found, list):
        found = {each["name"]: each["template"] for each in found}
    return found.get("default") if isinstance(found, dict) else found


def _compile(template: str) -> Any:
    """The template in the surroundings that transformers gives it; its text is data, hence the sandbox."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    plain = _GENERATION.sub(lambda m: f"{m[1]}{'endif' if m[2] else 'if true'}{m[3]}", template)
    return environment.from_string(plain)


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **options)


def _raise_exception(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path.name} is not valid JSON ({error}); copy it again") from error
    return content
