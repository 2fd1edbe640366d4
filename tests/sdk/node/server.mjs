// What every test needs: a client, the model's id, and a look at the server's own pages.
// The environment is that of ../python/conftest.py.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import OpenAI from "openai";

function needed(name) {
  const value = process.env[name];
  assert.ok(value, `${name} is not set: these tests need a running server`);
  return value;
}

export const baseURL = needed("HEARTH_BASE_URL").replace(/\/$/, "");
export const apiKey = needed("HEARTH_API_KEY");
export const model = needed("HEARTH_MODEL");

/** A prompt and the greedy text that follows it. */
export const golden = (() => {
  const { prompts } = JSON.parse(readFileSync(needed("HEARTH_GOLDEN"), "utf8"));
  const [prompt, found] = Object.entries(prompts).find(([text]) => text !== "");
  const ids = found.greedy_ids_after_bos.slice(found.prompt_ids.length - 1);
  return { prompt, promptIds: found.prompt_ids, ids, text: found.text.slice(prompt.length) };
})();

export function connect(options = {}) {
  return new OpenAI({ baseURL, apiKey, maxRetries: 0, timeout: 60_000, ...options });
}

const root = baseURL.replace(/\/v1$/, "");

export async function status(path) {
  return (await fetch(root + path)).status;
}

/** The sum of a metric over its labels; it must be there. */
export async function metric(name) {
  const page = await (await fetch(root + "/metrics")).text();
  const rows = [...page.matchAll(new RegExp(`^${name}(?:\\{[^}]*\\})? (\\S+)`, "gm"))];
  assert.ok(rows.length > 0, `/metrics has no ${name}`);
  return rows.reduce((sum, row) => sum + Number(row[1]), 0);
}

/** Fails unless nothing runs, nothing waits and no block is held within that time. */
export async function untilIdle(milliseconds) {
  const deadline = Date.now() + milliseconds;
  for (;;) {
    const load = [
      await metric("hearth_requests_running"),
      await metric("hearth_requests_waiting"),
      await metric("hearth_kv_blocks_used"),
    ];
    if (load.every((value) => value === 0)) return;
    assert.ok(Date.now() < deadline, `still busy (running, waiting, blocks): ${load}`);
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}
