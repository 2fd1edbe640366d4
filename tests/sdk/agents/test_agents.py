"""The Agents SDK of OpenAI: tools, handoffs and streams, over both of its model classes."""

import json
import os
from typing import Literal

import openai
import pytest
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    RunConfig,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from pydantic import BaseModel

set_tracing_disabled(True)


class Forecast(BaseModel):
    """What an agent answers with."""

    city: Literal["Paris", "Taipei"]
    warm: bool


@pytest.fixture(params=[OpenAIChatCompletionsModel, OpenAIResponsesModel])
def model(request):
    client = openai.AsyncOpenAI(
        base_url=os.environ["HEARTH_BASE_URL"], api_key=os.environ["HEARTH_API_KEY"], max_retries=0
    )
    return request.param(model=os.environ["HEARTH_MODEL"], openai_client=client)


@pytest.fixture
def asked():
    return []


@pytest.fixture
def get_weather(asked):
    @function_tool
    def get_weather(city: Literal["Paris", "Taipei"]) -> str:
        """Weather of a place."""
        asked.append(city)
        return "sunny"

    return get_weather


def settings(**more) -> ModelSettings:
    return ModelSettings(temperature=0, max_tokens=200, **more)


QUESTION = "What is the weather in Paris?"


def kinds(result) -> list[str]:
    return [item.type for item in result.new_items]


def test_a_forced_tool_runs_and_the_agent_goes_on(model, get_weather, asked):
    agent = Agent(name="Weather", model=model, tools=[get_weather],
                  model_settings=settings(tool_choice="required"))
    result = Runner.run_sync(agent, QUESTION)
    assert kinds(result)[:2] == ["tool_call_item", "tool_call_output_item"]
    assert asked and set(asked) <= {"Paris", "Taipei"}
    assert kinds(result)[-1] == "message_output_item" and result.final_output
    assert result.context_wrapper.usage.requests == 2
    assert result.context_wrapper.usage.output_tokens > 2


def test_a_named_tool_may_be_the_answer(model, get_weather, asked):
    agent = Agent(name="Weather", model=model, tools=[get_weather],
                  tool_use_behavior="stop_on_first_tool",
                  model_settings=settings(tool_choice="get_weather"))
    assert Runner.run_sync(agent, "Hello").final_output == "sunny"
    assert len(asked) == 1


def test_a_streamed_run_has_the_same_items(model, get_weather, asked):
    import asyncio

    agent = Agent(name="Weather", model=model, tools=[get_weather],
                  model_settings=settings(tool_choice="required"))

    async def run():
        result = Runner.run_streamed(agent, QUESTION)
        return result, [event async for event in result.stream_events()]

    result, events = asyncio.run(run())
    raw = [event.data.type for event in events if event.type == "raw_response_event"]
    assert raw.count("response.completed") == 2
    assert "response.function_call_arguments.delta" in raw
    assert "response.output_text.delta" in raw
    text = "".join(event.data.delta for event in events if event.type == "raw_response_event"
                   and event.data.type == "response.output_text.delta")
    assert text == result.final_output and asked
    names = [event.name for event in events if event.type == "run_item_stream_event"]
    assert names == ["tool_called", "tool_output", "message_output_created"]


def test_a_handoff_gives_the_talk_to_another(model):
    other = Agent(name="Other", model=model, instructions="Be brief.", model_settings=settings())
    first = Agent(name="First", model=model, handoffs=[other],
                  model_settings=settings(tool_choice="transfer_to_other"))
    result = Runner.run_sync(first, "Hello")
    assert result.last_agent is other
    assert kinds(result) == ["handoff_call_item", "handoff_output_item", "message_output_item"]
    assert result.final_output


def test_an_answer_of_a_class(model):
    agent = Agent(name="Forecast", model=model, output_type=Forecast, model_settings=settings())
    assert isinstance(Runner.run_sync(agent, QUESTION).final_output, Forecast)


def test_a_second_turn_follows_the_first(model, get_weather):
    agent = Agent(name="Weather", model=model, tools=[get_weather],
                  model_settings=settings(tool_choice="required"))
    first = Runner.run_sync(agent, QUESTION)
    talk = [*first.to_input_list(), {"role": "user", "content": "Hello"}]
    calm = Agent(name="Calm", model=model, model_settings=settings())
    second = Runner.run_sync(calm, talk, run_config=RunConfig(tracing_disabled=True))
    assert second.final_output and len(second.to_input_list()) == len(talk) + 1


def test_an_error_comes_through(model):
    agent = Agent(name="Hot", model=model, model_settings=ModelSettings(temperature=3))
    with pytest.raises(openai.BadRequestError) as caught:
        Runner.run_sync(agent, "Hello")
    assert caught.value.param == "temperature"


def test_a_tool_of_its_own_schema(model):
    seen = []

    @function_tool(strict_mode=True)
    def order(size: Literal["small", "large"], count: Literal[1, 2]) -> str:
        """Order a drink."""
        seen.append(json.dumps([size, count]))
        return "done"

    agent = Agent(name="Bar", model=model, tools=[order], tool_use_behavior="stop_on_first_tool",
                  model_settings=settings(tool_choice="required", parallel_tool_calls=False))
    assert Runner.run_sync(agent, "Hello").final_output == "done"
    assert len(seen) == 1
