"""LangChain's standard tests of a chat model: `ChatOpenAI` over chat completions and responses."""

import os

from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

# Far from its training the built-in model repeats itself without end; this and the limit stop it.
ANSWERS = {"max_tokens": 300, "extra_body": {"repetition_penalty": 2.5}}


class OverChat:
    """What the standard tests ask about the model."""

    server = {"base_url": "http://127.0.0.1:8080/v1", "api_key": "none", "model": "hearth-tiny"}
    over_responses = False

    @property
    def chat_model_class(self):
        return ChatOpenAI

    @property
    def chat_model_params(self):
        return self.server | {"use_responses_api": self.over_responses, "temperature": 0}

    @property
    def supports_json_mode(self):
        return True

    @property
    def structured_output_kwargs(self):
        return {"method": "json_schema"}


class Running(OverChat):
    server = ANSWERS | {
        "base_url": os.environ["HEARTH_BASE_URL"],
        "api_key": os.environ["HEARTH_API_KEY"],
        "model": os.environ["HEARTH_MODEL"],
        "max_retries": 0,
        "stream_usage": True,
    }


class TestUnitsOverChat(OverChat, ChatModelUnitTests):
    @property
    def init_from_env_params(self):
        """From the environment comes the key alone, as it does where a written model is read."""
        keyless = {name: value for name, value in self.server.items() if name != "api_key"}
        return {"OPENAI_API_KEY": "sk-there"}, keyless, {"openai_api_key": "sk-there"}


class TestUnitsOverResponses(TestUnitsOverChat):
    over_responses = True


class TestOverChat(Running, ChatModelIntegrationTests):
    pass


class TestOverResponses(Running, ChatModelIntegrationTests):
    over_responses = True
