"""Tokenizer files as transformers reads them. Oracle: AutoTokenizer on the same directory."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from jinja2 import UndefinedError
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fptq_runtime.models.chat_template import ChatTemplateError
from fptq_runtime.models.loader import CheckpointError
from fptq_runtime.models.tokenizer import Tokenizer, TokenizerError, eos_token_ids
from fptq_runtime.quantizer.source import load_tokenizer

DEMO = Path(__file__).parents[2] / "fptq_runtime" / "demo"
SHARED = Path(__file__).parents[3] / "shared" / "models"
IGNORED = shutil.ignore_patterns("*.safetensors")

LLAMA3_TEMPLATE = """{{- bos_token }}
{%- if custom_tools is defined %}{% set tools = custom_tools %}{% endif %}
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{#- The system message comes first. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today: " + (date_string if date_string is defined else strftime_now("%d %b %Y")) + "\\n" }}
{{- system_message }}<|eot_id|>
{%- for message in messages %}
    {%- if message.role == "tool" %}{% continue %}{% endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message.role == "assistant" %}{% generation %}{{ message['content'] | trim }}{% endgeneration %}
    {%- else %}{{ message['content'] | trim }}{% endif %}{{ '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
QWEN_TEMPLATE = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools' }}{% for tool in tools %}{{ "\\n" }}{{ tool | tojson }}{% endfor %}<|im_end|>
{%- elif messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{% for message in messages %}
    {%- if message.role not in ('system', 'user', 'assistant', 'tool') %}{{ raise_exception('no role') }}{% endif %}
    {{- '<|im_start|>' + message.role + ('\\n[' + message.name + ']' if message.name is defined else '') }}
    {{- '\\n' + message.content + '<|im_end|>' + '\\n' }}{% if loop.index0 == ns.last %}{% break %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""


def byte_level() -> Backend:
    """Byte-level BPE with the demo's vocabulary, without a post-processor and special tokens."""
    backend = Backend.from_file(str(DEMO / "tokenizer.json"))
    plain = json.loads(backend.to_str())
    plain["post_processor"], plain["added_tokens"] = None, []
    return Backend.from_str(json.dumps(plain))


def bytes_vocab(words: list[str]) -> list[str]:
    return ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]


def sentencepiece_bpe() -> Backend:
    """Llama 2's pipeline as its tokenizer.json has it: spaces by normalizers, bytes by fallback."""
    words = ["▁", "t", "h", "e", "▁t", "he", "▁the", "a", "▁a"]
    vocab = {word: i for i, word in enumerate(bytes_vocab(words))}
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "a")]
    backend = Backend(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                         decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def unigram() -> Backend:
    words = ["▁", "▁the", "t", "h", "e", "a", "▁a", "n"]
    vocab = [(word, -float(i)) for i, word in enumerate(bytes_vocab(words))]
    backend = Backend(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback(), decoders.Fuse()])
    return backend


# A tokenizer.json and what lies beside it.
CASES: dict[str, tuple[Callable[[], Backend], dict[str, Any]]] = {
    "llama 3": (byte_level, {
        "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "chat_template": LLAMA3_TEMPLATE,
        "added_tokens_decoder": {
            str(4096 + i): {"content": token, "special": True, "normalized": False, "lstrip": False, "rstrip": False,
                            "single_word": False}
            for i, token in enumerate(["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"])
        }}),
    "qwen": (byte_level, {
        "add_bos_token": False, "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "chat_template": QWEN_TEMPLATE}),
    "bos and eos": (byte_level, {"add_bos_token": True, "add_eos_token": True, "bos_token": "<s>", "eos_token": {
        "__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": False, "rstrip": True,
        "single_word": False}}),
    "sentencepiece bpe": (sentencepiece_bpe, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "unigram": (unigram, {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "templates by name": (sentencepiece_bpe, {"bos_token": "<s>", "chat_template": [
        {"name": "default", "template": "{{ bos_token }}{% for m in messages %}{{ m.content }}\n{% endfor %}"},
        {"name": "rag", "template": "{{ documents }}"}]}),
}
TEXTS = st.text(st.sampled_from("the a\n漢é😀<s>/") | st.characters(codec="utf-8"), max_size=40)
MESSAGES = [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "<s>the \n", "name": "a"},
            {"role": "assistant", "content": "the", "tool_calls": None}, {"role": "user", "content": "a\té"}]


def write(path: Path, backend: Backend, config: dict[str, Any]) -> Path:
    path.mkdir()
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "TokenizersBackend", **config}))
    (path / "config.json").write_text("{}")
    return path


@pytest.fixture(scope="module", params=[*CASES, "demo", "tales-6m", "stories260k"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "model"
    if request.param in CASES:
        backend, config = CASES[request.param]
        return write(path, backend(), config)
    source = DEMO if request.param == "demo" else SHARED / request.param
    if not source.is_dir():
        pytest.skip(f"{source} is not here")
    return Path(shutil.copytree(source, path, ignore=IGNORED))


@pytest.fixture(scope="module")
def ours(directory: Path) -> Tokenizer:
    return Tokenizer(directory)


@pytest.fixture(scope="module")
def theirs(directory: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS)
@example(text="the</s> the</s>\n<s> a")
def test_ids_and_texts(ours: Tokenizer, theirs: PreTrainedTokenizerFast, text: str) -> None:
    for add_special_tokens in (True, False):
        ids = ours.encode(text, add_special_tokens)
        assert ids == theirs.encode(text, add_special_tokens=add_special_tokens)
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.backend_tokenizer.decode(ids, skip_special_tokens=skip)
    assert [ours.token(i) for i in ids] == theirs.convert_ids_to_tokens(ids)


@given(text=TEXTS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bytes_of_tokens_make_the_text(ours: Tokenizer, text: str) -> None:
    ids = ours.encode(text, add_special_tokens=False)
    made = b"".join(map(ours.token_bytes, ids)).decode()
    assert ours.decode(ids, skip_special_tokens=False) in (made, made.removeprefix(" "))


def test_special_tokens(ours: Tokenizer, theirs: PreTrainedTokenizerFast) -> None:
    assert ours.vocab_size == len(theirs)
    assert ours.bos_token_id == theirs.bos_token_id
    info = ours.info()
    assert {k: v for k, v in info.items() if k.endswith("_token")} == theirs.special_tokens_map


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("variables", [{}, {"tools": [{"name": "é<b>", "arguments": [1, None]}]},
                                       {"date_string": "1 Jan", "custom": 3}])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_chat_templates(ours: Tokenizer, theirs: PreTrainedTokenizerFast, add_generation_prompt: bool,
                        variables: dict[str, Any], count: int) -> None:
    if theirs.chat_template is None:
        assert not ours.info()["chat_template"]
        return
    expected = theirs.apply_chat_template(MESSAGES[:count], add_generation_prompt=add_generation_prompt,
                                          return_dict=False, **variables)
    assert ours.apply_chat_template(MESSAGES[:count], add_generation_prompt, **variables) == expected


TOOLS = [
    {"type": "function", "function": {"name": "look_up", "strict": True, "description": "Ask <b> & é.", "parameters": {
        "type": "object", "properties": {"q": {"type": "string"}, "n": {"type": ["integer", "null"]}}}}},
    {"type": "function", "function": {"name": "now"}},
]
CALLS = [{"id": "c00000001", "type": "function", "function": {
    "name": "look_up", "arguments": {"q": "é \n\"", "n": None}}},
         {"id": "c00000002", "type": "function", "function": {"name": "now", "arguments": {}}}]
TOOL_MESSAGES = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "", "reasoning_content": "Hm.",
                                                      "tool_calls": CALLS},
                 {"role": "tool", "tool_call_id": "c00000001", "name": "look_up", "content": "<s>\n"},
                 {"role": "tool", "tool_call_id": "c00000002", "content": "a"}, {"role": "user", "content": "a"}]
TOOL_TEMPLATES: dict[str, Any] = {
    "hermes": "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}</tools>{% endif %}"
              "{% for m in messages %}{{ m.role }}:{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>"
              "{% endif %}{{ m.content }}{% if m.tool_calls %}{% for c in m.tool_calls %}{% if c.function %}"
              "{% set c = c.function %}{% endif %}<tool_call>{\"name\": \"{{ c.name }}\", \"arguments\": "
              "{{ c.arguments | tojson }}}</tool_call>{% endfor %}{% endif %}{% endfor %}",
    "mistral": "{% for m in messages %}{% if m.tool_calls is defined and m.tool_calls is not none %}[TOOL_CALLS]["
               "{% for c in m.tool_calls %}{% set out = c.function | tojson %}{{ out[:-1] }}, \"id\": \"{{ c.id }}\"}"
               "{% if not loop.last %}, {% endif %}{% if c.id | length != 9 %}{{ raise_exception('id') }}{% endif %}"
               "{% endfor %}]{% elif m.role == 'tool' %}[TOOL_RESULTS]{\"content\": {{ m.content | tojson }}}"
               "{% elif loop.last and tools %}[AVAILABLE_TOOLS] {{ tools | tojson(indent=2) }}[INST]{{ m.content }}"
               "{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "glm": "{% for t in tools or [] %}{{ t.function.parameters.properties.items() | list | length }}{% endfor %}"
           "{% for m in messages %}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}"
           "{% for k, v in c.function.arguments.items() %}<arg_key>{{ k }}</arg_key><arg_value>"
           "{{ v if v is string else v | tojson(ensure_ascii=False) }}</arg_value>{% endfor %}</tool_call>{% endfor %}"
           "{% endfor %}",
    "by name": [{"name": "default", "template": "{{ messages | length }}"},
                {"name": "tool_use", "template": "{{ tools | tojson }}{{ messages | tojson(sort_keys=True) }}"}],
}


@pytest.mark.parametrize("name", TOOL_TEMPLATES)
@pytest.mark.parametrize("tools", [TOOLS, TOOLS[:1], None])
def test_chat_templates_with_tools(tmp_path: Path, name: str, tools: Any) -> None:
    path = write(tmp_path / "model", byte_level(), {"chat_template": TOOL_TEMPLATES[name]})
    theirs = AutoTokenizer.from_pretrained(path, local_files_only=True)
    try:
        expected = theirs.apply_chat_template(TOOL_MESSAGES, tools=tools, add_generation_prompt=True, return_dict=False)
    except UndefinedError:  # a function without parameters
        with pytest.raises(ChatTemplateError):
            Tokenizer(path).apply_chat_template(TOOL_MESSAGES, tools=tools)
        return
    assert Tokenizer(path).apply_chat_template(TOOL_MESSAGES, tools=tools) == expected


def test_the_quantizer_reads_what_transformers_reads(directory: Path, theirs: PreTrainedTokenizerFast,
                                                     caplog: pytest.LogCaptureFixture) -> None:
    text = "the a\n <s>the"
    assert load_tokenizer(directory).encode(text) == theirs.encode(text)
    assert caplog.messages == []


@pytest.mark.parametrize(("backend", "config", "text", "said"), [
    (sentencepiece_bpe, {"bos_token": "<s>", "tokenizer_class": "LlamaTokenizer"}, "the <s> the", "(LlamaTokenizer)"),
    (byte_level, {"tokenizer_class": "GemmaTokenizer"}, "the the", "cannot load"),
    (unigram, {"tokenizer_class": "LlamaTokenizer"}, "the the", "(LlamaTokenizer)"),
])
def test_where_transformers_disagrees_tokenizer_json_stands_and_it_is_said(
        tmp_path: Path, caplog: pytest.LogCaptureFixture, backend: Callable[[], Backend], config: dict[str, Any],
        text: str, said: str) -> None:
    """Some classes keep vocabulary and merges, and take their own rules for spaces and bytes."""
    path = write(tmp_path / "model", backend(), config)
    (path / "config.json").write_text('{"model_type": "llama"}')
    stored = Backend.from_file(str(path / "tokenizer.json"))
    with contextlib.suppress(Exception):
        theirs = AutoTokenizer.from_pretrained(path, local_files_only=True)
        assert stored.encode(text).ids != theirs.encode(text)
    assert load_tokenizer(path).encode(text) == stored.encode(text).ids
    [line] = caplog.messages
    assert said in line
    assert "tokenizer.json as it stands" in line
    assert "\n" not in line


CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
INST = ("{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}")
GLM = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
ALPACA = "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
PHI = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}{{ eos_token }}"
BETWEEN = ("{% for m in messages %}<|im_start|>{{ m.content | trim }}{% if not loop.last %}<|im_end|>{% endif %}"
           "{% endfor %}")


@pytest.mark.parametrize(("template", "end"), [
    (CHATML, "<|im_end|>"), (QWEN_TEMPLATE, "<|im_end|>"), (LLAMA3_TEMPLATE, "<|eot_id|>"), (INST, "</s>"),
    (GLM, "<|user|>"), (PHI, "<|end|>"), (BETWEEN, "<|im_end|>"), (ALPACA, None),
    ("<|im_start|>{{ messages[0].content }}", None), ("{{ 1 / 0 }}", None), (None, None),
])
def test_the_end_of_a_turn_is_what_the_template_writes_there(tmp_path: Path, template: str | None, end: str | None
                                                             ) -> None:
    extra = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|end|>", "<|user|>", "\n\n", "<|end"]
    path = write(tmp_path / "model", byte_level(), {
        "bos_token": "<s>", "eos_token": "</s>", "extra_special_tokens": extra, "chat_template": template})
    tokenizer = Tokenizer(path)
    found = tokenizer.end_of_turn()
    assert (found and tokenizer.token(found)) == end


@pytest.mark.parametrize(("generation", "config", "token", "ends"), [
    ({"eos_token_id": 5}, (5,), "<|im_end|>", {5, "<|im_end|>"}),  # a ChatML fine-tune over its base model's configs
    ({"eos_token_id": [5, 6]}, (7,), "</s>", {5, 6, 7, "</s>"}),
    ({"eos_token_id": [5, 10**6, True, "x"]}, (), None, {5}),
    ({"eos_token_id": None}, (7,), "</s>", {7, "</s>", "<|im_end|>"}),
    ({}, (), None, {"<|im_end|>"}),
    (None, (7,), "</s>", {7, "</s>", "<|im_end|>"}),
    ("not a mapping", (), "</s>", {"</s>", "<|im_end|>"}),
])
def test_every_token_that_ends_an_answer(tmp_path: Path, generation: Any, config: tuple[int, ...], token: str | None,
                                         ends: set[int | str]) -> None:
    path = write(tmp_path / "model", byte_level(), {
        "eos_token": token, "extra_special_tokens": ["<|im_start|>", "<|im_end|>", "</s>"], "chat_template": CHATML})
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = Tokenizer(path)
    expected = {end if isinstance(end, int) else tokenizer.encode(end, False)[0] for end in ends}
    size = tokenizer.vocab_size
    assert set(eos_token_ids(path, config, tokenizer, size)) == expected
    base = min(tokenizer.encode("<|im_start|><|im_end|>", False))
    assert set(eos_token_ids(path, config, tokenizer, base)) == {end for end in expected if end < base}


def test_special_tokens_map_of_old_checkpoints(tmp_path: Path) -> None:
    path = write(tmp_path / "model", byte_level(), {"bos_token": "<b>"})
    (path / "special_tokens_map.json").write_text('{"bos_token": {"content": "<s>"}, "eos_token": "</s>"}')
    theirs = AutoTokenizer.from_pretrained(path, local_files_only=True)
    assert Tokenizer(path).bos_token_id == theirs.bos_token_id
    assert Tokenizer(path).encode("the</s>") == theirs.encode("the</s>")


def test_what_makes_the_library_panic_is_refused(tmp_path: Path) -> None:
    """A panic is no Exception, and would end whatever thread it is raised on."""
    backend = Backend(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0, False))
    backend.decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 5)])
    (tmp_path / "tokenizer.json").write_text(backend.to_str())
    with pytest.raises(CheckpointError, match=r"cannot be loaded: index out of bounds") as error:
        Tokenizer(tmp_path)
    assert "\n" not in str(error.value)
    backend.decoder = decoders.Fuse()
    (tmp_path / "tokenizer.json").write_text(backend.to_str())
    tokenizer = Tokenizer(tmp_path)
    tokenizer._backend.decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 5)])
    with pytest.raises(TokenizerError, match="cannot spell these tokens"):
        tokenizer.decode([])
