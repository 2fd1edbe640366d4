"""What was used, by the client's own resource where it has one."""

import time

import openai
import pytest

if not hasattr(openai.OpenAI, "admin"):
    pytest.skip("this client knows no usage", allow_module_level=True)


@pytest.fixture
def usage(base_url, api_key):
    """The sums of today's buckets: requests, tokens of prompts, tokens of answers."""
    client = openai.OpenAI(base_url=base_url, api_key=api_key, admin_api_key=api_key)
    names = ("num_model_requests", "input_tokens", "output_tokens")

    def sums():
        today = int(time.time()) - 86_400
        page = client.admin.organization.usage.completions(start_time=today, bucket_width="1d")
        results = [result for bucket in page.data for result in bucket.results]
        return [sum(getattr(result, name) for result in results) for name in names]

    with client:
        yield sums


def settled(usage, before, requests):
    for _ in range(200):
        now = usage()
        if now[0] >= before[0] + requests:
            break
        time.sleep(0.02)
    return [after - earlier for after, earlier in zip(now, before)]


def test_what_is_told_is_what_is_counted(client, model, usage):
    before = usage()
    messages = [{"role": "user", "content": "Hello"}]
    chat = client.chat.completions.create(model=model, messages=messages, n=2, max_tokens=5)
    said = chat.usage
    assert settled(usage, before, 1) == [1, said.prompt_tokens, said.completion_tokens]


def test_a_stream_that_is_left_is_counted(client, model, usage):
    before = usage()
    stream = client.completions.create(
        model=model, prompt="Once", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
    )
    read = [next(iter(stream)) for _ in range(5)]
    stream.close()
    requests, prompt, answer = settled(usage, before, 1)
    assert (requests, answer >= len(read) > 0, prompt > 0) == (1, True, True)
