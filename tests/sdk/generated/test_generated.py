"""A client that nobody wrote: `openapi-python-client` makes it of `/openapi.json`, whole, and it
reads what the server answers into its own classes."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = os.environ["HEARTH_BASE_URL"].removesuffix("/v1")
MODEL = os.environ["HEARTH_MODEL"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    tool = Path(sys.executable).with_name("openapi-python-client")
    command = [tool, "generate", "--url", f"{ROOT}/openapi.json", "--output-path", folder / "it"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # The one thing it cannot read, and would not have to.
    assert told.count("WARNING") == told.count("WARNING parsing GET /metrics") <= 1, told
    sys.path.insert(0, str(folder / "it"))
    return "hearth_client"


@pytest.fixture(scope="module")
def client(made):
    kinds = importlib.import_module(f"{made}.client")
    return kinds.AuthenticatedClient(base_url=ROOT, token=os.environ["HEARTH_API_KEY"])


def call(made, client, place, body=None, **parameters):
    """The answer of one operation; what it is called with is made of the class it wants."""
    operation = importlib.import_module(f"{made}.api.{place}")
    if body is not None:
        parameters["body"] = getattr(operation, body[0]).from_dict(body[1])
    return operation.sync(client=client, **parameters)


def test_models_are_listed(made, client):
    models = call(made, client, "models.list_models")
    assert models.data[0].id == MODEL
    assert call(made, client, "models.retrieve_model", model=MODEL).context_length > 0


def test_a_chat_is_an_object_of_its_own_class(made, client):
    asked = {"model": MODEL, "max_tokens": 4, "temperature": 0,
             "messages": [{"role": "user", "content": "Hello"}]}
    body = ("CreateChatCompletionBody", asked)
    chat = call(made, client, "text.create_chat_completion", body)
    assert type(chat).__name__ == "ChatCompletion"
    assert chat.choices[0].message.content.startswith("Hello")
    assert chat.usage.completion_tokens == 4


def test_an_error_is_one_too(made, client):
    error = call(made, client, "files.retrieve_file", file_id="file-none")
    assert type(error).__name__ == "Error"
    assert error.error.code == "not_found"
    assert error.error.param is None
