"""Tools and formats of responses on the built-in model, which grammars hold to their form."""

import json
import os

import openai
import pytest

TOOL = {
    "type": "function", "name": "get_weather", "strict": True,
    "parameters": {"type": "object", "properties": {"city": {"enum": ["Paris", "Taipei"]}},
                   "required": ["city"], "additionalProperties": False},
}


MODEL = "hearth-tiny"


@pytest.fixture
def client() -> openai.OpenAI:
    return openai.OpenAI(
        base_url=os.environ["HEARTH_BASE_URL"], api_key=os.environ["HEARTH_API_KEY"], max_retries=0
    )


@pytest.fixture
def ask(client):
    return lambda **fields: client.responses.create(
        **({"model": MODEL, "input": "What is the weather in Paris?", "temperature": 0} | fields))


def test_a_required_tool_is_called_and_its_answer_taken(ask):
    first = ask(tools=[TOOL], tool_choice="required")
    call = first.output[-1]
    assert (call.type, call.name) == ("function_call", "get_weather")
    assert json.loads(call.arguments)["city"] in ("Paris", "Taipei")
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny, 20 C"}
    second = ask(input=[output], previous_response_id=first.id, tools=[TOOL], tool_choice="none",
                 max_output_tokens=40)
    assert second.output[0].type == "message"


def test_a_streamed_call_is_put_together_by_the_sdk(client):
    with client.responses.stream(model=MODEL, input="Weather in Taipei?", tools=[TOOL],
                                 tool_choice={"type": "function", "name": "get_weather"},
                                 temperature=0) as stream:
        kinds = [event.type for event in stream]
        call = stream.get_final_response().output[-1]
    assert "response.function_call_arguments.delta" in kinds
    at = kinds.index("response.function_call_arguments.done")
    assert kinds[at + 1] == "response.output_item.done"
    assert call.parsed_arguments["city"] in ("Paris", "Taipei")


def test_a_schema_is_followed(ask):
    schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Taipei"]}},
              "required": ["city"], "additionalProperties": False}
    form = {"type": "json_schema", "name": "place", "schema": schema, "strict": True}
    response = ask(text={"format": form})
    assert json.loads(response.output_text)["city"] in ("Paris", "Taipei")
    assert response.text.format.name == "place"
