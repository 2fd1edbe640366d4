"""Files and uploads: what goes up comes back, is listed, and goes."""

import hashlib
import io

import openai
import pytest

LINES = b'{"custom_id": "a"}\n' * 1000


@pytest.fixture
def file(client):
    file = client.files.create(file=("lines.jsonl", LINES), purpose="batch")
    yield file
    try:
        client.files.delete(file.id)
    except openai.NotFoundError:
        pass


def test_a_file_comes_back_as_it_was(client, file):
    assert (file.object, file.status, file.purpose) == ("file", "processed", "batch")
    assert (file.bytes, file.filename) == (len(LINES), "lines.jsonl")
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == LINES
    assert client.files.wait_for_processing(file.id, poll_interval=0.01).id == file.id


def test_files_are_listed_by_purpose_and_cursor(client, file):
    other = client.files.create(file=io.BytesIO(b"x"), purpose="user_data",
                                expires_after={"anchor": "created_at", "seconds": 3600})
    assert other.expires_at == other.created_at + 3600
    assert [f.id for f in client.files.list(limit=1)][:2] == [other.id, file.id]
    assert [f.id for f in client.files.list(purpose="user_data", limit=1).data] == [other.id]
    assert client.files.delete(other.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.content(other.id)


@pytest.mark.parametrize(("fields", "param"), [
    ({"purpose": "fun"}, "purpose"),
    ({"purpose": "batch", "expires_after": {"anchor": "created_at", "seconds": 1}},
     "expires_after.seconds"),
    ({"purpose": "batch", "extra_body": {"colour": "red"}}, "colour"),
])
def test_wrong_forms_are_refused_by_name(client, fields, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.files.create(file=b"x", **fields)
    assert caught.value.param == param


def test_an_upload_in_parts_becomes_a_file(client):
    upload = client.uploads.create(bytes=len(LINES), filename="big.jsonl", mime_type="text/jsonl",
                                   purpose="batch")
    assert upload.status == "pending"
    half = len(LINES) // 2
    second = client.uploads.parts.create(upload.id, data=LINES[half:])
    first = client.uploads.parts.create(upload.id, data=LINES[:half])
    with pytest.raises(openai.BadRequestError) as caught:
        client.uploads.complete(upload.id, part_ids=[second.id, first.id], md5="0" * 32)
    assert caught.value.param == "md5"
    done = client.uploads.complete(upload.id, part_ids=[first.id, second.id],
                                   md5=hashlib.md5(LINES).hexdigest())
    assert (done.status, done.file.bytes) == ("completed", len(LINES))
    assert client.files.content(done.file.id).read() == LINES
    client.files.delete(done.file.id)


def test_the_helper_that_cuts_a_file_into_parts(client, tmp_path):
    path = tmp_path / "big.jsonl"
    path.write_bytes(LINES)
    done = client.uploads.upload_file_chunked(file=path, mime_type="text/jsonl", purpose="batch",
                                              part_size=5000)
    assert client.files.content(done.file.id).read() == LINES
    client.files.delete(done.file.id)


def test_a_cancelled_upload_takes_no_part(client):
    upload = client.uploads.create(bytes=1, filename="a", mime_type="text/plain", purpose="batch")
    assert client.uploads.cancel(upload.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError):
        client.uploads.parts.create(upload.id, data=b"x")
