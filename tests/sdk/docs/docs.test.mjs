// `/docs` in a browser that reaches nothing but the server: what is listed, what is asked for, and
// that trying a call works. HEARTH_CHROMIUM is the program; its own window is never shown.

import assert from "node:assert/strict";
import { after, before, describe, it } from "node:test";
import { chromium } from "playwright-core";

const root = process.env.HEARTH_BASE_URL?.replace(/\/v1\/?$/, "");
const apiKey = process.env.HEARTH_API_KEY;
const executablePath = process.env.HEARTH_CHROMIUM;
assert.ok(root && apiKey && executablePath, "these tests need a running server and a Chromium");

// Whatever is not on this machine goes to a port where nobody listens.
const offline = ["--no-sandbox", "--proxy-server=127.0.0.1:9", "--proxy-bypass-list=127.0.0.1"];

describe("/docs", () => {
  let browser;
  let page;
  const asked = [];
  const complaints = [];

  before(async () => {
    browser = await chromium.launch({ executablePath, args: offline });
    page = await browser.newPage();
    page.setDefaultTimeout(30_000);
    page.on("request", (request) => asked.push(request.url()));
    page.on("pageerror", (error) => complaints.push(`${error}`));
    page.on("console", (line) => {
      if (line.type() === "error") complaints.push(line.text());
    });
    await page.goto(`${root}/docs`);
    await page.locator("main[aria-busy=false]").waitFor();
  });
  after(() => browser?.close());

  /** The part of the page about one operation, opened. */
  async function opened(method, path) {
    await page.locator("#find").fill("");
    const all = page.locator("main details").filter({
      has: page.locator("summary .path", { hasText: new RegExp(`^${path}$`) }),
    });
    const one = all.filter({ has: page.locator(`summary .method.${method}`) });
    await one.locator("summary").click();
    return one;
  }

  /** Sends the form of an operation; says how it went. */
  async function sent(one) {
    await one.getByRole("button", { name: "Send" }).click();
    const status = one.getByRole("status");
    await status.filter({ hasText: / ms$/ }).waitFor();
    return status.textContent();
  }

  it("lists every operation of the document, and finds one by a field", async () => {
    const { paths } = await (await fetch(`${root}/openapi.json`)).json();
    const known = Object.entries(paths).flatMap(([path, item]) =>
      Object.keys(item).map((method) => `${method.toUpperCase()} ${path}`));
    const shown = await page.locator("main details > summary").evaluateAll((list) =>
      list.map((one) => {
        const text = (part) => one.querySelector(part).textContent;
        return `${text(".method")} ${text(".path")}`;
      }));
    assert.ok(known.length > 40, `${known.length}`);
    assert.deepEqual(shown.sort(), known.sort());
    await page.locator("#find").fill("max_completion_tokens");
    const found = page.locator("main details:visible");
    assert.equal(await found.count(), 1);
    assert.match(await found.textContent(), /\/v1\/chat\/completions/);
  });

  it("refuses a call without a key as the server does", async () => {
    const models = await opened("get", "/v1/models");
    assert.match(await sent(models), /^401 /);
    assert.match(await models.getByLabel("Answer").textContent(), /invalid_api_key/);
    assert.deepEqual(complaints.splice(0).filter((line) => !line.includes("401")), []);
  });

  it("tries a call, and shows a stream as it comes", async () => {
    await page.getByLabel("API key").fill(apiKey);
    const models = page.locator("main details[open]");
    assert.match(await sent(models), /^200 /);
    const list = JSON.parse(await models.getByLabel("Answer").textContent());
    assert.equal(list.data[0].id, process.env.HEARTH_MODEL);

    const chat = await opened("post", "/v1/chat/completions");
    const shown = (name) => chat.getByRole("table", { name }).textContent();
    assert.match(await shown("Body (application/json)"), /temperature *number: 0 to 2/);
    assert.match(await shown("Answer"), /choices\[\]\.message\.content/);
    const body = JSON.parse(await chat.locator("textarea").inputValue());
    assert.equal(body.stream, true);
    await chat.locator("textarea").fill(JSON.stringify({ ...body, temperature: 0 }));
    assert.match(await sent(chat), /^200 /);
    assert.match(await chat.getByLabel("Answer").textContent(), /data: \[DONE\]/);
    assert.match(await chat.locator(".said").textContent(), /^Hello/);
  });

  it("asked this server alone, and met no objection of the browser", () => {
    const elsewhere = asked.filter((url) => !url.startsWith(`${root}/`) && !url.startsWith("data:"));
    assert.deepEqual(elsewhere, []);
    assert.ok(asked.length >= 5, `${asked}`);
    assert.deepEqual(complaints, []);
  });
});
