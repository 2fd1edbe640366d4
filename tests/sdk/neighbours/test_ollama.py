"""Ollama's own Python client against the built-in model."""

import json
import os

import ollama
import pytest

MODEL = "hearth-tiny"
HELLO = [{"role": "user", "content": "Hello"}]
WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]
GREEDY = {"temperature": 0, "num_predict": 100}
PLACE = {"type": "object", "properties": {"city": {"enum": ["Paris", "Taipei"]}},
         "required": ["city"], "additionalProperties": False}


def get_weather(city: str) -> str:
    """Weather of a place

    Args:
      city: Which one.
    """
    return f"sunny in {city}"


def set_timer(minutes: int) -> str:
    """Start a timer

    Args:
      minutes: How many.
    """
    return f"{minutes} minutes"


# There is no field that forces a call; with a choice of two the model makes it by itself.
TOOLS = [get_weather, set_timer]


def connect(key: str) -> ollama.Client:
    host = os.environ["HEARTH_BASE_URL"].removesuffix("/v1")
    return ollama.Client(host=host, headers={"Authorization": f"Bearer {key}"})


@pytest.fixture
def client() -> ollama.Client:
    return connect(os.environ["HEARTH_API_KEY"])


@pytest.mark.parametrize("name", [MODEL, f"{MODEL}:latest"])
def test_it_greets_and_tells_its_times(client, name):
    answer = client.chat(model=name, messages=HELLO, options=GREEDY)
    assert answer.model == name and answer.message.role == "assistant"
    assert answer.message.content.startswith("Hello")
    assert (answer.done, answer.done_reason) == (True, "stop")
    assert answer.prompt_eval_count > 0 and 0 < answer.eval_count < 100
    assert answer.total_duration >= answer.eval_duration > 1_000
    assert answer.load_duration < answer.total_duration


def test_a_stream_says_the_same_line_by_line(client):
    whole = client.chat(model=MODEL, messages=HELLO, options=GREEDY)
    parts = list(client.chat(model=MODEL, messages=HELLO, options=GREEDY, stream=True))
    assert "".join(part.message.content for part in parts) == whole.message.content
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert (parts[-1].done_reason, parts[-1].eval_count) == ("stop", whole.eval_count)


def test_a_prompt_is_asked_in_the_template_and_raw(client):
    chat = client.chat(model=MODEL, messages=HELLO, options=GREEDY)
    made = client.generate(model=MODEL, prompt="Hello", options=GREEDY)
    assert made.response == chat.message.content
    told = client.generate(model=MODEL, prompt="Hello", system="Be brief.", options=GREEDY)
    assert told.prompt_eval_count > made.prompt_eval_count
    raw = client.generate(model=MODEL, prompt="Hello", raw=True, options={"num_predict": 3})
    assert raw.prompt_eval_count < made.prompt_eval_count and raw.done_reason == "length"
    parts = list(client.generate(model=MODEL, prompt="Hello", options=GREEDY, stream=True))
    assert "".join(part.response for part in parts) == made.response


def test_options_do_what_they_say(client):
    text = client.chat(model=MODEL, messages=HELLO, options=GREEDY).message.content
    stop = text[3:5]
    stopped = client.chat(model=MODEL, messages=HELLO, options={**GREEDY, "stop": [stop]})
    assert stopped.message.content == text.split(stop)[0] and stopped.done_reason == "stop"
    hot = {"temperature": 2.0, "seed": 5, "num_predict": 20, "top_k": 0, "num_ctx": 2048}
    once, twice = (
        client.chat(model=MODEL, messages=HELLO, options=hot).message.content for _ in range(2))
    assert once == twice
    other = client.chat(model=MODEL, messages=HELLO, options={**hot, "seed": 6}).message.content
    assert other != once


def test_a_format_is_followed(client):
    answer = client.chat(model=MODEL, messages=HELLO, format=PLACE, options=GREEDY)
    assert json.loads(answer.message.content)["city"] in ("Paris", "Taipei")
    made = client.generate(model=MODEL, prompt="Hello", format=PLACE, options=GREEDY)
    assert json.loads(made.response)["city"] in ("Paris", "Taipei")


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_goes_out_and_its_result_comes_back(client, stream):
    answer = client.chat(
        model=MODEL, messages=WEATHER, tools=TOOLS, options=GREEDY, stream=stream)
    parts = list(answer) if stream else [answer]
    [call] = [call for part in parts for call in part.message.tool_calls or []]
    assert call.function.name == "get_weather" and list(call.function.arguments) == ["city"]
    assert parts[-1].done_reason == "stop"
    result = {"role": "tool", "tool_name": "get_weather",
              "content": get_weather(**call.function.arguments)}
    said = [*WEATHER, {"role": "assistant", "tool_calls": [call]}, result]
    answer = client.chat(model=MODEL, messages=said, tools=TOOLS, options=GREEDY)
    assert "sunny" in answer.message.content


def test_log_probabilities_come_for_every_token(client):
    answer = client.chat(
        model=MODEL, messages=HELLO, logprobs=True, top_logprobs=2,
        options={"temperature": 0, "num_predict": 4})
    assert len(answer.logprobs) == 4 == answer.eval_count
    assert all(token.top_logprobs[0].token == token.token for token in answer.logprobs)


def test_models_say_what_they_are(client):
    [model] = client.list().models
    assert model.model == f"{MODEL}:latest" and len(model.digest) == 64 and model.size > 1_000_000
    details = model.details
    assert details.format == "gguf" and details.family and details.quantization_level
    assert details.parameter_size[-1] in "MB"
    shown = client.show(model.model)
    assert shown.details == details and {"completion", "tools"} <= set(shown.capabilities)
    family = details.family
    assert shown.modelinfo["general.architecture"] == family
    assert shown.modelinfo[f"{family}.block_count"] > 0 and "{%" in shown.template
    [running] = client.ps().models
    assert running.model == model.model and running.expires_at and running.size > 0
    assert running.context_length == shown.modelinfo[f"{family}.context_length"] or \
        running.context_length > 0


def test_to_ask_nothing_loads(client):
    answer = client.generate(model=MODEL, keep_alive="5m")
    assert (answer.done, answer.done_reason, answer.response) == (True, "load", "")
    assert client.chat(model=MODEL, messages=[]).done_reason == "load"


def test_refusals_are_ollamas(client):
    def refused(status, **fields):
        fields = {"model": MODEL, "messages": HELLO} | fields
        with pytest.raises(ollama.ResponseError) as caught:
            client.chat(**fields)
        assert caught.value.status_code == status
        return caught.value.error
    assert "options.mirostat" in refused(400, options={"mirostat": 1})
    assert "options.temprature" in refused(400, options={"temprature": 1})
    assert "think" in refused(400, think=True)
    image = [{"role": "user", "content": "a", "images": [b"aa"]}]
    assert "messages[0].images" in refused(400, messages=image)
    assert "llama3" in refused(404, model="llama3")
    with pytest.raises(ollama.ResponseError) as caught:
        list(client.chat(model=MODEL, messages=HELLO, options={"top_p": 2}, stream=True))
    assert "options.top_p" in caught.value.error
    with pytest.raises(ollama.ResponseError) as caught:
        client.embed(model=MODEL, input=["a"])
    assert caught.value.status_code == 400 and "model" in caught.value.error
    with pytest.raises(ollama.ResponseError) as caught:
        connect("sk-wrong").list()
    assert caught.value.status_code == 401
