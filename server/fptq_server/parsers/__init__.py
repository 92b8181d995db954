"""What a model's output says: content, reasoning, tool calls. One file a format of calls; this one lists them."""

from __future__ import annotations

from fptq_server.parsers.cohere import Cohere
from fptq_server.parsers.deepseek import DeepSeek
from fptq_server.parsers.frame import Parser
from fptq_server.parsers.gemma import Gemma
from fptq_server.parsers.glm import Glm
from fptq_server.parsers.granite import Granite
from fptq_server.parsers.harmony import Harmony
from fptq_server.parsers.hermes import Hermes
from fptq_server.parsers.lfm2 import Lfm2
from fptq_server.parsers.llama3_json import Llama3Json
from fptq_server.parsers.mistral import Mistral
from fptq_server.parsers.phi4 import Phi4
from fptq_server.parsers.pythonic import Pythonic
from fptq_server.parsers.qwen3_coder import Qwen3Coder
from fptq_server.parsers.reasoning import ReasoningFormat

# In both, the first one whose mark a chat template has is taken.
TOOL_PARSERS: tuple[type[Parser], ...] = (
    Harmony, DeepSeek, Cohere, Gemma, Lfm2, Qwen3Coder, Glm, Phi4, Granite, Mistral, Pythonic, Llama3Json, Hermes,
)
REASONING_FORMATS = (
    ReasoningFormat("cohere", "<|START_THINKING|>", "<|START_THINKING|>", "<|END_THINKING|>"),
    ReasoningFormat("gemma", "<channel|>", "<|channel>thought\n", "<channel|>"),
    ReasoningFormat("granite", "Here is my thought process", "Here is my thought process:", "Here is my response:"),
    ReasoningFormat("mistral", "[THINK]", "[THINK]", "[/THINK]"),
    ReasoningFormat("seed", "<seed:think>", "<seed:think>", "</seed:think>"),
    ReasoningFormat("think", "</think>", "<think>", "</think>"),
)


def find_tool_parser(template: str) -> type[Parser] | None:
    return next((parser for parser in TOOL_PARSERS if any(mark in template for mark in parser.marks)), None)


def find_reasoning(template: str) -> ReasoningFormat | None:
    return next((form for form in REASONING_FORMATS if form.mark in template), None)
