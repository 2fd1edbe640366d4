"""LangChain's standard tests of embeddings, with `OpenAIEmbeddings` against a real encoder."""

import os

from langchain_openai import OpenAIEmbeddings
from langchain_tests.integration_tests import EmbeddingsIntegrationTests


class TestEmbeddings(EmbeddingsIntegrationTests):
    @property
    def embeddings_class(self):
        return OpenAIEmbeddings

    @property
    def embedding_model_params(self):
        # Without the check of lengths it sends text, which it would cut by OpenAI's vocabulary.
        return {
            "base_url": os.environ["HEARTH_BASE_URL"],
            "api_key": os.environ["HEARTH_API_KEY"],
            "model": os.environ["HEARTH_MODEL"],
            "check_embedding_ctx_length": False,
            "max_retries": 0,
        }

    def test_likes_are_near(self, model):
        query = model.embed_query("How do I bake bread?")
        near, far = model.embed_documents(["A recipe for a loaf", "The stock market fell"])
        assert len(query) == 384

        def dot(other):
            return sum(x * y for x, y in zip(query, other, strict=True))

        assert dot(near) > 0.4 > 0.2 > dot(far)
