"""What every test needs: a client, the model's id, and a look at the server's own pages.

The server runs already. It is named by
  HEARTH_BASE_URL   e.g. http://127.0.0.1:8080/v1
  HEARTH_API_KEY    a key that it accepts (it must want one)
  HEARTH_MODEL      the id of the model that it serves
  HEARTH_GOLDEN     greedy continuations of that model: {"prompts": {text: {"prompt_ids": [...],
                    "greedy_ids_after_bos": [...], "text": prompt and continuation}}}
"""

import dataclasses
import json
import os
import re
import time
import urllib.error
import urllib.request

import openai
import pytest


@dataclasses.dataclass
class Golden:
    """A prompt and the greedy tokens that follow it."""

    prompt: str
    prompt_ids: list[int]
    ids: list[int]
    text: str
    next_logprobs: list[float]  # of the five best next tokens, best first


def needed(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        pytest.exit(f"{name} is not set: these tests need a running server", returncode=2)
    return value


@pytest.fixture(scope="session")
def base_url() -> str:
    return needed("HEARTH_BASE_URL").rstrip("/")


@pytest.fixture(scope="session")
def api_key() -> str:
    return needed("HEARTH_API_KEY")


@pytest.fixture(scope="session")
def model() -> str:
    return needed("HEARTH_MODEL")


@pytest.fixture(scope="session")
def goldens() -> list[Golden]:
    with open(needed("HEARTH_GOLDEN"), encoding="utf-8") as file:
        cases = json.load(file)["prompts"]
    goldens = []
    for prompt, case in cases.items():
        given = len(case["prompt_ids"]) - 1  # without BOS
        goldens.append(Golden(
            prompt=prompt,
            prompt_ids=case["prompt_ids"],
            ids=case["greedy_ids_after_bos"][given:],
            text=case["text"].removeprefix(prompt),
            next_logprobs=[logprob for _, logprob in case["next_token_top5"]],
        ))
    assert len(goldens) >= 3
    return goldens


@pytest.fixture(scope="session")
def golden(goldens) -> Golden:
    """One with a prompt, so that its text begins in the middle of a sentence."""
    return next(golden for golden in goldens if golden.prompt)


@pytest.fixture
def client(base_url, api_key):
    with openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def async_client(base_url, api_key):
    """Makes an asynchronous client; use it inside one `asyncio.run`."""
    return lambda: openai.AsyncOpenAI(
        base_url=base_url, api_key=api_key, max_retries=0, timeout=60
    )


class Server:
    """The pages of the server that are not OpenAI's."""

    def __init__(self, base_url: str):
        self.root = base_url.removesuffix("/v1")

    def status(self, path: str) -> int:
        try:
            with urllib.request.urlopen(self.root + path, timeout=10) as response:
                return response.status
        except urllib.error.HTTPError as error:
            return error.code

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels; it must be there."""
        with urllib.request.urlopen(self.root + "/metrics", timeout=10) as response:
            page = response.read().decode()
        values = re.findall(rf"^{name}(?:\{{[^}}]*\}})? (\S+)", page, re.MULTILINE)
        assert values, f"/metrics has no {name}:\n{page}"
        return sum(float(value) for value in values)

    def load(self) -> dict[str, float]:
        names = ("hearth_requests_running", "hearth_requests_waiting", "hearth_kv_blocks_used")
        return {name: self.metric(name) for name in names}

    def wait_until_idle(self, seconds: float) -> None:
        """Fails unless nothing runs, nothing waits and no block is held within that time."""
        deadline = time.monotonic() + seconds
        while any(load := self.load().values()):
            assert time.monotonic() < deadline, f"still busy after {seconds} s: {self.load()}"
            time.sleep(0.02)
        assert not any(load)


@pytest.fixture
def server(base_url) -> Server:
    return Server(base_url)
