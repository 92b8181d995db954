"""A model's own tokenizer and chat template, as the engine and the server need them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fptq_runtime.models.loader import CheckpointError

REPLACEMENT = "\ufffd"  # what a decoder shows for bytes that make no character, or none yet
MAX_CHARACTER_TOKENS = 4  # a character has at most four bytes, a token at least one


class ChatTemplateError(ValueError):
    """The model has no chat template, or it refuses these messages."""


class TokenStream:
    """Incremental detokenization: text comes out as soon as it can no longer change.

    Not tokenizers' DecodeStream, which raises on bytes that make no character, as a model may well generate, and
    repeats the prompt where that ends within a character.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, skip_special_tokens: bool, context: Sequence[int]) -> None:
        self._backend = tokenizer.backend_tokenizer
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
    """Raises CheckpointError where the directory has no usable tokenizer."""

    def __init__(self, path: Path | str) -> None:
        path = Path(path)
        if not (path / "tokenizer.json").is_file():
            raise CheckpointError(f"{path} has no tokenizer.json; save the model's fast tokenizer beside its weights")
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the libraries raise bare Exception for a malformed file
            raise CheckpointError(f"the tokenizer of {path} cannot be loaded: {_first_line(error)}") from None
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise CheckpointError(f"the tokenizer of {path} is not a fast tokenizer (tokenizer.json)")
        self._tokenizer = tokenizer
        # Prompts longer than the context are refused with both numbers; the library's own warning would only repeat it.
        self._tokenizer.model_max_length = 1 << 30

    @property
    def vocab_size(self) -> int:
        """Ids that the tokenizer knows; a model's vocabulary may be padded beyond it."""
        return len(self._tokenizer)

    @property
    def bos_token_id(self) -> int | None:
        token_id: int | None = self._tokenizer.bos_token_id
        return token_id

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def info(self) -> dict[str, Any]:
        """The special tokens by their role, and the chat template."""
        tokenizer = self._tokenizer
        return {
            **{role: str(token) for role, token in tokenizer.special_tokens_map.items() if isinstance(token, str)},
            "chat_template": tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
            "vocab_size": len(tokenizer),
        }

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Raises ValueError where the text has lone surrogates, which a command line's bytes become where not UTF-8."""
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except TypeError:
            raise ValueError("the text is not valid Unicode") from None
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return str(self._tokenizer.backend_tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def token(self, token_id: int) -> str:
        """The vocabulary's own spelling of a token."""
        return str(self._tokenizer.convert_ids_to_tokens(token_id))

    def stream(self, skip_special_tokens: bool = True, prompt_token_ids: Sequence[int] = ()) -> TokenStream:
        """The text of what follows the prompt. The prompt's last tokens decide whether it begins with a space."""
        return TokenStream(self._tokenizer, skip_special_tokens, prompt_token_ids[-8:])

    def apply_chat_template(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True,
                            **kwargs: Any) -> list[int]:
        """Token ids of the conversation; the template writes the special tokens, nothing adds them again."""
        if not self.has_chat_template:
            raise ChatTemplateError("this model has no chat template; use /v1/completions")
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **kwargs
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise ChatTemplateError(f"the chat template refuses these messages: {_first_line(error)}") from None
        return self.encode(str(text), add_special_tokens=False)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
