"""LiteLLM's embeddings against a real encoder."""

import os

import litellm
import pytest


@pytest.mark.parametrize("form", ["float", "base64", None])
def test_vectors(form):
    options = {"encoding_format": form} if form else {}
    answer = litellm.embedding(
        model="openai/" + os.environ["HEARTH_MODEL"], input=["Hello world", "Good-bye"],
        api_base=os.environ["HEARTH_BASE_URL"], api_key=os.environ["HEARTH_API_KEY"],
        max_retries=0, **options)
    assert [item["index"] for item in answer.data] == [0, 1]
    # [CLS] hello world [SEP], [CLS] good - bye [SEP]
    assert answer.usage.prompt_tokens == 9
    if form != "base64":
        for item in answer.data:
            vector = item["embedding"]
            assert len(vector) == 384
            assert sum(x * x for x in vector) == pytest.approx(1, abs=1e-5)
