from text_generation import Client
from text_generation.types import Message
from trial import PROMPT, URL, check, trial

client = Client(URL, timeout=120)
messages = [Message(role="user", content="Tell me of a king.")]


@trial("generate")
def _():
    check(client.generate(PROMPT, max_new_tokens=8).generated_text)


@trial("generate, best_of and details")
def _():
    check(client.generate(PROMPT, max_new_tokens=8, do_sample=True, best_of=2, decoder_input_details=True,
                          top_n_tokens=2).details.best_of_sequences)


@trial("generate_stream")
def _():
    check(list(client.generate_stream(PROMPT, max_new_tokens=8))[-1].generated_text)


@trial("chat")
def _():
    check(client.chat(messages, max_tokens=8).choices[0].message.content)


@trial("chat, streamed")
def _():
    check("".join(chunk.choices[0].delta.content or "" for chunk in client.chat(messages, max_tokens=8, stream=True)))
