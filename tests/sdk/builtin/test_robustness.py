"""What no client sends: the endpoints below refuse it with a 4xx of OpenAI's shape that names it."""

import json
import os
import urllib.error
import urllib.request

import pytest

BASE = os.environ["HEARTH_BASE_URL"]
MODEL = os.environ["HEARTH_MODEL"]
HI = [{"role": "user", "content": "Hi"}]
# Path, a body that is well, a field that must be there, a list and a value out of range in it.
ENDPOINTS = {
    "/chat/completions": ({"model": MODEL, "messages": HI}, "messages", "temperature"),
    "/completions": ({"model": MODEL, "prompt": "Hi"}, "prompt", "temperature"),
    "/responses": ({"model": MODEL, "input": "Hi"}, "model", "temperature"),
    "/responses/input_tokens": ({"model": MODEL, "input": "Hi"}, "model", None),
    "/responses/compact": ({"model": MODEL, "input": "Hi"}, "model", None),
    "/embeddings": ({"model": MODEL, "input": "Hi"}, "input", "dimensions"),
    "/conversations": ({"metadata": {}}, None, None),
    "/uploads": ({"filename": "a", "purpose": "batch", "bytes": 3, "mime_type": "text/plain"},
                 "filename", "bytes"),
    "/batches": ({"input_file_id": "file-x", "endpoint": "/v1/completions",
                  "completion_window": "24h"}, "endpoint", None),
}
LISTS = [("/chat/completions", "messages"), ("/chat/completions", "tools"),
         ("/completions", "prompt"), ("/embeddings", "input"), ("/responses", "input")]


def send(path, body, method="POST", kind="application/json"):
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    headers = {"Authorization": "Bearer " + os.environ["HEARTH_API_KEY"], "Content-Type": kind}
    request = urllib.request.Request(BASE + path, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, None
    except urllib.error.HTTPError as error:
        found = json.load(error)["error"]
        assert list(found) == ["message", "type", "param", "code"] and found["message"]
        return error.code, found


def refused(path, body, param):
    status, error = send(path, body)
    assert (status, error and error["param"]) == (400, param), error


@pytest.mark.parametrize("path", ENDPOINTS)
def test_an_unknown_field(path):
    refused(path, ENDPOINTS[path][0] | {"no_such_field": 1}, "no_such_field")


@pytest.mark.parametrize(("path", "field"), [(p, f) for p, e in ENDPOINTS.items() for f in e[0]])
@pytest.mark.parametrize("wrong", [True, 1.5], ids=str)
def test_a_wrong_type(path, field, wrong):
    refused(path, ENDPOINTS[path][0] | {field: wrong}, field)


@pytest.mark.parametrize(("path", "field"), [(p, e[1]) for p, e in ENDPOINTS.items() if e[1]])
def test_a_missing_field(path, field):
    refused(path, {k: v for k, v in ENDPOINTS[path][0].items() if k != field}, field)


@pytest.mark.parametrize(("path", "field"), LISTS)
def test_an_empty_list(path, field):
    refused(path, ENDPOINTS[path][0] | {field: []}, field)


@pytest.mark.parametrize(("path", "field"), [(p, e[2]) for p, e in ENDPOINTS.items() if e[2]])
@pytest.mark.parametrize("huge", [10**300, 2**63, -(2**63)], ids=["1e300", "2^63", "-2^63"])
def test_a_huge_value(path, field, huge):
    refused(path, ENDPOINTS[path][0] | {field: huge}, field)


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize("body", [b"", b"[]", b"null", b"{", b'{"a":', b"\xff", b"[" * 3000])
def test_what_is_no_object(path, body):
    status, error = send(path, body)
    assert status == 400, error


@pytest.mark.parametrize("path", ENDPOINTS)
def test_a_wrong_method_and_type(path):
    assert send(path, {}, method="PATCH")[0] == 405
    assert send(path, {}, method="PUT")[0] == 405
    assert send(path, b"a=b", kind="text/plain")[0] == 415
