"""`chat.completions`: whole, streamed, sampled, with log-probabilities."""

import asyncio

import openai
import pytest

MESSAGES = [
    {"role": "system", "content": "You tell stories."},
    {"role": "user", "content": "Tell me about Lily."},
]


def ask(client, model, **options):
    options = {"messages": MESSAGES, "temperature": 0, "max_tokens": 24} | options
    return client.chat.completions.create(model=model, **options)


def check_usage(usage, completion_tokens=None):
    assert usage.prompt_tokens > 0
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    if completion_tokens is not None:
        assert usage.completion_tokens == completion_tokens


def test_a_whole_answer(client, model):
    answer = ask(client, model)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == model
    assert answer.created > 1_700_000_000
    [choice] = answer.choices
    assert (choice.index, choice.message.role) == (0, "assistant")
    assert choice.message.content.strip()
    assert choice.logprobs is None and choice.message.refusal is None
    # Required and nullable: the keys must be there, which the SDK's types do not show.
    assert {"logprobs", "finish_reason"} <= choice.model_fields_set
    assert "refusal" in choice.message.model_fields_set
    check_usage(answer.usage)


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_the_limit(client, model, limit):
    options = {limit: 5, "messages": MESSAGES, "temperature": 0}
    answer = client.chat.completions.create(
        model=model, extra_body={"ignore_eos": True}, **options
    )
    assert answer.choices[0].finish_reason == "length"
    check_usage(answer.usage, completion_tokens=5)


def test_a_stream_is_the_whole_answer_in_pieces(client, model):
    whole = ask(client, model)
    chunks = list(ask(client, model, stream=True))
    assert len(chunks) > 3
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert chunks[0].model == model and chunks[0].id.startswith("chatcmpl-")
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert all(delta.role is None for delta in deltas[1:])
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons[-1] == whole.choices[0].finish_reason
    assert set(reasons[:-1]) == {None}
    assert all(chunk.usage is None for chunk in chunks)


def test_a_stream_with_usage_ends_with_it(client, model):
    whole = ask(client, model)
    chunks = list(ask(client, model, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert all(chunk.usage is None and chunk.choices for chunk in chunks[:-1])
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    for count in counts:
        assert getattr(chunks[-1].usage, count) == getattr(whole.usage, count)


def test_the_accumulating_helper_agrees_with_the_whole_answer(client, model):
    whole = ask(client, model)
    with client.chat.completions.stream(
        model=model, messages=MESSAGES, temperature=0, max_tokens=24
    ) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion() if whole.choices[0].finish_reason == "stop" else None
    assert "".join(pieces) == whole.choices[0].message.content
    if final is not None:
        assert final.choices[0].message.content == whole.choices[0].message.content


def test_the_asynchronous_client(async_client, client, model):
    async def both():
        async with async_client() as asynchronous:
            whole = await ask(asynchronous, model)
            stream = await ask(asynchronous, model, stream=True)
            streamed = [chunk.choices[0].delta.content or "" async for chunk in stream]
        return whole.choices[0].message.content, "".join(streamed)

    whole, streamed = asyncio.run(both())
    assert whole == streamed == ask(client, model).choices[0].message.content


def test_several_choices(client, model):
    answer = ask(client, model, n=2, temperature=1, seed=7, extra_body={"ignore_eos": True})
    assert [choice.index for choice in answer.choices] == [0, 1]
    one, other = (choice.message.content for choice in answer.choices)
    assert one != other
    assert answer.usage.completion_tokens == 2 * 24


def test_several_choices_in_a_stream(client, model):
    options = {"n": 3, "temperature": 1, "seed": 7}
    whole = ask(client, model, **options)
    texts, reasons = ["", "", ""], [None] * 3
    for chunk in ask(client, model, stream=True, **options):
        [choice] = chunk.choices
        assert reasons[choice.index] is None, "text after the end"
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]


def test_a_seed_repeats_and_another_differs(client, model):
    def text(seed):
        return ask(client, model, temperature=1, seed=seed).choices[0].message.content

    assert text(11) == text(11)
    assert len({text(seed) for seed in range(4)}) > 1


def test_logprobs(client, model):
    answer = ask(client, model, logprobs=True, top_logprobs=3, max_tokens=8,
                 extra_body={"ignore_eos": True})
    [choice] = answer.choices
    tokens = choice.logprobs.content
    assert len(tokens) == 8
    assert choice.logprobs.refusal is None
    for token in tokens:
        assert token.logprob <= 0
        tops = [top.logprob for top in token.top_logprobs]
        assert len(tops) == 3 and tops == sorted(tops, reverse=True)
        # Greedy: the token is the best alternative.
        best = token.top_logprobs[0]
        assert (best.token, best.logprob, best.bytes) == (token.token, token.logprob, token.bytes)
    # A SentencePiece token has its space in front, the text of an answer begins without one.
    said = b"".join(bytes(token.bytes) for token in tokens).decode(errors="ignore").lstrip(" ")
    assert said.startswith(choice.message.content.rstrip("\ufffd"))


def test_streamed_logprobs_are_those_of_the_whole_answer(client, model):
    options = {"logprobs": True, "top_logprobs": 2, "max_tokens": 12}
    whole = ask(client, model, **options).choices[0].logprobs.content
    streamed = []
    for chunk in ask(client, model, stream=True, **options):
        logprobs = chunk.choices[0].logprobs
        streamed += logprobs.content if logprobs else []
    assert len(whole) == len(streamed) > 0
    assert [token.bytes for token in whole] == [token.bytes for token in streamed]
    for one, other in zip(whole, streamed):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_logprobs_without_alternatives(client, model):
    answer = ask(client, model, logprobs=True, max_tokens=2)
    assert all(token.top_logprobs == [] for token in answer.choices[0].logprobs.content)


def test_logit_bias_forces_a_token(client, model, golden):
    forced = golden.ids[3]
    answer = ask(client, model, max_tokens=3, logprobs=True, logit_bias={str(forced): 100})
    tokens = [bytes(token.bytes) for token in answer.choices[0].logprobs.content]
    assert len(tokens) == 3 and len(set(tokens)) == 1
    free = ask(client, model, max_tokens=3, logprobs=True).choices[0].logprobs.content
    assert [bytes(token.bytes) for token in free] != tokens


def test_stop_strings_end_the_answer_and_are_not_returned(client, model):
    text = ask(client, model, max_tokens=40).choices[0].message.content
    stop = text[len(text) // 2 :][:4]
    expected = text[: text.index(stop)]
    for stops in (stop, ["~~~~", stop]):
        answer = ask(client, model, max_tokens=40, stop=stops)
        assert answer.choices[0].message.content == expected
        assert answer.choices[0].finish_reason == "stop"
    streamed = [chunk.choices[0].delta.content or ""
                for chunk in ask(client, model, max_tokens=40, stop=stop, stream=True)]
    assert "".join(streamed) == expected


def test_content_parts_are_the_same_text(client, model):
    parts = [{"role": "user", "content": [{"type": "text", "text": "Tell me"},
                                          {"type": "text", "text": "about Lily."}]}]
    plain = [{"role": "user", "content": "Tell me\nabout Lily."}]
    answers = [ask(client, model, messages=messages) for messages in (parts, plain)]
    assert answers[0].usage.prompt_tokens == answers[1].usage.prompt_tokens
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content


def test_the_conversation_matters(client, model):
    longer = MESSAGES + [{"role": "assistant", "content": "Lily had a cat."},
                         {"role": "user", "content": "And a dog?"}]
    short, long = ask(client, model), ask(client, model, messages=longer)
    assert long.usage.prompt_tokens > short.usage.prompt_tokens
    assert long.choices[0].message.content != short.choices[0].message.content


def test_parse_says_when_the_limit_cut_the_answer(client, model):
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(
            model=model, messages=MESSAGES, max_tokens=3, extra_body={"ignore_eos": True}
        )


def test_raw_headers(client, model):
    raw = client.chat.completions.with_raw_response.create(
        model=model, messages=MESSAGES, max_tokens=2
    )
    assert raw.headers["x-request-id"]
    assert float(raw.headers["openai-processing-ms"]) >= 0
    assert raw.headers["content-type"].startswith("application/json")
    answer = raw.parse()
    assert answer._request_id == raw.headers["x-request-id"]
    again = client.chat.completions.with_raw_response.create(
        model=model, messages=MESSAGES, max_tokens=2
    )
    assert again.headers["x-request-id"] != raw.headers["x-request-id"]


def test_the_stream_on_the_wire(client, model):
    with client.chat.completions.with_streaming_response.create(
        model=model, messages=MESSAGES, max_tokens=4, stream=True
    ) as raw:
        assert raw.headers["content-type"].startswith("text/event-stream")
        assert raw.headers["x-request-id"]
        lines = [line for line in raw.iter_lines() if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]" and lines.count("data: [DONE]") == 1
