"""Stored chat completions: kept, listed, labelled, forgotten, and nobody else's."""

import uuid

import openai
import pytest

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


@pytest.fixture
def label():
    """A label of this test only: the store may hold answers of others."""
    return {"test": uuid.uuid4().hex}


def keep(client, model, label, **fields):
    return client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=4, store=True, metadata=label, **fields)


def test_an_answer_is_kept_and_found_again(client, model, label):
    said = keep(client, model, label, temperature=0)
    kept = client.chat.completions.retrieve(said.id)
    assert (kept.id, kept.model, kept.created) == (said.id, said.model, said.created)
    assert kept.choices == said.choices and kept.usage == said.usage
    assert kept.metadata == label
    messages = client.chat.completions.messages.list(said.id).data
    assert [(m.role, m.content) for m in messages] == [("system", "Be brief."), ("user", "Hello")]
    assert [m.id for m in messages] == [f"{said.id}-0", f"{said.id}-1"]


def test_a_streamed_answer_is_kept(client, model, label):
    text, name = "", None
    for chunk in keep(client, model, label, stream=True):
        name = chunk.id
        text += chunk.choices[0].delta.content or "" if chunk.choices else ""
    assert client.chat.completions.retrieve(name).choices[0].message.content == text


def test_lists_follow_their_cursor(client, model, label):
    ids = [keep(client, model, label).id for _ in range(5)]
    newest_first = client.chat.completions.list(metadata=label, limit=2, order="desc")
    assert [answer.id for answer in newest_first] == ids[::-1]
    page = client.chat.completions.list(metadata=label, model=model, limit=2)
    assert [answer.id for answer in page.data] == ids[:2] and page.has_more
    assert page.has_next_page() and [answer.id for answer in page.get_next_page().data] == ids[2:4]
    assert client.chat.completions.list(metadata=label, model="other").data == []


def test_labels_are_replaced_and_answers_forgotten(client, model, label):
    name = keep(client, model, label).id
    updated = client.chat.completions.update(name, metadata={"new": "label"})
    assert updated.metadata == {"new": "label"}
    deleted = client.chat.completions.delete(name)
    assert (deleted.id, deleted.object, deleted.deleted) == (name, "chat.completion.deleted", True)
    for call in (client.chat.completions.retrieve, client.chat.completions.delete,
                 client.chat.completions.messages.list):
        with pytest.raises(openai.NotFoundError) as caught:
            call(name)
        assert name in caught.value.message


def test_what_is_not_asked_for_is_not_kept(client, model, label):
    said = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=2,
                                          metadata=label)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.retrieve(said.id)
    assert client.chat.completions.list(metadata=label).data == []


def test_bad_labels_are_refused_by_name(client, model):
    for label, param in (({"k": 1}, "metadata.k"), ({"k" * 65: "v"}, "metadata"),
                         ({str(i): "v" for i in range(17)}, "metadata")):
        with pytest.raises(openai.BadRequestError) as caught:
            keep(client, model, label)
        assert caught.value.param == param
