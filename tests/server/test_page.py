"""The page at /, in Chromium: what a person types, clicks and sees. Skipped where no Chromium or no Playwright is."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from markdown_it import MarkdownIt

from fptq_server.config import ServerConfig
from tests.server.conftest import Served, metric, scripted, wait_until

axe_playwright = pytest.importorskip("axe_playwright_python.sync_playwright", reason="Playwright is not installed")
playwright = pytest.importorskip("playwright.sync_api")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (390, 820, 1440)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@contextmanager
def opened(browser: Any, url: str, refusal: int = 401, **options: Any) -> Iterator[Any]:
    """The page, which asks nobody but the server and has nothing to complain of but answers with this status."""
    with browser.new_context(**options) as context:
        page = context.new_page()
        asked: list[str] = []
        said: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(url)
        yield page
        assert all(each.startswith(url) for each in asked)
        assert [text for text in said if f"status of {refusal}" not in text] == []


@pytest.fixture
def page(browser: Any, served: Served) -> Iterator[Any]:
    with opened(browser, served.url) as page:
        playwright.expect(page.locator("#model")).to_have_text("demo")
        yield page


@pytest.fixture
def refused(browser: Any, served: Served) -> Iterator[Any]:
    """The page, some of whose requests are bad ones."""
    with opened(browser, served.url, refusal=400) as page:
        yield page


def send(page: Any, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_label("Message", exact=True).press("Enter")


def ask(page: Any, text: str) -> Any:
    """The answer's element, once it is whole."""
    send(page, text)
    answer = page.locator("#log > .assistant").last
    answer.get_by_role("button", name="Regenerate").wait_for()
    return answer


def settings(page: Any, **values: str) -> None:
    page.get_by_role("button", name="Settings").click()
    for name, value in values.items():
        page.locator(f"[data-setting={name}]").fill(value)
    page.get_by_role("button", name="Settings").click()


def without_end(page: Any) -> None:
    """Answers go on up to their most tokens."""
    def go_on(route: Any) -> None:
        route.continue_(post_data=json.dumps({**json.loads(route.request.post_data), "ignore_eos": True}))

    page.route("**/v1/chat/completions", go_on)


def test_a_message_is_sent_and_its_answer_streamed(page: Any, served: Served) -> None:
    settings(page, temperature="0", max_tokens="300", system="Tell a tale.")
    page.evaluate("""() => {
        seen = [];
        const look = () => seen.push(document.querySelector(".assistant .body")?.textContent);
        new MutationObserver(look).observe(document.querySelector("#log"), { childList: true, subtree: true });
    }""")
    answer = ask(page, "Once upon a time")
    expected = served.http.post("/v1/chat/completions", json={"temperature": 0, "max_tokens": 300, "messages": [
        {"role": "system", "content": "Tell a tale."}, {"role": "user", "content": "Once upon a time"}]}).json()
    text = expected["choices"][0]["message"]["content"]
    assert page.evaluate("document.activeElement.id") == "message"
    assert page.evaluate("messages.at(-1).content") == text
    assert f"{expected['usage']['completion_tokens']} tokens in" in answer.inner_text()
    states = {state for state in page.evaluate("seen") if state}
    assert len(states) > 1


def test_stop_cancels_in_the_engine(page: Any, served: Served) -> None:
    aborted = metric(served, "fptq_requests_finished_total", reason="abort")
    settings(page, max_tokens="900")
    without_end(page)
    send(page, "Once upon a time")
    playwright.expect(page.locator("article.assistant .body")).not_to_be_empty()
    playwright.expect(page.get_by_role("button", name="Send")).to_be_hidden()
    page.get_by_role("button", name="Stop").click()
    wait_until(lambda: metric(served, "fptq_requests_finished_total", reason="abort") == aborted + 1)
    wait_until(lambda: metric(served, "fptq_requests_running") == 0)
    playwright.expect(page.locator("article.assistant .tools")).to_contain_text("stopped")
    assert page.evaluate("messages.at(-1).content")
    playwright.expect(page.get_by_role("button", name="Stop")).to_be_hidden()


def test_a_reload_keeps_the_conversation_and_the_settings(page: Any) -> None:
    settings(page, max_tokens="12", temperature="0")
    ask(page, "The old king")
    before = page.locator("#log").inner_text()
    page.reload()
    playwright.expect(page.locator("#log")).to_have_text(before, use_inner_text=True)
    assert page.locator("[data-setting=max_tokens]").input_value() == "12"
    ask(page, "And then?")
    assert page.locator("#log > article").count() == 4
    page.get_by_role("button", name="New chat").click()
    assert page.locator("#log > .user").count() == 0


def test_regenerate_and_edit(page: Any, served: Served) -> None:
    with scripted(served, "First.") as asked:
        ask(page, "one")
    with scripted(served, "Second.") as again:
        page.get_by_role("button", name="Regenerate").click()
        playwright.expect(page.locator("article.assistant .body")).to_have_text("Second.")
    assert [prompt for prompt, _ in again] == [prompt for prompt, _ in asked]
    with scripted(served, "Third."):
        page.get_by_role("button", name="Edit").click()
        page.get_by_label("Edited message").fill("two")
        page.get_by_role("button", name="Send again").click()
        playwright.expect(page.locator("article.assistant .body")).to_have_text("Third.")
    assert page.evaluate("messages.map(message => message.content)") == ["two", "Third."]


ATTACKS = """<img src=x onerror="document.title='taken'"><script>document.title='taken'</script>
[click](javascript:document.title='taken') ![x](https://example.com/x.png) <iframe src="https://example.com">

# <b>bold</b>

| <i>a</i> |
|---|
| <style>*{display:none}</style> |

```html"><script>document.title='taken'</script>
<svg onload="document.title='taken'">
"""


def test_what_the_model_writes_is_never_markup(page: Any, served: Served) -> None:
    with scripted(served, ATTACKS):
        answer = ask(page, "<b>me</b>")
    assert page.title() == "demo · FPTQ Serve"
    assert page.locator("#log :is(img, script, iframe, style, svg, b, i, [onerror], [onload])").count() == 0
    assert {link.get_attribute("href") for link in page.locator("#log a").all()} == {"https://example.com/x.png"}
    for shown in ("<img src=x onerror=", "<script>", "[click](javascript:", "<b>bold</b>", "<svg onload="):
        assert shown in answer.inner_text()


def test_no_text_can_become_markup(browser: Any, served: Served) -> None:
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(served.url)
        with pytest.raises(playwright.Error, match="Trusted"):
            page.evaluate("document.body.innerHTML = '<p>'")
        policy = served.http.get("/").headers["content-security-policy"]
        assert "unsafe" not in policy and "http" not in policy and policy.startswith("default-src 'none'")


MARKDOWN = (
    "# One\n\nA *soft* and **strong** word, `code`, ***both*** and ~~gone~~.\n\n## Two ##\ntext",
    "1. one\n2. two\n   - inner\n   - again\n3. three\n\n- a\n- b",
    "```python\ndef f(x):\n    return x * 2\n\n# no title\n```\nafter\n\n~~~\nplain\n~~~",
    "> said\n> again\n\n---\n\nsnake_case_word and 2 * 3 * 4, \\*not soft\\*",
    "| a | b |\n|---|:-:|\n| **1** | `2` |\n| 3 | 4 |\n\nend",
    "[link](https://example.com/a_b?c=d) & [no link](ftp://example.com/)",
    "``a ` b`` and unclosed **bold and `tick",
    "```\nan answer that is not whole",
)


@pytest.mark.parametrize("text", MARKDOWN)
def test_markdown_is_read_as_others_read_it(page: Any, text: str) -> None:
    """markdown-it is the oracle: the same elements around the same words, white space and line breaks aside."""
    reader = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    reader.validateLink = lambda url: url.startswith("https:")
    ours = page.evaluate("""(text) => {
        const outline = (node) => node.nodeType === 3 ? node.data : ["DIV", "BR"].includes(node.tagName)
            ? [...node.childNodes].map(outline).join("")
            : `<${node.localName}>${[...node.childNodes].map(outline).join("")}</>`;
        return markdown(text).map(outline).join("");
    }""", text)
    theirs = reader.render(text)
    for found, put in ((r"</\w+>", "</>"), ("<hr />", "<hr></>"), ("<br />", ""), (r"<(\w+)[^>]*>", r"<\1>"),
                       ("<h2>", "<h4>"), ("<h1>", "<h3>"), ("<s>", "<del>")):
        theirs = re.sub(found, put, theirs)
    assert "".join(ours.split()) == "".join(html.unescape(theirs).split())


def test_tools_are_shown_and_answered(page: Any, served: Served) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}}}}]
    settings(page, tools=json.dumps(tools))
    with scripted(served, '<tool_call>\n{"name": "weather", "arguments": {"city": "Ürümqi"}}\n</tool_call>'):
        answer = ask(page, "What is the weather?")
    playwright.expect(answer.get_by_role("heading", name="weather")).to_be_visible()
    assert json.loads(answer.locator(".call pre").inner_text()) == {"city": "Ürümqi"}
    with scripted(served, "It is sunny.") as asked, page.expect_request("**/v1/chat/completions") as sent:
        answer.get_by_label("Result of weather").fill("sunny")
        answer.get_by_role("button", name="Send result").click()
        playwright.expect(page.locator("article.assistant .body").last).to_have_text("It is sunny.")
    assert len(asked) == 1
    _, call, result = json.loads(sent.value.post_data)["messages"]
    assert result == {"role": "tool", "content": "sunny", "tool_call_id": call["tool_calls"][0]["id"]}


def test_json_is_a_tree(page: Any) -> None:
    schema = {"type": "object", "properties": {"name": {"enum": ["Ann"]}, "ages": {"const": [1, 2]}},
              "required": ["name", "ages"], "additionalProperties": False}
    settings(page, schema=json.dumps(schema))
    answer = ask(page, "Who?")
    answer.get_by_role("button", name="JSON").click()
    for entry in ("answer {2}", "ages [2]"):
        playwright.expect(answer.get_by_text(entry)).to_be_visible()
    playwright.expect(answer.get_by_text('name "Ann"')).to_be_visible()


def test_a_conversation_longer_than_the_context_is_told_and_goes_on(refused: Any, served: Served) -> None:
    with scripted(served, "Yes."):
        ask(refused, "One?")
    long = "word " * 2000
    send(refused, long)
    told = refused.locator("article.assistant").last
    playwright.expect(told.get_by_role("alert")).to_have_text(
        "The conversation is longer than the 1024 tokens this model can read. Start a new chat, or edit an earlier "
        "message.")
    assert refused.get_by_label("Message", exact=True).input_value() == long
    with scripted(served, "Still."), refused.expect_request("**/v1/chat/completions") as sent:
        send(refused, "Two?")
        playwright.expect(refused.locator("article.assistant .body").last).to_have_text("Still.")
    assert [message["content"] for message in json.loads(sent.value.post_data)["messages"]] == ["One?", "Yes.", "Two?"]
    send(refused, long)
    told.get_by_role("button", name="New chat").click()
    assert refused.locator("#log > .user").count() == 0
    send(refused, refused.get_by_label("Message", exact=True).input_value())
    playwright.expect(refused.locator("article.assistant").get_by_role("alert")).to_have_text(
        "The message is longer than the 1024 tokens this model can read. Shorten it.")


def test_results_that_are_too_long_can_be_given_again(refused: Any, served: Served) -> None:
    settings(refused, tools=json.dumps([{"type": "function", "function": {"name": "now"}}]))
    with scripted(served, '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'):
        answer = ask(refused, "What time is it?")
    answer.get_by_label("Result of now").fill("word " * 2000)
    answer.get_by_role("button", name="Send result").click()
    playwright.expect(refused.get_by_role("alert").filter(has_text="The conversation is longer")).to_be_visible()
    with scripted(served, "Noon."):
        refused.get_by_label("Result of now").fill("12:00")
        refused.get_by_role("button", name="Send result").click()
        playwright.expect(refused.locator("article.assistant .body").last).to_have_text("Noon.")
    assert refused.evaluate("messages.map(message => message.role)") == ["user", "assistant", "tool", "assistant"]


def test_what_cut_an_answer_is_said(page: Any) -> None:
    settings(page, max_tokens="4")
    without_end(page)
    playwright.expect(ask(page, "Once")).to_contain_text("cut by the most tokens")
    page.get_by_role("button", name="New chat").click()
    settings(page, max_tokens="")
    playwright.expect(ask(page, "word " * 900)).to_contain_text("cut: the context is full")


def test_the_demo_says_what_it_is_for(page: Any) -> None:
    playwright.expect(page.locator("#log")).to_have_text(
        "This small demo only continues tales. Try: Once upon a time")


def test_settings_show_what_is_in_force_and_refuse_what_is_out_of_range(page: Any) -> None:
    shown = {name: page.locator(f"[data-setting={name}]").get_attribute("placeholder")
             for name in ("temperature", "top_p", "top_k", "repetition_penalty", "max_tokens")}
    assert shown == {"temperature": "1", "top_p": "1", "top_k": "0", "repetition_penalty": "1",
                     "max_tokens": "what fits"}
    page.get_by_role("button", name="Settings").click()
    error = page.locator("#settings-error")
    for name, wrong, right in (("temperature", "7", "0.75"), ("temperature", "-1", "0"), ("top_k", "1.5", "2")):
        field = page.locator(f"[data-setting={name}]")
        field.fill(wrong)
        playwright.expect(error).to_contain_text("Temperature: " if name == "temperature" else "Top k: ")
        playwright.expect(error).to_be_in_viewport(ratio=1)
        playwright.expect(field).to_have_attribute("aria-invalid", "true")
        send(page, "Once")
        told = page.locator("article.assistant").last.get_by_role("alert")
        playwright.expect(told).to_have_text(error.inner_text())
        field.fill(right)
        playwright.expect(error).to_be_empty()
        playwright.expect(field).to_have_attribute("aria-invalid", "false")
        page.get_by_role("button", name="New chat").click()


def test_a_setting_that_is_no_json_is_told(page: Any) -> None:
    settings(page, schema="[1]")
    send(page, "Who?")
    told = page.locator("article.assistant").get_by_role("alert")
    playwright.expect(told).to_have_text("JSON schema of the answer: not a JSON object")


def test_token_probabilities(page: Any, served: Served) -> None:
    settings(page, temperature="0", max_tokens="8")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Token probabilities").check()
    answer = ask(page, "Once")
    told = served.http.post("/v1/chat/completions", json={
        "temperature": 0, "max_tokens": 8, "logprobs": True, "top_logprobs": 5,
        "messages": [{"role": "user", "content": "Once"}]}).json()["choices"][0]["logprobs"]["content"]
    tokens = answer.locator(".tokens span")
    assert [token.text_content() for token in tokens.all()] == [entry["token"] for entry in told]
    playwright.expect(answer).to_contain_text("Red: unlikely. Point at a token for its alternatives.")
    tokens.nth(1).hover()
    rows = page.get_by_role("tooltip").locator("tr")
    assert [json.loads(row.locator("td").first.text_content()[2:]) for row in rows.all()] == [
        entry["token"] for entry in told[1]["top_logprobs"]]
    page.mouse.move(0, 0)
    playwright.expect(page.get_by_role("tooltip")).to_be_hidden()
    tokens.first.focus()
    page.keyboard.press("ArrowRight")
    playwright.expect(tokens.nth(1)).to_be_focused()
    playwright.expect(page.get_by_role("tooltip")).to_be_visible()


def test_the_live_view(page: Any, served: Served) -> None:
    page.get_by_role("button", name="Live").click()
    tiles = page.locator("#tiles")
    playwright.expect(tiles).to_contain_text("Tokens a second")
    ask(page, "Once upon a time")
    for name in ("First token", "Between tokens"):
        tile = tiles.locator("div", has_text=name).locator("dd")
        playwright.expect(tile).to_have_text(re.compile(r"\d m?s / .*\d m?s"))
    golden = page.evaluate("""() => {
        scrapes.push({ time: performance.now(), values: new Map([
            ...scrapes.at(-1).values, ["fptq_golden_checks_total", 1], ["fptq_golden_deviation_ratio", 0.26]]) });
        showTiles();
        return $("tiles").lastChild.textContent;
    }""")
    assert golden == "Self-check26 % of the tolerance"
    playwright.expect(page.locator("#kernels")).to_contain_text(served.http.get("/info").json()["kernels"]["backend"])


def test_an_api_key_is_asked_for(browser: Any, run_server: Callable[..., Any]) -> None:
    with run_server(ServerConfig(api_keys=("secret",))) as served, opened(browser, served.url) as page:
        assert httpx.post(served.url + "/", json={"inputs": "x"}).status_code == 401
        told = page.get_by_role("dialog").get_by_role("alert")
        playwright.expect(told).to_be_empty()
        for key, said in (("wrong", "That key was not accepted."), ("secret", "")):
            page.get_by_label("API key", exact=True).fill(key)
            page.get_by_role("button", name="Use it").click()
            playwright.expect(page.locator("#key-error")).to_have_text(said)
        playwright.expect(page.locator("#model")).to_have_text("demo")
        settings(page, max_tokens="4")
        ask(page, "Once")
        page.reload()
        playwright.expect(page.locator("#model")).to_have_text("demo")
        assert "secret" not in page.evaluate("JSON.stringify(localStorage)")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_and_everybody_can_use_it(browser: Any, served: Served, width: int, theme: str) -> None:
    """axe, with every rule it has: names, roles, contrast, order. Nothing is wider than the window."""
    shape = {"viewport": {"width": width, "height": 800}, "color_scheme": theme, "bypass_csp": True}
    with opened(browser, served.url, **shape) as page:
        def check() -> None:
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            report = axe_playwright.Axe().run(page)
            assert report.violations_count == 0, report.generate_report()

        text = f"# Title\n\nA [link](https://example.com) and `code`.\n\n```\n{'long ' * 60}\n```\n"
        with scripted(served, text):
            ask(page, "word " * 60)
        check()
        page.get_by_role("button", name="JSON").click()
        check()
        for name in ("Live", "Settings"):
            page.get_by_role("button", name=name).click()
            page.locator(f"#{name.lower()}").wait_for()
            check()


def test_by_keyboard_alone(page: Any, served: Served) -> None:
    playwright.expect(page.get_by_label("Message", exact=True)).to_be_focused()
    with scripted(served, "Yes."):
        page.keyboard.type("One")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("two")
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Regenerate").wait_for()
    assert page.evaluate("messages[0].content") == "One\ntwo"
    reached = set()
    for _ in range(12):
        page.keyboard.press("Shift+Tab")
        reached.add(page.evaluate("document.activeElement.textContent"))
    assert {"Regenerate", "Edit", "JSON", "New chat", "Settings", "Live"} <= reached


def test_there_is_no_page_where_none_is_wanted(run_server: Callable[..., Any]) -> None:
    with run_server(ServerConfig(page=False)) as served:
        assert served.http.get("/").status_code == 405
        assert served.http.post("/", json={"inputs": "x", "parameters": {"max_new_tokens": 1}}).status_code == 200
