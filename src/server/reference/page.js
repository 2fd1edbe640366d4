"use strict";
const element = (tag, properties, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
};
const byId = (id) => document.getElementById(id);

// A table with a header for each column.
function table(caption, names, rows) {
  const head = names.map((name) => element("th", { scope: "col" }, name));
  const body = rows.map((cells) => element("tr", {}, ...cells.map((cell) => element("td", {}, cell))));
  return element("table", {}, element("caption", {}, caption),
    element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...body));
}

function typeOf(schema) {
  if (schema.anyOf) return schema.anyOf.map(typeOf).join(" or ");
  const type = [].concat(resolved(schema).type || "any").join(" or ");
  const item = schema.items ? typeOf(schema.items) : "any";
  if (item !== "any") return `${type} of ${item}`;
  if ("minimum" in schema) return `${type}: ${schema.minimum} to ${schema.maximum}`;
  return schema.enum ? `${type}: ${schema.enum.join(", ")}` : type;
}

// What stands behind a reference.
let schemas = {};
const resolved = (schema = {}) => schemas[(schema.$ref || "").split("/").pop()] || schema;

// The fields of an object, those inside its objects too.
function fieldRows(schema, word, prefix = "") {
  return Object.entries(schema.properties || {}).flatMap(([name, field]) => {
    const required = (schema.required || []).includes(name);
    const treatment = field["x-hearth-treatment"];
    const status = treatment ? `${treatment}: ${field.description}` : required ? word : "";
    const row = [element("code", {}, prefix + name), typeOf(field), status];
    const inner = resolved(field.items || (field.anyOf || [field])[0]);
    return [row, ...fieldRows(inner, word, `${prefix}${name}${field.items ? "[]" : ""}.`)];
  });
}

// What a stream says, piece by piece, where an event has text.
function textOf(event) {
  const choice = (event.choices || [])[0] || {};
  const delta = choice.delta || {};
  if (event.type === "response.output_text.delta") return event.delta;
  return delta.content || delta.reasoning_content || choice.text || "";
}

async function show(response, output, said) {
  const kind = response.headers.get("content-type") || "";
  if (!kind.startsWith("text/event-stream")) {
    const text = await response.text();
    try { output.textContent = JSON.stringify(JSON.parse(text), null, 2); }
    catch { output.textContent = text; }
    return;
  }
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  said.hidden = false;
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    output.append(value);
    output.scrollTop = output.scrollHeight;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: {")) continue;
      try { said.append(textOf(JSON.parse(line.slice(6)))); } catch { /* half an event */ }
    }
  }
}

function request(method, path, form, kind) {
  const named = (place) => [...form.querySelectorAll(`[data-in=${place}]`)];
  let url = path;
  for (const input of named("path")) {
    url = url.replace(`{${input.name}}`, encodeURIComponent(input.value));
  }
  const query = new URLSearchParams();
  for (const input of named("query")) if (input.value) query.append(input.name, input.value);
  if (query.size) url += `?${query}`;
  const options = { method: method.toUpperCase(), headers: {} };
  const key = byId("key").value.trim();
  if (key) options.headers.Authorization = `Bearer ${key}`;
  if (kind === "application/json") {
    options.headers["Content-Type"] = kind;
    options.body = form.querySelector("textarea").value;
  } else if (kind) {
    options.body = new FormData();
    for (const input of named("form")) {
      const value = input.type === "file" ? input.files[0] : input.value;
      if (value) options.body.append(input.name, value);
    }
  } else if (method !== "get") {
    options.headers["Content-Type"] = "application/json";
  }
  return [url, options];
}

function field(label, name, place, properties = {}) {
  const input = element("input", { name, ...properties });
  input.dataset.in = place;
  return element("label", {}, `${label} `, input);
}

// Everything that a request needs, and what came back.
function tryForm(method, path, operation, kind, schema) {
  const form = element("form", { className: "try" });
  for (const parameter of operation.parameters || []) {
    const type = parameter.in === "path" ? { required: true } : {};
    form.append(field(parameter.name, parameter.name, parameter.in, type));
  }
  if (kind === "application/json") {
    const example = JSON.stringify((schema.examples || [{}])[0], null, 2);
    form.append(element("label", {}, "Body", element("textarea", { value: example, spellcheck: false })));
  } else if (kind) {
    for (const [name, part] of Object.entries(schema.properties)) {
      const file = part.format === "binary" ? { type: "file" } : {};
      form.append(field(name, name, "form", file));
    }
  }
  const send = element("button", { type: "submit" }, "Send");
  const stop = element("button", { type: "button", hidden: true }, "Stop");
  const status = element("p", { className: "mute" });
  status.setAttribute("role", "status");
  const said = element("p", { className: "said", hidden: true });
  said.setAttribute("aria-live", "polite");
  const output = element("pre", { hidden: true, tabIndex: 0 });
  output.setAttribute("aria-label", "Answer");
  form.append(element("div", { className: "buttons" }, send, stop), status, said, output);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const abort = new AbortController();
    stop.onclick = () => abort.abort();
    [send.disabled, stop.hidden, said.hidden, output.hidden] = [true, false, true, false];
    said.textContent = output.textContent = "";
    status.textContent = "Waiting.";
    const began = performance.now();
    try {
      const [url, options] = request(method, path, form, kind);
      const response = await fetch(url, { ...options, signal: abort.signal });
      status.textContent = `${response.status} ${response.statusText}`;
      await show(response, output, said);
      status.textContent += `, ${Math.round(performance.now() - began)} ms`;
    } catch (error) {
      status.textContent = abort.signal.aborted ? "Stopped." : String(error);
    }
    [send.disabled, stop.hidden] = [false, true];
  });
  return form;
}

function route(method, path, operation) {
  const content = operation.requestBody ? operation.requestBody.content : {};
  const [kind, media] = Object.entries(content)[0] || [];
  const schema = media ? media.schema : {};
  const summary = element("summary", {},
    element("span", { className: `method ${method}` }, method.toUpperCase()),
    element("span", { className: "path" }, path), " ",
    element("span", { className: "says" }, operation.summary));
  const details = element("details", {}, summary);
  const words = `${method} ${path} ${operation.summary} ${Object.keys(schema.properties || {})}`;
  details.dataset.words = words.toLowerCase();
  details.addEventListener("toggle", () => {
    if (details.childElementCount > 1) return;
    const inside = element("div", {});
    if (operation.description) inside.append(element("p", {}, operation.description));
    const parameters = (operation.parameters || []).map((parameter) =>
      [element("code", {}, parameter.name), parameter.in, typeOf(parameter.schema), parameter.description || ""]);
    if (parameters.length) {
      inside.append(table("Parameters", ["Name", "In", "Type", ""], parameters));
    }
    const rows = fieldRows(schema, "required");
    if (rows.length) inside.append(table(`Body (${kind})`, ["Field", "Type", "Status"], rows));
    const { content: answers } = operation.responses["200"] || operation.responses["201"];
    inside.append(element("p", { className: "mute" },
      `Answers with ${Object.keys(answers).join(" or ")}.`));
    const answer = resolved((answers["application/json"] || {}).schema);
    const members = fieldRows(answer, "always");
    if (members.length) inside.append(table("Answer", ["Member", "Type", ""], members));
    inside.append(element("h3", {}, "Try it"), tryForm(method, path, operation, kind, schema));
    details.append(inside);
  });
  return details;
}

async function start() {
  const main = byId("routes");
  const reference = await (await fetch("/openapi.json")).json();
  ({ schemas } = reference.components);
  byId("version").textContent = reference.info.version;
  byId("about").textContent = reference.info.description;
  main.replaceChildren();
  const groups = new Map();
  for (const [path, item] of Object.entries(reference.paths)) {
    for (const [method, operation] of Object.entries(item)) {
      const [group] = operation.tags;
      if (!groups.has(group)) {
        groups.set(group, element("section", {}, element("h2", {}, group)));
        main.append(groups.get(group));
      }
      groups.get(group).append(route(method, path, operation));
    }
  }
  main.setAttribute("aria-busy", "false");
  byId("bar").addEventListener("submit", (event) => event.preventDefault());
  byId("find").addEventListener("input", (event) => {
    const wanted = event.target.value.toLowerCase();
    for (const details of main.querySelectorAll("details")) {
      details.hidden = !details.dataset.words.includes(wanted);
    }
    for (const section of groups.values()) {
      section.hidden = !section.querySelector("details:not([hidden])");
    }
  });
}

start().catch((error) => {
  byId("routes").textContent = `The document could not be read: ${error}`;
});
