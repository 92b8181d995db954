"""The process in which a chat template runs. A template is a foreign program: what it may take is bounded where no
expression can get around it, by the kernel. chat_template.py starts this file as a script, which imports nothing of
ours.

Standard input is a socket. Lines of JSON come: first the template and its limits, then, for each conversation, its
variables, or null to be told which it reads, and the CPU time that they may take. For each of these a line goes back
with its text or error, and whether it is the last. Where that time is over the process ends by SIGPROF.
"""

from __future__ import annotations

import json
import resource
import signal
import socket
import sys
from collections.abc import Mapping
from datetime import datetime
from typing import Any

KEPT_BYTES = 128 << 20  # still holding more, the process ends with its answer, so that a fresh one takes its place


def environment() -> Any:
    """With what transformers gives to chat templates, which are written for it."""
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks what the assistant said, for training."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None,
               separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
        """Without Jinja's escapes for HTML."""
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, Generation])
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


def variables_of(source: str) -> list[str]:
    """What a template reads and does not set, beside what every template is given."""
    import jinja2.meta

    jinja = environment()
    return sorted(jinja2.meta.find_undeclared_variables(jinja.parse(source)) - jinja.globals.keys())


def render(template: Any, variables: Mapping[str, Any], max_characters: int) -> str:
    parts: list[str] = []
    length = 0
    for part in template.generate(**variables):
        parts.append(part)
        length += len(part)
        if length > max_characters:
            raise ValueError(f"it writes more than {max_characters} characters")
    return "".join(parts)


def held_bytes() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:  # another system
        return 0


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which then drains
    channel = socket.socket(fileno=0)
    lines = channel.makefile("rb")
    setup = json.loads(lines.readline())
    sys.path[:] = setup["path"]
    template = None
    import jinja2.sandbox  # noqa: F401  before memory is bounded

    memory: int = setup["max_bytes"]
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    for line in lines:
        try:
            request = json.loads(line)
            signal.setitimer(signal.ITIMER_PROF, request["seconds"])
            if request["variables"] is None:
                answer: dict[str, Any] = {"text": json.dumps(variables_of(setup["template"]))}
            else:
                template = template or environment().from_string(setup["template"])
                answer = {"text": render(template, request["variables"], setup["max_characters"])}
        except MemoryError:
            answer = {"error": f"it needs more than {memory >> 20} MiB"}
        except Exception as error:  # it fails in whatever way it likes
            answer = {"error": (str(error).strip().splitlines() or [type(error).__name__])[0][:1000]}
        answer["last"] = held_bytes() > KEPT_BYTES
        channel.sendall(json.dumps(answer).encode() + b"\n")
        signal.setitimer(signal.ITIMER_PROF, 0)
        if answer["last"]:
            break


if __name__ == "__main__":
    main()
