// Calls a server by the gRPC transport of @connectrpc/connect-node.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const task = JSON.parse(process.argv[2]);
// The packages are installed in the working folder, not beside this file.
const require = createRequire(process.cwd() + "/");
const { Code, ConnectError, createClient } = require("@connectrpc/connect");
const { compressionGzip, createGrpcTransport } = require("@connectrpc/connect-node");
const { createFileRegistry, fromBinary } = require("@bufbuild/protobuf");
const { FileDescriptorSetSchema } = require("@bufbuild/protobuf/wkt");

const files = createFileRegistry(
  fromBinary(FileDescriptorSetSchema, readFileSync(task.descriptors)),
);
const IMAGE_BYTES = 4 * 6 * 3;

function connect(baseUrl, options = {}) {
  const transport = createGrpcTransport({ baseUrl, ...options });
  return {
    infer: createClient(files.getService("inference.GRPCInferenceService"), transport),
    health: createClient(files.getService("grpc.health.v1.Health"), transport),
  };
}

function request({ content = Buffer.from(task.pixels, "hex"), model = "colors", id = "" } = {}) {
  const shape = [content.length / IMAGE_BYTES, 4, 6, 3].map(BigInt);
  return {
    modelName: model,
    id,
    inputs: [{ name: "image", datatype: "UINT8", shape }],
    outputs: [{ name: "logits" }],
    rawInputContents: [content],
  };
}

const hex = (bytes) => Buffer.from(bytes).toString("hex");
const answer = (reply) => ({
  version: reply.modelVersion,
  logits: hex(reply.rawOutputContents[0]),
});
const soon = { timeoutMs: 60000 };

async function errorOf(promise) {
  try {
    await promise;
  } catch (error) {
    return ConnectError.from(error);
  }
  throw new Error("expected an error");
}

async function* streamRequests() {
  for (let id = 0; id < 50; id++) yield request({ id: String(id) });
  yield request({ model: task.unknown_model, id: "bad" });
}

const calls = {
  async unary(client) {
    const bytes = Buffer.from(Array.from({ length: 256 }, (_, byte) => byte));
    const headers = { "x-trace-bin": bytes.toString("base64"), "x-note": "plain text" };
    return answer(await client.infer.modelInfer(request(), { headers, ...soon }));
  },
  async gzip() {
    const options = { sendCompression: compressionGzip, compressMinBytes: 0 };
    return answer(await connect(`http://${task.address}`, options).infer.modelInfer(request(), soon));
  },
  async large(client) {
    const content = Buffer.alloc(task.large_images * IMAGE_BYTES);
    const reply = await client.infer.modelInfer(request({ content }), soon);
    return reply.rawOutputContents[0].length;
  },
  async oversized(client) {
    const content = Buffer.alloc(100000 * IMAGE_BYTES);
    return (await errorOf(client.infer.modelInfer(request({ content }), soon))).code;
  },
  async error(client) {
    const error = await errorOf(client.infer.modelInfer(request({ model: task.unknown_model }), soon));
    return [error.code, error.rawMessage];
  },
  async stream(client) {
    const outcomes = {};
    for await (const each of client.infer.modelStreamInfer(streamRequests(), soon)) {
      const { id, rawOutputContents } = each.inferResponse;
      outcomes[id] = each.errorMessage || hex(rawOutputContents[0]);
    }
    return outcomes;
  },
  async watched(client) {
    const stop = new AbortController();
    for await (const reply of client.health.watch({ service: "colors" }, { signal: stop.signal })) {
      return reply.status;
    }
  },
  async deadline(client) {
    const watch = async () => {
      for await (const _ of client.health.watch({ service: "colors" }, { timeoutMs: 300 }));
    };
    return (await errorOf(watch())).code;
  },
  async cancel(_, waiting) {
    await waiting.health.check({}, soon);
    const stop = new AbortController();
    const call = errorOf(waiting.infer.modelInfer(request(), { signal: stop.signal }));
    // The C core may answer the first check before it starts the handler of the call.
    for (let count = 0; count < 3; count += 1) await waiting.health.check({}, soon);
    stop.abort();
    return (await call).code;
  },
  async pushback(_, waiting) {
    await waiting.health.check({}, soon);
    const first = waiting.infer.modelInfer(request(), soon);
    await waiting.health.check({}, soon);
    const error = await errorOf(waiting.infer.modelInfer(request(), soon));
    await first;
    return [error.code, error.metadata.get("grpc-retry-pushback-ms")];
  },
  async secure() {
    const nodeOptions = {
      ca: readFileSync(task.ca),
      cert: readFileSync(task.certificate),
      key: readFileSync(task.key),
    };
    const own = connect(`https://${task.secure}`, { nodeOptions });
    return answer(await own.infer.modelInfer(request(), soon));
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
      try {
        const { modelVersion } = await client.infer.modelInfer(request(), soon);
        count(modelVersion);
      } catch (error) {
        failures.push(String(error));
      }
    }
  };
  await Promise.all(Array.from({ length: 8 }, work));
  return { versions, failures };
}

const client = connect(`http://${task.address}`);
const waiting = connect(`http://${task.waiting || task.address}`);
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
