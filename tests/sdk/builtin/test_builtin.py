"""The Python client against `hearth serve` as a fresh machine has it: no model named, no network."""

import json
import os

import openai
import pydantic
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


def function(name, description, **properties):
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {
        "name": name, "description": description, "parameters": parameters}}


TOOLS = [
    function("get_weather", "Weather of a place", city={"type": "string"}),
    function("set_timer", "Start a timer", minutes={"type": "integer"}),
]
WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]


def ask(client, **options):
    options = {"model": "hearth-tiny", "messages": WEATHER, "temperature": 0} | options
    return client.chat.completions.create(**options)


def test_it_calls_a_tool_by_itself_and_goes_on_with_the_result(client):
    [choice] = ask(client, tools=TOOLS).choices
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    [call] = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "get_weather")
    assert list(json.loads(call.function.arguments)) == ["city"]
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    [choice] = ask(client, tools=TOOLS, messages=[*WEATHER, choice.message, result]).choices
    assert choice.finish_reason == "stop" and "sunny" in choice.message.content


def test_a_streamed_call_is_the_whole_one_in_pieces(client):
    [whole] = ask(client, tools=TOOLS).choices[0].message.tool_calls
    with client.chat.completions.stream(
        model="hearth-tiny", messages=WEATHER, temperature=0, tools=TOOLS
    ) as stream:
        names = [event.name for event in stream
                 if event.type == "tool_calls.function.arguments.delta"]
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    [call] = final.message.tool_calls
    assert call.function.arguments == whole.function.arguments
    assert len(names) > 1 and set(names) == {"get_weather"}


@pytest.mark.parametrize("name", ["get_weather", "set_timer"])
def test_a_named_tool_is_called_whatever_was_said(client, name):
    choice = {"type": "function", "function": {"name": name}}
    [call] = ask(client, tools=TOOLS, tool_choice=choice, messages=MESSAGES).choices[
        0].message.tool_calls
    [value] = json.loads(call.function.arguments).values()
    assert call.function.name == name
    assert isinstance(value, {"get_weather": str, "set_timer": int}[name])


def test_required_and_none(client):
    required = ask(client, tools=TOOLS, tool_choice="required", messages=MESSAGES).choices[0]
    assert required.message.tool_calls
    none = ask(client, tools=TOOLS, tool_choice="none").choices[0]
    assert none.message.tool_calls is None and none.finish_reason == "stop"


FUNCTIONS = [tool["function"] for tool in TOOLS]


def test_functions_are_called_and_answered_as_before_there_were_tools(client):
    [choice] = ask(client, functions=FUNCTIONS).choices
    assert choice.finish_reason == "function_call" and choice.message.content is None
    call = choice.message.function_call
    assert call.name == "get_weather" and choice.message.tool_calls is None
    assert list(json.loads(call.arguments)) == ["city"]
    result = {"role": "function", "name": call.name, "content": "sunny"}
    [choice] = ask(client, functions=FUNCTIONS, messages=[*WEATHER, choice.message, result]).choices
    assert choice.finish_reason == "stop" and "sunny" in choice.message.content


def test_a_streamed_function_call_comes_name_first_then_in_pieces(client):
    whole = ask(client, functions=FUNCTIONS).choices[0].message.function_call
    choices = [chunk.choices[0] for chunk in ask(client, functions=FUNCTIONS, stream=True)]
    calls = [c.delta.function_call for c in choices if c.delta.function_call]
    assert [call.name for call in calls] == ["get_weather"] + [None] * (len(calls) - 1)
    assert len(calls) > 2 and "".join(call.arguments for call in calls) == whole.arguments
    assert choices[-1].finish_reason == "function_call"


@pytest.mark.parametrize("name", ["get_weather", "set_timer"])
def test_a_named_function_is_called_whatever_was_said(client, name):
    named = {"functions": FUNCTIONS, "function_call": {"name": name}, "messages": MESSAGES}
    call = ask(client, **named).choices[0].message.function_call
    [value] = json.loads(call.arguments).values()
    assert call.name == name
    assert isinstance(value, {"get_weather": str, "set_timer": int}[name])
    none = ask(client, functions=FUNCTIONS, function_call="none").choices[0]
    assert none.message.function_call is None and none.finish_reason == "stop"


def test_functions_and_tools_at_once_are_refused(client):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, functions=FUNCTIONS, tools=TOOLS)
    assert caught.value.param == "functions"


class Person(pydantic.BaseModel):
    """What `parse` asks for."""

    name: str
    city: str


def test_parse_gives_an_object_of_the_class(client):
    content = "Mirka lives in Torvin.\nAnswer in JSON with the keys name, city."
    answer = client.chat.completions.parse(
        model="hearth-tiny", messages=[{"role": "user", "content": content}],
        response_format=Person, max_completion_tokens=400, temperature=0,
    )
    assert answer.choices[0].message.parsed == Person(name="Mirka", city="Torvin")


def test_parse_gives_the_arguments_of_a_call(client):
    class GetWeather(pydantic.BaseModel):
        """Weather of a place."""

        city: str

    answer = client.chat.completions.parse(
        model="hearth-tiny", messages=WEATHER, temperature=0, tool_choice="required",
        tools=[openai.pydantic_function_tool(GetWeather, name="get_weather")],
    )
    [call] = answer.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, GetWeather)


def test_a_schema_that_cannot_be_kept_to_is_named(client):
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, response_format={
            "type": "json_schema", "json_schema": {"name": "n", "schema": schema}})
    assert caught.value.param == "response_format" and "uniqueItems" in caught.value.message
