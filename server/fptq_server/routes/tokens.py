"""/tokenize, /detokenize and /tokenizer_info, as vLLM has them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from fptq_runtime.models.tokenizer import Tokenizer
from fptq_server.chat_format import ChatFormat
from fptq_server.config import ModelCard, ServerConfig
from fptq_server.errors import ERROR_RESPONSES, APIError
from fptq_server.protocol import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse
from fptq_server.tools import template_messages
from fptq_server.validation import chat_prompt, check_model, check_text, continues, template_variables, tokenizing


def tokens_router(tokenizer: Tokenizer, chat: ChatFormat, model: ModelCard, config: ServerConfig) -> APIRouter:
    router = APIRouter(tags=["tokens"], responses=ERROR_RESPONSES)

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> TokenizeResponse:
        """Token ids of a prompt, or of messages under the chat template."""
        check_model(body.model, model)
        if (body.prompt is None) == (body.messages is None):
            raise APIError(400, "give either prompt or messages", param="prompt")
        if body.messages is not None:
            if body.add_special_tokens:
                raise APIError(400, "add_special_tokens is not supported with messages; the chat template writes the "
                                    "special tokens", param="add_special_tokens", code="not_supported")
            begin, continue_final = continues(body)
            variables = await template_variables(body, tokenizer, config)
            messages = chat.messages(template_messages(body.messages))
            tokens = await chat_prompt(messages, tokenizer, model, begin, variables, continue_final)
        else:
            for name in ("add_generation_prompt", "continue_final_message", "chat_template_kwargs"):
                if getattr(body, name):
                    raise APIError(400, f"{name} needs messages", param=name)
            text = check_text(body.prompt or "", "prompt", model)
            special = body.add_special_tokens is not False
            tokens = await tokenizing(len(text), lambda: tokenizer.encode(text, special))
        return TokenizeResponse(count=len(tokens), max_model_len=model.max_model_len, tokens=tokens,
                                token_strs=[tokenizer.token(t) for t in tokens] if body.return_token_strs else None)

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> DetokenizeResponse:
        """The text of token ids, special tokens included unless skip_special_tokens is true."""
        check_model(body.model, model)
        unknown = [token for token in body.tokens if token >= model.vocab_size]
        if unknown:
            raise APIError(400, f"token id {unknown[0]} is outside the vocabulary of {model.vocab_size} tokens",
                           param="tokens")
        skip = bool(body.skip_special_tokens)
        text = await tokenizing(len(body.tokens), lambda: tokenizer.decode(body.tokens, skip))
        return DetokenizeResponse(prompt=text)

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        """Special tokens and the chat template."""
        return tokenizer.info()

    return router
