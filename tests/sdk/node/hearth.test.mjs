// The official JavaScript client against a running server. The Python suite beside this one goes
// deeper; this one holds what differs between the clients: their streams, helpers and errors.

import assert from "node:assert/strict";
import { describe, it } from "node:test";
import OpenAI from "openai";
import { apiKey, connect, golden, metric, model, status, untilIdle } from "./server.mjs";

const client = connect();
const messages = [
  { role: "system", content: "You tell stories." },
  { role: "user", content: "Tell me about Lily." },
];
const ask = (options = {}) =>
  client.chat.completions.create({ model, messages, temperature: 0, max_tokens: 24, ...options });
const complete = (options = {}) =>
  client.completions.create({ model, prompt: golden.prompt, temperature: 0, ...options });

// Long enough to be in the middle of it when the client goes: 16 x 400 tokens.
const LONG = { n: 16, max_tokens: 400, temperature: 1, seed: 1, ignore_eos: true };
const LONG_TOKENS = 16 * 400;

async function collect(stream) {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return chunks;
}

/** The error of a call that must fail with this class. */
async function refused(call, Kind) {
  try {
    await call();
  } catch (error) {
    assert.ok(error instanceof Kind, `${error?.constructor?.name}: ${error}`);
    return error;
  }
  assert.fail(`expected ${Kind.name}`);
}

describe("models", () => {
  it("lists and retrieves the served model", async () => {
    const ids = [];
    for await (const entry of client.models.list()) ids.push(entry.id);
    assert.ok(ids.includes(model));
    const entry = await client.models.retrieve(model);
    assert.equal(entry.id, model);
    assert.equal(entry.object, "model");
  });

  it("does not find an unknown one", async () => {
    const error = await refused(() => client.models.retrieve("a/b:c"), OpenAI.NotFoundError);
    assert.equal(error.code, "model_not_found");
  });
});

describe("chat", () => {
  it("answers whole and streamed alike, with usage in the last chunk", async () => {
    // Whoever asks first computes the prompt; from then on it is cached, and counted as that.
    await ask();
    const whole = await ask();
    assert.equal(whole.object, "chat.completion");
    assert.equal(whole.model, model);
    assert.ok(whole.choices[0].message.content.trim());
    const chunks = await collect(
      await ask({ stream: true, stream_options: { include_usage: true } }),
    );
    const last = chunks.pop();
    assert.deepEqual(last.choices, []);
    assert.deepEqual(last.usage, whole.usage);
    assert.ok(chunks.length > 3);
    assert.ok(chunks.every((chunk) => chunk.usage === null && chunk.id === last.id));
    const text = chunks.map((chunk) => chunk.choices[0].delta.content ?? "").join("");
    assert.equal(text, whole.choices[0].message.content);
    assert.equal(chunks.at(-1).choices[0].finish_reason, whole.choices[0].finish_reason);
  });

  it("works with the accumulating helper", async () => {
    const whole = await ask();
    const runner = client.chat.completions.stream({
      model, messages, temperature: 0, max_tokens: 24,
    });
    let heard = "";
    runner.on("content", (delta) => (heard += delta));
    const final = await runner.finalContent();
    assert.equal(final, whole.choices[0].message.content);
    assert.equal(heard, final);
  });

  it("repeats itself with a seed", async () => {
    const text = async (seed) =>
      (await ask({ temperature: 1, seed })).choices[0].message.content;
    assert.equal(await text(5), await text(5));
    const several = new Set(await Promise.all([0, 1, 2, 3].map(text)));
    assert.ok(several.size > 1);
  });

  it("gives several choices", async () => {
    const answer = await ask({ n: 3, temperature: 1, seed: 2 });
    assert.deepEqual(answer.choices.map((choice) => choice.index), [0, 1, 2]);
    assert.ok(new Set(answer.choices.map((choice) => choice.message.content)).size > 1);
  });

  it("gives log-probabilities", async () => {
    const answer = await ask({ logprobs: true, top_logprobs: 2, max_tokens: 5, ignore_eos: true });
    const { content } = answer.choices[0].logprobs;
    assert.equal(content.length, 5);
    for (const token of content) {
      assert.equal(token.top_logprobs.length, 2);
      assert.deepEqual(token.top_logprobs[0].bytes, token.bytes);
      assert.ok(token.logprob <= 0);
    }
  });

  it("says its request id and its time", async () => {
    const { data, response, request_id } = await client.chat.completions
      .create({ model, messages, max_tokens: 2 })
      .withResponse();
    assert.ok(request_id);
    assert.equal(data._request_id, request_id);
    assert.equal(response.headers.get("x-request-id"), request_id);
    assert.ok(Number(response.headers.get("openai-processing-ms")) >= 0);
  });
});

describe("completions", () => {
  it("says what the model's reference says", async () => {
    const max_tokens = golden.ids.length;
    const whole = await complete({ max_tokens });
    assert.equal(whole.choices[0].text, golden.text);
    assert.equal(whole.usage.prompt_tokens, golden.promptIds.length);
    const chunks = await collect(await complete({ max_tokens, stream: true }));
    assert.equal(chunks.map((chunk) => chunk.choices[0].text).join(""), golden.text);
    const ids = await complete({ max_tokens, prompt: golden.promptIds });
    assert.equal(ids.choices[0].text, golden.text);
  });

  it("stops at a stop string without saying it", async () => {
    const stop = golden.text.slice(30, 36);
    const answer = await complete({ max_tokens: 100, stop });
    assert.equal(answer.choices[0].text, golden.text.slice(0, golden.text.indexOf(stop)));
    assert.equal(answer.choices[0].finish_reason, "stop");
  });

  it("scores a prompt", async () => {
    const answer = await complete({ max_tokens: 0, echo: true, logprobs: 1 });
    const { tokens, token_logprobs } = answer.choices[0].logprobs;
    assert.equal(tokens.length, golden.promptIds.length);
    assert.equal(token_logprobs[0], null);
    assert.ok(token_logprobs.slice(1).every((logprob) => logprob <= 0));
    assert.equal(answer.choices[0].text, golden.prompt);
  });
});

describe("errors", () => {
  const { BadRequestError, AuthenticationError, NotFoundError } = OpenAI;
  const schema = { name: "s", schema: { type: "array", uniqueItems: true } };
  const audio = { voice: "alloy", format: "mp3" };
  const cases = [
    ["temperature", 3, "invalid_value"],
    ["audio", audio, "unsupported_parameter"],
    ["tools", [], "invalid_value"],
    ["response_format", { type: "json_schema", json_schema: schema }, "invalid_value"],
    ["tempature", 1, "unknown_parameter"],
  ];
  for (const [param, value, code] of cases) {
    it(`refuses ${param} by name`, async () => {
      const error = await refused(() => ask({ [param]: value }), BadRequestError);
      assert.equal(error.status, 400);
      assert.equal(error.param, param);
      assert.equal(error.code, code);
      assert.equal(error.type, "invalid_request_error");
      assert.ok(error.requestID);
    });
  }

  it("refuses an over-long prompt", async () => {
    const content = "Once upon a time there was a girl. ".repeat(3000);
    const error = await refused(
      () => ask({ messages: [{ role: "user", content }] }), BadRequestError,
    );
    assert.equal(error.code, "context_length_exceeded");
    const [limit, prompt] = error.message.replace(/^400 /, "").match(/\d+/g).map(Number);
    assert.ok(0 < limit && limit < prompt);
  });

  it("refuses a wrong key", async () => {
    const stranger = connect({ apiKey: `${apiKey}-wrong` });
    const error = await refused(() => stranger.models.list(), AuthenticationError);
    assert.equal(error.code, "invalid_api_key");
  });

  it("does not know another model", async () => {
    const error = await refused(() => ask({ model: "no-such-model" }), NotFoundError);
    assert.equal(error.code, "model_not_found");
    assert.equal(error.param, "model");
  });
});

describe("clients that go", () => {
  it("frees everything when a stream is aborted", async () => {
    await untilIdle(20_000);
    const before = await metric("hearth_generated_tokens_total");
    const stream = await complete({ ...LONG, stream: true });
    for await (const chunk of stream) {
      assert.ok(chunk.choices.length > 0);
      assert.ok((await metric("hearth_kv_blocks_used")) > 0);
      stream.controller.abort();
      break;
    }
    await untilIdle(5_000);
    assert.ok((await metric("hearth_generated_tokens_total")) - before < 0.9 * LONG_TOKENS);
  });

  it("goes on after a client's timeout", async () => {
    await untilIdle(20_000);
    const before = await metric("hearth_generated_tokens_total");
    const hasty = connect({ timeout: 50 });
    await refused(
      () => hasty.completions.create({ model, prompt: "Once", ...LONG }),
      OpenAI.APIConnectionTimeoutError,
    );
    await untilIdle(5_000);
    assert.ok((await metric("hearth_generated_tokens_total")) - before < 0.9 * LONG_TOKENS);
    assert.equal(await status("/health"), 200);
    assert.equal(await status("/ready"), 200);
    assert.ok((await complete({ max_tokens: 2 })).choices[0].text);
  });
});

describe("many clients", () => {
  it("each hear what they hear alone", async () => {
    const request = (seed) => ({
      messages: [{ role: "user", content: `Story ${seed}` }], temperature: 1, seed,
      max_tokens: 40 + seed, stream: true,
    });
    const text = async (seed) =>
      (await collect(await ask(request(seed))))
        .map((chunk) => chunk.choices[0].delta.content ?? "")
        .join("");
    const seeds = [0, 1, 2, 3, 4, 5, 6, 7];
    const alone = [];
    for (const seed of seeds) alone.push(await text(seed));
    assert.deepEqual(await Promise.all(seeds.map(text)), alone);
    assert.ok(new Set(alone).size > 1);
  });
});
