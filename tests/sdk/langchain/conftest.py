"""What the built-in model, of two million parameters, cannot do: the only expected failures.

Each is expected to fail in its own words alone: a refusal, a broken stream, an answer of the wrong
shape or any other assertion fails the test.
"""

import pytest
from langchain_core.exceptions import OutputParserException
from openai import LengthFinishReasonError

SUM = ("it is asked for magic_function(3) and chooses another number",
       AssertionError, r"assert \{'input': -?\d+\} == \{'input': 3\}")
UNABLE = {
    "test_tool_calling": SUM,
    "test_tool_calling_async": SUM,
    "test_tool_calling_with_no_arguments": (
        "LangChain's schema is not strict and allows any arguments: it makes some up, which over"
        " responses do not end within the limit",
        AssertionError, r"^assert (\{.+\} == \{\}|0 == 1)"),
    "test_agent_loop": (
        "it answers without the tool when nothing forces it",
        AssertionError, r"^assert False\s.+ = any\("),
    "test_unicode_tool_call_integration": (
        "the name that it writes does not end within the limit",
        AssertionError, "^Expected at least 1 tool call, got 0"),
    "test_bind_runnables_as_tools": (
        "the style that it writes does not end within the limit",
        AssertionError, r"^assert \[\]"),
    "test_structured_output_pydantic_2_v1": (
        "the joke that it writes does not end within the limit",
        AssertionError, r"^assert False\s.+ = isinstance\(None, "),
    "test_json_mode": (
        "it does not know which keys it is asked for, nor where to end",
        (LengthFinishReasonError, OutputParserException),
        "(?s)the length limit was reached|^Failed to parse Joke from .+Field required"),
}


def pytest_collection_modifyitems(items):
    for item in items:
        unable = UNABLE.get(item.originalname)
        if unable and "Units" not in item.nodeid:
            reason, error, words = unable
            # Over chat completions the built-in model does end that one's string.
            strict = item.originalname != "test_bind_runnables_as_tools"
            raises = pytest.RaisesExc(error, match=words)
            item.add_marker(pytest.mark.xfail(reason=reason, raises=raises, strict=strict))
