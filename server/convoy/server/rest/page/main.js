// The page speaks the Open Inference Protocol to the server that sent it, and reads `ui/state`.

import { Charts } from "./charts.js";
import { acceptImages, Classifier } from "./classify.js";
import { count, node } from "./format.js";
import { LANGUAGES } from "./requests.js";
import { ask, NoTokenError, token } from "./server.js";

const REFRESH_MS = 2000;
const STATE_TIMEOUT_MS = 5000;
const ALL_MODELS = "";
const element = (id) => document.getElementById(id);

let models = [];
let grpcPort = 0;
let image = "image.png";
let language = "curl";
let tokenInUse = false;
let answeredAt = performance.now();
let shownExamples = "";
const charts = new Charts(element("charts"));

// [name, number], the number empty for whatever version is the default.
function choice() {
  return element("model").value ? JSON.parse(element("model").value) : null;
}

function chosenPath() {
  if (!choice()) return null;
  const [name, version] = choice();
  return `v2/models/${encodeURIComponent(name)}${version ? `/versions/${version}` : ""}`;
}

const classifier = new Classifier(chosenPath, {
  chosen: (name) => { image = name; showRequest(); },
  tokenNeeded,
});

function tokenNeeded() {
  if (tokenInUse) return;
  tokenInUse = true;
  element("token-field").hidden = false;
  showRequest();
}

// Put options into a select only if they differ: an open list stays open, and a choice stays made.
function offer(select, options) {
  const text = JSON.stringify(options);
  if (select.dataset.options === text) return false;
  select.dataset.options = text;
  const before = select.value;
  select.replaceChildren(...options.map(([value, label]) => node("option", { value }, label)));
  if (options.some(([value]) => value === before)) select.value = before;
  return select.value !== before;
}

function modelChoices() {
  const ready = models.filter((model) => model.ready);
  return ready.filter((model) => model.default).flatMap(({ name, version }) => {
    const others = ready.filter((model) => model.name === name);
    const all = [[JSON.stringify([name, ""]), `${name}, version ${version}`]];
    if (others.length < 2) return all;
    all[0][1] += " (default)";
    return [...all, ...others.filter((model) => model.version !== version).map(
      (model) => [JSON.stringify([name, model.version]), `${name}, version ${model.version}`])];
  });
}

function showState(state) {
  const health = element("health");
  health.textContent = state.ready ? "ready" : "not ready";
  health.className = state.ready ? "ready" : "down";
  element("server").textContent = `${state.name} ${state.version}`;
  models = state.models;
  grpcPort = state.grpc_port;
  element("metrics").hidden = !state.metrics_port;
  // The operators' port speaks plain HTTP.
  element("metrics").href = `http://${location.hostname}:${state.metrics_port}/metrics`;
  if (offer(element("model"), modelChoices())) modelChanged();
  const names = [...new Set(models.map(({ name }) => name))];
  if (offer(element("traffic-of"), [[ALL_MODELS, "all models"], ...names.map((name) => [name, name])])) refresh();
  showModels();
  showExamples();
  showTraffic(state.traffic);
}

function showModels() {
  const rows = models.map((model) => [
    model.name, model.default ? `${model.version} (default)` : model.version,
    model.ready ? "ready" : "not ready", `${model.width_px} × ${model.height_px}`, count(model.classes),
    model.device, `${model.platform}, ${model.provider}`, model.max_batch_size,
  ].map(String));
  const text = JSON.stringify(rows);
  if (element("models").dataset.rows === text) return;
  element("models").dataset.rows = text;
  element("models").replaceChildren(...rows.map(
    (row) => node("tr", {}, ...row.map((cell) => node("td", {}, cell)))));
}

function showTraffic(traffic) {
  const { answered, failed } = traffic.window;
  element("totals").textContent = `${count(answered)} requests answered, ${count(failed)} failed`;
  charts.show(traffic);
}

async function showExamples() {
  const [name, version] = choice() ?? [];
  const model = models.find((each) => each.name === name && (version ? each.version === version : each.default));
  const key = model ? JSON.stringify([name, model.version]) : "";
  if (key === shownExamples) return;
  shownExamples = key;
  const place = element("examples");
  place.hidden = true;
  for (const old of place.querySelectorAll("img")) URL.revokeObjectURL(old.src);
  place.replaceChildren();
  const base = model && `ui/models/${encodeURIComponent(name)}/versions/${model.version}/examples`;
  for (let at = 0; at < (model?.examples ?? 0); at += 1) {
    try {
      const { body } = await ask(`${base}/${at}`, "blob", { timeoutMs: STATE_TIMEOUT_MS });
      if (key !== shownExamples) return;
      place.append(exampleButton(body, at + 1));
      place.hidden = false;
    } catch {
      // They are an offer; the images themselves will show what is wrong.
      shownExamples = "";
      return;
    }
  }
}

function exampleButton(blob, nth) {
  const name = `example-${nth}.${blob.type.split("/")[1]}`;
  const picture = node("img", { alt: "", src: URL.createObjectURL(blob) });
  const button = node("button", { type: "button", ariaLabel: `Classify example ${nth}` }, picture);
  button.addEventListener("click", () => classifier.start([new File([blob], name, { type: blob.type })]));
  return button;
}

function showRequest() {
  const [model, version] = choice() ?? ["MODEL", ""];
  const tls = location.protocol === "https:";
  const host = location.hostname;
  const port = grpcPort || location.port || (tls ? 443 : 80);
  element("request").textContent = LANGUAGES[language]({
    url: new URL(".", location.href).href, grpc: `${host}:${port}`, model, version, image, tls,
    secured: tokenInUse || Boolean(token.get()),
  });
  element("request").setAttribute("aria-labelledby", `language-${language}`);
  for (const tab of element("languages").children) {
    const selected = tab.dataset.language === language;
    tab.setAttribute("aria-selected", String(selected));
    tab.tabIndex = selected ? 0 : -1;
  }
}

function offerLanguages() {
  const names = Object.keys(LANGUAGES);
  element("languages").replaceChildren(...names.map((name) => {
    const tab = node("button", {
      type: "button", id: `language-${name}`, dataset: { language: name },
      attributes: { role: "tab", "aria-controls": "request" },
    }, name);
    tab.addEventListener("click", () => { language = name; showRequest(); });
    return tab;
  }));
  element("languages").addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    language = names.at((names.indexOf(language) + step) % names.length);
    showRequest();
    element(`language-${language}`).focus();
  });
}

async function copyRequest() {
  try {
    await navigator.clipboard.writeText(element("request").textContent);
    element("copied").textContent = "copied";
  } catch {
    // Browsers give the clipboard to pages from HTTPS and this machine only.
    getSelection().selectAllChildren(element("request"));
    element("copied").textContent = "selected: copy it with the keyboard";
  }
}

function modelChanged() {
  classifier.again();
  showExamples();
  showRequest();
}

async function refresh() {
  const of = element("traffic-of").value;
  try {
    const query = of === ALL_MODELS ? "" : `?model=${encodeURIComponent(of)}`;
    const { body } = await ask(`ui/state${query}`, "json", { timeoutMs: STATE_TIMEOUT_MS });
    answeredAt = performance.now();
    if (of === element("traffic-of").value) showState(body);
  } catch (error) {
    if (error instanceof NoTokenError) tokenNeeded();
    const silent = Math.round((performance.now() - answeredAt) / 1000);
    element("health").textContent = error instanceof NoTokenError ? error.message
      : `${error.message}; the last one came ${silent} s ago`;
    element("health").className = "down";
  }
}

async function follow() {
  await refresh();
  setTimeout(follow, REFRESH_MS);
}

element("form").addEventListener("submit", (event) => event.preventDefault());
element("model").addEventListener("change", modelChanged);
element("traffic-of").addEventListener("change", refresh);
element("copy").addEventListener("click", copyRequest);
element("token").addEventListener("change", async (event) => {
  token.set(event.target.value);
  await refresh();
  classifier.retry();
});
acceptImages((files) => classifier.start(files), (text) => classifier.say(text));
offerLanguages();
showRequest();
follow();
