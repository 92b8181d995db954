"""A model's own tokenizer and chat template, as the engine and the server need them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from fptq_runtime.artifact.files import is_there, read_file
from fptq_runtime.errors import FptqError
from fptq_runtime.models.chat_template import ChatTemplate, ChatTemplateError
from fptq_runtime.models.loader import CheckpointError, read_json

REPLACEMENT = "\ufffd"  # what a decoder shows for bytes that make no character, or none yet
MAX_CHARACTER_TOKENS = 4  # a character has at most four bytes, a token at least one
INFILL_TOKENS = (  # before the prefix, before the suffix, before what is asked for
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen, CodeGemma, Granite 3
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite Code
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
)
MAX_TOKENIZER_BYTES = 256 << 20
MAX_TEMPLATE_BYTES = 4 << 20
BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")  # SentencePiece's, for what its vocabulary lacks


class TokenizerError(CheckpointError):
    """A tokenizer that cannot do with a text or tokens what it is asked."""


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's: printable bytes stand for themselves, the others in order for the code points from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_ALPHABET = _byte_alphabet()


class TokenStream:
    """Incremental detokenization: text comes out as soon as it can no longer change.

    Not tokenizers' DecodeStream, which raises on bytes that make no character, as a model may well generate, and
    repeats the prompt where that ends within a character. A character that the prompt leaves open and the answer
    completes is the answer's; U+FFFD that the prompt ends with is not.
    """

    def __init__(self, backend: Backend, skip_special_tokens: bool, context: Sequence[int]) -> None:
        self._backend = backend
        self._skip_special_tokens = skip_special_tokens
        self._window = list(context)  # tokens whose text is out, since they shape what follows, then those still open
        self._text = self._decode()
        while self._text.strip(REPLACEMENT) and self._text.startswith(REPLACEMENT):
            del self._window[0]  # a context cut within a character spoils the bytes after the cut
            self._text = self._decode()
        self._num_out = len(self._window)
        self._out = self._text
        self._out_if_completed = self._before_open_character()

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
        new = text[len(self._out if text.startswith(self._out) else self._out_if_completed) :]
        del self._window[: self._num_out]
        self._num_out = len(self._window)
        self._text = self._out = self._out_if_completed = self._decode()
        return new or None

    def _before_open_character(self) -> str:
        """The text of the window without the tokens of a character that may be open at its end."""
        for end in range(len(self._window), max(0, len(self._window) - MAX_CHARACTER_TOKENS), -1):
            text = self._decode(end)
            if not text.endswith(REPLACEMENT):
                return text
        return self._text

    def _decode(self, end: int | None = None) -> str:
        return _decoded(self._backend, self._window[:end], self._skip_special_tokens)


class SomeTokens:
    """A stream without the tokens that are hidden."""

    def __init__(self, stream: TokenStream, hidden: Collection[int]) -> None:
        self._stream = stream
        self._hidden = hidden

    def step(self, token_id: int) -> str | None:
        return None if token_id in self._hidden else self._stream.step(token_id)


class Tokenizer:
    """tokenizer.json as it stands, with the special tokens and the chat template that lie beside it, read as
    transformers reads them but without importing it. chat_template: in place of the model's own. Raises
    CheckpointError where the directory has no usable tokenizer."""

    def __init__(self, path: Path | str, chat_template: str | None = None) -> None:
        path = Path(path)
        try:
            content = read_file(path / "tokenizer.json", MAX_TOKENIZER_BYTES)
        except FileNotFoundError:
            raise CheckpointError(f"{path} has no tokenizer.json; save the model's fast tokenizer beside its weights"
                                  ) from None
        config = read_json(file) if is_there(file := path / "tokenizer_config.json") else {}
        try:
            self._backend = Backend.from_buffer(content)
            roles = _special_tokens(path, config)
            self._special_tokens = {role: str(token.content) for role, token in roles.items()}
            self._configure(config, list(roles.values()))
            self._added = self._backend.get_added_tokens_decoder()
            decoder = self._backend.decoder
            self._byte_level = decoder is not None and decoder.decode(["Ġ"]) == " "
            self._byte_fallback = decoder is not None and decoder.decode(["<0x41>"]) == "A"
            templates = _chat_templates(path, config) if chat_template is None else {
                "default": ChatTemplate(chat_template)}
            self._chat_template = templates.get("default")
            self._tools_template = templates.get("tool_use")
            self._backend.decode([])
        except FptqError:
            raise
        except BaseException as error:
            raise CheckpointError(f"the tokenizer of {path} cannot be loaded: {_reason(error)}") from None

    def _configure(self, config: Mapping[str, Any], special: list[AddedToken]) -> None:
        """What tokenizer_config.json adds to tokenizer.json, whose own post-processor says what is put around a text:
        add_bos_token and add_eos_token are of tokenizers without that file."""
        self._backend.no_truncation()
        self._backend.no_padding()
        known = self._backend.get_added_tokens_decoder()
        added = {int(index): _added_token(token) for index, token in config.get("added_tokens_decoder", {}).items()}
        self._backend.add_tokens([token for index, token in sorted(added.items()) if index not in known])
        extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        marked = {token.content for token in known.values() if token.special}
        special += map(_added_token, extra if isinstance(extra, list) else ())
        self._backend.add_special_tokens([token for token in special if token.content not in marked])

    @property
    def vocab_size(self) -> int:
        """Ids that the tokenizer knows; a model's vocabulary may be padded beyond it."""
        return int(self._backend.get_vocab_size())

    @property
    def vocab(self) -> dict[str, int]:
        """The id of every token by its spelling."""
        return dict(self._backend.get_vocab())

    @property
    def bos_token_id(self) -> int | None:
        return self._role("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._role("eos_token")

    def _role(self, role: str) -> int | None:
        token = self._special_tokens.get(role)
        token_id: int | None = None if token is None else self._backend.token_to_id(token)
        return token_id

    @cached_property
    def added_tokens(self) -> dict[int, str]:
        """Tokens that are found in a text before anything else is, special or not."""
        return {token_id: str(token.content) for token_id, token in self._added.items()}

    def info(self) -> dict[str, Any]:
        """The special tokens by their role, and the chat template."""
        template = None if self._chat_template is None else self._chat_template.source
        return {**self._special_tokens, "chat_template": template, "vocab_size": self.vocab_size}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Raises FptqError where the text has lone surrogates, which a command line's bytes become where not UTF-8, and
        TokenizerError where no token stands for what is in it."""
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:
            raise FptqError("the text is not valid Unicode") from None
        except BaseException as error:
            raise TokenizerError(f"the model's tokenizer cannot read this text: {_reason(error)}") from None
        return ids

    def infill(self, prefix: str, suffix: str) -> str | None:
        """A prompt that asks for what stands between the two; None where the tokenizer has no tokens for that."""
        added = set(self.added_tokens.values())
        for before, after, middle in INFILL_TOKENS:
            if {before, after, middle} <= added:
                return f"{before}{prefix}{after}{suffix}{middle}"
        return None

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Raises TokenizerError."""
        return _decoded(self._backend, list(token_ids), skip_special_tokens)

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

    def to_json(self) -> str:
        """tokenizer.json, with what lies beside it."""
        return str(self._backend.to_str())

    def stream(self, skip_special_tokens: bool = True, prompt_token_ids: Sequence[int] = (),
               shown: Collection[int] = ()) -> TokenStream | SomeTokens:
        """The text of what follows the prompt. The prompt's last tokens decide whether it begins with a space. shown:
        special tokens that are not skipped."""
        context = prompt_token_ids[-8:]
        if not skip_special_tokens or not shown:
            return TokenStream(self._backend, skip_special_tokens, context)
        hidden = {token_id for token_id in self._added if self.is_special(token_id)} - set(shown)
        return SomeTokens(TokenStream(self._backend, False, [i for i in context if i not in hidden]), hidden)

    def chat_template(self, tools: bool = False) -> str | None:
        """tools: the one for conversations with tools, where the model has one of its own for them."""
        template = self._tools_template or self._chat_template if tools else self._chat_template
        return None if template is None else template.source

    @property
    def template_variables(self) -> frozenset[str]:
        """What a request may tell the chat template beside its messages. Raises ChatTemplateError."""
        templates = [template for template in (self._chat_template, self._tools_template) if template is not None]
        read = frozenset[str]().union(*(template.variables for template in templates))
        return read - {"messages", "tools", "documents", "add_generation_prompt", *self._special_tokens}

    def apply_chat_template(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True,
                            **kwargs: Any) -> list[int]:
        """Token ids of the conversation; the template writes the special tokens, nothing adds them again. Raises
        ChatTemplateError."""
        text = self.render_chat(messages, add_generation_prompt, **kwargs).result()
        return self.encode(text, add_special_tokens=False)

    def render_chat(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True,
                    **kwargs: Any) -> Future[str]:
        """What the template makes of the conversation. Raises ChatTemplateError, here or in the future."""
        template = self._tools_template or self._chat_template if kwargs.get("tools") else self._chat_template
        if template is None:
            raise ChatTemplateError("this model has no chat template; use /v1/completions")
        # A key without a value is left out: templates ask whether a key is there and would write "None".
        given = [_with_reasoning({key: value for key, value in message.items() if value is not None})
                 for message in messages]
        return template.render({"tools": None, "documents": None, **self._special_tokens, **kwargs,
                                "messages": given, "add_generation_prompt": add_generation_prompt})

    def end_of_turn(self) -> int | None:
        """The token that the chat template puts right after what the assistant said: a model trained on it ends its
        answers so, whatever its configs name."""
        asked, said = "question", "answer 7319"  # nothing that a template says of itself
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        for messages in (turns, [*turns, turns[0]]):  # some write the end of a turn where the next one begins
            try:
                text = self.render_chat(messages, False).result()
            except ChatTemplateError:
                return None
            _, found, rest = text.rpartition(said)
            rest = rest.lstrip() if found else ""
            ends = [(len(token), token_id) for token_id, token in self.added_tokens.items()
                    if token.strip() and rest.startswith(token.strip())]
            if ends:
                return max(ends)[1]
        return None


def eos_token_ids(path: Path, configured: Sequence[int], tokenizer: Tokenizer, vocab_size: int) -> tuple[int, ...]:
    """Tokens that end an answer: those of generation_config.json, of config.json (`configured`) and of the tokenizer
    together, since a fine-tune renews one of them and leaves its base model's in the others; and where
    generation_config.json names none, what ends a turn in the chat template. Without ids that the model does not have.
    """
    named: list[Any] = []
    with suppress(CheckpointError):
        value = read_json(path / "generation_config.json").get("eos_token_id")
        named = value if isinstance(value, list) else [value]

    def known(ids: Sequence[Any]) -> list[int]:
        return [i for i in ids if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < vocab_size]

    ids = known(named)
    turn = [] if ids else [tokenizer.end_of_turn()]
    return tuple(dict.fromkeys([*ids, *known([*configured, tokenizer.eos_token_id, *turn])]))


def _added_token(token: str | Mapping[str, Any]) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True, normalized=False)
    return AddedToken(**{key: value for key, value in token.items() if key != "__type"})


def _special_tokens(path: Path, config: Mapping[str, Any]) -> dict[str, AddedToken]:
    """By role: bos_token, eos_token, … special_tokens_map.json is of the time before added_tokens_decoder."""
    roles = dict(config)
    if "added_tokens_decoder" not in config and is_there(file := path / "special_tokens_map.json"):
        roles |= read_json(file)
    return {role: _added_token(token) for role, token in roles.items() if role.endswith("_token") and (
        isinstance(token, str) or (isinstance(token, Mapping) and isinstance(token.get("content"), str)))}


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Under every name that templates have for it, as transformers does."""
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((message[name] for name in names if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _chat_templates(path: Path, config: Mapping[str, Any]) -> dict[str, ChatTemplate]:
    """By name; one alone is "default"."""
    if is_there(file := path / "chat_template.jinja"):
        template: Any = read_file(file, MAX_TEMPLATE_BYTES).decode()
    else:
        template = config.get("chat_template")
    if not isinstance(template, list):
        template = [{"name": "default", "template": template}]
    return {entry["name"]: ChatTemplate(str(entry["template"])) for entry in template if entry["template"]}


def _decoded(backend: Backend, token_ids: list[int], skip_special_tokens: bool) -> str:
    try:
        return str(backend.decode(token_ids, skip_special_tokens=skip_special_tokens))
    except BaseException as error:
        raise TokenizerError(f"the model's tokenizer cannot spell these tokens: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    """In one line. The library raises bare Exception for what is malformed, or panics, which is no Exception; what ends
    the process is raised again."""
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        raise error
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
