// The page speaks the Open Inference Protocol to the server that sent it, and reads `ui/state`.

const REFRESH_MS = 2000;
const SHOWN_CLASSES = 5;
const SHOWN_S = 300;
const element = (id) => document.getElementById(id);
const milliseconds = (value) => `${value.toFixed(value < 10 ? 2 : 0)} ms`;

const charts = [
  { title: "Latency, ms", lines: [["p50", "p50_s"], ["p90", "p90_s"], ["p99", "p99_s"]], scale: 1000 },
  { title: "Requests a second", lines: [["answered", "requests_per_s"], ["failed", "errors_per_s"]], scale: 1 },
  { title: "Images in a batch", lines: [["mean", "batch_size"]], scale: 1 },
  { title: "Images waiting", lines: [["queue", "queued_images"]], scale: 1 },
];

function node(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function authorization() {
  const token = element("token").value || sessionStorage.getItem("token");
  return token ? { Authorization: `Bearer ${token}` } : {};
}

async function ask(path, options = {}) {
  const reply = await fetch(path, {
    ...options, headers: { ...authorization(), ...options.headers },
  });
  element("token-field").hidden &&= reply.status !== 401;
  if (!reply.ok) {
    const text = await reply.text();
    let reason = text || reply.statusText;
    try { reason = JSON.parse(text).error ?? reason; } catch { /* not JSON: show it as it is */ }
    throw new Error(reason);
  }
  return reply;
}

// One encoded image as a BYTES element: four bytes of length, then the file.
function inferenceBody(file) {
  const header = new TextEncoder().encode(JSON.stringify({
    inputs: [{
      name: "image", datatype: "BYTES", shape: [1],
      parameters: { binary_data_size: 4 + file.byteLength },
    }],
    outputs: [{
      name: "probabilities",
      parameters: { binary_data: false, classification: SHOWN_CLASSES },
    }],
  }));
  const length = new DataView(new ArrayBuffer(4));
  length.setUint32(0, file.byteLength, true);
  return { headerBytes: header.byteLength, body: new Blob([header, length, file]) };
}

// "0.93:7:seven" → probability and label; a label may hold colons itself.
function readClass(text) {
  const [value, index, ...label] = text.split(":");
  return { probability: Number(value), label: label.join(":") || index };
}

// "queue;dur=0.12, batch;desc=4" → [["queue", "0.12 ms"], ["batch", "4"]]
function readTimes(header) {
  return (header ?? "").split(",").map((entry) => {
    const [name, value = ""] = entry.trim().split(";");
    const [kind, amount = ""] = value.split("=");
    return [name, kind === "dur" ? milliseconds(Number(amount)) : amount];
  });
}

async function classify(file) {
  element("message").textContent = "";
  element("answer").hidden = true;
  if (!element("model").value) {
    element("message").textContent = "no model is in service";
    return;
  }
  const preview = element("preview");
  URL.revokeObjectURL(preview.src);
  preview.src = URL.createObjectURL(file);
  preview.alt = file.name ? `the image ${file.name}` : "the pasted image";
  preview.hidden = false;
  const [model, version] = JSON.parse(element("model").value);
  const { headerBytes, body } = inferenceBody(await file.arrayBuffer());
  const started = performance.now();
  try {
    const path = `v2/models/${encodeURIComponent(model)}/versions/${version}/infer`;
    const reply = await ask(path, {
      method: "POST", body, headers: { "Inference-Header-Content-Length": String(headerBytes) },
    });
    const answer = await reply.json();
    const total = performance.now() - started;
    showAnswer(answer.outputs[0].data.map(readClass));
    showTimes([...readTimes(reply.headers.get("Server-Timing")),
      ["whole request, seen from here", milliseconds(total)]]);
    element("answer").hidden = false;
  } catch (error) {
    element("message").textContent = error.message;
  }
}

function showAnswer(classes) {
  element("best").textContent = classes[0].label;
  element("classes").replaceChildren(...classes.map(({ label, probability }) => {
    const percent = `${(100 * probability).toFixed(1)} %`;
    const meter = node("meter", { min: 0, max: 1, value: probability, ariaLabel: label });
    return node("li", {}, node("span", { title: label }, label), meter, node("span", {}, percent));
  }));
}

function showTimes(times) {
  element("stages").replaceChildren(...times.flatMap(
    ([name, value]) => [node("dt", {}, name), node("dd", {}, value)]));
}

function showState(state) {
  const health = element("health");
  health.textContent = state.ready ? "ready" : "not ready";
  health.className = state.ready ? "ready" : "down";
  element("server").textContent = `${state.name} ${state.version}`;
  showModels(state.models);
  showCharts(state.history);
}

function showModels(models) {
  const choices = models.filter((model) => model.ready).map((model) => node("option", {
    value: JSON.stringify([model.name, model.version]),
  }, `${model.name}, version ${model.version}`));
  const select = element("model");
  const chosen = select.value;
  select.replaceChildren(...choices);
  if (choices.some((choice) => choice.value === chosen)) select.value = chosen;
  element("models").replaceChildren(...models.map((model) => node("tr", {}, ...[
    model.name, model.version, model.ready ? "ready" : "not ready",
    `${model.height_px} × ${model.width_px}`, model.classes, model.device,
    `${model.platform}, ${model.provider}`, model.max_batch_size,
  ].map((text) => node("td", {}, String(text))))));
}

function showCharts(history) {
  element("charts").replaceChildren(...charts.map((chart) => drawChart(chart, history)));
}

function drawChart({ title, lines, scale }, history) {
  const end = history.at(-1)?.at_s ?? 0;
  const values = lines.map(([, key]) => history.map((point) => point[key]));
  const top = Math.max(1e-9, ...values.flat().filter((value) => value !== null));
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 ${SHOWN_S} 100`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const caption = node("figcaption", {}, node("span", {}, title));
  const latest = node("span");
  lines.forEach(([name, key], number) => {
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("class", `c${number}`);
    path.setAttribute("d", trace(history, key, end, top));
    svg.append(path);
    const value = history.at(-1)?.[key];
    const shown = value === null || value === undefined ? "–" : (value * scale).toPrecision(3);
    latest.append(" ", node("span", { className: `c${number}` }, name), " ", node("b", {}, shown));
  });
  caption.append(latest);
  return node("figure", {}, caption, svg);
}

function trace(history, key, end, top) {
  let pen = "M";
  return history.map((point) => {
    if (point[key] === null) { pen = "M"; return ""; }
    const x = SHOWN_S - (end - point.at_s);
    const y = 97 - 94 * (point[key] / top);
    // A step of no length lets a lone point be seen.
    const step = `${pen}${x.toFixed(1)} ${y.toFixed(1)}h0`;
    pen = "L";
    return step;
  }).join("");
}

async function refresh() {
  try {
    showState(await (await ask("ui/state")).json());
  } catch (error) {
    element("health").textContent = `no answer: ${error.message}`;
    element("health").className = "down";
  }
  setTimeout(refresh, REFRESH_MS);
}

function acceptImages() {
  const drop = element("drop");
  element("file").addEventListener("change", (event) => {
    if (event.target.files.length) classify(event.target.files[0]);
  });
  element("form").addEventListener("submit", (event) => event.preventDefault());
  element("token").addEventListener("change", (event) => {
    sessionStorage.setItem("token", event.target.value);
  });
  for (const kind of ["dragover", "dragleave", "drop"]) {
    drop.addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", kind === "dragover");
      if (kind === "drop" && event.dataTransfer.files.length) classify(event.dataTransfer.files[0]);
    });
  }
  document.addEventListener("paste", (event) => {
    const image = [...event.clipboardData.files].find((file) => file.type.startsWith("image/"));
    if (image) classify(image);
  });
}

acceptImages();
refresh();
