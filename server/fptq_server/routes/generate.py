"""/generate, /generate_stream and /, as text-generation-inference has them."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import APIRouter, Request
from starlette.responses import Response

from fptq_runtime.engine.async_engine import AsyncEngine
from fptq_runtime.engine.output import TokenLogprobs
from fptq_runtime.engine.request import FinishReason
from fptq_runtime.models.tokenizer import Tokenizer
from fptq_server.config import ModelCard, ServerConfig
from fptq_server.errors import ERROR_RESPONSES, APIError
from fptq_server.generation import Choice, Generation
from fptq_server.logprobs import TokenTexts
from fptq_server.protocol import (
    BestOfSequence,
    GenerateDetails,
    GenerateEvent,
    GenerateParameters,
    GenerateRequest,
    GenerateResponse,
    GenerateToken,
    PrefillToken,
    StreamDetails,
)
from fptq_server.record import record_of
from fptq_server.sse import STREAM_RESPONSE, EventStream, run_while_connected
from fptq_server.structured import generate_grammar
from fptq_server.validation import check_length, check_text, fold_seed, make_params, tokenizing

DEFAULT_MAX_NEW_TOKENS = 100  # TGI's

Reason = Literal["length", "eos_token", "stop_sequence"]


@dataclass
class Reply:
    """Writes one request's text, whole or token by token. prefix: what return_full_text puts before it."""

    generation: Generation
    texts: TokenTexts
    prefix: str
    parameters: GenerateParameters

    async def whole(self) -> GenerateResponse:
        drawn = sorted(await self.generation.collect(), key=lambda choice: choice.mean_logprob, reverse=True)
        best, *others = [self.prefix + "".join(choice.texts) for choice in drawn]
        if not self.parameters.details and not self.parameters.decoder_input_details:
            return GenerateResponse(generated_text=best, details=None)
        sequences = [BestOfSequence(generated_text=text, **self._details(choice))
                     for text, choice in zip(others, drawn[1:], strict=True)]
        return GenerateResponse(generated_text=best, details=GenerateDetails(
            best_of_sequences=sequences or None, **self._details(drawn[0])))

    def _details(self, choice: Choice) -> dict[str, Any]:
        [prompt], known = self.generation.prompts, self.generation.prompt_logprobs[0] or ()
        return {
            "finish_reason": _reason(choice.finish_reason, choice.stop_reason),
            "generated_tokens": len(choice.logprobs),
            "seed": self.parameters.seed,
            "prefill": [PrefillToken(id=token_id, text=self.texts.look_up(token_id).text,
                                     logprob=None if entry is None else entry.logprob)
                        for token_id, entry in zip(prompt, known, strict=False)],
            "tokens": [self._token(*token) for token in zip(choice.logprobs, choice.texts, strict=False)],
            "top_tokens": [self._top(entry) for entry in choice.logprobs] if self.parameters.top_n_tokens else None,
        }

    async def events(self) -> AsyncGenerator[str, None]:
        generated, text = 0, self.prefix
        async for _, output in self.generation.outputs():
            text += output.text
            for entry in output.logprobs:
                generated += 1
                details = None
                if output.finish_reason is not None:
                    details = StreamDetails(finish_reason=_reason(output.finish_reason, output.stop_reason),
                                            generated_tokens=generated, input_length=output.num_prompt_tokens,
                                            seed=self.parameters.seed)
                yield GenerateEvent(
                    index=generated,
                    token=self._token(entry, output.text),
                    top_tokens=self._top(entry),
                    generated_text=None if details is None else text,
                    details=details,
                ).model_dump_json()

    def _token(self, entry: TokenLogprobs, text: str) -> GenerateToken:
        """text: what became certain with the token; a special token, which the text leaves out, shows its own."""
        token = self.texts.look_up(entry.token_id)
        return GenerateToken(id=entry.token_id, text=text or (token.text if token.special else ""),
                             logprob=entry.logprob, special=token.special)

    def _top(self, entry: TokenLogprobs) -> list[GenerateToken]:
        tokens = [(token_id, logprob, self.texts.look_up(token_id)) for token_id, logprob in entry.top]
        return [GenerateToken(id=token_id, text=token.text, logprob=logprob, special=token.special)
                for token_id, logprob, token in tokens]


def generate_router(engine: AsyncEngine, tokenizer: Tokenizer, texts: TokenTexts, model: ModelCard,
                    config: ServerConfig) -> APIRouter:
    router = APIRouter(tags=["TGI"], responses=ERROR_RESPONSES)

    async def start(body: GenerateRequest, request: Request) -> Reply:
        parameters = body.parameters or GenerateParameters()
        adapter = parameters.adapter_id or ""
        if adapter and adapter not in model.adapters:
            raise APIError(404, f"there is no adapter {adapter}", param="parameters.adapter_id",
                           code="model_not_found")
        text = check_text(body.inputs, "inputs", model)
        prompt = await tokenizing(len(text), lambda: tokenizer.encode(text))
        if parameters.truncate is not None:
            prompt = prompt[-parameters.truncate:]
        max_tokens = DEFAULT_MAX_NEW_TOKENS if parameters.max_new_tokens is None else parameters.max_new_tokens
        check_length(prompt, max_tokens, "inputs", model)
        params = make_params(
            n=parameters.best_of or 1,
            max_tokens=max_tokens,
            seed=fold_seed(parameters.seed),
            stop=tuple(parameters.stop or ()),
            logprobs=parameters.top_n_tokens or 0,
            prompt_logprobs=0 if parameters.decoder_input_details else None,
            structured=await generate_grammar(parameters.grammar, engine),
            **_sampling(parameters),
        )
        generation = Generation(engine, record_of(request.scope), "gen", [prompt], params, adapter)
        return Reply(generation, texts, body.inputs if parameters.return_full_text else "", parameters)

    async def whole(body: GenerateRequest, request: Request) -> GenerateResponse:
        reply = await start(body, request)
        with reply.generation:
            return await run_while_connected(request.receive, reply.whole())

    @router.post("/generate", response_model=GenerateResponse, responses=STREAM_RESPONSE)
    async def generate(body: GenerateRequest, request: Request) -> Response:
        """Continue `inputs`. With `stream`, as /generate_stream does."""
        if body.stream:
            return await generate_stream(body, request)
        return Response((await whole(body, request)).model_dump_json(), media_type="application/json")

    @router.post("/", response_model=list[GenerateResponse], responses=STREAM_RESPONSE)
    async def generate_at_root(body: GenerateRequest, request: Request) -> Response:
        """The same as /generate, but a list of one answer where it is not a stream: what clients expect of a model's
        own URL."""
        if body.stream:
            return await generate_stream(body, request)
        return Response(f"[{(await whole(body, request)).model_dump_json()}]", media_type="application/json")

    @router.post("/generate_stream", response_class=Response, responses=STREAM_RESPONSE)
    async def generate_stream(body: GenerateRequest, request: Request) -> Response:
        """Continue `inputs`, one server-sent event a token; the last has generated_text and details."""
        parameters = body.parameters or GenerateParameters()
        if parameters.max_new_tokens == 0:
            raise APIError(400, "max_new_tokens must be at least 1 in a stream, whose events are tokens",
                           param="parameters.max_new_tokens")
        for name, asked in (("decoder_input_details", parameters.decoder_input_details),
                            ("best_of", (parameters.best_of or 1) > 1)):
            if asked:
                raise APIError(400, f"{name} is not supported in a stream; use /generate without it",
                               param=f"parameters.{name}", code="not_supported")
        reply = await start(body, request)
        return EventStream(reply.events(), reply.generation.abort, config.keep_alive_interval)

    return router


def _sampling(parameters: GenerateParameters) -> dict[str, Any]:
    """Greedy unless something asks for sampling, which is TGI's rule."""
    names = ("top_p", "min_p", "top_k", "repetition_penalty", "frequency_penalty", "temperature")
    fields = {name: value for name in names if (value := getattr(parameters, name)) is not None}
    if not parameters.do_sample and not fields.keys() & {"top_p", "min_p", "top_k", "temperature"}:
        fields["temperature"] = 0.0
    return fields


def _reason(reason: FinishReason | None, stop: str | int | None) -> Reason:
    if reason is FinishReason.LENGTH:
        return "length"
    return "stop_sequence" if isinstance(stop, str) else "eos_token"
