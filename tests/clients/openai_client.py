"""Starts a daemon and drives it with the official `openai` client.

usage: openai_client.py SPATE_BINARY

Each check is a function; the first failure ends the run with its traceback.
"""

import asyncio
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import openai

MODEL = "smollm2-135m-instruct"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


BASE_URL = f"http://127.0.0.1:{free_port()}"
client = openai.OpenAI(base_url=f"{BASE_URL}/v1", api_key="unused", max_retries=0, timeout=120)

QUESTION = [{"role": "user", "content": "Name three primary colours."}]


def text_of(stream):
    """Concatenated content of a chat stream, its finish reason, and usage where sent."""
    text, finish, usage = "", None, None
    for chunk in stream:
        assert chunk.object == "chat.completion.chunk", chunk
        if chunk.usage:
            usage = chunk.usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
    return text, finish, usage


def models():
    listed = [model.id for model in client.models.list()]
    assert MODEL in listed, listed
    assert client.models.retrieve(MODEL).id == MODEL


def chat():
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=24
    )
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason in ("stop", "length")
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 < usage.completion_tokens <= 24


def stream_equals_whole():
    ask = dict(model=MODEL, messages=QUESTION, temperature=0, max_tokens=24)
    whole = client.chat.completions.create(**ask)
    text, finish, usage = text_of(
        client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    )
    assert text == whole.choices[0].message.content, (text, whole)
    assert finish == whole.choices[0].finish_reason
    assert usage.completion_tokens == whole.usage.completion_tokens
    # The same prompt again comes from the prefix cache.
    assert usage.prompt_tokens_details.cached_tokens > 0, usage


def several_choices():
    ask = dict(model=MODEL, messages=QUESTION, temperature=1.0, seed=7, max_tokens=16, n=3)
    first = client.chat.completions.create(**ask)
    again = client.chat.completions.create(**ask)
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) > 1, texts
    assert texts == [choice.message.content for choice in again.choices], "a seed reproduces"


def stop_strings():
    ask = dict(model=MODEL, prompt="1, 2, 3, 4, 5, 6, 7,", temperature=0, max_tokens=24)
    whole = client.completions.create(**ask).choices[0].text
    stop = whole[4:7]
    cut = client.completions.create(**ask, stop=[stop]).choices[0]
    assert cut.text == whole[: whole.index(stop)], (whole, stop, cut)
    assert cut.finish_reason == "stop"
    streamed = "".join(
        chunk.choices[0].text
        for chunk in client.completions.create(**ask, stop=stop, stream=True)
        if chunk.choices
    )
    assert streamed == cut.text, (streamed, cut)


def logprobs():
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=5, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for token in content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3
        best = max(top.logprob for top in token.top_logprobs)
        assert abs(token.logprob - best) < 1e-6, "greedy takes the most likely"
        assert bytes(token.bytes).decode(errors="replace") == token.token


def errors():
    def refused(kind, **changes):
        try:
            client.chat.completions.create(**{"model": MODEL, "messages": QUESTION, **changes})
        except kind as error:
            return error
        raise AssertionError(f"{changes} was accepted")

    assert refused(openai.NotFoundError, model="no-such-model").code == "model_not_found"
    assert refused(openai.BadRequestError, temperature=-1).param == "temperature"
    assert refused(openai.BadRequestError, max_tokens=0).param == "max_tokens"
    assert refused(openai.BadRequestError, messages=[]).param == "messages"
    too_long = [{"role": "user", "content": "word " * 100_000}]
    assert refused(openai.BadRequestError, messages=too_long).code == "context_length_exceeded"
    assert refused(openai.BadRequestError, stream=True, top_p=2).param == "top_p"


async def many_at_once():
    """Neighbours do not change an answer."""
    many = openai.AsyncOpenAI(base_url=f"{BASE_URL}/v1", api_key="unused", timeout=300)

    async def ask(i):
        answer = await many.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": f"Write about the number {i}."}],
            temperature=0,
            max_tokens=16,
        )
        return answer.choices[0].message.content

    alone = [await ask(i) for i in range(3)]
    together = await asyncio.gather(*(ask(i) for i in range(16)))
    assert together[:3] == alone, (alone, together[:3])
    await many.close()


def leaving_early():
    with client.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=500, extra_body={"ignore_eos": True}, stream=True
    ) as stream:
        for _ in zip(stream, range(3)):
            pass


def wait_until_ready(daemon, limit=300):
    """The first start may have to fetch the model."""
    for _ in range(limit * 10):
        assert daemon.poll() is None, f"the daemon exited with {daemon.returncode}"
        try:
            with urllib.request.urlopen(f"{BASE_URL}/readyz", timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"not ready within {limit} s")


def main():
    port = BASE_URL.rsplit(":", 1)[1]
    daemon = subprocess.Popen([sys.argv[1], "serve", MODEL, "--port", port])
    try:
        wait_until_ready(daemon)
        checks = [models, chat, stream_equals_whole, several_choices, stop_strings, logprobs]
        for check in [*checks, errors, leaving_early]:
            check()
            print(f"ok {check.__name__}")
        asyncio.run(many_at_once())
        print("ok many_at_once")
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(timeout=60) == 0, daemon.returncode
        print("ok drained and exited")
    finally:
        daemon.kill()


main()
