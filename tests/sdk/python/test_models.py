"""The list of models, and the pages beside the API."""

import openai
import pytest


def test_list_names_the_served_model(client, model):
    models = client.models.list()
    assert models.object == "list"
    assert model in [entry.id for entry in models]


def test_retrieve(client, model):
    entry = client.models.retrieve(model)
    assert (entry.id, entry.object) == (model, "model")
    assert isinstance(entry.created, int) and entry.created > 0
    assert isinstance(entry.owned_by, str) and entry.owned_by


def test_retrieve_of_an_unknown_model(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("no-such/model:7b")
    assert caught.value.code == "model_not_found"
    assert "no-such/model:7b" in caught.value.message


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_probes(server, path):
    assert server.status(path) == 200


def test_an_unknown_page_is_not_found(server):
    assert server.status("/no-such-page") == 404


def test_requests_are_counted(client, server, model):
    before = server.metric("hearth_requests_total")
    client.completions.create(model=model, prompt="One", max_tokens=1)
    assert server.metric("hearth_requests_total") >= before + 1
