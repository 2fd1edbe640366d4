"""Anthropic's own Python client against the built-in model, which grammars hold to its tools."""

import os

import anthropic
import pytest

MODEL = "hearth-tiny"
HELLO = [{"role": "user", "content": "Hello"}]
WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]
TOOL = {
    "name": "get_weather", "description": "Weather of a place",
    "input_schema": {"type": "object", "properties": {"city": {"enum": ["Paris", "Taipei"]}},
                     "required": ["city"], "additionalProperties": False},
}
ROOT = os.environ["HEARTH_BASE_URL"].removesuffix("/v1")
KEY = os.environ["HEARTH_API_KEY"]


@pytest.fixture
def client() -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=ROOT, api_key=KEY, max_retries=0)


# Sampling is not in the client's signature any more; the API has it all the same.
GREEDY = {"extra_body": {"temperature": 0}}


def ask(client, **fields):
    fields = {"model": MODEL, "max_tokens": 100, "messages": HELLO} | GREEDY | fields
    return client.messages.create(**fields)


def test_it_greets_and_ends_its_turn(client):
    message = ask(client)
    [block] = message.content
    assert (message.type, message.role, message.model) == ("message", "assistant", MODEL)
    assert block.type == "text" and block.text.startswith("Hello")
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    usage = message.usage
    assert usage.input_tokens + usage.cache_read_input_tokens > 0 < usage.output_tokens < 100
    assert message._request_id.startswith("req_")


def test_a_stream_adds_up_in_the_order_of_its_events(client):
    whole = ask(client)
    fields = {"model": MODEL, "max_tokens": 100, "messages": HELLO} | GREEDY
    kinds = [event.type for event in client.messages.create(**fields, stream=True)]
    # The client keeps pings to itself.
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    with client.messages.stream(**fields) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text == whole.content[0].text
    assert final.stop_reason == "end_turn"
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_limits_and_stop_sequences_are_named(client):
    text = ask(client).content[0].text
    short = ask(client, max_tokens=1)
    assert (short.stop_reason, short.usage.output_tokens) == ("max_tokens", 1)
    stop = text[3:5]
    stopped = ask(client, stop_sequences=["never said", stop])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop)
    assert stopped.content[0].text == text.split(stop)[0]
    # More than the context has room for ends where the context does.
    assert ask(client, max_tokens=20_000).stop_reason == "end_turn"


def test_a_system_prompt_is_a_string_or_blocks_and_counts(client):
    def count(**fields):
        return client.messages.count_tokens(model=MODEL, messages=HELLO, **fields).input_tokens
    bare = count()
    blocks = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    assert count(system="Be brief.") == count(system=blocks) > bare
    assert count(tools=[TOOL]) > bare + 10
    usage = ask(client).usage
    assert usage.input_tokens + usage.cache_read_input_tokens == bare


def test_a_prompt_that_was_there_before_is_read_from_the_cache(client):
    long = [{"role": "user", "content": "Say hello to everybody on this list. " * 8}]
    first, second = (ask(client, messages=long, max_tokens=2).usage for _ in range(2))
    assert second.cache_read_input_tokens > 0
    whole = [u.input_tokens + u.cache_read_input_tokens for u in (first, second)]
    assert whole[0] == whole[1]


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_a_call_goes_out_and_its_result_comes_back(client, choice):
    choice = choice | {"disable_parallel_tool_use": True}
    message = ask(client, messages=WEATHER, tools=[TOOL], tool_choice=choice)
    [block] = message.content
    assert (message.stop_reason, block.type, block.name) == ("tool_use", "tool_use", "get_weather")
    assert block.id.startswith("toolu_") and block.input["city"] in ("Paris", "Taipei")
    result = {"type": "tool_result", "tool_use_id": block.id, "content": "sunny"}
    said = [*WEATHER, {"role": "assistant", "content": message.content},
            {"role": "user", "content": [result]}]
    answer = ask(client, messages=said, tools=[TOOL])
    assert answer.stop_reason == "end_turn" and "sunny" in answer.content[0].text


def test_a_streamed_call_is_put_together_by_the_client(client):
    with client.messages.stream(
        model=MODEL, max_tokens=100, messages=WEATHER, tools=[TOOL], tool_choice={"type": "any"},
        **GREEDY,
    ) as stream:
        deltas = [event.delta.type for event in stream if event.type == "content_block_delta"]
        final = stream.get_final_message()
    assert set(deltas) == {"input_json_delta"} and final.stop_reason == "tool_use"
    assert final.content[0].input["city"] in ("Paris", "Taipei")


def test_no_tool_is_called_that_may_not_be(client):
    message = ask(client, messages=WEATHER, tools=[TOOL], tool_choice={"type": "none"})
    assert [block.type for block in message.content] == ["text"]


def test_a_schema_is_followed(client):
    schema = TOOL["input_schema"]
    message = ask(client, output_config={"format": {"type": "json_schema", "schema": schema}})
    assert '"city"' in message.content[0].text and message.stop_reason == "end_turn"


def test_refusals_are_anthropics(client):
    def refused(kind, **fields):
        with pytest.raises(kind) as caught:
            ask(client, **fields)
        body = caught.value.body
        assert body["type"] == "error" and body["request_id"].startswith("req_")
        return body["error"]["type"], body["error"]["message"]
    kind, message = refused(anthropic.BadRequestError, messages=[])
    assert kind == "invalid_request_error" and "messages" in message
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
    _, message = refused(
        anthropic.BadRequestError, messages=[{"role": "user", "content": [image]}])
    assert "messages[0].content[0]" in message and "image" in message
    _, message = refused(anthropic.BadRequestError, extra_body={"tempature": 1})
    assert "tempature" in message
    thinking = {"type": "enabled", "budget_tokens": 1024}
    _, message = refused(anthropic.BadRequestError, max_tokens=2048, thinking=thinking)
    assert "thinking" in message
    assert refused(anthropic.NotFoundError, model="claude")[0] == "not_found_error"
    client.api_key = "sk-wrong"
    assert refused(anthropic.AuthenticationError)[0] == "authentication_error"


def test_a_key_may_come_in_anthropics_header():
    client = anthropic.Anthropic(
        base_url=ROOT, api_key="unused", max_retries=0,
        default_headers={"Authorization": anthropic.omit, "x-api-key": KEY})
    assert ask(client, max_tokens=1).stop_reason == "max_tokens"
