"""A whole batch: a file of requests up, the batch to its end, files of answers down."""

import json
import time

import openai
import pytest

ENDED = ("completed", "failed", "expired", "cancelled")


def lines(model, count, **fields):
    body = {"model": model, "messages": [{"role": "user", "content": "Once"}], "max_tokens": 4}
    line = {"method": "POST", "url": "/v1/chat/completions", "body": body | fields}
    return [line | {"custom_id": f"request-{i}"} for i in range(count)]


def create(client, requests, **fields):
    text = "".join(json.dumps(request) + "\n" for request in requests).encode()
    file = client.files.create(file=("requests.jsonl", text), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", **fields
    )


def ended(client, batch):
    deadline = time.monotonic() + 60
    while (batch := client.batches.retrieve(batch.id)).status not in ENDED:
        assert time.monotonic() < deadline, batch
        time.sleep(0.05)
    return batch


def test_a_batch_from_its_file_to_its_answers(client, model):
    begun = create(
        client,
        [*lines(model, 20), lines(model, 1, max_tokens=10_000_000)[0] | {"custom_id": "huge"}],
        metadata={"kind": "nightly"},
        output_expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert (begun.object, begun.status, begun.metadata) == (
        "batch", "validating", {"kind": "nightly"})
    batch = ended(client, begun)
    assert batch.status == "completed", batch
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (21, 20, 1)
    times = [batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at]
    assert times == sorted(times) and batch.expires_at == batch.created_at + 86400
    assert (batch.failed_at, batch.expired_at, batch.cancelled_at) == (None, None, None)
    answers = client.files.content(batch.output_file_id).text.splitlines()
    answers = [json.loads(line) for line in answers]
    assert [a["custom_id"] for a in answers] == [f"request-{i}" for i in range(20)]
    tokens = 0
    for answer in answers:
        assert (answer["error"], answer["response"]["status_code"]) == (None, 200)
        body = answer["response"]["body"]
        completion = openai.types.chat.ChatCompletion.model_validate(body)
        tokens += completion.usage.total_tokens
    assert batch.to_dict()["usage"]["total_tokens"] == tokens
    (error,) = client.files.content(batch.error_file_id).text.splitlines()
    error = json.loads(error)
    assert (error["custom_id"], error["response"]["status_code"]) == ("huge", 400)
    output = client.files.retrieve(batch.output_file_id)
    assert (output.purpose, output.expires_at) == ("batch_output", output.created_at + 3600)
    assert [b.id for b in client.batches.list(limit=1)][0] == batch.id


def test_a_file_that_is_wrong_names_its_lines(client, model):
    requests = lines(model, 3)
    requests[1]["body"] = {"model": model}
    requests[2]["custom_id"] = "request-0"
    batch = ended(client, create(client, requests))
    assert batch.status == "failed"
    assert [(e.line, e.code, e.param) for e in batch.errors.data] == [
        (2, "missing_required_parameter", "body.messages"),
        (3, "duplicate_custom_id", "custom_id"),
    ]


def test_a_batch_can_be_cancelled_once(client, model):
    batch = create(client, lines(model, 200, max_tokens=100))
    batch = client.batches.cancel(batch.id)
    assert batch.status in ("cancelling", "cancelled")
    batch = ended(client, batch)
    assert batch.status == "cancelled" and batch.cancelled_at
    completed = ended(client, create(client, lines(model, 1)))
    assert completed.status == "completed"
    with pytest.raises(openai.BadRequestError):
        client.batches.cancel(completed.id)


def test_wrong_bodies_are_refused_by_name(client, model):
    good = create(client, lines(model, 1))
    for name, value in [("endpoint", "/v1/nothing"), ("completion_window", "1h"),
                        ("input_file_id", "file-none")]:
        fields = {"input_file_id": good.input_file_id, "endpoint": "/v1/chat/completions",
                  "completion_window": "24h"} | {name: value}
        with pytest.raises(openai.BadRequestError) as caught:
            client.batches.create(**fields)
        assert caught.value.param == name
    ended(client, good)
    with pytest.raises(openai.NotFoundError):
        client.batches.retrieve("batch_none")
