"""What is refused, with the SDK's own exception classes, and by the name of the field."""

import re

import openai
import pytest

MESSAGES = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
SCHEMA = {"name": "s", "strict": True, "schema": {"type": "array", "uniqueItems": True}}


def chat(client, model, **options):
    options = {"messages": MESSAGES, "max_tokens": 4} | options
    return client.chat.completions.create(model=model, **options)


@pytest.mark.parametrize(("field", "value"), [
    ("temperature", 2.5),
    ("temperature", -0.1),
    ("temperature", "hot"),
    ("top_p", 1.5),
    ("frequency_penalty", -3),
    ("presence_penalty", 2.1),
    ("n", 0),
    ("max_tokens", -1),
    ("max_completion_tokens", 1.5),
    ("stop", ["1", "2", "3", "4", "5"]),
    ("top_logprobs", 3),  # without `logprobs`
    ("stream_options", {"include_usage": True}),  # without `stream`
    ("messages", []),
    ("messages", "Hello"),
    ("tools", []),
    ("tool_choice", "required"),  # without `tools`
    ("response_format", {"type": "json_schema", "json_schema": SCHEMA}),
])
def test_wrong_values_are_refused_by_name(client, model, field, value):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**({"model": model, "messages": MESSAGES} | {field: value}))
    error = caught.value
    assert error.status_code == 400
    assert error.param == field
    assert error.type == "invalid_request_error"
    assert error.code and field in error.message
    assert error.request_id == error.response.headers["x-request-id"]
    assert set(error.response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(("field", "value"), [
    ("audio", {"voice": "alloy", "format": "mp3"}),
    ("modalities", ["text", "audio"]),
])
def test_what_is_not_done_is_refused_by_name(client, model, field, value):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, model, **{field: value})
    assert caught.value.param == field
    assert caught.value.code == "unsupported_parameter"
    assert field in caught.value.message


def test_an_unknown_field_is_refused_by_name(client, model):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, model, extra_body={"tempature": 0.5})
    assert caught.value.param == "tempature"
    assert caught.value.code == "unknown_parameter"


def test_pictures_are_refused(client, model):
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, model, messages=[{"role": "user", "content": [picture]}])
    assert caught.value.param.startswith("messages")


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_an_overlong_prompt_names_both_lengths(client, model, endpoint):
    text = "Once upon a time there was a girl. " * 3_000
    with pytest.raises(openai.BadRequestError) as caught:
        if endpoint == "chat":
            chat(client, model, messages=[{"role": "user", "content": text}])
        else:
            client.completions.create(model=model, prompt=text)
    error = caught.value
    assert error.code == "context_length_exceeded"
    assert error.param == {"chat": "messages", "completions": "prompt"}[endpoint]
    limit, prompt = (int(number) for number in re.findall(r"\d+", error.body["message"])[:2])
    assert 0 < limit < prompt and prompt > 10_000
    # The limit that it names is the true one: a request for all of it but the prompt is fine.
    client.completions.create(model=model, prompt="One", max_tokens=1)
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=model, prompt="One", max_tokens=limit)
    assert caught.value.code == "context_length_exceeded"


def test_a_wrong_key(base_url, model):
    with openai.OpenAI(base_url=base_url, api_key="sk-wrong", max_retries=0) as client:
        for call in (lambda: chat(client, model), client.models.list):
            with pytest.raises(openai.AuthenticationError) as caught:
                call()
            assert caught.value.code == "invalid_api_key"


def test_an_unknown_model(client):
    for call in (
        lambda: chat(client, "no-such-model"),
        lambda: chat(client, "no-such-model", stream=True),
        lambda: client.completions.create(model="no-such-model", prompt="x"),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            call()
        assert caught.value.code == "model_not_found"
        assert caught.value.param == "model"
        assert "no-such-model" in caught.value.message


def test_an_unknown_token_id(client, model):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=model, prompt=[1, 4_000_000])
    assert caught.value.param.startswith("prompt")


def test_an_unknown_route(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.post("/no/such/route", body={}, cast_to=object)
    assert caught.value.type == "invalid_request_error"


def test_a_refused_stream_is_an_error_not_a_stream(client, model):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, model, stream=True, temperature=9)
    assert caught.value.param == "temperature"
