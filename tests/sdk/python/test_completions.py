"""`completions`: the model's own text, all forms of a prompt, echo and prompt scoring."""

import pytest


def complete(client, model, prompt, **options):
    options = {"temperature": 0, "max_tokens": 16} | options
    return client.completions.create(model=model, prompt=prompt, **options)


def test_the_model_says_what_its_reference_says(client, model, goldens):
    for golden in goldens:
        answer = complete(client, model, golden.prompt, max_tokens=len(golden.ids))
        text = answer.choices[0].text
        if not golden.prompt:
            # SentencePiece puts a space before the first word of a text; both are its text.
            text = text.removeprefix(" ")
        assert text == golden.text
        assert answer.usage.prompt_tokens == len(golden.prompt_ids)
        assert answer.usage.completion_tokens == len(golden.ids)
        assert answer.choices[0].finish_reason == "length"


def test_the_shape_of_a_whole_answer(client, model):
    answer = complete(client, model, "Once")
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.model == model
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.choices[0].logprobs is None
    assert "logprobs" in answer.choices[0].model_fields_set


def test_the_default_limit_is_sixteen(client, model, golden):
    answer = client.completions.create(
        model=model, prompt=golden.prompt, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage.completion_tokens == 16


def test_a_stream_is_the_whole_answer_in_pieces(client, model, golden):
    chunks = list(complete(client, model, golden.prompt, max_tokens=len(golden.ids), stream=True,
                           stream_options={"include_usage": True}))
    assert len(chunks) > 10
    assert {chunk.object for chunk in chunks} == {"text_completion"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage.prompt_tokens == len(golden.prompt_ids)
    assert chunks[-1].usage.completion_tokens == len(golden.ids)
    choices = [chunk.choices[0] for chunk in chunks[:-1]]
    assert "".join(choice.text for choice in choices) == golden.text
    assert choices[-1].finish_reason == "length"
    assert all(choice.finish_reason is None for choice in choices[:-1])


def test_a_list_of_prompts_is_prompt_major(client, model, goldens):
    prompts = [golden.prompt for golden in goldens if golden.prompt]
    alone = [complete(client, model, prompt).choices[0].text for prompt in prompts]
    together = complete(client, model, prompts)
    assert [choice.index for choice in together.choices] == list(range(len(prompts)))
    assert [choice.text for choice in together.choices] == alone
    twice = complete(client, model, prompts, n=2)
    assert [choice.text for choice in twice.choices] == [text for text in alone for _ in range(2)]
    assert [choice.index for choice in twice.choices] == list(range(2 * len(prompts)))


def test_token_ids_are_taken_as_they_are(client, model, goldens):
    texts = [golden.text for golden in goldens if golden.prompt]
    ids = [golden.prompt_ids for golden in goldens if golden.prompt]
    one = complete(client, model, ids[0], max_tokens=20)
    assert one.usage.prompt_tokens == len(ids[0])
    assert texts[0].startswith(one.choices[0].text) and one.choices[0].text
    several = complete(client, model, ids, max_tokens=20)
    assert len(several.choices) == len(ids)
    for choice, text in zip(several.choices, texts):
        assert text.startswith(choice.text) and choice.text


def test_echo(client, model, golden):
    plain = complete(client, model, golden.prompt)
    echoed = complete(client, model, golden.prompt, echo=True)
    assert echoed.choices[0].text == golden.prompt + plain.choices[0].text
    streamed = complete(client, model, golden.prompt, echo=True, stream=True)
    text = "".join(chunk.choices[0].text for chunk in streamed)
    assert text == golden.prompt + plain.choices[0].text


def test_stop_strings(client, model, golden):
    stop = golden.text[30:36]
    expected = golden.text[: golden.text.index(stop)]
    whole = complete(client, model, golden.prompt, max_tokens=100, stop=[stop])
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (expected, "stop")
    streamed = list(complete(client, model, golden.prompt, max_tokens=100, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == expected
    assert streamed[-1].choices[0].finish_reason == "stop"


def test_logit_bias_bans_a_token(client, model, golden):
    banned = complete(client, model, golden.prompt, logit_bias={str(golden.ids[0]): -100})
    free = complete(client, model, golden.prompt)
    assert golden.text.startswith(free.choices[0].text)
    assert banned.choices[0].text[0] != free.choices[0].text[0]


def test_a_seed_repeats(client, model, golden):
    def text(seed):
        return complete(client, model, golden.prompt, temperature=1, seed=seed).choices[0].text

    assert text(3) == text(3)
    assert len({text(seed) for seed in range(4)}) > 1


def test_logprobs_are_parallel_lists(client, model, golden):
    answer = complete(client, model, golden.prompt, logprobs=3)
    [choice] = answer.choices
    logprobs = choice.logprobs
    assert "".join(logprobs.tokens) == choice.text
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == 16
    assert len(logprobs.top_logprobs) == len(logprobs.text_offset) == 16
    offsets = [len("".join(logprobs.tokens[:i])) for i in range(16)]
    assert logprobs.text_offset == offsets
    for token, logprob, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs
    ):
        assert logprob <= 0
        assert 3 <= len(top) <= 4
        # Greedy: the token is the best alternative.
        assert top[token] == pytest.approx(logprob) and max(top.values()) == top[token]


def test_logprobs_are_those_of_the_reference(client, model, goldens):
    for golden in goldens:
        answer = complete(client, model, golden.prompt, max_tokens=1, logprobs=5)
        top = sorted(answer.choices[0].logprobs.top_logprobs[0].values(), reverse=True)
        assert top == pytest.approx(golden.next_logprobs, abs=0.02)


def test_prompt_scoring(client, model, golden):
    """max_tokens 0, echo and logprobs: nothing is generated, the prompt is scored."""
    generated = complete(client, model, golden.prompt_ids, max_tokens=12, logprobs=1)
    expected = generated.choices[0].logprobs.token_logprobs
    ids = golden.prompt_ids + golden.ids[:12]
    scored = complete(client, model, ids, max_tokens=0, echo=True, logprobs=1)
    [choice] = scored.choices
    assert scored.usage.completion_tokens == 0
    assert scored.usage.prompt_tokens == len(ids)
    logprobs = choice.logprobs
    assert len(logprobs.tokens) == len(ids)
    assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
    assert all(logprob <= 0 for logprob in logprobs.token_logprobs[1:])
    assert logprobs.token_logprobs[-12:] == pytest.approx(expected, abs=0.02)
    assert choice.text.endswith(generated.choices[0].text)


def test_echo_with_logprobs_covers_prompt_and_answer(client, model, golden):
    answer = complete(client, model, golden.prompt, max_tokens=4, echo=True, logprobs=0)
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.tokens) == len(golden.prompt_ids) + 4
    assert logprobs.token_logprobs[0] is None
    assert None not in logprobs.token_logprobs[1:]
    assert logprobs.text_offset == sorted(logprobs.text_offset)
