"""A model's own tokenizer and chat template, as the engine and the server need them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from fptq_runtime.errors import FptqError
from fptq_runtime.models.loader import CheckpointError, read_json

REPLACEMENT = "\ufffd"  # what a decoder shows for bytes that make no character, or none yet
MAX_CHARACTER_TOKENS = 4  # a character has at most four bytes, a token at least one
BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")  # SentencePiece's, for what its vocabulary lacks


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's: printable bytes stand for themselves, the others in order for the code points from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_ALPHABET = _byte_alphabet()


class ChatTemplateError(FptqError):
    """The model has no chat template, or it refuses these messages."""


class TokenStream:
    """Incremental detokenization: text comes out as soon as it can no longer change.

    Not tokenizers' DecodeStream, which raises on bytes that make no character, as a model may well generate, and
    repeats the prompt where that ends within a character.
    """

    def __init__(self, backend: Backend, skip_special_tokens: bool, context: Sequence[int]) -> None:
        self._backend = backend
        self._skip_special_tokens = skip_special_tokens
        self._window = list(context)  # tokens whose text is out, since they shape what follows, then those still open
        self._text = self._decode()
        while self._text.startswith(REPLACEMENT):  # a context cut within a character spoils the bytes after the cut
            del self._window[0]
            self._text = self._decode()
        self._num_out = len(self._window)
        self._chars_out = len(self._text.rstrip(REPLACEMENT))

    def step(self, token_id: int) -> str | None:
        """The text that this token completes, or None while a character is still open."""
        self._window.append(token_id)
        text = self._decode()
        if text == self._text and not text.endswith(REPLACEMENT):
            # Nothing was added: a skipped special token, which must not push the context out of the window.
            self._window.pop()
            return None
        self._text = text
        if text.endswith(REPLACEMENT) and len(self._window) - self._num_out < MAX_CHARACTER_TOKENS:
            return None
        new = text[self._chars_out :]
        del self._window[: self._num_out]
        self._num_out = len(self._window)
        self._text = self._decode()
        self._chars_out = len(self._text)
        return new or None

    def _decode(self) -> str:
        return str(self._backend.decode(self._window, skip_special_tokens=self._skip_special_tokens))


class Tokenizer:
    """tokenizer.json with the special tokens and the chat template that lie beside it, read as transformers reads them
    but without importing it.

    serialized: a tokenizer.json to take in place of the directory's own. Raises CheckpointError where the directory has
    no usable tokenizer.
    """

    def __init__(self, path: Path | str, serialized: str | None = None) -> None:
        path = Path(path)
        file = path / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(f"{path} has no tokenizer.json; save the model's fast tokenizer beside its weights")
        try:
            self._backend = Backend.from_file(str(file)) if serialized is None else Backend.from_str(serialized)
            config = read_json(path / "tokenizer_config.json") if (path / "tokenizer_config.json").is_file() else {}
            self._special_tokens = _special_tokens(path, config)
            self._configure(config)
            self._added = self._backend.get_added_tokens_decoder()
            decoder = self._backend.decoder
            self._byte_level = decoder is not None and decoder.decode(["Ġ"]) == " "
            self._byte_fallback = decoder is not None and decoder.decode(["<0x41>"]) == "A"
            self._chat_template = _chat_template(path, config)
        except Exception as error:  # the library raises bare Exception for a malformed file
            raise CheckpointError(f"the tokenizer of {path} cannot be loaded: {_first_line(error)}") from None

    def _configure(self, config: Mapping[str, Any]) -> None:
        """What tokenizer_config.json adds to tokenizer.json, whose own post-processor says what is put around a text:
        add_bos_token and add_eos_token are of tokenizers without that file."""
        self._backend.no_truncation()
        self._backend.no_padding()
        known = self._backend.get_added_tokens_decoder()
        added = {int(index): _added_token(token) for index, token in config.get("added_tokens_decoder", {}).items()}
        self._backend.add_tokens([token for index, token in sorted(added.items()) if index not in known])
        extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        marked = {token.content for token in known.values() if token.special}
        special = map(_added_token, (*self._special_tokens.values(), *(extra if isinstance(extra, list) else ())))
        self._backend.add_special_tokens([token for token in special if token.content not in marked])

    @property
    def serialized(self) -> str:
        """A tokenizer.json that says everything: special tokens and what is put around a text included."""
        return str(self._backend.to_str())

    @property
    def vocab_size(self) -> int:
        """Ids that the tokenizer knows; a model's vocabulary may be padded beyond it."""
        return int(self._backend.get_vocab_size())

    @property
    def bos_token_id(self) -> int | None:
        token = self._special_tokens.get("bos_token")
        token_id: int | None = None if token is None else self._backend.token_to_id(token)
        return token_id

    def info(self) -> dict[str, Any]:
        """The special tokens by their role, and the chat template."""
        return {**self._special_tokens, "chat_template": self._chat_template, "vocab_size": self.vocab_size}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Raises FptqError where the text has lone surrogates, which a command line's bytes become where not UTF-8."""
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:
            raise FptqError("the text is not valid Unicode") from None
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return str(self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def token(self, token_id: int) -> str:
        """The vocabulary's own spelling of a token."""
        return str(self._backend.id_to_token(token_id))

    def is_special(self, token_id: int) -> bool:
        """A text without special tokens leaves this one out."""
        return token_id in self._added and bool(self._added[token_id].special)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the UTF-8 of a text, in its middle: maybe a part of a character, or nothing."""
        spelling = self._backend.id_to_token(token_id)
        if spelling is None:
            return b""
        if token_id in self._added:
            return str(self._added[token_id].content).encode()
        if self._byte_level and all(character in BYTE_ALPHABET for character in spelling):
            return bytes(BYTE_ALPHABET[character] for character in spelling)
        if self._byte_fallback and (byte := BYTE_TOKEN.fullmatch(spelling)):
            return bytes.fromhex(byte[1])
        # Decoders strip the space before a first token, so the token is decoded after itself.
        once = self.decode([token_id], skip_special_tokens=False)
        return self.decode([token_id, token_id], skip_special_tokens=False)[len(once):].encode()

    def stream(self, skip_special_tokens: bool = True, prompt_token_ids: Sequence[int] = ()) -> TokenStream:
        """The text of what follows the prompt. The prompt's last tokens decide whether it begins with a space."""
        return TokenStream(self._backend, skip_special_tokens, prompt_token_ids[-8:])

    def apply_chat_template(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True,
                            **kwargs: Any) -> list[int]:
        """Token ids of the conversation; the template writes the special tokens, nothing adds them again."""
        if not self._chat_template:
            raise ChatTemplateError("this model has no chat template; use /v1/completions")
        from jinja2 import TemplateError

        # A key without a value is left out: templates ask whether a key is there and would write "None".
        given = [{key: value for key, value in message.items() if value is not None} for message in messages]
        variables = {"tools": None, "documents": None, **self._special_tokens, **kwargs}
        try:
            text = _compiled(self._chat_template).render(
                messages=given, add_generation_prompt=add_generation_prompt, **variables)
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise ChatTemplateError(f"the chat template refuses these messages: {_first_line(error)}") from None
        return self.encode(text, add_special_tokens=False)


def _added_token(token: str | Mapping[str, Any]) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True, normalized=False)
    return AddedToken(**{key: value for key, value in token.items() if key != "__type"})


def _special_tokens(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """By role: bos_token, eos_token, … special_tokens_map.json is of the time before added_tokens_decoder."""
    roles = dict(config)
    if "added_tokens_decoder" not in config and (path / "special_tokens_map.json").is_file():
        roles |= read_json(path / "special_tokens_map.json")
    tokens = {role: token.get("content") if isinstance(token, Mapping) else token
              for role, token in roles.items() if role.endswith("_token")}
    return {role: token for role, token in tokens.items() if isinstance(token, str)}


def _chat_template(path: Path, config: Mapping[str, Any]) -> str | None:
    """Of several templates, the one named default."""
    file = path / "chat_template.jinja"
    template = file.read_text("utf-8") if file.is_file() else config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return None if template is None else str(template)


@lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    """With what transformers gives to chat templates, which are written for it; they are foreign, hence the sandbox."""
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks what the assistant said, for training."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None,
               separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
        """Without Jinja's escapes for HTML."""
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, Generation])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
