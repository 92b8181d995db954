from command import run
from trial import KEY, MODEL, URL, check, trial

# An answer that ends early by its length is an error to it, and the demo's seldom end by themselves.
SETTINGS = f"[{{name: openai/{MODEL}, extra_params: {{stop: [a, e, i, o]}}}}]"


def aider(*more):
    return run("aider", "--model", f"openai/{MODEL}", "--openai-api-base", f"{URL}/v1", "--openai-api-key", KEY,
               "--no-git", "--yes-always", "--no-check-update", "--no-show-model-warnings", "--no-show-release-notes",
               "--analytics-disable", "--no-pretty", "--no-detect-urls", "--no-suggest-shell-commands",
               "--model-settings-file", "options.yml", "--message", "Say hello.", *more, written=SETTINGS)


@trial("ask")
def _():
    answer = aider("--chat-mode", "ask")
    check("received" in answer, answer[-200:])


@trial("ask, not streamed")
def _():
    answer = aider("--chat-mode", "ask", "--no-stream")
    check("received" in answer, answer[-200:])


@trial("edit a file")
def _():
    answer = aider("--edit-format", "whole", "king.txt")
    check("received" in answer, answer[-200:])
