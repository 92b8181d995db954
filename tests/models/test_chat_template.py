"""What a hostile template can take. Oracle for what a good one gives: test_tokenizer.py, with transformers."""

from __future__ import annotations

from typing import Any

import psutil
import pytest

from fptq_runtime.models.chat_template import MAX_BYTES, ChatTemplate, ChatTemplateError

MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "<b>é</b>"}]
REPLY = "{{ messages[0].content }}"

FAILS = [
    "{{ messages[9].content }}", "{{ raise_exception('no') }}", "{% if %}", "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}", "{{ 1 // 0 }}", "{{ 2.0 ** 10000 }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ " + "(" * 500 + "1" + ")" * 500 + " }}",
    "{{ 'é'.encode('ascii') }}", "{{ messages.x.y.z }}", "{{ strftime_now(3) }}", "{{ '%c' % 10**8 }}",
    "{% for c in 'aa' recursive %}{{ loop('aa') }}{% endfor %}", "{% include 'x' %}",
    "{{ cycler.__init__.__globals__.os }}",
]
TOO_MUCH = [
    "{{ [1] * 10 ** 8 }}", "{{ 'a' * 10 ** 9 }}", "{{ ('a' * 10 ** 12) | length }}", "{{ 10 ** (10 ** 10) }}",
    "{{ messages | tojson(indent=10 ** 8) }}", "{{ messages | tojson(separators=('a' * 10 ** 9, 'b')) }}",
    "{{ 1 == 3 ** (10 ** 8) }}", "{{ (2 ** (10 ** 7)) ** 99 }}",
    "{{ '%1000000000d' % 1 }}", "{{ '{:>999999999}'.format(1) }}", "{{ '%*d' % (10 ** 9, 1) }}",
    "{{ 'a'.center(10 ** 9) }}", "{{ 'a'.zfill(10 ** 9) }}", "{{ '\t'.expandtabs(10 ** 9) }}",
    "{{ ('a' * 10 ** 6).replace('a', 'b' * 10 ** 6) }}", "{{ ('b' * 10 ** 5).join(['c'] * 10 ** 6) }}",
    "{{ 'a' | center(10 ** 9) }}", "{{ 'a' | indent(10 ** 9, true) }}", "{{ ['a'] | batch(10 ** 9, 'x') | list }}",
    "{{ messages | slice(10 ** 9) | list }}", "{{ ('a ' * 10 ** 7) | wordwrap(1, wrapstring='b' * 1000) }}",
    "{{ {'a': 'b' * 10 ** 9} | xmlattr }}", "{{ ('a' * 10 ** 8) | urlize }}", "{{ lipsum(n=10 ** 8) }}",
    "{{ range(10 ** 5) | map('string') | join(',' * 10 ** 6) }}",
    "{% for i in range(10 ** 5) %}{% for j in range(10 ** 5) %}{% endfor %}{% endfor %}",
    "{% set x = 'x' * 10 ** 6 %}{% for i in range(99999) %}{{ x }}{% endfor %}",
    "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=[]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) * 2 }}{% else %}x{% endif %}{% endmacro %}{{ m(60) }}",
]


def render(source: str, **variables: Any) -> str:
    return ChatTemplate(source).render({"messages": MESSAGES, **variables}).result()


@pytest.mark.parametrize("template", FAILS)
def test_a_template_that_fails_or_reaches_out_is_refused(template: str) -> None:
    with pytest.raises(ChatTemplateError, match="the chat template refuses these messages: ") as error:
        render(template)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1100


@pytest.mark.parametrize("template", TOO_MUCH)
def test_a_template_that_takes_too_much_is_refused(template: str) -> None:
    before = psutil.Process().memory_info().rss
    with pytest.raises(ChatTemplateError, match=r"refuses these messages: it (takes|needs|writes|has not ended)"):
        render(template)
    assert psutil.Process().memory_info().rss < before + MAX_BYTES


def processes() -> set[psutil.Process]:
    return {child for child in psutil.Process().children() if "render.py" in " ".join(child.cmdline())}


def test_conversations_after_and_beside_one_that_takes_too_much() -> None:
    template = ChatTemplate("{{ 'a' * n }}")
    endless = template.render({"n": 10 ** 12})
    assert template.render({"n": 1}).result() == "a"
    with pytest.raises(ChatTemplateError):
        endless.result()
    slow = ChatTemplate("{% if n %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
                        "{% endif %}{{ n }}")
    slow.render({"n": 0}).result()
    stuck = slow.render({"n": 1})
    assert slow.render({"n": 0}).result() == "0"
    assert not stuck.done()
    with pytest.raises(ChatTemplateError, match=r"CPU time|has not ended"):
        stuck.result()
    assert slow.render({"n": 0}).result() == "0"


def test_a_process_is_kept_while_it_is_small_and_ends_with_its_template() -> None:
    others = processes()
    template = ChatTemplate("{{ ('a' * n) | length }}")
    assert template.render({"n": 1}).result() == "1"
    [first] = processes() - others
    assert template.render({"n": 2}).result() == "2"
    assert processes() - others == {first}
    first.kill()
    first.wait()
    assert template.render({"n": 3}).result() == "3"
    [second] = processes() - others
    second.suspend()
    template._idle[0]._socket.settimeout(0.2)
    with pytest.raises(ChatTemplateError, match="has not ended after"):
        template.render({"n": 4}).result()
    assert not second.is_running()
    assert template.render({"n": 5}).result() == "5"
    [third] = processes() - others
    assert template.render({"n": MAX_BYTES // 2}).result() == str(MAX_BYTES // 2)
    assert processes() - others == {third}
    del template
    assert psutil.wait_procs([third], timeout=60)[1] == []


def test_a_process_that_holds_much_is_replaced() -> None:
    others = processes()
    template = ChatTemplate("{% for m in messages %}{{ m }}{% endfor %}")
    assert template.render({"messages": [1, 2]}).result() == "12"
    [process] = processes() - others
    emoji = "\U0001f600" * (1 << 20)
    assert len(template.render({"messages": [emoji] * 6}).result()) == 6 << 20
    assert not process.is_running()
    assert template.render({"messages": [3]}).result() == "3"


def test_a_process_is_told_nothing_that_is_not_the_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    monkeypatch.setenv("TZ", "UTC")
    others = processes()
    template = ChatTemplate(REPLY)
    template.render({"messages": MESSAGES}).result()
    [process] = processes() - others
    assert process.environ() == {"TZ": "UTC"}
    assert process.rlimit(psutil.RLIMIT_AS) == (MAX_BYTES, MAX_BYTES)
    assert {file.path for file in process.open_files()} == set()


def test_what_json_cannot_carry_is_refused() -> None:
    with pytest.raises(ChatTemplateError, match="cannot be given these messages"):
        render(REPLY, tools=[object()])
