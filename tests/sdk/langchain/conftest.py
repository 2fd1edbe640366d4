"""What the built-in model, of two million parameters, cannot do: the only expected failures.

Each is expected for its reason alone: a refusal, a broken stream or any other error of the server
is none of `MEANING` and fails the test.
"""

import pytest
from langchain_core.exceptions import OutputParserException
from openai import LengthFinishReasonError
from pydantic import ValidationError

MEANING = (AssertionError, OutputParserException, LengthFinishReasonError, ValidationError)
SUM = "it is asked for magic_function(3) and chooses another number"
ENDLESS = "a string that a tool or a schema leaves open does not end within the limit"
UNABLE = {
    "test_tool_calling": SUM,
    "test_tool_calling_async": SUM,
    "test_tool_calling_with_no_arguments": "it makes arguments up where a schema allows any",
    "test_agent_loop": "it answers without the tool when nothing forces it",
    "test_unicode_tool_call_integration": ENDLESS,
    "test_bind_runnables_as_tools": ENDLESS,
    "test_structured_output_pydantic_2_v1": ENDLESS,
    "test_json_mode": "it does not know which keys it is asked for",
}


def pytest_collection_modifyitems(items):
    for item in items:
        reason = UNABLE.get(item.originalname)
        if reason and "Units" not in item.nodeid:
            # Over chat completions the built-in model does end that one's string.
            strict = item.originalname != "test_bind_runnables_as_tools"
            item.add_marker(pytest.mark.xfail(reason=reason, raises=MEANING, strict=strict))
