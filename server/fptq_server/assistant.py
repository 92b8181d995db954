"""Answers to conversations, whatever the API that they come by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fptq_runtime.engine.async_engine import AsyncEngine
from fptq_runtime.engine.grammar import Grammar
from fptq_runtime.models.tokenizer import Tokenizer
from fptq_server.chat_format import ChatFormat, Reading
from fptq_server.config import ModelCard
from fptq_server.generation import Generation
from fptq_server.record import RequestRecord
from fptq_server.structured import compiled
from fptq_server.tools import Tools
from fptq_server.validation import chat_prompt, check_length, make_params


class Assistant:
    """variables: what the chat template is told unless a request says otherwise."""

    def __init__(self, engine: AsyncEngine, tokenizer: Tokenizer, chat: ChatFormat, model: ModelCard,
                 variables: Mapping[str, Any]) -> None:
        self.chat = chat
        self.model = model
        self.engine = engine
        self._tokenizer = tokenizer
        self._variables = variables

    async def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Tools, variables: Mapping[str, Any]
                     ) -> list[int]:
        """Token ids of a conversation, as ChatFormat.messages takes it; an assistant's last message is what the answer
        goes on with."""
        given = self.chat.messages(messages, tools)
        within = given[-1]["role"] == "assistant" and "tool_calls" not in given[-1]
        return await chat_prompt(given, self._tokenizer, self.model, not within,
                                 {**self._variables, **self.chat.variables(tools), **variables}, within)

    async def answer(self, record: RequestRecord, kind: str, prompt: list[int], tools: Tools, max_tokens: int | None, *,
                     adapter: str = "", structured: Grammar | None = None, structured_param: str = "",
                     include_reasoning: bool = True, **fields: Any) -> tuple[Generation, Reading]:
        """structured: what the answer must be, and the request's field that says so. fields: of SamplingParams; the
        model's own defaults where they are None. Raises APIError."""
        fields = {**self.model.sampling, **{name: value for name, value in fields.items() if value is not None}}
        fields["max_tokens"] = fields.get("max_tokens", self.model.max_model_len) if max_tokens is None else max_tokens
        check_length(prompt, fields["max_tokens"], "messages", self.model)
        if structured is not None:
            await compiled(structured, self.engine, structured_param)
        fields["structured"] = await self.chat.grammar(prompt, tools, structured, self.engine)
        params = make_params(shown_special_tokens=self.chat.shown_special_tokens(tools), **fields)
        reading = self.chat.reading(prompt, tools, include_reasoning)
        return Generation(self.engine, record, kind, [prompt], params, adapter), reading
