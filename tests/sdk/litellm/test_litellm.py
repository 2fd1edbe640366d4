"""LiteLLM as a client: its `openai/` provider, which many gateways and tools are built on."""

import json
import os

import litellm
import pytest

MODEL = "openai/" + os.environ["HEARTH_MODEL"]
MESSAGES = [{"role": "user", "content": "Hello"}]
CITY = {"type": "object", "properties": {"city": {"enum": ["Paris", "Taipei"]}},
        "required": ["city"], "additionalProperties": False}
TOOLS = [{"type": "function", "function": {
    "name": name, "description": name, "parameters": CITY, "strict": True,
}} for name in ("get_weather", "get_time")]
SERVER = {"api_base": os.environ["HEARTH_BASE_URL"], "api_key": os.environ["HEARTH_API_KEY"],
          "max_retries": 0}


def ask(**options):
    return litellm.completion(
        **({"model": MODEL, "messages": MESSAGES, "temperature": 0} | SERVER | options))


def test_a_completion_and_its_stream_say_the_same():
    whole = ask()
    [choice] = whole.choices
    assert choice.finish_reason == "stop" and choice.message.content.startswith("Hello")
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    built = litellm.stream_chunk_builder(chunks)
    assert built.choices[0].message.content == choice.message.content
    assert built.usage.completion_tokens == whole.usage.completion_tokens > 1
    assert built.usage.prompt_tokens == whole.usage.prompt_tokens


@pytest.mark.parametrize("name", ["get_weather", "get_time"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_named_tool(name, stream):
    answer = ask(tools=TOOLS, tool_choice={"type": "function", "function": {"name": name}},
                 stream=stream)
    if stream:
        answer = litellm.stream_chunk_builder(list(answer))
    [call] = answer.choices[0].message.tool_calls
    assert call.function.name == name and call.id.startswith("call_")
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Taipei")


def test_a_required_tool_and_its_answer():
    first = ask(tools=TOOLS, tool_choice="required").choices[0]
    assert first.finish_reason == "tool_calls"
    results = [{"role": "tool", "tool_call_id": call.id, "content": "sunny"}
               for call in first.message.tool_calls]
    second = ask(messages=[*MESSAGES, first.message, *results], tools=TOOLS, tool_choice="none")
    assert second.choices[0].message.content and not second.choices[0].message.tool_calls


def test_a_schema():
    form = {"type": "json_schema",
            "json_schema": {"name": "place", "schema": CITY, "strict": True}}
    content = ask(response_format=form).choices[0].message.content
    assert json.loads(content)["city"] in ("Paris", "Taipei")


def test_text_completions():
    answer = litellm.text_completion(
        model="text-completion-openai/" + os.environ["HEARTH_MODEL"], prompt="Hello",
        max_tokens=5, temperature=0, **SERVER)
    assert answer.choices[0].text and answer.usage.completion_tokens <= 5


def test_responses_whole_and_streamed():
    options = {"model": MODEL, "input": "Hello", "temperature": 0} | SERVER
    whole = litellm.responses(**options)
    assert whole.status == "completed"
    text = whole.output[0].content[0].text
    events = list(litellm.responses(**options, stream=True))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == text and len(deltas) > 1
    assert events[-1].type == "response.completed"


def test_a_tool_of_responses():
    tool = {"type": "function", "name": "get_weather", "parameters": CITY, "strict": True}
    answer = litellm.responses(
        model=MODEL, input="Hello", temperature=0, tools=[tool], tool_choice="required", **SERVER)
    call = answer.output[-1]
    assert (call.type, call.name) == ("function_call", "get_weather")
    assert json.loads(call.arguments)["city"] in ("Paris", "Taipei")


def test_errors_are_of_their_class():
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        ask(temperature=3)
    with pytest.raises(litellm.NotFoundError, match="no-such"):
        ask(model="openai/no-such")
    with pytest.raises(litellm.AuthenticationError):
        ask(api_key="wrong")
    with pytest.raises(litellm.ContextWindowExceededError):
        ask(messages=[{"role": "user", "content": "word " * 5000}])
