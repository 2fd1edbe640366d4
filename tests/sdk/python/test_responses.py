"""Responses and conversations, with the accumulator of the SDK as the judge of the stream."""

import time

import openai
import pytest
from openai.resources.responses import Responses

OLD = not hasattr(Responses, "compact")


def respond(client, model, **fields):
    fields = {"input": "Once upon a time", "temperature": 0, "max_output_tokens": 16} | fields
    return client.responses.create(model=model, **fields)


def test_a_response_is_kept_and_shown_again(client, model):
    response = respond(client, model, metadata={"k": "v"})
    assert response.output_text
    assert response.status in ("completed", "incomplete")
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert client.responses.retrieve(response.id) == response
    items = client.responses.input_items.list(response.id).data
    assert items[0].content[0].text == "Once upon a time"
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def test_the_stream_helper_accepts_every_event(client, model):
    whole = respond(client, model)
    kinds = []
    with client.responses.stream(model=model, input="Once upon a time", temperature=0,
                                 max_output_tokens=16) as stream:
        for event in stream:
            kinds.append(event.type)
        if "response.completed" in kinds:
            assert stream.get_final_response().output_text == whole.output_text
    assert kinds[:4] == ["response.created", "response.in_progress", "response.output_item.added",
                         "response.content_part.added"]
    assert kinds[-4:] == ["response.output_text.done", "response.content_part.done",
                          "response.output_item.done", f"response.{whole.status}"]


def test_a_plain_stream_says_what_the_whole_one_says(client, model):
    events = list(respond(client, model, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == respond(client, model).output_text == events[-1].response.output_text
    assert {e.item_id for e in events if hasattr(e, "item_id")} == {events[-1].response.output[0].id}


def test_responses_follow_each_other(client, model):
    first = respond(client, model)
    second = respond(client, model, input="And then", previous_response_id=first.id)
    said = [{"role": "user", "content": "Once upon a time"}, *first.output,
            {"role": "user", "content": "And then"}]
    assert second.output_text == respond(client, model, input=said).output_text
    with pytest.raises(openai.BadRequestError) as caught:
        respond(client, model, previous_response_id="resp_none")
    assert caught.value.param == "previous_response_id"


def test_a_conversation_grows(client, model):
    conversation = client.conversations.create(
        items=[{"role": "user", "content": "Hello"}], metadata={"k": "v"})
    response = respond(client, model, conversation=conversation.id)
    assert response.conversation.id == conversation.id
    items = list(client.conversations.items.list(conversation.id, order="asc", limit=1))
    assert [item.role for item in items] == ["user", "user", "assistant"]
    assert items[2].content[0].text == response.output_text
    item = client.conversations.items.retrieve(items[0].id, conversation_id=conversation.id)
    assert item == items[0]
    client.conversations.items.delete(items[0].id, conversation_id=conversation.id)
    added = client.conversations.items.create(
        conversation.id, items=[{"role": "user", "content": "More"}])
    assert added.data[0].content[0].text == "More"
    assert client.conversations.update(conversation.id, metadata={}).metadata == {}
    assert client.conversations.delete(conversation.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.conversations.retrieve(conversation.id)


def test_a_response_in_the_background(client, model):
    response = respond(client, model, background=True)
    assert response.status == "queued"
    deadline = time.monotonic() + 30
    while (response := client.responses.retrieve(response.id)).status in ("queued", "in_progress"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert response.output_text == respond(client, model).output_text
    events = list(client.responses.retrieve(response.id, stream=True, starting_after=2))
    assert events[0].sequence_number == 3
    assert events[-1].response.id == response.id


@pytest.mark.skipif(OLD, reason="this client has no word for it")
def test_a_conversation_is_summed_up_and_goes_on(client, model):
    said = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "First."}]
    short = client.responses.compact(model=model, input=said)
    assert [item.type for item in short.output] == ["message", "compaction"]
    assert short.usage.output_tokens > 0
    again = [item.model_dump(exclude_none=True) for item in short.output]
    response = respond(client, model, input=[*again, {"role": "user", "content": "Two?"}])
    assert response.usage.input_tokens > client.responses.input_tokens.count(
        model=model, input=[again[0], {"role": "user", "content": "Two?"}]).input_tokens


def test_what_was_had_is_told(client, model):
    response = respond(client, model, truncation="auto", service_tier="flex")
    assert (response.truncation, response.service_tier) == ("auto", "flex")
    assert respond(client, model, service_tier="fast").service_tier == "priority"


@pytest.mark.skipif(OLD, reason="this client has no word for it")
def test_input_tokens(client, model):
    count = client.responses.input_tokens.count(model=model, input="Once upon a time")
    assert count.input_tokens == respond(client, model).usage.input_tokens


def test_log_probabilities(client, model):
    response = respond(client, model, top_logprobs=2, include=["message.output_text.logprobs"])
    logprobs = response.output[0].content[0].logprobs
    assert len(logprobs[0].top_logprobs) == 2 and logprobs[0].logprob <= 0


@pytest.mark.parametrize(("field", "value", "param"), [
    ("temperature", 3, "temperature"),
    ("max_output_tokens", 1, "max_output_tokens"),
    ("input", [{"role": "robot", "content": "x"}], "input[0].role"),
    ("input", [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}],
     "input[0].content[0]"),
    ("tools", [{"type": "web_search"}], "tools[0].type"),
    ("truncation", "some", "truncation"),
    ("user", 5, "user"),
    ("text", {"format": {"type": "xml"}}, "text.format.type"),
    ("extra_body", {"tempature": 1}, "tempature"),
])
def test_wrong_fields_are_refused_by_name(client, model, field, value, param):
    with pytest.raises(openai.BadRequestError) as caught:
        respond(client, model, **{field: value})
    assert caught.value.param == param
