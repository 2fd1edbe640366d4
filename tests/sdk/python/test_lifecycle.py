"""Clients that leave, clients that give up, and many clients at once."""

import asyncio
import time

import openai
import pytest

# Long enough to be in the middle of it when the client goes: 16 x 400 tokens.
LONG = {"prompt": "Once upon a time", "max_tokens": 400, "n": 16, "temperature": 1, "seed": 1,
        "extra_body": {"ignore_eos": True}}
LONG_TOKENS = 16 * 400


@pytest.fixture
def idle(server):
    """Nothing runs before the test, and nothing is left behind after it."""
    server.wait_until_idle(20)
    yield server
    server.wait_until_idle(20)


def test_a_finished_request_leaves_nothing_behind(client, idle, model):
    client.completions.create(model=model, prompt="Once", max_tokens=5)
    idle.wait_until_idle(1)


def test_a_client_that_leaves_a_stream_frees_its_blocks(client, idle, model):
    generated = idle.metric("hearth_generated_tokens_total")
    stream = client.completions.create(model=model, stream=True, **LONG)
    next(iter(stream))
    load = idle.load()
    assert load["hearth_requests_running"] > 0 and load["hearth_kv_blocks_used"] > 0
    stream.close()
    idle.wait_until_idle(5)
    # It stopped because the client left, not because it was done.
    assert idle.metric("hearth_generated_tokens_total") - generated < LONG_TOKENS * 0.9


def test_an_asynchronous_client_that_leaves(async_client, idle, model):
    generated = idle.metric("hearth_generated_tokens_total")

    async def leave():
        async with async_client() as client:
            async with await client.completions.create(model=model, stream=True, **LONG) as stream:
                async for _ in stream:
                    break

    asyncio.run(leave())
    idle.wait_until_idle(5)
    assert idle.metric("hearth_generated_tokens_total") - generated < LONG_TOKENS * 0.9


def test_a_client_that_times_out(client, idle, model):
    generated = idle.metric("hearth_generated_tokens_total")
    started = time.monotonic()
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.05).completions.create(model=model, **LONG)
    assert time.monotonic() - started < 5
    idle.wait_until_idle(5)
    assert idle.metric("hearth_generated_tokens_total") - generated < LONG_TOKENS * 0.9
    assert idle.status("/health") == idle.status("/ready") == 200
    answer = client.completions.create(model=model, prompt="Once", max_tokens=2)
    assert answer.choices[0].text


def test_eight_streams_at_once_say_what_each_says_alone(async_client, idle, model):
    """A seeded request does not depend on its neighbours, to the letter."""
    requests = [
        {"messages": [{"role": "user", "content": f"A story about {who}"}], "seed": seed,
         "temperature": 1, "max_tokens": 60 + seed}
        for seed, who in enumerate(["a cat", "a dog", "Tim", "Lily", "the sun and the moon and all"
                                    " the stars", "rain", "a very big red ball", "x"])
    ]

    async def text(client, request):
        stream = await client.chat.completions.create(model=model, stream=True, **request)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def run():
        async with async_client() as client:
            alone = [await text(client, request) for request in requests]
            together = await asyncio.gather(*(text(client, request) for request in requests))
        return alone, together

    alone, together = asyncio.run(run())
    assert len(set(alone)) == len(alone) and all(alone)
    assert list(together) == alone


def test_greedy_text_in_a_crowd_is_the_reference(async_client, idle, model, goldens):
    async def run():
        async with async_client() as client:
            return await asyncio.gather(*(
                client.completions.create(model=model, prompt=golden.prompt, temperature=0,
                                          max_tokens=len(golden.ids))
                for golden in goldens * 3
            ))

    for answer, golden in zip(asyncio.run(run()), goldens * 3):
        text = answer.choices[0].text
        assert (text if golden.prompt else text.removeprefix(" ")) == golden.text
