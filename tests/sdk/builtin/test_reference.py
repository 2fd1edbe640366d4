"""`/openapi.json` by the judgement of others: it is valid OpenAPI 3.1, needs no key, and knows every
parameter of OpenAI's newest client."""

import inspect
import json
import os
import urllib.request

import openai
import pytest

# Only the environment of the newest client has it: once is enough.
validator = pytest.importorskip("openapi_spec_validator")


@pytest.fixture(scope="module")
def document():
    url = os.environ["HEARTH_BASE_URL"].removesuffix("/v1") + "/openapi.json"
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)


def test_the_document_is_valid(document):
    validator.OpenAPIV31SpecValidator(document).validate()
    assert document["openapi"].startswith("3.1")


CLIENT = openai.OpenAI(api_key="none", base_url="http://127.0.0.1:1")
CONVERSATIONS, RESPONSES = CLIENT.conversations, CLIENT.responses
COMPLETIONS = CLIENT.chat.completions
CALLS = {
    ("post", "/v1/chat/completions"): COMPLETIONS.create,
    ("get", "/v1/chat/completions"): COMPLETIONS.list,
    ("post", "/v1/chat/completions/{completion_id}"): COMPLETIONS.update,
    ("get", "/v1/chat/completions/{completion_id}/messages"): COMPLETIONS.messages.list,
    ("post", "/v1/completions"): CLIENT.completions.create,
    ("post", "/v1/embeddings"): CLIENT.embeddings.create,
    ("post", "/v1/responses"): RESPONSES.create,
    ("get", "/v1/responses/{response_id}"): RESPONSES.retrieve,
    ("get", "/v1/responses/{response_id}/input_items"): RESPONSES.input_items.list,
    ("post", "/v1/responses/input_tokens"): RESPONSES.input_tokens.count,
    ("post", "/v1/responses/compact"): RESPONSES.compact,
    ("post", "/v1/conversations"): CONVERSATIONS.create,
    ("post", "/v1/conversations/{conversation_id}"): CONVERSATIONS.update,
    ("post", "/v1/conversations/{conversation_id}/items"): CONVERSATIONS.items.create,
    ("get", "/v1/conversations/{conversation_id}/items"): CONVERSATIONS.items.list,
    ("get", "/v1/conversations/{conversation_id}/items/{item_id}"): CONVERSATIONS.items.retrieve,
    ("post", "/v1/files"): CLIENT.files.create,
    ("get", "/v1/files"): CLIENT.files.list,
    ("post", "/v1/uploads"): CLIENT.uploads.create,
    ("post", "/v1/uploads/{upload_id}/parts"): CLIENT.uploads.parts.create,
    ("post", "/v1/uploads/{upload_id}/complete"): CLIENT.uploads.complete,
    ("post", "/v1/batches"): CLIENT.batches.create,
    ("get", "/v1/batches"): CLIENT.batches.list,
}
OF_THE_CLIENT = {"extra_headers", "extra_query", "extra_body", "timeout"}


@pytest.mark.parametrize(("method", "path"), CALLS)
def test_every_parameter_of_the_client_is_documented(document, method, path):
    operation = document["paths"][path][method]
    bodies = operation.get("requestBody", {}).get("content", {}).values()
    known = {name for body in bodies for name in body["schema"]["properties"]}
    known |= {one["name"] for one in operation.get("parameters", [])}
    # What stands in the path has another name there.
    sent = inspect.signature(CALLS[method, path]).parameters.values()
    sent = {one.name for one in sent if one.kind is one.KEYWORD_ONLY} - OF_THE_CLIENT
    assert sent - {"conversation_id"} <= known
