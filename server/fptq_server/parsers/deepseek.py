"""DeepSeek R1, V3 and V3.1 (calls as JSON between their own tokens), and V3.2 (DSML)."""

from __future__ import annotations

from fptq_server.parsers.frame import JsonCalls, NotACall, Parser, Steps

CALLS = "<｜tool▁calls▁begin｜>"
CALL, SEPARATOR, END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
CALLS_END = "<｜tool▁calls▁end｜>"
DSML = "<｜DSML｜"


class DeepSeek(Parser):
    name = "deepseek"
    marks = (CALLS, "｜DSML｜")
    openers = (CALLS, f"{DSML}function_calls>", f"{DSML}tool_calls>")
    inner = (CALL, SEPARATOR, END, CALLS_END, "</｜DSML｜invoke>")
    json_calls = JsonCalls(f"{CALL}{{name}}{SEPARATOR}", END, "", CALLS, CALLS_END)

    def call(self, opener: str) -> Steps[None]:
        if opener != CALLS:
            yield from self._invocations(opener)
            return
        yield from self.skip_space()
        yield from self.expect(CALL)
        while True:
            name, _ = yield from self.name_until(SEPARATOR)
            fenced = (yield from self.skip_space()) != "{"
            if fenced:  # R1 and V3
                if name != "function":
                    raise NotACall
                name, _ = yield from self.name_until("```json")
                if (yield from self.skip_space()) != "{":
                    raise NotACall
            self.start(name)
            yield from self.json_value(self.arguments)
            if fenced:
                yield from self.close("```")
            yield from self.close(END)
            self.mark()
            yield from self.skip_space()
            if not (yield from self.accept(CALL)):
                break
        yield from self.close(CALLS_END)

    def _invocations(self, opener: str) -> Steps[None]:
        yield from self.skip_space()
        yield from self.expect(f'{DSML}invoke name="')
        while True:
            name, _ = yield from self.name_until('">')
            self.start(name)
            while True:
                self.mark()
                yield from self.skip_space()
                if not (yield from self.accept(f'{DSML}parameter name="')):
                    break
                key = yield from self.until('" string="')
                string = (yield from self.until('">')) == "true"
                if (yield from self.member(key, "</｜DSML｜parameter>", string=string)) is None:
                    return
            self.end_members()
            yield from self.close("</｜DSML｜invoke>")
            self.mark()
            yield from self.skip_space()
            if not (yield from self.accept(f'{DSML}invoke name="')):
                break
        yield from self.close(opener.replace("<", "</"))
