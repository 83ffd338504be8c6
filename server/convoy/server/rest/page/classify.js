// The list of images, and the answer to the chosen one. An answer is kept with its image and names
// the version that gave it.

import { count, duration, node, percent } from "./format.js";
import { ask, NoTokenError } from "./server.js";

const TIMEOUT_MS = 30_000;
const MOST_AT_ONCE = 4;
const MOST_IMAGES = 100;
const SHOWN_CLASSES = 5;
const STAGES = {
  decode: "Decoding, the wait for a thread included",
  queue: "Wait for a batch",
  inference: "Inference of the batch",
  batch: "Images in the batch",
};
const element = (id) => document.getElementById(id);

// One encoded image as a BYTES element: four bytes of length, then the file.
function inferenceBody(file) {
  const header = new TextEncoder().encode(JSON.stringify({
    parameters: { timeout: TIMEOUT_MS * 1000 },
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

// "queue;dur=0.12, batch;desc=4" → [["Wait for a batch", "0.12 ms"], ["Images in the batch", "4"]]
function readTimes(header) {
  return (header ?? "").split(",").filter(Boolean).map((entry) => {
    const [name, value = ""] = entry.trim().split(";");
    const [kind, amount = ""] = value.split("=");
    return [STAGES[name] ?? name, kind === "dur" ? duration(Number(amount) / 1000) : amount];
  });
}

export class Classifier {
  // `path` gives the path of the chosen model or null; `chosen` is called with an image's name.
  constructor(path, { chosen, tokenNeeded }) {
    this.path = path;
    this.chosen = chosen;
    this.tokenNeeded = tokenNeeded;
    this.items = [];
    this.current = null;
    this.running = 0;
    setInterval(() => this.#showWaiting(), 250);
  }

  // Classify files in place of those before.
  start(files) {
    for (const item of this.items) {
      item.controller.abort();
      URL.revokeObjectURL(item.url);
    }
    const left = files.length - MOST_IMAGES;
    this.say(left > 0 ? `${count(left)} of ${count(files.length)} images were left out: the page `
      + `takes ${MOST_IMAGES} at a time, convoy-client batch any number` : "");
    this.items = files.slice(0, MOST_IMAGES).map((file) => ({
      file, name: file.name || "pasted image", url: URL.createObjectURL(file),
    }));
    this.current = this.items[0] ?? null;
    this.again();
    if (this.current) this.chosen(this.current.name);
  }

  // Classify the same images by the model that is chosen now.
  again() {
    for (const item of this.items) {
      item.controller?.abort();
      Object.assign(item, { state: "waiting", answer: null, error: "" });
      item.controller = new AbortController();
    }
    this.#show();
    this.#next();
  }

  // Classify those that lacked a token.
  retry() {
    if (this.items.some((item) => item.state === "failed")) this.again();
  }

  say(text) { element("message").textContent = text; }

  #next() {
    while (this.running < MOST_AT_ONCE) {
      const item = this.items.find(({ state }) => state === "waiting");
      if (!item) return;
      this.running += 1;
      this.#classify(item, item.controller.signal).finally(() => {
        this.running -= 1;
        this.#next();
      });
    }
  }

  async #classify(item, signal) {
    Object.assign(item, { state: "pending", since: performance.now() });
    this.#show();
    let ended;
    try {
      ended = { state: "done", answer: await this.#ask(item, signal) };
    } catch (error) {
      if (error instanceof NoTokenError) this.tokenNeeded();
      ended = { state: "failed", error: error.message };
    }
    // The answer of an aborted request belongs to another model, or to a list that is gone.
    if (signal.aborted) return;
    Object.assign(item, ended);
    this.#show();
  }

  async #ask(item, signal) {
    const path = this.path();
    if (!path) throw new Error("no model is in service");
    const { headerBytes, body } = inferenceBody(await item.file.arrayBuffer());
    const started = performance.now();
    const { reply, body: answer } = await ask(`${path}/infer`, "json", {
      method: "POST", body, signal, timeoutMs: TIMEOUT_MS,
      headers: { "Inference-Header-Content-Length": String(headerBytes) },
    });
    const total = duration((performance.now() - started) / 1000);
    return {
      json: answer,
      by: `${answer.model_name}, version ${answer.model_version}`,
      classes: answer.outputs[0].data.map(readClass),
      times: [...readTimes(reply.headers.get("Server-Timing")), ["Whole request, as the browser sees it", total]],
    };
  }

  #show() {
    const list = element("items");
    list.hidden = this.items.length < 2;
    while (list.children.length > this.items.length) list.lastChild.remove();
    this.items.forEach((item, index) => {
      const row = list.children[index] ?? list.appendChild(this.#row(index));
      this.#fill(row.firstChild, item);
    });
    this.#showCurrent();
  }

  #row(index) {
    const button = node("button", { type: "button" }, node("img", { alt: "" }), node("span"), node("span"));
    button.addEventListener("click", () => {
      this.current = this.items[index];
      this.#show();
      this.chosen(this.current.name);
    });
    return node("li", {}, button);
  }

  #fill(button, item) {
    const [picture, name, found] = button.children;
    if (picture.src !== item.url) picture.src = item.url;
    button.setAttribute("aria-current", String(item === this.current));
    name.textContent = item.name;
    found.className = item.state;
    const best = item.answer?.classes[0];
    found.textContent = best ? `${best.label}, ${percent(best.probability)}`
      : { waiting: "waiting", pending: "sent", failed: "failed" }[item.state];
    found.title = item.error;
  }

  #showCurrent() {
    const item = this.current;
    element("answer").hidden = !item;
    if (!item) return;
    const picture = element("preview");
    if (picture.src !== item.url) picture.src = item.url;
    picture.alt = `the image ${item.name}`;
    const waits = item.state === "waiting" || item.state === "pending";
    element("answer").setAttribute("aria-busy", String(waits));
    element("pending").hidden = !waits;
    element("found").hidden = element("facts").hidden = !item.answer;
    element("failure").textContent = item.error;
    this.#showWaiting();
    if (item.answer) this.#showAnswer(item.answer);
  }

  #showWaiting() {
    const item = this.current;
    if (!item || element("pending").hidden) return;
    const seconds = item.state === "pending" ? Math.floor((performance.now() - item.since) / 1000) : 0;
    const text = seconds < 1 ? "waiting for the answer"
      : `waiting for the answer: ${seconds} s of at most ${TIMEOUT_MS / 1000} s`;
    if (element("waited").textContent !== text) element("waited").textContent = text;
  }

  #showAnswer({ classes, by, times, json }) {
    element("best").textContent = classes[0].label;
    element("answered-by").textContent = `by ${by}`;
    element("classes").replaceChildren(...classes.map(({ label, probability }) => {
      const meter = node("meter", { min: 0, max: 1, value: probability, ariaLabel: label });
      return node("li", {}, node("span", { title: label }, label), meter, node("span", {}, percent(probability)));
    }));
    element("stages").replaceChildren(...times.flatMap(
      ([name, value]) => [node("dt", {}, name), node("dd", {}, value)]));
    element("json").textContent = JSON.stringify(json, null, 2);
  }
}

// Files from a drop anywhere on the page, a paste, or the file field.
export function acceptImages(take, say) {
  const field = element("file");
  field.addEventListener("change", () => {
    if (field.files.length) take([...field.files]);
    // So that choosing the same file again is a change.
    field.value = "";
  });
  for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
    // On the window: elsewhere a dropped file would replace the page.
    window.addEventListener(kind, (event) => {
      event.preventDefault();
      document.body.classList.toggle("over", kind === "dragenter" || kind === "dragover");
      if (kind !== "drop") return;
      const files = [...event.dataTransfer?.files ?? []];
      if (files.length) take(files);
      else say("what was dropped holds no file");
    });
  }
  document.addEventListener("paste", (event) => {
    const images = [...event.clipboardData.files].filter((file) => file.type.startsWith("image/"));
    if (images.length) take(images);
  });
}
