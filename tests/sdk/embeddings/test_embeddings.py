"""The Python client against a real encoder, all-MiniLM-L6-v2, whose weights are a Python package.

Environment, besides what `../python/conftest.py` says of a server:
  HEARTH_MODEL  the id under which the encoder is served
  HEARTH_DATA   folder with reference vectors and similarity pairs; what needs them is skipped
                where they are not there
"""

import base64
import csv
import math
import os
import struct
from pathlib import Path

import openai
import pytest

DATA = Path(os.environ.get("HEARTH_DATA", ""))
# Mean-pooled vectors of text-embeddings-inference for these texts, not normalised.
GOLDEN = DATA / "models/all-MiniLM-L6-v2-goldens/tei_bert_batch.snap"
GOLDEN_TEXTS = ["What is Deep Learning?", "Deep Learning is...", "What is Deep Learning?"]
PAIRS = DATA / "eval/stsb-multi-mt/stsb-en-dev.csv"


@pytest.fixture(scope="session")
def model() -> str:
    return os.environ["HEARTH_MODEL"]


@pytest.fixture(scope="session")
def client() -> openai.OpenAI:
    return openai.OpenAI(
        base_url=os.environ["HEARTH_BASE_URL"], api_key=os.environ["HEARTH_API_KEY"], max_retries=0
    )


def vectors(client, model, texts, **more) -> list[list[float]]:
    answer = client.embeddings.create(model=model, input=texts, **more)
    assert [item.index for item in answer.data] == list(range(len(answer.data)))
    return [item.embedding for item in answer.data]


def dot(a, b) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def test_one_text_as_the_client_asks_by_default(client, model):
    answer = client.embeddings.create(model=model, input="The food was delicious.")
    [item] = answer.data
    assert (answer.object, answer.model, item.object, item.index) == ("list", model, "embedding", 0)
    assert len(item.embedding) == 384
    assert dot(item.embedding, item.embedding) == pytest.approx(1, abs=1e-5)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == 7
    assert answer._request_id.startswith("req_")


def test_numbers_and_base64_are_the_same_vector(client, model):
    text = "Base64 is what the client asks for unless told otherwise."
    [default] = vectors(client, model, text)
    [numbers] = vectors(client, model, text, encoding_format="float")
    raw = client.embeddings.with_raw_response.create(
        model=model, input=text, encoding_format="base64"
    )
    encoded = raw.http_response.json()["data"][0]["embedding"]
    decoded = struct.unpack("<384f", base64.b64decode(encoded))
    assert list(decoded) == pytest.approx(numbers, abs=1e-8)
    assert default == pytest.approx(numbers, abs=1e-8)


def test_texts_in_company_and_alone(client, model):
    texts = ["A cat sits on the mat.", "word " * 200, "數學", "Ein Satz.", "x"] * 20
    together = vectors(client, model, texts)
    for i in range(5):
        assert together[i::5] == [together[i]] * 20
        assert vectors(client, model, texts[i]) == [together[i]]


def test_tokens_instead_of_text(client, model):
    # [CLS] hello world [SEP]
    ids = [101, 7592, 2088, 102]
    [text] = vectors(client, model, "Hello world")
    assert vectors(client, model, ids) == [text]
    assert vectors(client, model, [ids, ids[:2]])[0] == text


def test_meaning_is_near_to_its_like(client, model):
    query, near, far = vectors(
        client, model, ["How do I bake bread?", "A recipe for a loaf", "The stock market fell"]
    )
    assert dot(query, near) > 0.4 > 0.2 > dot(query, far)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"input": ""}, "input", "invalid_value"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": ["a", ""]}, "input[1]", "invalid_value"),
        ({"input": ["a"] * 2049}, "input", "invalid_value"),
        ({"input": [[1] * 250] * 1201}, "input", "invalid_value"),
        ({"input": [101, 30522]}, "input", "invalid_value"),
        ({"input": "a", "dimensions": 64}, "dimensions", "invalid_value"),
        ({"input": "a", "dimensions": 0}, "dimensions", "invalid_value"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "invalid_value"),
        ({"input": "a", "extra_body": {"normalise": True}}, "normalise", "unknown_parameter"),
        ({"input": "word " * 300}, "input", "context_length_exceeded"),
    ],
)
def test_errors_name_the_field(client, model, fields, param, code):
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model=model, **fields)
    assert (caught.value.param, caught.value.code) == (param, code)


def test_a_long_text_is_told_both_lengths(client, model):
    with pytest.raises(openai.BadRequestError, match="256 tokens.* 302 prompt tokens"):
        client.embeddings.create(model=model, input="word " * 300)


def test_it_does_not_chat(client, model):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=model, messages=[{"role": "user", "content": "Hi"}])
    assert caught.value.param == "model" and "embeds" in caught.value.message


def test_it_is_listed(client, model):
    assert [entry.id for entry in client.models.list()] == [model]
    assert client.models.retrieve(model).model_extra["embedding_length"] == 384


@pytest.mark.skipif(not GOLDEN.is_file(), reason=f"{GOLDEN} is not there")
def test_vectors_are_those_of_text_embeddings_inference(client, model):
    wanted: list[list[float]] = []
    for line in GOLDEN.read_text().splitlines():
        if line.startswith("- - "):
            wanted.append([])
        if line.startswith(("- - ", "  - ")):
            wanted[-1].append(float(line[4:]))
    got = vectors(client, model, GOLDEN_TEXTS)
    assert len(wanted) == len(got) == 3
    for text, reference in zip(got, wanted, strict=True):
        length = math.sqrt(dot(reference, reference))
        # 2e-3 of the vectors as they are there, brought to length 1.
        assert text == pytest.approx([x / length for x in reference], abs=2e-3 / length)


def ranks(values: list[float]) -> list[float]:
    """Positions in order; equal values share the mean of theirs."""
    order = sorted(range(len(values)), key=values.__getitem__)
    out = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for i in order[start:end]:
            out[i] = (start + end - 1) / 2
        start = end
    return out


def correlation(a: list[float], b: list[float]) -> float:
    mean_a, mean_b = math.fsum(a) / len(a), math.fsum(b) / len(b)
    a, b = [x - mean_a for x in a], [x - mean_b for x in b]
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


@pytest.mark.skipif(not PAIRS.is_file(), reason=f"{PAIRS} is not there")
def test_similarity_of_sentences_ranks_as_people_rank_it(client, model):
    with PAIRS.open(encoding="utf-8", newline="") as file:
        pairs = [(a, b, float(score)) for a, b, score in csv.reader(file)]
    assert len(pairs) == 1500
    left = [v for i in (0, 750) for v in vectors(client, model, [a for a, _, _ in pairs[i:i + 750]])]
    right = [v for i in (0, 750) for v in vectors(client, model, [b for _, b, _ in pairs[i:i + 750]])]
    near = [dot(a, b) for a, b in zip(left, right, strict=True)]
    spearman = correlation(ranks(near), ranks([score for _, _, score in pairs]))
    print(f"Spearman {spearman:.4f}")
    # What Hugging Face transformers gives on the same pairs.
    assert spearman == pytest.approx(0.8672, abs=5e-4)
