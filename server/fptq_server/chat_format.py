"""How the served model is spoken to, and how what it writes is read: chat template, tools, reasoning."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from fptq_runtime.engine.async_engine import AsyncEngine
from fptq_runtime.engine.grammar import Grammar
from fptq_runtime.engine.request import FinishReason
from fptq_runtime.models.chat_template import ChatTemplateError
from fptq_runtime.models.tokenizer import Tokenizer
from fptq_server.answer_grammar import AnswerGrammar, enforced_schema
from fptq_server.errors import APIError
from fptq_server.generation import openai_reason
from fptq_server.parsers import REASONING_FORMATS, TOOL_PARSERS, find_reasoning, find_tool_parser
from fptq_server.parsers.frame import Answer, Arguments, CallStart, Content, Delta, Parser, Reasoning
from fptq_server.parsers.hermes import Hermes
from fptq_server.parsers.reasoning import Thinking
from fptq_server.structured import compiled
from fptq_server.tools import NO_TOOLS, Tools

PROBE_FUNCTIONS = [{"name": "f", "description": "x", "parameters": {
    "type": "object", "properties": {}, "required": []}}]
TAIL = 16  # last tokens of a prompt, in which its template may begin the reasoning

DESCRIPTION = """You can call these functions, each on a line as JSON:
<tools>
{functions}
</tools>
To call one, write its name and its arguments as JSON between tags, and nothing else:
<tool_call>
{{"name": "function", "arguments": {{"argument": "value"}}}}
</tool_call>
You get what it returns between <tool_response> and </tool_response>."""


class Reading:
    """Reads what the choices of one request say. make: None where it is plain text. parallel: without it, what follows
    a first call is left out."""

    def __init__(self, make: Callable[[], Parser] | None, parallel: bool, include_reasoning: bool) -> None:
        self._make = make
        self._parallel = parallel
        self._include_reasoning = include_reasoning
        self._parsers: dict[int, Parser] = {}
        self._calling: set[int] = set()

    def deltas(self, index: int, text: str, last: bool) -> list[Delta]:
        """What more of a choice's text says. Of plain text, itself, even where there is none."""
        if self._make is None:
            return [Content(text)]
        if index not in self._parsers:
            self._parsers[index] = self._make()
        parser = self._parsers[index]
        deltas = parser.feed(text)
        if last:
            deltas += parser.finish()
        deltas = [delta for delta in deltas if self._wanted(delta)]
        if any(isinstance(delta, CallStart) for delta in deltas):
            self._calling.add(index)
        return deltas

    def answer(self, index: int, texts: Sequence[str]) -> Answer:
        """What the whole text of a choice says."""
        return Answer().add(self.deltas(index, "".join(texts), True))

    def reason(self, index: int, reason: FinishReason | None) -> Literal["stop", "length", "tool_calls"] | None:
        """OpenAI's word for why a choice ended; None while it goes on."""
        return "tool_calls" if reason is FinishReason.STOP and index in self._calling else openai_reason(reason)

    def _wanted(self, delta: Delta) -> bool:
        match delta:
            case Reasoning():
                return self._include_reasoning
            case CallStart(call, _, _) | Arguments(call, _):
                return self._parallel or call == 0
        return True


class ChatFormat:
    """Of one model. tool_parser, reasoning_parser: names of formats; auto is what the chat template tells, none is off.

    A model whose template takes no tools is told of them in its system message, and calls, as Hermes does it: it may
    not have learned to, but a call that is required comes out whole.
    """

    def __init__(self, tokenizer: Tokenizer, tool_parser: str = "auto", reasoning_parser: str = "auto") -> None:
        template = tokenizer.chat_template(tools=True) or ""
        self._tokenizer = tokenizer
        named = next((parser for parser in TOOL_PARSERS if parser.name == tool_parser), find_tool_parser(template))
        self.reads_calls = tool_parser != "none"
        self.parser: type[Parser] = named or Hermes
        found = find_reasoning(template) if reasoning_parser == "auto" else None
        self.reasoning = next((form for form in REASONING_FORMATS if form.name == reasoning_parser), found)
        self._developer = "developer" in template
        self._shown = {parses: self._shown_special_tokens(parses) for parses in (False, True)}
        self._probe(named is not None)

    def _probe(self, known: bool) -> None:
        """Find out what the template takes: none says it, and some refuse what others need. known: its format of calls
        is."""
        asked: list[dict[str, Any]] = [{"role": "user", "content": "x"}]
        told: list[dict[str, Any]] = [{"role": "system", "content": "x"}, *asked]
        tools = [{"type": "function", "function": function} for function in PROBE_FUNCTIONS]
        shown = {**told[0], "tools": json.dumps(PROBE_FUNCTIONS)}
        render = self._rendered
        self._takes_system = render(told) is not None or render(asked) is None
        self._native = known and render(asked, tools=tools) not in (None, render(asked))
        self._tools_in_system = known and not self._native and render([shown, *asked]) not in (None, render(told))
        self._text_arguments = render(_calling({}), tools=tools) is None
        self._text_arguments &= render(_calling("{}"), tools=tools) is not None
        arguments = "{}" if self._text_arguments else {}
        single = render(_calling(arguments), tools=tools) is not None
        self._single_call = single and render(_calling(arguments, arguments), tools=tools) is None
        self._takes_effort = render(asked, reasoning_effort="low") != render(asked, reasoning_effort="high")
        self._takes_thinking = render(asked, enable_thinking=True) != render(asked, enable_thinking=False)

    def messages(self, messages: Sequence[Mapping[str, Any]], tools: Tools = NO_TOOLS) -> list[dict[str, Any]]:
        """As the template takes them. content is text; calls and reasoning are where OpenAI has them."""
        given = [self._message(message) for message in messages]
        if self._tools_in_system and tools.offered:
            if given[0]["role"] != "system":
                given.insert(0, {"role": "system", "content": ""})
            functions = [tool["function"] for tool in tools.offered]
            given[0] = {**given[0], "tools": json.dumps(functions, ensure_ascii=False)}
        if self._native or self._tools_in_system:
            return given
        given = _without_calls(given)
        if tools.offered:
            lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools.offered)
            text = DESCRIPTION.format(functions=lines)
            role = "system" if self._takes_system else "user"
            if given and given[0]["role"] == role:
                parts = [given[0]["content"], text] if self._takes_system else [text, given[0]["content"]]
                given[0] = {**given[0], "content": "\n\n".join(parts)}
            else:
                given.insert(0, {"role": role, "content": text})
        return given

    def variables(self, tools: Tools, effort: str | None = None) -> dict[str, Any]:
        """What the template is told of tools and of how long to think. Raises APIError where it takes no effort."""
        variables: dict[str, Any] = {"tools": list(tools.offered)} if tools.offered and self._native else {}
        if effort is None or (effort == "none" and self.reasoning is None):
            return variables
        if self._takes_effort:
            return {**variables, "reasoning_effort": effort}
        if self._takes_thinking:
            return {**variables, "enable_thinking": effort != "none"}
        if effort == "medium":  # OpenAI's default
            return variables
        raise APIError(400, "reasoning_effort is not supported by this model, whose chat template does not read it",
                       param="reasoning_effort", code="not_supported")

    def reading(self, prompt: Sequence[int], tools: Tools, include_reasoning: bool = True) -> Reading:
        """What reads the answers to a prompt."""
        schemas = tools.schemas if tools.offered and self.reads_calls else {}
        form = self.reasoning
        opened = self.opened(prompt)

        def parser() -> Parser:
            answer = self.parser(schemas) if self._parses(tools) else None
            if answer is not None and (form is None or self.parser.always):
                return answer
            assert form is not None
            return Thinking(form, opened, answer)

        return Reading(parser if self._parses(tools) or form is not None else None,
                       tools.parallel and not (self._native and self._single_call), include_reasoning)

    def opened(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt ends where the reasoning has begun."""
        if self.reasoning is None:
            return False
        tail = self._tokenizer.decode(prompt[-TAIL:], skip_special_tokens=False)
        return tail.rstrip().endswith(self.reasoning.begin.rstrip())

    async def grammar(self, prompt: Sequence[int], tools: Tools, structured: Grammar | None, engine: AsyncEngine
                      ) -> Grammar | None:
        """What the answer to a prompt must be, compiled: calls where they are required, else `structured`, if given, or
        calls; else text whose calls match their schemas where a function is strict. Raises APIError."""
        forced = tools.choice == "required"
        strict = any(tool["function"].get("strict") for tool in tools.offered)
        opened = self.opened(prompt)
        if not forced and structured is None and (not strict or not self.reads_calls or self.parser.json_calls.single):
            return None
        if not forced and structured is not None and (
                structured.kind != "json_schema" or not (opened or tools.offered)):
            return structured
        for i, tool in enumerate(tools.offered):
            schema = Grammar.json_schema(enforced_schema(tool, forced))
            await compiled(schema, engine, f"tools.{i}.function.parameters")
        tokens = {token: token_id for token_id, token in self._tokenizer.added_tokens.items()
                  if self._tokenizer.is_special(token_id) or (token[:1], token[-1:]) == ("<", ">")}
        answer = AnswerGrammar(self.parser, tools, tokens, None if self.parser.always else self.reasoning, opened)
        grammar = answer.calls() if forced else \
            answer.calls_in_text() if structured is None else answer.calls_or(structured)
        return await compiled(grammar, engine, "tools")

    def shown_special_tokens(self, tools: Tools) -> frozenset[int]:
        """Those that `reading` needs to see."""
        return self._shown[self._parses(tools)]

    def _shown_special_tokens(self, parses: bool) -> frozenset[int]:
        markers = [*self.parser.openers, *self.parser.inner] if parses else []
        if self.reasoning is not None:
            markers += [self.reasoning.begin, self.reasoning.end]
        return frozenset(token_id for token_id, token in self._tokenizer.added_tokens.items()
                         if self._tokenizer.is_special(token_id) and any(token in marker for marker in markers))

    def _parses(self, tools: Tools) -> bool:
        return self.reads_calls and (bool(tools.offered) or self.parser.always)

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        given = {"content": "", **message}
        if given["role"] == "developer" and not self._developer:
            given["role"] = "system"
        length = self.parser.id_length or 0  # [-0:] is all of it
        if "tool_call_id" in given:
            given["tool_call_id"] = given["tool_call_id"][-length:]
        if "tool_calls" in given:
            given["tool_calls"] = [self._call(call, call["id"][-length:]) for call in given["tool_calls"]]
        return given

    def _call(self, call: Mapping[str, Any], call_id: str) -> dict[str, Any]:
        function = call["function"]
        if self._text_arguments and not isinstance(function["arguments"], str):
            function = {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
        return {**call, "id": call_id, "function": function}

    def _rendered(self, messages: Sequence[dict[str, Any]], **variables: Any) -> str | None:
        """None where the template refuses it."""
        try:
            return self._tokenizer.render_chat(messages, **variables).result()
        except ChatTemplateError:
            return None


def _calling(*arguments: Any) -> list[dict[str, Any]]:
    """A conversation with calls of these arguments."""
    calls = [{"id": f"call0000{i}", "type": "function", "function": {"name": "f", "arguments": each}}
             for i, each in enumerate(arguments)]
    results = [{"role": "tool", "tool_call_id": call["id"], "name": "f", "content": "x"} for call in calls]
    return [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": calls}, *results]


def _without_calls(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Calls and what they returned as the text of turns, as Hermes has them."""
    result: list[dict[str, Any]] = []
    responding = False
    for message in messages:
        message = dict(message)
        if responding and message["role"] == "user":  # templates that insist on turns refuse two of one role
            result[-1]["content"] += "\n\n" + message["content"]
            responding = False
            continue
        calls = message.pop("tool_calls", ())
        if calls:
            texts = [f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>" for call in calls]
            message["content"] = "\n".join([message["content"], *texts] if message["content"] else texts)
        if message["role"] != "tool":
            responding = False
            result.append(message)
            continue
        text = f"<tool_response>\n{message['content']}\n</tool_response>"
        if responding:
            result[-1]["content"] += "\n" + text
        else:
            result.append({"role": "user", "content": text})
        responding = True
    return result
