// Shows openapi.json, the document of the REST paths.

import { node } from "./format.js";
import { ask } from "./server.js";

const { body: api } = await ask("openapi.json", "json", { timeoutMs: 10_000 });

// Follows references until the value itself is there.
function resolve(value) {
  if (!value?.$ref) return value;
  return resolve(value.$ref.slice(2).split("/").reduce((place, key) => place[key], api));
}

// A schema with what it refers to.
function expanded(value) {
  if (Array.isArray(value)) return value.map(expanded);
  if (value === null || typeof value !== "object") return value;
  if (value.$ref) return expanded(resolve(value));
  return Object.fromEntries(Object.entries(value).map(([key, each]) => [key, expanded(each)]));
}

function schemaOf(title, { schema, example }) {
  const text = (value) => JSON.stringify(value, null, 2);
  const parts = [node("pre", { tabIndex: 0, ariaLabel: title, role: "group" }, text(expanded(schema)))];
  if (example) parts.push("Example:", node("pre", { tabIndex: 0, ariaLabel: `${title}, example`, role: "group" }, text(example)));
  return node("details", {}, node("summary", {}, title), ...parts);
}

function table(headings, rows) {
  const head = node("tr", {}, ...headings.map((name) => node("th", { scope: "col" }, name)));
  const lines = rows.map((row) => node("tr", {}, ...row.map((cell) => node("td", {}, cell))));
  const made = node("table", {}, node("thead", {}, head), node("tbody", {}, ...lines));
  return node("div", { className: "scroll", tabIndex: 0, role: "group", ariaLabel: headings[0] }, made);
}

function operation(path, verb, { operationId, summary, description, parameters = [], requestBody, responses }) {
  const heading = node("h3", {}, node("span", { className: `verb ${verb}` }, verb), " ", node("code", {}, path));
  const article = node("article", { id: operationId }, heading, node("p", {}, summary));
  if (description) article.append(node("p", {}, description));
  if (parameters.length) {
    article.append(table(["parameter", "in", "meaning"], parameters.map(resolve).map(
      (each) => [each.name, each.in, each.description ?? ""])));
  }
  for (const [type, content] of Object.entries(requestBody?.content ?? {})) {
    article.append(schemaOf(`Body, ${type}`, content));
  }
  article.append(table(["status", "reply"], Object.entries(responses).map(
    ([status, reply]) => [status, resolve(reply).description])));
  for (const [status, reply] of Object.entries(responses)) {
    for (const [type, content] of Object.entries(resolve(reply).content ?? {})) {
      if (status === "200") article.append(schemaOf(`Reply ${status}, ${type}`, content));
    }
  }
  return article;
}

document.getElementById("about").textContent = api.info.description;
document.getElementById("operations").append(...Object.entries(api.paths).flatMap(
  ([path, verbs]) => Object.entries(verbs).map(([verb, each]) => operation(path, verb, each))));
