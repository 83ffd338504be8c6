// Calls a server by @grpc/grpc-js.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const task = JSON.parse(process.argv[2]);
// The packages are installed in the working folder, not beside this file.
const require = createRequire(process.cwd() + "/");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const definitions = loader.loadFileDescriptorSetFromBuffer(readFileSync(task.descriptors), {
  longs: Number,
  enums: Number,
  defaults: true,
  keepCase: true,
});
const { inference, grpc: standard } = grpc.loadPackageDefinition(definitions);
const IMAGE_BYTES = 4 * 6 * 3;

function connect(address, credentials = grpc.credentials.createInsecure(), options = {}) {
  return {
    infer: new inference.GRPCInferenceService(address, credentials, options),
    health: new standard.health.v1.Health(address, credentials, options),
  };
}

function request({ content = Buffer.from(task.pixels, "hex"), model = "colors", id = "" } = {}) {
  const shape = [content.length / IMAGE_BYTES, 4, 6, 3];
  return {
    model_name: model,
    id,
    inputs: [{ name: "image", datatype: "UINT8", shape }],
    outputs: [{ name: "logits" }],
    raw_input_contents: [content],
  };
}

const soon = (ms = 60000) => ({ deadline: Date.now() + ms });

// Returns the call and a promise of { reply } or { error }.
function infer(client, message, metadata = new grpc.Metadata()) {
  let call;
  const end = new Promise((resolve) => {
    call = client.infer.ModelInfer(message, metadata, soon(), (error, reply) =>
      resolve({ error, reply }),
    );
  });
  return { call, end };
}

function answer({ error, reply }) {
  if (error) throw error;
  return { version: reply.model_version, logits: reply.raw_output_contents[0].toString("hex") };
}

// Comes back with the channel connected and every earlier call of it seen by the server.
const check = (client) =>
  new Promise((resolve, reject) =>
    client.health.Check({}, soon(), (error) => (error ? reject(error) : resolve())),
  );

// Collects what a call streams, until its end.
const collect = (call, onMessage = () => {}) =>
  new Promise((resolve) => {
    const messages = [];
    call.on("data", (message) => {
      messages.push(message);
      onMessage(message);
    });
    call.on("error", (error) => resolve({ messages, code: error.code }));
    call.on("end", () => resolve({ messages, code: 0 }));
  });

const calls = {
  async unary(client) {
    const metadata = new grpc.Metadata();
    metadata.set("x-trace-bin", Buffer.from(Array.from({ length: 256 }, (_, byte) => byte)));
    metadata.set("x-note", "plain text");
    return answer(await infer(client, request(), metadata).end);
  },
  async gzip() {
    const options = { "grpc.default_compression_algorithm": 2 };
    const own = connect(task.address, grpc.credentials.createInsecure(), options);
    return answer(await infer(own, request()).end);
  },
  async large(client) {
    const content = Buffer.alloc(task.large_images * IMAGE_BYTES);
    const { error, reply } = await infer(client, request({ content })).end;
    if (error) throw error;
    return reply.raw_output_contents[0].length;
  },
  async oversized(client) {
    return (await infer(client, request({ content: Buffer.alloc(100000 * IMAGE_BYTES) })).end).error.code;
  },
  async error(client) {
    const { error } = await infer(client, request({ model: task.unknown_model })).end;
    return [error.code, error.details];
  },
  async stream(client) {
    const call = client.infer.ModelStreamInfer(new grpc.Metadata(), soon());
    const collected = collect(call);
    for (let id = 0; id < 50; id++) call.write(request({ id: String(id) }));
    call.write(request({ model: task.unknown_model, id: "bad" }));
    call.end();
    const { messages, code } = await collected;
    if (code) throw new Error(`ended with ${code}`);
    return Object.fromEntries(
      messages.map((each) => [
        each.infer_response.id,
        each.error_message || each.infer_response.raw_output_contents[0].toString("hex"),
      ]),
    );
  },
  async watched(client) {
    const call = client.health.Watch({ service: "colors" }, soon());
    const { messages } = await collect(call, () => call.cancel());
    return messages[0].status;
  },
  async deadline(client) {
    return (await collect(client.health.Watch({ service: "colors" }, soon(300)))).code;
  },
  async cancel(_, waiting) {
    await check(waiting);
    const { call, end } = infer(waiting, request());
    // The C core may answer the first check before it starts the handler of the call.
    for (let count = 0; count < 3; count += 1) await check(waiting);
    call.cancel();
    return (await end).error.code;
  },
  async pushback(_, waiting) {
    await check(waiting);
    const first = infer(waiting, request());
    await check(waiting);
    const { error } = await infer(waiting, request()).end;
    answer(await first.end);
    return [error.code, error.metadata.get("grpc-retry-pushback-ms")[0]];
  },
  async secure() {
    const files = [task.ca, task.key, task.certificate].map((name) => readFileSync(name));
    const own = connect(task.secure, grpc.credentials.createSsl(...files));
    return answer(await infer(own, request()).end);
  },
};

async function reload(client) {
  const versions = {};
  const failures = [];
  const count = (version) => {
    if (!Object.keys(versions).length) console.log("calling");
    versions[version] = (versions[version] ?? 0) + 1;
  };
  const work = async () => {
    while (!(task.until_version in versions) && !failures.length) {
      const { error, reply } = await infer(client, request()).end;
      if (error) failures.push(String(error));
      else count(reply.model_version);
    }
  };
  await Promise.all(Array.from({ length: 8 }, work));
  return { versions, failures };
}

const client = connect(task.address);
const waiting = connect(task.waiting || task.address);
const outcomes = {};
for (const [name, call] of task.until_version ? [["reload", reload]] : Object.entries(calls)) {
  try {
    outcomes[name] = await call(client, waiting);
  } catch (error) {
    outcomes[name] = { unexpected: error.stack };
  }
}
console.log(JSON.stringify(outcomes));
process.exit(0);
