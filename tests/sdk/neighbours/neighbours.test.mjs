// Anthropic's and Ollama's own JavaScript clients against the built-in model: their streams,
// helpers and errors. The Python suites beside this one go deeper.

import assert from "node:assert/strict";
import { describe, it } from "node:test";
import Anthropic from "@anthropic-ai/sdk";
import { Ollama } from "ollama";

const model = "hearth-tiny";
const baseURL = process.env.HEARTH_BASE_URL?.replace(/\/v1\/?$/, "");
const apiKey = process.env.HEARTH_API_KEY;
assert.ok(baseURL && apiKey, "these tests need a running server");

const hello = [{ role: "user", content: "Hello" }];
const weather = [{ role: "user", content: "What is the weather in Paris?" }];
const place = {
  type: "object",
  properties: { city: { enum: ["Paris", "Taipei"] } },
  required: ["city"],
  additionalProperties: false,
};

describe("messages", () => {
  const client = new Anthropic({ baseURL, apiKey, maxRetries: 0 });
  const tool = { name: "get_weather", description: "Weather of a place", input_schema: place };
  // Sampling is not in the client's types any more; the API has it all the same.
  const ask = (fields) => ({ model, max_tokens: 100, messages: hello, temperature: 0, ...fields });

  it("answers whole and streamed alike", async () => {
    const whole = await client.messages.create(ask());
    assert.deepEqual([whole.role, whole.stop_reason], ["assistant", "end_turn"]);
    assert.match(whole.content[0].text, /^Hello/);
    assert.match(whole._request_id, /^req_/);
    const kinds = [];
    for await (const event of await client.messages.create(ask({ stream: true }))) {
      kinds.push(event.type);
    }
    assert.equal(kinds[0], "message_start");
    assert.equal(kinds.at(-1), "message_stop");
    let heard = "";
    const stream = client.messages.stream(ask()).on("text", (text) => (heard += text));
    const final = await stream.finalMessage();
    assert.equal(heard, whole.content[0].text);
    assert.deepEqual(final.content[0].text, heard);
    assert.equal(final.usage.output_tokens, whole.usage.output_tokens);
  });

  it("streams a forced call and takes its result", async () => {
    const tool_choice = { type: "tool", name: tool.name, disable_parallel_tool_use: true };
    const asked = ask({ messages: weather, tools: [tool], tool_choice });
    const parts = [];
    const stream = client.messages.stream(asked).on("inputJson", (part) => parts.push(part));
    const message = await stream.finalMessage();
    assert.equal(message.stop_reason, "tool_use");
    const [call] = message.content;
    assert.ok(["Paris", "Taipei"].includes(call.input.city), JSON.stringify(call));
    assert.deepEqual(JSON.parse(parts.join("")), call.input);
    const result = { type: "tool_result", tool_use_id: call.id, content: "sunny" };
    const answer = await client.messages.create(ask({
      tools: [tool],
      messages: [
        ...weather,
        { role: "assistant", content: message.content },
        { role: "user", content: [result] },
      ],
    }));
    assert.match(answer.content[0].text, /sunny/);
  });

  it("counts tokens as an answer counts them", async () => {
    const counted = await client.messages.countTokens({ model, messages: hello });
    const { usage } = await client.messages.create(ask({ max_tokens: 1 }));
    assert.equal(counted.input_tokens, usage.input_tokens + usage.cache_read_input_tokens);
    const more = await client.messages.countTokens({ model, messages: hello, tools: [tool] });
    assert.ok(more.input_tokens > counted.input_tokens + 10);
  });

  it("frees the server when its client leaves a stream", async () => {
    const stream = client.messages.stream(ask({ messages: weather, tools: [tool] }));
    for await (const event of stream) {
      if (event.type === "message_start") break;
    }
    stream.abort();
    assert.ok(await client.messages.create(ask({ max_tokens: 1 })));
  });

  it("names what is wrong, in errors of its own classes", async () => {
    const refused = async (fields, Kind, type, words, own = client) => {
      await assert.rejects(own.messages.create(ask(fields)), (error) => {
        assert.ok(error instanceof Kind, `${error?.constructor?.name}: ${error}`);
        assert.equal(error.error.error.type, type);
        assert.match(error.message, words);
        return true;
      });
    };
    await refused({ messages: [] }, Anthropic.BadRequestError, "invalid_request_error", /messages/);
    await refused({ tempature: 1 }, Anthropic.BadRequestError, "invalid_request_error", /tempature/);
    await refused({ model: "claude" }, Anthropic.NotFoundError, "not_found_error", /claude/);
    const stranger = new Anthropic({ baseURL, apiKey: "sk-wrong", maxRetries: 0 });
    await refused({}, Anthropic.AuthenticationError, "authentication_error", /key/, stranger);
  });
});

describe("ollama", () => {
  const headers = { Authorization: `Bearer ${apiKey}` };
  const client = new Ollama({ host: baseURL, headers });
  const options = { temperature: 0, num_predict: 100 };

  it("answers whole and line by line", async () => {
    const whole = await client.chat({ model, messages: hello, options });
    assert.match(whole.message.content, /^Hello/);
    let heard = "";
    let last;
    for await (last of await client.chat({ model, messages: hello, options, stream: true })) {
      heard += last.message.content;
    }
    assert.equal(heard, whole.message.content);
    assert.deepEqual([last.done, last.done_reason], [true, "stop"]);
    const shaped = await client.generate({ model, prompt: "Hello", format: place, options });
    assert.ok(["Paris", "Taipei"].includes(JSON.parse(shaped.response).city));
  });

  it("lists the model, and names what is wrong", async () => {
    const { models } = await client.list();
    assert.deepEqual(models.map((one) => one.name), [`${model}:latest`]);
    await assert.rejects(client.chat({ model: "llama3", messages: hello }), /llama3/);
    await assert.rejects(client.embeddings({ model, prompt: "a" }), /model/);
  });
});
