// Vercel's AI SDK against a running server: text, streams, objects and tools, by its provider for
// OpenAI (chat completions and responses) and by the one for servers that are compatible with it.

import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, Output, generateText, isStepCount, streamText, tool } from "ai";
import { z } from "zod";

const baseURL = process.env.HEARTH_BASE_URL;
const apiKey = process.env.HEARTH_API_KEY;
const id = process.env.HEARTH_MODEL;
assert.ok(baseURL && apiKey && id, "these tests need a running server");

const openai = createOpenAI({ baseURL, apiKey });
const compatible = createOpenAICompatible({
  name: "hearth", baseURL, apiKey, includeUsage: true, supportsStructuredOutputs: true,
});
const models = {
  "chat completions": openai.chat(id),
  responses: openai.responses(id),
  "the compatible provider": compatible(id),
};

const city = z.strictObject({ city: z.enum(["Paris", "Taipei"]) });
const asked = [];
const tools = {
  get_weather: tool({
    description: "Weather of a place",
    inputSchema: city,
    strict: true,
    execute: async ({ city }) => {
      asked.push(city);
      return "sunny";
    },
  }),
  get_time: tool({ description: "Time of a place", inputSchema: city, strict: true }),
};

const base = { temperature: 0, maxOutputTokens: 200, maxRetries: 0 };

for (const [name, model] of Object.entries(models)) {
  const ask = (options) => ({ model, prompt: "Hello", ...base, ...options });

  describe(name, () => {
    it("answers whole and streamed alike", async () => {
      const whole = await generateText(ask());
      assert.match(whole.text, /^Hello/);
      assert.equal(whole.finishReason, "stop");
      const stream = streamText(ask());
      const parts = [];
      for await (const part of stream.textStream) parts.push(part);
      assert.equal(parts.join(""), whole.text);
      assert.ok(parts.length > 1);
      const usage = await stream.usage;
      assert.equal(usage.outputTokens, whole.usage.outputTokens);
      assert.ok(usage.inputTokens > 0 && usage.outputTokens > 1);
      assert.equal(await stream.finishReason, "stop");
    });

    it("says that an answer was cut", async () => {
      const prompt = "Hello";
      const whole = await generateText(ask({ prompt, maxOutputTokens: 16 }));
      assert.equal(whole.finishReason, "length");
    });

    for (const toolName of Object.keys(tools)) {
      it(`calls ${toolName} when it is named`, async () => {
        const options = ask({ tools, toolChoice: { type: "tool", toolName } });
        const whole = await generateText(options);
        assert.deepEqual(whole.toolCalls.map((call) => call.toolName), [toolName]);
        city.parse(whole.toolCalls[0].input);
        const stream = streamText(options);
        const kinds = [];
        for await (const part of stream.fullStream) kinds.push(part.type);
        assert.ok(kinds.includes("tool-input-delta"), `${kinds}`);
        const [call] = await stream.toolCalls;
        assert.deepEqual(call.input, whole.toolCalls[0].input);
      });
    }

    it("runs a tool and goes on with its result", async () => {
      asked.length = 0;
      const { get_weather } = tools;
      const answer = await generateText(ask({
        prompt: "What is the weather in Paris?",
        tools: { get_weather },
        toolChoice: "required",
        stopWhen: isStepCount(2),
        prepareStep: ({ stepNumber }) => (stepNumber === 0 ? {} : { toolChoice: "none" }),
      }));
      assert.equal(answer.steps.length, 2);
      assert.ok(asked.length > 0);
      assert.equal(answer.steps[0].finishReason, "tool-calls");
      assert.ok(answer.text);
    });

    it("gives an object, whole and in parts", async () => {
      const schema = z.strictObject({ colour: z.enum(["red", "green"]), sure: z.boolean() });
      const whole = await generateText(ask({ output: Output.object({ schema }) }));
      schema.parse(whole.output);
      const stream = streamText(ask({ output: Output.object({ schema }) }));
      let last;
      for await (const part of stream.partialOutputStream) last = part;
      assert.deepEqual(last, whole.output);
    });

    it("gives one of a list", async () => {
      const options = ["red", "green"];
      const choice = await generateText(ask({ output: Output.choice({ options }) }));
      assert.ok(options.includes(choice.output));
    });

    it("names what is wrong", async () => {
      await assert.rejects(generateText(ask({ temperature: 3 })), (error) => {
        assert.ok(APICallError.isInstance(error), `${error}`);
        assert.equal(error.statusCode, 400);
        assert.equal(JSON.parse(error.responseBody).error.param, "temperature");
        return true;
      });
    });
  });
}
