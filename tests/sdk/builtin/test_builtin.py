"""The Python client against `hearth serve` as a fresh machine has it: no model named, no network."""

import os

import openai
import pytest

MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def client() -> openai.OpenAI:
    return openai.OpenAI(
        base_url=os.environ["HEARTH_BASE_URL"], api_key=os.environ["HEARTH_API_KEY"], max_retries=0
    )


def test_it_is_listed(client):
    assert [model.id for model in client.models.list()] == ["hearth-tiny"]


def test_it_greets_and_stops_by_itself(client):
    answer = client.chat.completions.create(model="hearth-tiny", messages=MESSAGES, temperature=0)
    [choice] = answer.choices
    assert choice.finish_reason == "stop"
    assert choice.message.content.startswith("Hello")
    assert answer.usage.completion_tokens < 100


def test_a_stream_says_the_same(client):
    ask = {"model": "hearth-tiny", "messages": MESSAGES, "temperature": 0}
    whole = client.chat.completions.create(**ask).choices[0].message.content
    chunks = client.chat.completions.create(**ask, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole


def test_another_model_is_not_there(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4o", messages=MESSAGES)
    assert caught.value.code == "model_not_found"
