"""What grammars force whatever the model is able to: names, arguments and objects of a form."""

import os
from typing import Literal

import pytest
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


@tool
def paint(colour: Literal["red", "green"], coats: Literal[1, 2]) -> str:
    """Paint the wall."""
    return f"{colour} {coats}"


@tool
def wait(minutes: Literal[1, 5]) -> str:
    """Wait."""
    return str(minutes)


class Wall(BaseModel):
    """A wall."""

    colour: Literal["red", "green"]
    dry: bool


@pytest.fixture(params=[False, True], ids=["chat", "responses"])
def model(request) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=os.environ["HEARTH_BASE_URL"], api_key=os.environ["HEARTH_API_KEY"],
        model=os.environ["HEARTH_MODEL"], temperature=0, max_retries=0, max_tokens=200,
        use_responses_api=request.param,
    )


@pytest.mark.parametrize("named", [paint, wait])
def test_a_named_tool_is_called_and_runs(model, named):
    bound = model.bind_tools([paint, wait], tool_choice=named.name, strict=True)
    [call] = bound.invoke("Hello").tool_calls
    assert call["name"] == named.name and call["id"].startswith("call_")
    assert named.invoke(call["args"])
    whole = None
    for chunk in bound.stream("Hello"):
        whole = chunk if whole is None else whole + chunk
    assert [(one["name"], one["args"]) for one in whole.tool_calls] == [(named.name, call["args"])]


def test_any_tool_is_called_and_its_answer_taken(model):
    question = ("human", "What is the weather?")
    first = model.bind_tools([paint, wait], tool_choice="any").invoke([question])
    assert first.tool_calls
    tools = {"paint": paint, "wait": wait}
    results = [tools[call["name"]].invoke(call) for call in first.tool_calls]
    second = model.bind_tools([paint, wait], tool_choice="none").invoke(
        [question, first, *results])
    assert not second.tool_calls and second.text


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_an_object_of_the_class(model, method):
    shaped = model.with_structured_output(Wall, method=method, strict=True)
    assert isinstance(shaped.invoke("Hello"), Wall)
    assert isinstance(list(shaped.stream("Hello"))[-1], Wall)
